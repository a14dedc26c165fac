# SPDX-License-Identifier: MIT
"""Rules for a plain call of an operator: its values, its schema, and the shapes it promises."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from torchpar.testing.case import (
    LAYOUTS,
    LOW,
    Attempts,
    Calls,
    Case,
    Failed,
    Function,
    NotRun,
    Rules,
    Tensors,
    Wrong,
    accurate,
    cast,
    close,
    expect_floating,
    gradients,
    normal_like,
    same_bits,
    same_metadata,
)

RULES = Rules()


@RULES.add("values")
def _(case: Case) -> None:
    operands = case.operands if case.reference is not None else [t.contiguous() for t in case.operands]
    try:
        actual, expected = case.op(*case.operands), case.plain(*operands)
    except Exception as e:  # samples are what the operator takes
        raise Failed(f"{type(e).__name__}: {e}") from e
    close(actual, expected)


@RULES.add("same bits twice")
def _(case: Case) -> None:
    first = case.op(*case.operands)
    for _ in range(3):  # chance may agree once
        same_bits(case.op(*case.operands), first)


@RULES.add("operands and results")
def _(case: Case) -> None:
    is_alias = torch._C._is_alias_of  # type: ignore[attr-defined]
    operands = [t.clone() for t in case.operands]
    results = case.op(*operands)
    for i, (t, before) in enumerate(zip(operands, case.operands, strict=True)):
        if t._version or not torch.equal(t.nan_to_num(), before.nan_to_num()):
            raise Wrong(f"operand {i} is written to")
        if any(is_alias(y, t) for y in results):
            raise Wrong(f"a result shares the memory of operand {i}")
    if any(is_alias(a, b) for a, b in itertools.combinations(results, 2)):
        raise Wrong("two results share memory")


@RULES.add("schema")
def _(case: Case) -> Attempts:
    if case.overload is None:
        raise NotRun("no operator was called")
    with Calls() as calls:
        case.op(*case.operands)
    if case.overload not in calls.seen and case.callable is not case.overload:
        raise NotRun("the operator decomposes before it is dispatched")
    arguments = calls.seen.get(case.overload, case.arguments(case.operands))

    def check(test: str, requires_grad: bool) -> None:
        def prepared(t: Tensor) -> Tensor:
            return t.detach().requires_grad_(requires_grad and t.is_floating_point())

        args, kwargs = tree_map_only(Tensor, prepared, arguments)
        found = torch.library.opcheck(case.overload, args, kwargs, test_utils=test, raise_exception=False)
        if found[test] != "SUCCESS":
            raise Wrong(f"opcheck: {found[test]}")

    for test in ("test_schema", "test_autograd_registration"):
        for requires_grad in (False, True):
            yield test, partial(check, test, requires_grad)


def _other_operands(case: Case) -> Iterator[tuple[str, Tensors]]:
    yield "as given", case.operands
    for name, layout in LAYOUTS.items():
        yield f"{name} operands", tuple(map(layout, case.operands))
        for i, t in enumerate(case.operands if len(case.operands) > 1 else ()):
            yield f"{name} operand {i}", (*case.operands[:i], layout(t), *case.operands[i + 1 :])
    yield from case.resized(lambda t, dim: t.narrow(dim, 0, 0))
    yield from case.resized(lambda t, dim: t.narrow(dim, 0, min(t.shape[dim], 1)))
    yield "operands without dimensions", tuple(t.flatten()[0] if t.numel() else t for t in case.operands)


def _layouts(check: Callable[[Case, Tensors], None], case: Case) -> Attempts:
    for name, operands in _other_operands(case):
        yield name, partial(check, case, operands)


def _same_values(case: Case, operands: Tensors) -> None:
    actual = case.takes(operands)
    copies = [t.clone(memory_format=torch.contiguous_format) for t in operands]
    close(actual, case.takes(copies, case.plain))


def _right_fakes(case: Case, operands: Tensors) -> None:
    actual = case.takes(operands)
    with FakeTensorMode() as mode:
        fakes = case.op(*map(mode.from_tensor, operands))
    same_metadata(fakes, actual)


RULES.add("layouts and sizes")(partial(_layouts, _same_values))
RULES.add("fake tensors")(partial(_layouts, _right_fakes))


@RULES.add("low precision")
def _(case: Case) -> Attempts:
    expect_floating(case)

    def values(operands: Tensors, dtype: torch.dtype) -> None:
        actual, wide = case.takes(operands), cast(operands, torch.float64)
        if case.reference is not None:
            return accurate(actual, case.plain(*operands), case.plain(*wide))
        # Nobody knows how often the operator rounds: half of the digits are asked for.
        bound = torch.finfo(dtype).eps ** 0.5
        for a, like, e in zip(actual, case.op(*case.operands), case.takes(wide), strict=True):
            right = dtype if like.dtype == case.floating[0].dtype else like.dtype
            size = float(e.abs().max()) if e.numel() else 0.0
            close(a, e.to(right), rtol=bound, atol=bound * size)

    def pulled(operands: Tensors, dtype: torch.dtype) -> None:
        case.takes(operands)

        def computed(function: Function, chosen: Tensors) -> Tensors:
            xs = case.leaves(chosen)
            ys = case.smooth(function)(*xs)
            incoming = [normal_like(y).to(dtype).to(y.dtype) for y in ys]
            return gradients(ys, xs, incoming)

        exact = computed(case.plain, cast(operands, torch.float64))
        accurate(computed(case.op, operands), computed(case.plain, operands), exact)

    for dtype in (torch.float32, *LOW):
        operands = cast(case.operands, dtype)
        yield str(dtype), partial(values, operands, dtype)
        if case.reference is not None:
            yield f"{dtype}, gradients", partial(pulled, operands, dtype)
