# SPDX-License-Identifier: MIT
"""A product that the caller knows to be symmetric.

    Y = α·A·Bᵀ + β·C

Products of polynomials in one symmetric matrix are: A = p(S), B = q(S), since both are symmetric and
commute. With G = dL/dY:

    dL/dA = α·G·B        dL/dB = α·Gᵀ·A        dL/dC = β·G

the plain formula's derivatives, along which the result stays symmetric if the promise is kept.
"""

import math
from typing import Any

import torch
from torch import Tensor

from torchpar.ops import _cpu
from torchpar.ops._library import (
    Wrap,
    batch_first,
    is_dtensor,
    may_describe,
    operator,
    register_autocast,
    register_autograd,
    register_fake,
    register_sharding,
    register_vmap,
    sample,
)
from torchpar.ops._matrix import check_dtype, check_like, fp32_precision, mirrored, product


def symmetric_matmul(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    check: bool = False,
) -> Tensor:
    """A product known to be symmetric, at half the arithmetic: ``alpha * a @ b.mT + beta * c``.

    Only tiles on and below the diagonal are computed, and each is stored twice, so that the result equals
    its transpose bit for bit, whatever ``a @ b.mT`` is. `torchpar.matmul_t` is the case b = a.

    Args:
        a: ``(*, n, k)``; float16, bfloat16, float32 or float64. On CUDA, float32 follows
            `torch.backends.cuda.matmul.fp32_precision`.
        b: as ``a``, of its shape, dtype and device.
        c: ``(*, n, n)``, symmetric, of ``a``'s dtype and device, or None. It is not read if ``beta`` is 0.
        alpha, beta: factors of the product and of ``c``.
        check: compute the whole product in float64 and raise if it, or ``c``, is not symmetric up to the
            rounding of ``a``, ``b`` and ``c``. For debugging: it takes several times as long, and waits for
            the device. Not under torch.func transforms.

    Returns:
        ``(*, n, n)``, contiguous, of ``a``'s dtype.

    Raises:
        RuntimeError: an unsupported dtype, shapes that do not fit, mixed dtypes or devices; with ``check``, a
            product or a ``c`` that is not symmetric.
    """
    return _op(a, b, c, alpha=alpha, beta=beta, check=check)  # type: ignore[no-any-return]


def _check(a: Tensor, b: Tensor, c: Tensor | None) -> None:
    check_dtype("symmetric_matmul", "a", a)
    if a.dim() < 2:
        raise RuntimeError(f"torchpar::symmetric_matmul: a has shape {tuple(a.shape)}, expected (*, n, k)")
    check_like("symmetric_matmul", "b", b, a.shape, a)
    if c is not None:
        check_like("symmetric_matmul", "c", c, (*a.shape[:-1], a.shape[-2]), a)


def _check_promise(a: Tensor, b: Tensor, c: Tensor | None) -> None:
    """Raise a RuntimeError where a @ b.mT, or c, is further from symmetric than rounding explains.

    Operands that come of a few operations are off by a few roundings each: 8 of them, 4·eps of
    ``|a| @ |b|.mT``, on either side of the diagonal. Operands much smaller than the terms they come of are
    off by more, and are refused.
    """
    wide_a, wide_b = a.double(), b.double()
    parts = {"a @ b.mT": (wide_a @ wide_b.mT, wide_a.abs() @ wide_b.abs().mT)}
    if c is not None:
        parts["c"] = (c.double(), c.double().abs())
    explained = 4 * torch.finfo(a.dtype).eps + a.shape[-1] * torch.finfo(torch.float64).eps  # this sum's own
    for name, (value, size) in parts.items():
        excess = (value - value.mT).abs() / (explained * (size + size.mT))
        excess = excess.nan_to_num(nan=0.0)  # of 0/0, or of what is not finite
        worst = excess.amax().item() if excess.numel() else 0.0
        if worst > 1:
            raise RuntimeError(
                f"torchpar::symmetric_matmul: {name} is not symmetric: it differs from its transpose by up to"
                f" {worst:.3g} times what the rounding of its operands explains"
            )


