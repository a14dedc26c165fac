# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-any-return"
"""ATen operators in exact arithmetic: those that are the same everywhere, and a rule for each other one.

An operator *passes* if it moves data, compares, or rounds once for each element, as IEEE 754 defines it. A
*rule* computes it by exact products (`torchpar.exact_matmul`), exact sums (`torchpar.exact.sums`), and
functions (`torchpar.exact.functions`). An operator that is in neither list is refused.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchpar.errors import ConfigError
from torchpar.exact import attention, ieee, random
from torchpar.exact.attention import causal_mask, product_by_keys, weights_of
from torchpar.exact.functions import (
    cos64,
    erf64,
    erfinv64,
    exp64,
    in_pieces,
    log64,
    pow64,
    sigmoid64,
    sin64,
    tanh64,
)
from torchpar.exact.softmax import log_softmax, softmax
from torchpar.exact.sums import exact_index_sum, exact_sum
from torchpar.ops import exact_matmul

Rule = Callable[..., Any]

# In-place and out= variants count as their operators.
_PASSING = """
    alias as_strided broadcast_tensors cat clone constant_pad_nd contiguous copy detach diagonal expand flip
    gather im2col index index_select lift_fresh masked_select narrow new_empty new_full new_ones new_zeros
    permute pixel_shuffle repeat reshape roll select select_backward select_scatter set_ slice slice_backward
    slice_scatter split split_with_sizes squeeze stack t take_along_dim transpose tril triu unbind unfold
    unsafe_split unsqueeze view view_as_complex _unsafe_view _reshape_alias _to_copy _pin_memory resize_
    empty empty_like empty_strided full full_like ones ones_like scalar_tensor zeros zeros_like fill zero eye
    masked_fill masked_scatter scatter index_fill index_copy where nan_to_num clamp clamp_min clamp_max
    abs neg sign sqrt floor ceil round trunc relu threshold threshold_backward hardtanh hardtanh_backward
    eq ne lt le gt ge isnan isinf isneginf isposinf logical_and logical_or logical_not logical_xor all any
    equal maximum minimum max min amax amin argmax argmin sort topk mul div reciprocal
    new_empty_strided _local_scalar_dense item is_same_size is_pinned embedding uniform random rand rand_like
