# SPDX-License-Identifier: MIT
"""The product of a matrix and its transpose.

    C = X·Xᵀ

With G = dL/dC:

    dL/dX = (G + Gᵀ)·X

A second operator computes dL/dX: on a GPU one kernel makes (G + Gᵀ)/2, and PyTorch's library
multiplies (float16 takes two products). The second operator has no gradient: second derivatives are
derivatives of the plain formula. The plain formula is also the gradient in a precision of
`torchpar.fp32_products` that PyTorch's library has not.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypeGuard

import torch
from torch import Tensor

from torchpar.kernels import Wrap
from torchpar.library import sample
from torchpar.library.rules import Context, Sharding, Spec, VmapInfo
from torchpar.library.sharding import is_dtensor
from torchpar.library.transforms import needs_formula
from torchpar.ops import cpu, fp32
from torchpar.ops._operator import (
    is_emulating,
    operator,
    overloads,
    product_flops,
    runs_kernels,
    supports_tma,
)
from torchpar.ops.matrix import (
    check_dtype,
    fp32_precision,
    mean_with_transpose,
    needs_fp32_kernel,
    product,
)

if TYPE_CHECKING:  # DTensor takes long to import
    from torch.distributed.tensor import DTensor, Placement


def matmul_t(x: Tensor) -> Tensor:
    """The product of a matrix and its transpose, at half the arithmetic and exactly symmetric.

    ``c = x @ x.mT``. Only tiles on and below the diagonal are computed, and each is stored twice,
    so ``torch.equal(c, c.mT)`` holds. Under torch.func transforms the plain product is evaluated,
    which may not be exactly symmetric. A DTensor sharded by rows is gathered once, and each rank
    computes the rows of its shard of the plain product. If `fully_shard` has split a layer that was
    split by rows, each rank computes all rows. `torchpar.reference.matmul_t` is the same function
    in plain PyTorch, to be read first.

    Args:
        x: ``(*, n, k)``; float16, bfloat16, float32 or float64. On CUDA, float32 follows
            `torch.backends.cuda.matmul.fp32_precision`, or `torchpar.fp32_products`.

    Returns:
        ``(*, n, n)``, contiguous, of ``x``'s dtype.

    Raises:
        RuntimeError: an unsupported dtype, or fewer than two dimensions.
    """
    precision = fp32.chosen
    if precision is None:
        return _op(x)  # type: ignore[no-any-return]
    return _op_of_precision(x, precision=precision)  # type: ignore[no-any-return]


def _check_operands(x: Tensor, *_: object) -> None:
    check_dtype("matmul_t", "x", x)
    if x.dim() < 2:
        raise RuntimeError(f"torchpar::matmul_t: x has shape {tuple(x.shape)}, expected (*, n, k)")


def _formula(x: Tensor, *, precision: str | None = None) -> Tensor:
    _check_operands(x)
    if not _is_split_by_rows(x):
        return product(x, x, precision=precision)
    whole, rows = _gathered(x), x.dim() - 2
    # With torch 2.11 DTensor refuses the backward of a product of rows in a strided placement.
    is_strided = any(_splits(p, rows) and not p.is_shard(rows) for p in x.placements)
    return product(whole if is_strided else x, whole, precision=precision)


def _is_split_by_rows(x: Tensor, **_: object) -> "TypeGuard[DTensor]":
    return (
        type(x) is not Tensor
        and is_dtensor(x)
        and x.dim() >= 2
        and any(_splits(p, x.dim() - 2) for p in x.placements)
    )


def _gathered(x: "DTensor") -> "DTensor":
    from torch.distributed.tensor import Replicate

    rows = x.ndim - 2
    return x.redistribute(placements=[Replicate() if _splits(p, rows) else p for p in x.placements])


def _splits(placement: "Placement", dim: int) -> bool:
    """Whether a placement splits ``dim``.

    `fully_shard` splits a layer that was split by rows once more, by a strided placement, for which
    PyTorch's `is_shard` is False.
    """
    return getattr(placement, "dim", None) == dim


def _kernels() -> ModuleType:
    from torchpar.kernels import matmul_t

    return matmul_t


def _compute(x: Tensor, *, precision: str | None = None, wrap: Wrap) -> Tensor:
    if not runs_kernels(x):
        _check_operands(x)
        return cpu.symmetric_matmul(x, x)
    from torchpar.kernels import matmul_t as kernel

    precision, is_native = fp32_precision(x, precision)
    out = kernel.matmul_t(
        x,
        precision,
        wrap,
        tma=wrap is None or supports_tma(wrap),
        only_if_faster=is_native and not is_emulating(),
        check=_check_operands,
    )
    return kernel.mirror(product(x, x), wrap) if out is None else out


# Inductor would fuse the blocks of the CPU path into one slower kernel, and compile it for half a
# minute.
_op, _op_of_precision = overloads(
    "matmul_t(Tensor x) -> Tensor",
    kernels=_kernels,
    flops=lambda x_shape, **_: cpu.symmetric_flops(x_shape),
    opaque=lambda x, **_: cpu.is_halved(x),
)(_compute)


def _matmul_t_fake(x: Tensor, **_: object) -> Tensor:
    _check_operands(x)
    return x.new_empty(*x.shape[:-1], x.shape[-2])


class _Context(Context, Protocol):
    precision: str | None


def _setup_context(
    ctx: _Context,
    inputs: tuple[Tensor, ...],
    output: Tensor,
    keyword_only_inputs: Mapping[str, str | None] = {},
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.precision = keyword_only_inputs.get("precision")


def _backward(ctx: _Context, g: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    if needs_formula(g, x) or needs_fp32_kernel(x, ctx.precision):
        return _backward_formula(g, x, ctx.precision)
    return _backward_op(g, x)  # type: ignore[no-any-return]


def _matmul_t_vmap(
    info: VmapInfo, in_dims: tuple[int], x: Tensor, **precision: str | None
) -> tuple[Tensor, int]:
    _check_operands(sample(x, in_dims[0]))
    op = _op_of_precision if precision else _op
    return op(x.movedim(in_dims[0], 0), **precision), 0


def _matmul_t_sharding(x: Spec, **_: object) -> list[Sharding]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    batch = [([Shard(dim)], [Shard(dim)]) for dim in range(x.ndim - 2)]
    return [([Replicate()], [Replicate()]), ([Partial()], [Shard(x.ndim - 1)]), *batch]


for _each in (_op, _op_of_precision):
    _each.register_fake(_matmul_t_fake)
    _each.register_autograd(
        _backward, setup_context=_setup_context, formula=_formula, decompose=_is_split_by_rows
    )
    _each.register_vmap(_matmul_t_vmap)
    _each.register_autocast()
    _each.register_sharding(_matmul_t_sharding)


# The backward: dX = (G + Gᵀ)·X, with G (*, n, n) and X (*, n, k).


def _backward_formula(g: Tensor, x: Tensor, precision: str | None = None) -> Tensor:
    # G + Gᵀ can overflow where the result does not. Its half cannot, but would lose small float16
    # gradients.
    if x.dtype == torch.float16:
        return product(g, x.mT) + product(g.mT, x.mT)
    return product(mean_with_transpose(g), x.mT, precision=precision) * 2


@operator(
    "matmul_t_backward(Tensor g, Tensor x) -> Tensor",
    kernels=_kernels,
    # All of (G + Gᵀ)·X. A GPU takes two such products of float16.
    flops=lambda g_shape, x_shape, **_: product_flops(g_shape, (*x_shape[:-2], *x_shape[:-3:-1])),
    opaque=lambda g, x: cpu.is_halved(x),
)
def _backward_op(g: Tensor, x: Tensor, *, wrap: Wrap) -> Tensor:
    if not runs_kernels(x):
        return cpu.symmetrized_product(g, x).contiguous()
    if x.dtype == torch.float16:
        return _backward_formula(g, x).contiguous()
    from torchpar.kernels import matmul_t as kernel

    return product(kernel.half_sum(g, wrap), x.mT, None, 2.0, 0.0)


@_backward_op.register_fake
def _matmul_t_backward_fake(g: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_backward_op.register_autocast(cast=False)
