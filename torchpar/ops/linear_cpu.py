# SPDX-License-Identifier: MIT
"""float32 products on the CPU by oneDNN, on processors where it is faster than PyTorch's BLAS library.

PyTorch gives float32 products to its BLAS library. Where that is MKL, it uses only AVX2 on AMD processors:
two cores of an AMD EPYC reach 205 GFLOP/s with MKL and 440 with oneDNN. `torch.ops.mkldnn._linear_pointwise`,
a private name that Inductor uses too, is oneDNN's product. It sums all terms in one chain, and the error
grows with the chain's length. Therefore long sums are cut into chains of at most `CHAIN` terms: the error is
then less than twice MKL's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchpar.library import is_transformed
from torchpar.ops import processor
from torchpar.ops.matrix import pad_to_even, rows

CHAIN = 264
# Multiplications per chain and thread from which oneDNN is faster, although its call takes longer than MKL's.
_MIN_PRODUCT = 2_500_000
_is_tracing = torch._C._is_tracing
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def prefers_onednn(t: Tensor) -> bool:
    """Return True if products of ``t`` go to oneDNN where they are large enough."""
    fits = t.is_cpu and t.dtype == torch.float32 and t.layout == torch.strided
    return fits and processor.has_onednn() and bool(torch.backends.mkldnn.enabled)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, differentiable."""
    fits = weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])  # PyTorch takes others, too
    if fits and _chain_length(weight.shape, x, weight, bias):
        return LinearFunction.apply(x, weight, bias)  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx = mm(rows(g), weight).view(x.shape) if need_x else None
        dw = mm(rows(g).mT, rows(x)) if need_weight else None
        return dx, dw, rows(g).sum(0) if need_bias else None


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` for ``x (*, in)``, ``weight (out, in)``; not differentiable."""
    length = _chain_length(weight.shape, x, weight, bias)
    if length == 0:
        return F.linear(*pad_to_even(x, weight), bias)
    if bias is not None:
        bias = bias.contiguous()  # oneDNN reads it as if it were
    y = in_chains(cut(rows(x), weight, length), bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], len(weight))


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for matrices, differentiable."""
    length = 0 if torch.is_grad_enabled() else _chain_length(b.shape[::-1], a, b)
    return in_chains(cut(a, b.T, length)) if length else a.mm(b)


def _chain_length(shape: torch.Size, a: Tensor, *others: Tensor | None) -> int:
    """The terms of a chain for ``a (*, k)`` and a matrix of ``shape (n, k)``; 0 where PyTorch multiplies."""
    if not is_eager(a, *others):
        return 0
    n, k = shape
    count = -(-k // CHAIN)
    by_onednn = (
        a.numel() * n >= _MIN_PRODUCT * max(count * torch.get_num_threads(), 1)
        and all(t is None or prefers_onednn(t) for t in (a, *others))
        and a.shape[-1] == k
    )
    return -(-k // count) if by_onednn else 0


def cut(a: Tensor, b: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
    """Matrices ``a`` and ``b`` cut into ``length`` columns each, as `in_chains` takes them.

    Each part of ``b`` or its transpose is contiguous. With another one oneDNN takes a thousand times as long.
    """
    parts = [t if t.is_contiguous() or t.mT.is_contiguous() else t.contiguous() for t in b.split(length, 1)]
    return list(zip(parts if a is b else a.split(length, 1), parts, strict=True))


def in_chains(terms: list[tuple[Tensor, Tensor]], bias: Tensor | None = None) -> Tensor:
    """``a @ b.T + bias`` for matrices that were `cut`, one chain after the other."""
    pointwise: Any = torch.ops.mkldnn._linear_pointwise
    out: Tensor = pointwise(*terms[0], bias, "none", [], "")
    for a, b in terms[1:]:
        out = pointwise.binary(a, out, b, None, "add")
    return out


def is_eager(*tensors: Tensor | None) -> bool:
    """Return True if no compiler, transform, tensor subclass or autocast must intercept the calls."""
    if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, tensors)):
        return False
    return not (_is_tracing() or is_transformed(tensors) or torch.is_autocast_enabled("cpu"))
