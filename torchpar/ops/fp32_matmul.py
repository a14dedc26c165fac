# SPDX-License-Identifier: MIT
"""A product of float32 whose precision is an argument.

    C = A·Bᵀ

With G = dL/dC:

    dL/dA = G·B        dL/dB = Gᵀ·A

The operator is internal: `torchpar.ops.matrix.product` calls it where PyTorch's library has not the
precision of `torchpar.fp32_products`. Its derivatives are such products, too.
"""

import math
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from torchpar.kernels import Wrap
from torchpar.library import batch_first
from torchpar.library.rules import Context, Sharding, Spec, VmapInfo
from torchpar.ops._operator import is_emulating, operator, product_flops, runs_kernels
from torchpar.ops.matrix import fp32_precision, rows


def fp32_matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """``a @ b.mT`` for float32 ``a (*, m, k)``, and ``b (*, n, k)`` or ``(n, k)``."""
    return _op(a, b, precision=precision)  # type: ignore[no-any-return]


def _kernels() -> ModuleType:
    from torchpar.kernels import fp32_matmul

    return fp32_matmul


@operator(
    "fp32_matmul(Tensor a, Tensor b, *, str precision) -> Tensor",
    kernels=_kernels,
    flops=product_flops,
)
def _op(a: Tensor, b: Tensor, *, precision: str, wrap: Wrap) -> Tensor:
    shape = *a.shape[:-1], b.shape[-2]
    if 0 in shape or a.shape[-1] == 0:  # the kernel expects a number
        return a.new_zeros(shape)
    if b.dim() == 2:
        a = rows(a)
    a, b = (t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:]) for t in (a, b))
    out = None
    if runs_kernels(a, b):
        from torchpar.kernels import fp32_matmul as kernel

        precision, is_native = fp32_precision(a, precision)
        only_if_faster = is_native and not is_emulating()
        out = kernel.fp32_matmul(a, b, precision, wrap, only_if_faster=only_if_faster)
    return (torch.matmul(a, b.mT) if out is None else out).view(shape)


@_op.register_fake
def _fp32_matmul_fake(a: Tensor, b: Tensor, *, precision: str) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-2])


class _Context(Context, Protocol):
    precision: str


def _setup_context(
    ctx: _Context, inputs: tuple[Tensor, ...], keyword_only_inputs: dict[str, str], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.precision = keyword_only_inputs["precision"]


def _backward(ctx: _Context, g: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad
    da = fp32_matmul(g, b.mT, ctx.precision) if need_a else None
    if not need_b:
        return da, None
    if b.dim() == 2:
        g, a = rows(g), rows(a)
    return da, fp32_matmul(g.mT, a.mT, ctx.precision)


_op.register_autograd(_backward, setup_context=_setup_context)


@_op.register_vmap
def _fp32_matmul_vmap(
    info: VmapInfo, in_dims: tuple[int | None, ...], a: Tensor, b: Tensor, *, precision: str
) -> tuple[Tensor, int]:
    a_dim, b_dim = in_dims
    is_matrix = b.dim() - (b_dim is not None) == 2
    a = batch_first(a, a_dim, info.batch_size)
    if is_matrix and b_dim is None:
        return fp32_matmul(a, b, precision), 0
    b = batch_first(b, b_dim, info.batch_size)
    if is_matrix and a.dim() > 3:
        flat = a.reshape(info.batch_size, math.prod(a.shape[1:-1]), a.shape[-1])
        return fp32_matmul(flat, b, precision).view(*a.shape[:-1], b.shape[-2]), 0
    return fp32_matmul(a, b, precision), 0


_op.register_autocast(cast=False)


@_op.register_sharding
def _fp32_matmul_sharding(a: Spec, b: Spec, **_: object) -> list[Sharding]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    def of_a(dim: int) -> Sharding:  # a row, or a batch
        is_batch = dim < b.ndim - 2
        return [Shard(dim)], [Shard(dim), Shard(dim) if is_batch else Replicate()]

    columns: Sharding = [Shard(a.ndim - 1)], [Replicate(), Shard(b.ndim - 2)]
    terms: Sharding = [Partial()], [Shard(a.ndim - 1), Shard(b.ndim - 1)]
    whole: Sharding = [Replicate()], [Replicate(), Replicate()]
    return [whole, terms, columns, *map(of_a, range(a.ndim - 1))]
