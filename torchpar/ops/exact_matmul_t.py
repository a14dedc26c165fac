# SPDX-License-Identifier: MIT
"""The product of a float32 matrix and its transpose by exact sums of integers, half of which are computed.

    C = X·Xᵀ, by the formula of `torchpar.ops._exact`

With G = dL/dC, the gradient is an exact product too:

    dL/dX = (G + Gᵀ)·X

computed from G/2, so that the sum does not overflow. G/2 loses bits of subnormal numbers only.
"""

from typing import Any

import torch
from torch import Tensor

from torchpar.ops import _exact
from torchpar.ops._library import (
    Wrap,
    operator,
    ops,
    register_autocast,
    register_autograd,
    register_fake,
    register_sharding,
    register_vmap,
    sample,
    with_derivatives,
)
from torchpar.ops._matrix import half_sum
from torchpar.ops.exact_matmul import check_operand, exact_matmul


def exact_matmul_t(x: Tensor) -> Tensor:
    """The product ``x @ x.mT`` in float32, with the same bits on every device and number of threads.

    It equals ``exact_matmul(x, x)``, which has the error, and equals its transpose bit for bit.

    Args:
        x: ``(*, n, k)`` float32.

    Returns:
        ``(*, n, n)``, contiguous.

    Raises:
        RuntimeError: another dtype, or fewer than two dimensions.
    """
    return _op(x)  # type: ignore[no-any-return]


def _check(x: Tensor) -> None:
    check_operand("exact_matmul_t", "x", x, "(*, n, k)")


@operator("exact_matmul_t(Tensor x) -> Tensor", kernels="exact_matmul", opaque=lambda x: not x.is_cuda)
def _exact_matmul_t(x: Tensor, *, wrap: Wrap) -> Tensor:
    _check(x)
    return _exact.product(x, x, wrap)


_op = ops.exact_matmul_t.default


@register_fake("exact_matmul_t")
def _(x: Tensor) -> Tensor:
    _check(x)
    return x.new_empty(*x.shape[:-1], x.shape[-2])


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return exact_matmul(half_sum(g), x.mT) * 2  # G + Gᵀ could overflow


def _jvp(ctx: Any, dx: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    product = exact_matmul(dx, x)
    return product + product.mT


_formula = with_derivatives("exact_matmul_t", _backward, setup_context=_setup_context, jvp=_jvp)
register_autograd("exact_matmul_t", _backward, setup_context=_setup_context, formula=_formula)


@register_vmap("exact_matmul_t")
def _(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
    _check(sample(x, in_dims[0]))
    return exact_matmul_t(x.movedim(in_dims[0], 0)), 0


register_autocast("exact_matmul_t", dtype=torch.float32)


@register_sharding("exact_matmul_t")
def _(x: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    batch = [([Shard(dim)], [Shard(dim)]) for dim in range(x.ndim - 2)]
    return [([Replicate()], [Replicate()]), *batch]