"""
PASSING = frozenset(_PASSING.split())

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the ATen operators of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _float32(*operands: Tensor | None) -> None:
    for t in operands:
        if t is not None and t.dtype != torch.float32:
            raise ConfigError(f"exact arithmetic takes float32, an operand is {t.dtype}; convert it")


# Products


@rule("mm", "bmm")
def _mm(a: Tensor, b: Tensor) -> Tensor:
    _float32(a, b)
    return exact_matmul(a, b.mT)


@rule("addmm", "baddbmm")
def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = _times(_mm(a, b), alpha)
    return product if beta == 0 else product + _times(c, beta)


@rule("mv", "dot")
def _mv(a: Tensor, b: Tensor) -> Tensor:
    return _mm(a.view(-1, a.shape[-1]), b[:, None]).view(a.shape[:-1])


def _times(t: Tensor, factor: Any) -> Tensor:
    return t if isinstance(factor, int | float) and factor == 1 else t * factor


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
    _float32(x, weight, bias)
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
    p = _attention_weights(q, k, causal, attn_mask, scale)
    return product_by_keys(p, v), q.new_zeros(q.shape[:-1])  # a sum that the backward pass does not need


@rule("_scaled_dot_product_flash_attention_for_cpu_backward")
def _attention_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, dropout: float, causal: bool, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = _attention_weights(q, k, causal, attn_mask, scale)
    return attention.gradients(g, q, k, v, p, scale or q.shape[-1] ** -0.5)


def _attention_weights(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, scale: float | None
) -> Tensor:
    return weights_of(q, k, causal_mask(q, k) if causal else mask, scale or q.shape[-1] ** -0.5)


# Sums


@rule("sum")
def _sum(x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    if not x.is_floating_point():
        return torch.sum(x, dims, keepdim, dtype=dtype) if dims is not None else torch.sum(x, dtype=dtype)
    return exact_sum(x, dims, keepdim).to(dtype or x.dtype)


@rule("mean")
def _mean(x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    total = exact_sum(x, dims, keepdim)
    return (total / (x.numel() / max(total.numel(), 1))).to(dtype or x.dtype)


def _variance(x: Tensor, dims: Any, correction: Any, keepdim: bool) -> tuple[Tensor, Tensor]:
    total = exact_sum(x, dims, True)
    n = x.numel() / max(total.numel(), 1)
    mean, by = total / n, n - (1 if correction is None else correction)
    variance = exact_sum((x.double() - mean).square(), dims, keepdim) / by
    return variance, mean


@rule("var")
def _var(x: Tensor, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return _variance(x, dims, correction, keepdim)[0].to(x.dtype)


@rule("std")
def _std(x: Tensor, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return _variance(x, dims, correction, keepdim)[0].sqrt().to(x.dtype)


@rule("linalg_vector_norm", "norm")
def _norm(x: Tensor, order: Any = 2, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    if order == math.inf:
        return torch.linalg.vector_norm(x, order, dims, keepdim, dtype=dtype)
    if order not in (1, 2):
        raise ConfigError(f"exact arithmetic has norms of the orders 1, 2 and infinity, not {order}")
    terms = x.double().square() if order == 2 else x.double().abs()
    total = exact_sum(terms, dims, keepdim)
    return (total.sqrt() if order == 2 else total).to(dtype or x.dtype)


@rule("native_layer_norm")
def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _float32(x, weight, bias)
    dims = [*range(-len(shape), 0)]
    mean = exact_sum(x, dims, True) / math.prod(shape)
    centred = x.double() - mean
    rstd = 1 / (exact_sum(centred.square(), dims, True) / math.prod(shape) + eps).sqrt()
    y = (centred * rstd).float()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean.float(), rstd.float()


@rule("native_layer_norm_backward")
def _layer_norm_backward(
    g: Tensor, x: Tensor, shape: Sequence[int], mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    dims, batch = [*range(-len(shape), 0)], [*range(x.dim() - len(shape))]
    n = math.prod(shape)
    normal = (x.double() - mean.double()) * rstd.double()
    scaled = g.double() if weight is None else g.double() * weight.double()
    dx = dw = db = None
    if output_mask[0]:
        along = exact_sum(scaled * normal, dims, True) / n
        dx = (rstd.double() * (scaled - exact_sum(scaled, dims, True) / n - normal * along)).float()
    if output_mask[1]:
        dw = exact_sum(g.double() * normal, batch).float() if batch else (g.double() * normal).float()
    if output_mask[2]:
        db = exact_sum(g, batch).float() if batch else g.clone()
    return dx, dw, db


@rule("_softmax", "_safe_softmax")
def _softmax(x: Tensor, dim: int, *_: Any, dtype: Any = None) -> Tensor:
    _float32(x)
    return softmax(x, dim)


@rule("_softmax_backward_data")
def _softmax_backward(g: Tensor, y: Tensor, dim: int, _: Any) -> Tensor:
    total = exact_sum(g.double() * y.double(), [dim], True)
    return ((g.double() - total) * y.double()).float()


@rule("logsumexp")
def _logsumexp(x: Tensor, dims: list[int], keepdim: bool = False) -> Tensor:
    _float32(x)
    largest = x.amax(dims, True)
    shift = torch.where(largest.isfinite(), largest, 0.0)
    total = log64(exact_sum(ieee.exp(x - shift), dims, True)) + shift.double()
    return (total if keepdim else total.squeeze(tuple(dims))).float()


@rule("_log_softmax")
def _log_softmax(x: Tensor, dim: int, _: bool) -> Tensor:
    _float32(x)
    return log_softmax(x, dim)


@rule("_log_softmax_backward_data")
def _log_softmax_backward(g: Tensor, y: Tensor, dim: int, _: Any) -> Tensor:
    return (g.double() - ieee.exp(y).double() * exact_sum(g, [dim], True)).float()


@rule("nll_loss_forward")
def _nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: int
) -> tuple[Tensor, Tensor]:
    factors = _loss_weights(x, target, weight, ignore)
    index = torch.where(target == ignore, 0, target).unsqueeze(-1)
    losses = -x.gather(-1, index).squeeze(-1) * factors
    losses = torch.where(factors == 0, 0.0, losses)
    total = exact_sum(factors) if reduction == 1 else torch.zeros((), dtype=torch.float64, device=x.device)
    if reduction == 0:
        return losses, total.float()
    loss = exact_sum(losses)
    return (loss / total if reduction == 1 else loss).float(), total.float()


@rule("nll_loss_backward")
def _nll_loss_backward(
    g: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: int, total: Tensor
) -> Tensor:
    factors = _loss_weights(x, target, weight, ignore)
    each = -factors * g / total if reduction == 1 else -factors * g
    index = torch.where(target == ignore, 0, target).unsqueeze(-1)
    return torch.zeros_like(x).scatter_(-1, index, torch.where(factors == 0, 0.0, each).unsqueeze(-1))


def _loss_weights(x: Tensor, target: Tensor, weight: Tensor | None, ignore: int) -> Tensor:
    """The weight of each sample's loss."""
    kept = target != ignore
    of_class = (
        torch.ones_like(target, dtype=x.dtype) if weight is None else weight[torch.where(kept, target, 0)]
    )
    return torch.where(kept, of_class, 0.0)


