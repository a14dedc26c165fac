# SPDX-License-Identifier: MIT
"""Rules for matrix products and convolutions: exact products.

The rules of torchpar's products ignore the precision that they are given, since they are exact.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from torchpar.errors import ConfigError
from torchpar.exact.registry import rule, times, wide
from torchpar.exact.sums import exact_sum
from torchpar.ops import exact_matmul, exact_matmul_t
from torchpar.ops.exact_digits import product_of_exponents, row_exponents


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.mT`` in float32, of operands of one dtype."""
    if a.dtype == torch.float32:
        return exact_matmul(a, b)
    e = row_exponents(a)
    return product_of_exponents(a, b, e, row_exponents(b), dtype=torch.float32)


@rule("mm", "bmm", narrow=True)
def _mm(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return exact_matmul(a, b.mT) if dtype in (None, a.dtype) else wide_product(a, b.mT)


@rule("addmm", "baddbmm", narrow=True)
def _addmm(
    c: Tensor,
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype | None = None,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    """The product and the sum are float32, and are rounded to another dtype once."""
    shape = *a.shape[:-1], b.shape[-1]
    product = times(wide_product(a, b.mT), alpha) if alpha else wide(a).new_zeros(shape)
    return product if beta == 0 else product + times(wide(c), beta)


@rule("mv", "dot", narrow=True)
def _mv(a: Tensor, b: Tensor) -> Tensor:
    return _mm(a[None] if a.dim() == 1 else a, b[:, None]).view(a.shape[:-1])


@rule("fp32_matmul")
def _fp32_matmul(a: Tensor, b: Tensor, *, precision: str) -> Tensor:
    return exact_matmul(a, b.expand(*a.shape[:-2], *b.shape[-2:]))


@rule("matmul_t", narrow=True)
def _matmul_t(x: Tensor, *, precision: str | None = None) -> Tensor:
    return exact_matmul_t(x)


@rule("matmul_t_backward", narrow=True)
def _matmul_t_backward(g: Tensor, x: Tensor) -> Tensor:
    """``(G + Gᵀ)·X`` by two products, since G + Gᵀ rounds and can overflow."""
    return wide_product(g, x.mT) + wide_product(g.mT, x.mT)


@rule("symmetric_matmul", narrow=True)
def _symmetric_matmul(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float | None = None,
    precision: str | None = None,
) -> Tensor:
    """The lower triangle of ``alpha·A·Bᵀ + beta·C`` and its mirror image."""
    addend = wide(a).new_zeros(*a.shape[:-1], a.shape[-2]) if c is None else c
    y = _addmm(addend, a, b.mT, torch.float32, beta=beta or 0, alpha=alpha)
    n = y.shape[-1]
    return torch.where(torch.ones(n, n, dtype=torch.bool, device=y.device).tril(), y, y.mT)


@rule("symmetric_addmm", narrow=True)
def _symmetric_addmm(
    h: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    alpha: float,
    beta: float,
    precision: str | None = None,
) -> Tensor:
    return _symmetric_matmul(a, b, h, alpha=alpha, beta=beta)


def _windows(
    x: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The windows of ``x (b, c, *positions)``: ``(groups, b, *windows, c/groups · elements)``."""
    dims = len(size)
    x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    for dim, (k, s, d) in enumerate(zip(size, stride, dilation, strict=True), 2):
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    x = x.unflatten(1, (groups, -1)).movedim(1, 0)  # (groups, b, c/groups, *windows, *size)
    return x.movedim(2, 2 + dims).flatten(2 + dims)


@rule("convolution", narrow=True)
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    if transposed:
        raise ConfigError(
            "exact arithmetic has no transposed convolutions; insert zeros between the inputs, and "
            "convolve"
        )
    if not weight.numel():
        raise ConfigError(
            f"a convolution's weight has shape {tuple(weight.shape)}, expected sizes of at least 1"
        )
    windows = _windows(x, weight.shape[2:], stride, padding, dilation, groups)
    multiply = exact_matmul if bias is None else wide_product
    product = multiply(weight.unflatten(0, (groups, -1)).flatten(2), windows.flatten(1, -2))
    y: Tensor = product.flatten(0, 1).unflatten(1, windows.shape[1:-1]).movedim(0, 1).contiguous()
    return y if bias is None else y.add(wide(bias).view(-1, *[1] * len(stride)))


@rule("convolution_backward", narrow=True)
def _convolution_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    size = weight.shape[2:]
    dims = [*range(2, x.dim())]
    padding = [*padding] * (len(dims) // len(padding))  # "valid" comes as one 0
    dx = dw = None
    if output_mask[1]:
        windows = _windows(x, size, stride, padding, dilation, groups)
        of_outputs = g.unflatten(1, (groups, -1)).movedim(0, 2).flatten(2)
        dw = exact_matmul(of_outputs, windows.flatten(1, -2).mT).view(weight.shape)
    if output_mask[0]:
        # The convolution of the spread gradient with the reversed kernels, inputs and outputs
        # exchanged.
        lasts = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
        ends = zip(lasts, g.shape[2:], stride, strict=True)
        places = tuple(slice(i, i + n * s, s) for i, n, s in ends)
        lengths = [n + 2 * p + i for n, p, i in zip(x.shape[2:], padding, lasts, strict=True)]
        spread = g.new_zeros(*g.shape[:2], *lengths)
        spread[:, :, *places] = g
        kernels = weight.flip(dims).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        ones, zeros = [1] * len(dims), [0] * len(dims)
        padded = _convolution(spread, kernels, None, ones, zeros, dilation, False, zeros, groups)
        dx = F.pad(padded, [-p for p in reversed(padding) for _ in range(2)])
    return dx, dw, exact_sum(wide(g), [0, *dims]).float() if output_mask[2] else None
