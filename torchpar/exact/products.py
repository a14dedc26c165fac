# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-any-return"
"""Rules for matrix products and convolutions: exact products."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from torchpar.errors import ConfigError
from torchpar.exact.registry import check_float32, rule, times
from torchpar.exact.sums import exact_sum
from torchpar.ops import exact_matmul


@rule("mm", "bmm")
def _mm(a: Tensor, b: Tensor) -> Tensor:
    check_float32(a, b)
    return exact_matmul(a, b.mT)


@rule("addmm", "baddbmm")
def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = times(_mm(a, b), alpha)
    return product if beta == 0 else product + times(c, beta)


@rule("mv", "dot")
def _mv(a: Tensor, b: Tensor) -> Tensor:
    return _mm(a[None] if a.dim() == 1 else a, b[:, None]).view(a.shape[:-1])


def _columns(x: Tensor, size: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """The windows of ``x (b, c, h, w)`` as rows ``(groups, b·positions, c/groups·kh·kw)``."""
    windows = F.unfold(x, tuple(size), dilation, padding, stride).mT  # (b, positions, c·kh·kw)
    b, positions, n = windows.shape
    return windows.reshape(b * positions, groups, n // groups).transpose(0, 1)


def _two_dims(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, transposed: bool
) -> tuple[Tensor, Tensor, list[int], list[int], list[int]]:
    """The operands of a convolution of one or two dimensions as those of one of two."""
    if x.dim() not in (3, 4) or transposed:
        raise ConfigError("exact arithmetic has convolutions of one and two dimensions, not transposed ones")
    if x.dim() == 3:
        return x.unsqueeze(2), weight.unsqueeze(2), [1, *stride], [0, *padding], [1, *dilation]
    pairs = [[*value] * (2 // len(value)) for value in (stride, padding, dilation)]
    return x, weight, pairs[0], pairs[1], pairs[2]


@rule("convolution")
def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Tensor:  # fmt: skip
    check_float32(x, weight, bias)
    one_dim = x.dim() == 3
    x, weight, stride, padding, dilation = _two_dims(x, weight, stride, padding, dilation, transposed)
    out, _, *size = weight.shape
    rows = _columns(x, size, stride, padding, dilation, groups)
    y = exact_matmul(rows, weight.reshape(groups, out // groups, -1))
    h, w = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, size, stride, strict=True)
    )
    y = y.transpose(0, 1).reshape(len(x), h, w, out).permute(0, 3, 1, 2).contiguous()
    y = y if bias is None else y + bias[:, None, None]
    return y.squeeze(2) if one_dim else y


@rule("convolution_backward")
def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    shapes = x.shape, weight.shape
    x, weight, stride, padding, dilation = _two_dims(x, weight, stride, padding, dilation, transposed)
    g = g.reshape(*g.shape[:2], -1, g.shape[-1])
    out, inner, *size = weight.shape
    dx = dw = None
    if output_mask[1]:
        rows = _columns(x, size, stride, padding, dilation, groups)
        dz = g.permute(0, 2, 3, 1).reshape(-1, groups, out // groups).transpose(0, 1)
        dw = exact_matmul(dz.mT, rows.mT).reshape(shapes[1])
    if output_mask[0]:
        # The convolution of the spread gradient with the reversed kernels, inputs and outputs exchanged.
        b, _, h, w = g.shape
        spread = g.new_zeros(b, out, (h - 1) * stride[0] + 1, (w - 1) * stride[1] + 1)
        spread[:, :, :: stride[0], :: stride[1]] = g
        pads: list[int] = []
        for n, width, p, d, k in zip(x.shape[2:], spread.shape[2:], padding, dilation, size, strict=True):
            before = d * (k - 1) - p
            pads = [before, n - width - before + d * (k - 1), *pads]
        spread = F.pad(spread, pads)
        kernels = weight.flip(2, 3).view(groups, out // groups, inner, *size).transpose(1, 2)
        kernels = kernels.reshape(groups * inner, out // groups, *size)
        dx = _convolution(spread, kernels, None, [1, 1], [0, 0], dilation, False, [0, 0], groups)
        dx = dx.view(shapes[0])
    return dx, dw, exact_sum(g, [0, 2, 3]).float() if output_mask[2] else None