def _formula(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    check: bool = False,
) -> Tensor:
    _check(a, b, c)
    if _is_checked_dtensor(a, b, c, check=check):
        _check_promise(*(t if t is None else t.full_tensor() for t in (a, b, c if beta else None)))  # type: ignore[attr-defined, arg-type]
        return _op(a, b, c, alpha=alpha, beta=beta)  # type: ignore[no-any-return]
    return product(a, b, c, alpha, beta)


def _is_checked_dtensor(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, check: bool = False, **factors: float
) -> bool:
    """Whether the promise is to be checked of a whole whose parts need not keep it."""
    return check and is_dtensor(a)


def _is_opaque(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, check: bool = False, **factors: float
) -> bool:
    return check or _cpu.is_halved(a)


@operator(
    "symmetric_matmul(Tensor a, Tensor b, Tensor? c=None, *, "
    "float alpha=1.0, float beta=0.0, bool check=False) -> Tensor",
    kernels="matmul_t",
    opaque=_is_opaque,
)
def _symmetric_matmul(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    check: bool = False,
    wrap: Wrap,
) -> Tensor:
    _check(a, b, c)
    if check:
        _check_promise(a, b, c if beta else None)
    return symmetric_product(a, b, c, alpha, beta, wrap)


def symmetric_product(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, wrap: Wrap
) -> Tensor:
    """The operator's result, and `torchpar.matmul_t`'s, of arguments that have been checked."""
    if not a.is_cuda:
        return _cpu.symmetric_product(a, b, c, alpha, beta)
    from torchpar.kernels import matmul_t as kernels
    from torchpar.kernels import tuning

    n, k = a.shape[-2:]
    precision, batch = fp32_precision(), math.prod(a.shape[:-2])
    tiles = tuning.chosen("symmetric_product", a.dtype, precision, n, n, k, batch, a, b)
    if tiles is None or alpha == 0:  # 0·NaN is 0 to BLAS, and NaN in a kernel
        return mirrored(product(a, b, c, alpha, beta))
    if tiles.tma and not may_describe(wrap):
        tiles = tiles._replace(tma=False)
    out = a.new_empty(*a.shape[:-1], n)
    kernels.symmetric_product(a, b, out, precision, wrap, c, alpha, beta, tiles)
    return out


_op = torch.ops.torchpar.symmetric_matmul.default


@register_fake("symmetric_matmul")
def _(a: Tensor, b: Tensor, c: Tensor | None = None, **_: Any) -> Tensor:
    _check(a, b, c)
    return a.new_empty(*a.shape[:-1], a.shape[-2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    need_a, need_b, *need_c, _ = ctx.needs_input_grad  # a c left at its default is not listed
    alpha, beta = ctx.kwargs.get("alpha", 1.0), ctx.kwargs.get("beta", 0.0)
    da = alpha * (g @ b) if need_a else None
    db = alpha * (g.mT @ a) if need_b else None
    return da, db, *(beta * g if need else None for need in need_c)


register_autograd(
    "symmetric_matmul",
    _backward,
    setup_context=_setup_context,
    formula=_formula,
    decompose=_is_checked_dtensor,
)


@register_vmap("symmetric_matmul")
def _(
    info: Any, in_dims: tuple[int | None, ...], a: Tensor, b: Tensor, c: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, int]:
    operands = list(zip((a, b, c), (*in_dims, None)[:3], strict=True))
    _check(*(t if t is None else sample(t, dim) for t, dim in operands))  # type: ignore[arg-type]
    batched = [t if t is None else batch_first(t, dim, info.batch_size) for t, dim in operands]
    return _op(*batched, **kwargs), 0


register_autocast("symmetric_matmul")


@register_sharding("symmetric_matmul")
def _(a: Any, b: Any, c: Any = None, **_: Any) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    def rule(result: Any, operand: Any) -> Any:
        return [result], [operand, operand, None if c is None else result]

    batch = [rule(Shard(dim), Shard(dim)) for dim in range(a.ndim - 2)]
    return [rule(Replicate(), Replicate()), rule(Partial(), Shard(a.ndim - 1)), *batch]