@rule("mse_loss")
def _mse_loss(x: Tensor, y: Tensor, reduction: int = 1) -> Tensor:
    squares = (x - y).square()
    return squares if reduction == 0 else _mean(squares) if reduction == 1 else _sum(squares)


@rule("mse_loss_backward")
def _mse_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int) -> Tensor:
    gradient = (x - y) * 2 * g
    return gradient / x.numel() if reduction == 1 else gradient


@rule("embedding_dense_backward")
def _embedding_backward(g: Tensor, indices: Tensor, rows: int, padding: int, by_frequency: bool) -> Tensor:
    if by_frequency:
        raise ConfigError("exact arithmetic has no scale_grad_by_freq of an embedding; leave it out")
    gradient = exact_index_sum(g.reshape(-1, g.shape[-1]), indices.flatten(), rows)
    if padding >= 0:
        gradient[padding] = 0
    return gradient


@rule("index_add")
def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1) -> Tensor:
    if not x.is_floating_point():
        return torch.index_add(x, dim, index, source, alpha=alpha)
    moved = source.movedim(dim, 0)
    total = exact_index_sum(moved.reshape(len(index), -1), index, x.shape[dim])
    return x + _times(total.view(x.shape[dim], *moved.shape[1:]).movedim(0, dim), alpha)


@rule("scatter_add")
def _scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    if not x.is_floating_point():
        return torch.scatter_add(x, dim, index, source)
    # The index of each target in the flat tensor.
    places = torch.arange(x.numel(), device=x.device).view(x.shape)
    places = places[tuple(slice(None if i == dim % x.dim() else n) for i, n in enumerate(index.shape))]
    flat = places.gather(dim, index).flatten()
    values = source[tuple(map(slice, index.shape))].reshape(-1, 1)
    return x + exact_index_sum(values, flat, x.numel()).view(x.shape)


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(x: Tensor, indices: Any, values: Tensor, accumulate: bool = False, *_: Any) -> Tensor:
    if not (accumulate and x.is_floating_point()):
        return torch.index_put(x, indices, values)
    places = torch.arange(x.numel(), device=x.device).view(x.shape)
    places = places[tuple(slice(None) if i is None else i for i in indices)]
    total = exact_index_sum(values.expand(places.shape).reshape(-1, 1), places.flatten(), x.numel())
    return x + total.view(x.shape)


# One operation at a time: a processor may fuse a product and a sum, which rounds once


@rule("add")
def _add(x: Any, y: Any, *, alpha: Any = 1) -> Tensor:
    return x + _times(y, alpha) if isinstance(y, Tensor) else x + y * alpha


@rule("sub")
def _sub(x: Any, y: Any, *, alpha: Any = 1) -> Tensor:
    return x - _times(y, alpha) if isinstance(y, Tensor) else x - y * alpha


@rule("rsub")
def _rsub(x: Any, y: Any, *, alpha: Any = 1) -> Tensor:
    return y - _times(x, alpha)


@rule("addcmul")
def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return x + _times(a, value) * b


@rule("addcdiv")
def _addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return x + _times(a, value) / b


@rule("lerp")
def _lerp(x: Tensor, y: Tensor, weight: Any) -> Tensor:
    return x + (y - x) * weight


# Functions


def _function(name: str, function: Callable[[Tensor], Tensor]) -> None:
    RULES[name] = partial(in_pieces, function)


