# SPDX-License-Identifier: MIT
"""Rule of subclasses of tensors."""

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor

from torchpar.testing.operators.attempts import Attempts, OutcomeException
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.compare import close
from torchpar.testing.operators.gradients import gradients, pulled_back
from torchpar.testing.operators.tensors import Function, Tensors, normal_like


def tensor_subclass(case: Case) -> Attempts:  # noqa: C901  # a try for each operand
    """Try PyTorch's TwoTensor, a subclass that computes with two tensors, here twice the same."""
    from torch.testing._internal.two_tensor import TwoTensor

    def inner(tensors: Tensors) -> Tensors:
        if any(not isinstance(t, TwoTensor) for t in tensors):
            raise OutcomeException("wrong", "the result is no tensor of the subclass")
        return tuple(t.a for t in tensors)  # type: ignore[attr-defined]

    def wrapped(tensors: Iterable[Tensor]) -> Tensors:
        return tuple(TwoTensor(t, t) for t in tensors)

    def values(function: Function) -> None:
        close(inner(function(*wrapped(case.operands))), function(*case.operands))

    def pulled(function: Function) -> None:
        xs = tuple(t.requires_grad_() for t in wrapped(case.floating))
        incoming = wrapped(map(normal_like, case.oracle(*case.floating)))
        close(
            inner(gradients(case.smooth(function)(*xs), xs, incoming)),
            pulled_back(case.oracle, case),
        )

    def check(compare: Callable[[Function], None]) -> None:
        try:
            compare(case.op)
        except OutcomeException:
            if case.reference is not None:
                try:
                    compare(case.plain)
                except (
                    OutcomeException
                ) as e:  # PyTorch's subclass forgets that a view is conjugated
                    raise OutcomeException(
                        "not run", f"the reference is wrong for a subclass: {e.args[1]}"
                    ) from e
            raise

    yield "values", partial(check, values)
    if case.floating:
        yield "gradients", partial(check, pulled)
