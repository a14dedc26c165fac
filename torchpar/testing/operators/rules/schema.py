# SPDX-License-Identifier: MIT
"""Rules of what an operator promises of its results: its schema, and its fakes."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map_only

from torchpar.testing.operators.attempts import Attempts, OutcomeException
from torchpar.testing.operators.case import Calls, Case
from torchpar.testing.operators.compare import same_metadata
from torchpar.testing.operators.layouts import in_layouts_and_sizes
from torchpar.testing.operators.tensors import Tensors, is_differentiable


def schema(case: Case) -> Attempts:
    overload = case.overload
    if overload is None:
        raise OutcomeException("not run", "no operator was called")
    with Calls() as calls:
        case.op(*case.operands)
    if overload not in calls.seen and case.callable is not overload:
        raise OutcomeException("not run", "the operator decomposes before it is dispatched")
    arguments = calls.seen.get(overload, case.arguments(case.operands))

    def check(test: str, requires_grad: bool) -> None:
        def prepared(t: Tensor) -> Tensor:
            return t.detach().requires_grad_(requires_grad and is_differentiable(t))

        args, kwargs = tree_map_only(Tensor, prepared, arguments)
        found = torch.library.opcheck(
            overload, args, kwargs, test_utils=test, raise_exception=False
        )
        if found[test] != "SUCCESS":
            raise OutcomeException("wrong", f"opcheck: {found[test]}")

    for test in ("test_schema", "test_autograd_registration"):
        for requires_grad in (False, True):
            yield test, partial(check, test, requires_grad)


def _fake_of_meta(case: Case) -> None:
    """Call the fake on the device "meta", so that a device that the fake fixes is seen."""
    actual = case.op(*case.operands)
    metas = case.op(*(t.to("meta") for t in case.operands))
    same_metadata(metas, tuple(t.to("meta") for t in actual))


def _symbolic_fake(case: Case) -> None:
    """Refuse a fake that converts a size to a number: it would be compiled for this size alone."""
    fixed = _fixed_sizes(case, case.operands)
    for label, operands in case.resized(lambda t, dim: torch.cat([t, t], dim)):
        size = int(label.rpartition(" ")[2])
        # A fake that only asks whether a size is 8 does not fix a size of 16.
        if size in fixed and _is_taken(case, operands) and 2 * size in _fixed_sizes(case, operands):
            raise OutcomeException("wrong", f"the fake fixes the size {size}, as int() of it does")


def _fixed_sizes(case: Case, operands: Tensors) -> set[int]:
    """The sizes of operands that a call on fake tensors converts to numbers."""
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes) as mode:
        contexts: list[Any] = [
            StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK] * t.dim()) for t in operands
        ]
        fakes = [
            mode.from_tensor(t, symbolic_context=context)
            for t, context in zip(operands, contexts, strict=True)
        ]
        symbols = {
            fake.shape[dim].node.expr: t.shape[dim]  # type: ignore[attr-defined]
            for t, fake in zip(operands, fakes, strict=True)
            for dim in range(t.dim())
            if isinstance(fake.shape[dim], torch.SymInt)
        }
        case.op(*fakes)
    return {size for symbol, size in symbols.items() if shapes.replace(symbol).is_number}


def _is_taken(case: Case, operands: Tensors) -> bool:
    try:
        case.takes(operands)
    except OutcomeException:
        return False
    return True


def right_fakes(case: Case, operands: Tensors) -> None:
    actual = case.takes(operands)
    with FakeTensorMode() as mode:
        fakes = case.op(*map(mode.from_tensor, operands))
    same_metadata(fakes, actual)
    shared, expected = (len({t.untyped_storage()._cdata for t in ts}) for ts in (fakes, actual))
    if shared < expected:
        raise OutcomeException(
            "wrong", "two results share memory, expected one new tensor for each"
        )


def fake_tensors(case: Case) -> Attempts:
    yield from in_layouts_and_sizes(right_fakes, case)
    yield "meta operands", partial(_fake_of_meta, case)
    yield "symbolic sizes", partial(_symbolic_fake, case)