_function("exp", exp64)
_function("log", log64)
_function("log2", lambda x: log64(x) * (1 / math.log(2)))
_function("log1p", lambda x: log64(x + 1))
_function("sigmoid", sigmoid64)
_function("tanh", tanh64)
_function("sin", sin64)
_function("cos", cos64)
_function("erf", erf64)
_function("erfinv", erfinv64)
_function("rsqrt", lambda x: 1 / x.sqrt())
_function("silu", lambda x: x * sigmoid64(x))

RULES["sigmoid_backward"] = partial(in_pieces, lambda g, y: g * (y * (1 - y)))
RULES["tanh_backward"] = partial(in_pieces, lambda g, y: g * (1 - y * y))


@rule("softplus")
def _softplus(x: Tensor, beta: float = 1, _: float = 20) -> Tensor:
    _check_beta(beta)
    return in_pieces(lambda x: x.clamp(min=0) + log64(exp64(-x.abs()) + 1), x)


@rule("softplus_backward")
def _softplus_backward(g: Tensor, x: Tensor, beta: float, _: float) -> Tensor:
    _check_beta(beta)
    return in_pieces(lambda g, x: g * sigmoid64(x), g, x)


def _check_beta(beta: float) -> None:
    if beta != 1:
        raise ConfigError(f"softplus in exact arithmetic has beta 1, not {beta}; scale its input and output")


@rule("silu_backward")
def _silu_backward(g: Tensor, x: Tensor) -> Tensor:
    def formula(g: Tensor, x: Tensor) -> Tensor:
        s = sigmoid64(x)
        return g * (s * (x * (1 - s) + 1))

    return in_pieces(formula, g, x)


_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715
_ROOT_HALF, _DENSITY = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)


@rule("gelu")
def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    def formula(x: Tensor) -> Tensor:
        if approximate == "tanh":
            return x * 0.5 * (tanh64((x + x * x * x * _TANH_CUBE) * _TANH_SCALE) + 1)
        return x * 0.5 * (erf64(x * _ROOT_HALF) + 1)

    return in_pieces(formula, x)


@rule("gelu_backward")
def _gelu_backward(g: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    def formula(g: Tensor, x: Tensor) -> Tensor:
        if approximate == "tanh":
            t = tanh64((x + x * x * x * _TANH_CUBE) * _TANH_SCALE)
            inner = (x * x * (3 * _TANH_CUBE) + 1) * _TANH_SCALE
            return g * ((t + 1) * 0.5 + x * 0.5 * (1 - t * t) * inner)
        return g * ((erf64(x * _ROOT_HALF) + 1) * 0.5 + x * exp64(x * x * -0.5) * _DENSITY)

    return in_pieces(formula, g, x)


@rule("pow")
def _pow(x: Any, exponent: Any) -> Tensor:
    if not isinstance(exponent, Tensor):
        return in_pieces(lambda t: pow64(t, float(exponent)), x) if x.is_floating_point() else x**exponent
    base = torch.tensor(float(x), dtype=torch.float64) if not isinstance(x, Tensor) else x.double()
    power = exp64(log64(base) * exponent.double())
    return torch.where(exponent == 0, 1.0, power).to(exponent.dtype)


# Random numbers


@rule("normal")
def _normal(x: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> Tensor:
    return (random.normal(x.shape, generator, x.device) * std + mean).to(x.dtype)


@rule("randn")
def _randn(size: Any, *, generator: Any = None, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return random.normal(size, generator, torch.device(device or "cpu")).to(dtype or torch.float32)


@rule("randn_like", "normal_functional")
def _randn_like(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return random.normal(x.shape, None, x.device).to(x.dtype)


@rule("bernoulli")
def _bernoulli(x: Tensor, p: Any = None, *, generator: Any = None) -> Tensor:
    return random.bernoulli(x.shape, x.double() if p is None else p, generator, x.device).to(x.dtype)


@rule("native_dropout")
def _native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if not train:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = random.bernoulli(x.shape, 1 - p, None, x.device)
    return x * kept / (1 - p), kept


@rule("arange", "linspace")
def _arange(*bounds: Any, **options: Any) -> Tensor:
    numbers = [*bounds, 0]
    if any(float(number) != int(number) for number in numbers if not isinstance(number, torch.dtype)):
        raise ConfigError(f"arange{bounds} in exact arithmetic expects whole numbers; scale their range")
    return torch.arange(*bounds, **options)
