# SPDX-License-Identifier: MIT
"""First and second derivatives of the three operators, by PyTorch's gradcheck and gradgradcheck.

`test_our_operators.py` does the same, and more, through `torchpar.testing.check_operator`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

SHAPES: dict[str, list[list[tuple[int, ...]]]] = {
    "maximum": [[(4, 3), (4, 3)], [(4, 1), (3,)], [(0, 3), (0, 3)]],
    "matmul_t": [[(4, 3)], [(1, 5)], [(5, 1)], [(2, 3, 4)], [(0, 3)], [(3, 0)]],
    "linear_sigmoid": [
        [(4, 3), (5, 3), (5,)],
        [(4, 3), (5, 3)],
        [(2, 2, 3), (1, 3), (1,)],
        [(0, 3), (2, 3), (2,)],
    ],
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "sliced": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
}


def is_right(op: Callable[..., Tensor], arguments: list[Tensor]) -> bool:
    """Whether the first and second derivatives of ``op`` are those that finite differences give."""
    arguments = [t.detach().requires_grad_() for t in arguments]
    return gradcheck(op, arguments) and gradgradcheck(op, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name, shapes", [(name, one) for name, many in SHAPES.items() for one in many], ids=str
)
def test_derivatives(name: str, shapes: list[tuple[int, ...]], layout: str) -> None:
    arguments = [LAYOUTS[layout](normal(*shape, seed=i)) for i, shape in enumerate(shapes)]
    assert is_right(getattr(torch.ops.torchpar, name), arguments)


def test_a_wrong_derivative_is_rejected() -> None:
    def half(x: Tensor) -> Tensor:  # the gradient of x·xᵀ, if one of the factors is a constant
        return x @ x.detach().mT

    assert is_right(lambda x: x @ x.mT, [normal(4, 3)])
    with pytest.raises(GradcheckError):
        is_right(half, [normal(4, 3)])


class Constant(torch.autograd.Function):
    """x³ with its derivative 3x²·g, whose own derivative is that of a constant times g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x.detach() ** 2 * g


def test_a_wrong_second_derivative_of_a_right_first_one_is_rejected() -> None:
    x = normal(4, 3).requires_grad_()
    assert gradcheck(Constant.apply, [x])
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        gradgradcheck(Constant.apply, [x])
    with pytest.raises(GradcheckError):
        is_right(Constant.apply, [x])
