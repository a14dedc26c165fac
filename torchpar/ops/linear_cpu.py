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
from torchpar.ops.matrix import pad_to_even, product, rows
from torchpar.ops.processor import has_bfloat16

CHAIN = 264
_is_tracing = torch._C._is_tracing
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}
# Multiplications per chain and thread from which oneDNN is faster, although its call takes longer than MKL's.
_MIN_PRODUCT = 2_500_000
# The same per thread for a layer, whose autograd function is in Python, and slower than PyTorch's: from here
# on it gains a tenth on an AMD EPYC.
_MIN_LAYER = 12_000_000


def prefers_onednn(t: Tensor) -> bool:
    """Return True if products of ``t`` go to oneDNN where they are large enough."""
    return t.is_cpu and t.dtype == torch.float32 and processor.uses_onednn()


def onednn(
    a: Tensor, b: Tensor, onto: Tensor | None = None, bias: Tensor | None = None, sigmoid: bool = False
) -> Tensor:
    """``a @ b.T + onto + bias`` in one chain, for matrices; without ``onto`` also its sigmoid.

    ``b`` or its transpose is contiguous. With another ``b`` oneDNN takes a thousand times as long.
    """
    linear: Any = torch.ops.mkldnn._linear_pointwise
    if onto is None:
        return linear(a, b, bias, "sigmoid" if sigmoid else "none", [], "")  # type: ignore[no-any-return]
    return linear.binary(a, onto, b, bias, "add")  # type: ignore[no-any-return]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`, differentiable."""
    by_onednn = is_eager(x, weight, bias) and takes_onednn(x, weight, bias)
    return LinearFunction.apply(x, weight, bias) if by_onednn else F.linear(x, weight, bias)


def takes_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return True if oneDNN takes a layer's operands, and is faster.

    PyTorch takes more layouts and biases, or raises an error.
    """
    operands = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.numel() * weight.shape[:1].numel() >= _MIN_LAYER * torch.get_num_threads()
        and processor.uses_onednn()
        and all(t.is_cpu and t.dtype == torch.float32 and t.layout == torch.strided for t in operands)
        and weight.dim() == 2
        and (bias is None or bias.shape == weight.shape[:1])
    )


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, sigmoid: bool = False) -> Tensor:
    """``x @ weight.T + bias`` for ``x (*, in)``, ``weight (out, in)``, or its sigmoid; not differentiable."""
    length = _chain_length(x, weight)
    if length == 0:
        y = F.linear(*pad_to_even(x, weight), bias)
        return y.sigmoid_() if sigmoid else y
    if bias is not None:
        bias = bias.contiguous()  # oneDNN reads it as if it were
    y = in_chains(cut(rows(x), weight, length), bias, sigmoid)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], len(weight))


def linear_gradients(
    dz: Tensor, x: Tensor, weight: Tensor, need_x: bool = True, need_weight: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dx ``(*, in)`` and dL/dweight ``(out, in)`` of a linear layer, from dz = dL/dy ``(*, out)``."""
    if dz.dtype == torch.bfloat16 and dz.is_cpu and not has_bfloat16():
        wide = linear_gradients(dz.float(), x.float(), weight.float(), need_x, need_weight)
        dx, dw = (None if t is None else t.bfloat16() for t in wide)
        return dx, dw
    if torch.is_grad_enabled() or not prefers_onednn(dz) or not is_eager(dz, x, weight):
        # PyTorch's product of a one-dimensional DTensor and a matrix has a wrong shape (2.15).
        flat = rows(dz) if dz.dim() == 1 else dz
        dx = product(flat, weight.mT) if need_x else None
        dw = product(rows(dz).mT, rows(x).mT) if need_weight else None
    else:
        dx = mm(rows(dz), weight) if need_x else None
        dw = mm(rows(dz).T, rows(x)) if need_weight else None
    return None if dx is None else dx.view(x.shape), dw


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for matrices; no gradient."""
    length = _chain_length(a, b.T)
    return in_chains(cut(a, b.T, length)) if length else a.mm(b)


def cut(a: Tensor, b: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
    """Matrices ``a`` and ``b`` cut into ``length`` columns each, as `in_chains` takes them."""
    parts = [t if t.is_contiguous() or t.mT.is_contiguous() else t.contiguous() for t in b.split(length, 1)]
    return list(zip(parts if a is b else a.split(length, 1), parts, strict=True))


def in_chains(
    terms: list[tuple[Tensor, Tensor]], bias: Tensor | None = None, sigmoid: bool = False
) -> Tensor:
    """``a @ b.T + bias``, or its sigmoid, for matrices that were `cut`."""
    is_one = len(terms) == 1
    out = onednn(*terms[0], bias=bias, sigmoid=sigmoid and is_one)
    for term in terms[1:]:
        out = onednn(*term, out)
    return out.sigmoid_() if sigmoid and not is_one else out


def _chain_length(a: Tensor, b: Tensor) -> int:
    """The terms of a chain for the product of the rows of ``a`` and ``b``; 0 where BLAS is as fast."""
    count = -(-b.shape[1] // CHAIN)
    by_onednn = (
        a.numel() * b.shape[0] >= _MIN_PRODUCT * max(count * torch.get_num_threads(), 1)
        and prefers_onednn(a)
        and b.dtype == a.dtype
        and a.shape[-1:] == b.shape[1:]
    )
    return -(-b.shape[1] // count) if by_onednn else 0


def is_eager(*tensors: Tensor | None) -> bool:
    """Return True if no compiler, transform, tensor subclass or autocast must intercept the calls."""
    return all(type(t) in _PLAIN for t in tensors) and not (
        torch.compiler.is_compiling() or _is_tracing() or is_transformed() or torch.is_autocast_enabled("cpu")
    )


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx, dw = linear_gradients(g, x, weight, need_x, need_weight)
        return dx, dw, rows(g).sum(0) if need_bias else None
