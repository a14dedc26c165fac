# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-any-return"
"""Rules for matrix products, convolutions and attention: exact products."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from torchpar.errors import ConfigError
from torchpar.exact import attention
from torchpar.exact.attention import causal_mask, product_by_keys, weights_of
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


def _pair(value: Sequence[int]) -> list[int]:
    return [*value] if len(value) == 2 else [*value] * 2


def _columns(x: Tensor, size: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """The windows of ``x (b, c, h, w)`` as rows ``(groups, b·positions, c/groups·kh·kw)``."""
    windows = F.unfold(x, tuple(size), dilation, padding, stride).mT  # (b, positions, c·kh·kw)
    b, positions, n = windows.shape
    return windows.reshape(b * positions, groups, n // groups).transpose(0, 1)


@rule("convolution")
def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Tensor:  # fmt: skip
    check_float32(x, weight, bias)
    if x.dim() == 3 and not transposed:  # one dimension
        x, weight = x.unsqueeze(2), weight.unsqueeze(2)
        stride, padding, dilation = (
            [value, *given] for value, given in ((1, stride), (0, padding), (1, dilation))
        )
        return _convolution(
            x, weight, bias, stride, padding, dilation, False, [0, 0], groups
        ).squeeze(2)  # fmt: skip
    if x.dim() != 4 or transposed:
        raise ConfigError("exact arithmetic has convolutions of one and two dimensions, not transposed ones")
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    out, _, *size = weight.shape
    rows = _columns(x, size, stride, padding, dilation, groups)
    y = exact_matmul(rows, weight.reshape(groups, out // groups, -1))
    h, w = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, size, stride, strict=True)
    )
    y = y.transpose(0, 1).reshape(len(x), h, w, out).permute(0, 3, 1, 2).contiguous()
    return y if bias is None else y + bias[:, None, None]


@rule("convolution_backward")
def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    if x.dim() == 3:
        stride, padding, dilation = (
            [value, *given] for value, given in ((1, stride), (0, padding), (1, dilation))
        )
        dx, dw, db = _convolution_backward(
            g.unsqueeze(2), x.unsqueeze(2), weight.unsqueeze(2), bias_sizes, stride, padding, dilation,
            transposed, [0, 0], groups, output_mask,
        )  # fmt: skip
        return None if dx is None else dx.squeeze(2), None if dw is None else dw.squeeze(2), db
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    out, inner, *size = weight.shape
    dx = dw = None
    if output_mask[1]:
        rows = _columns(x, size, stride, padding, dilation, groups)
        dz = g.permute(0, 2, 3, 1).reshape(-1, groups, out // groups).transpose(0, 1)
        dw = exact_matmul(dz.mT, rows.mT).reshape(weight.shape)
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
    return dx, dw, exact_sum(g, [0, 2, 3]).float() if output_mask[2] else None


@rule("_scaled_dot_product_flash_attention_for_cpu")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if dropout:
        raise ConfigError(
            "this form of attention has no dropout in exact arithmetic; call F.dropout after it"
        )
    p = _attention_weights(q, k, causal, attn_mask, scale)
    return product_by_keys(p, v), q.new_zeros(q.shape[:-1])  # a sum that the backward pass does not need


@rule("_scaled_dot_product_flash_attention_for_cpu_backward")
def _attention_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, dropout: float, causal: bool, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = _attention_weights(q, k, causal, attn_mask, scale)
    return attention.gradients(g, q, k, v, p, _scale(q, scale))


def _attention_weights(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, scale: float | None
) -> Tensor:
    return weights_of(q, k, causal_mask(q, k) if causal else mask, _scale(q, scale))


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale
