# SPDX-License-Identifier: MIT
"""Rules for sums, means, norms, softmax, losses, indexing, sort and topk: exact sums.

    m = max x        p = e^(x − m)        softmax = p / Σp        log softmax = (x − m) − ln Σp

The largest p is 1, so that terms that are 0 do not change the unit of `exact_sum`.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.exact.functions import exp64, in_pieces, log64, sqrt64
from torchpar.exact.registry import (
    EXACT_RULES,
    NARROW,
    Result,
    check_dtypes,
    rule,
    times,
    wide,
    widened,
)
from torchpar.exact.sums import exact_index_sum, exact_sum
from torchpar.ops.exact_digits import rounded_to


@rule("sum", any_dtype=True, narrow=True)
def _sum(
    x: Tensor,
    dims: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if dtype is not None and dtype.is_complex:
        raise ConfigError(
            f"exact arithmetic has sums of real numbers, not of {dtype}; sum both parts"
        )
    if dtype is not None and not dtype.is_floating_point:  # each term is converted first
        return torch.sum(x, dims, keepdim, dtype=dtype)
    if not x.is_floating_point():  # a sum in another dtype would round
        return torch.sum(x, dims, keepdim).to(dtype or torch.int64)
    check_dtypes(x)
    return rounded_to(exact_sum(wide(x), dims, keepdim), dtype or x.dtype)


@rule("cumsum")
def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Take only numbers such as a mask's: integers below 2²⁴ have the same sum in any order."""
    if not (x == x.round()).all() or x.abs().double().sum() >= 2**24:
        raise ConfigError(
            "no exact version of aten.cumsum.default for these numbers; it takes integers, and "
            "floats that are whole numbers and add up to less than 2²⁴"
        )
    return torch.cumsum(x, dim).to(dtype or x.dtype)


@rule("mean", narrow=True)
def _mean(
    x: Tensor,
    dims: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    total = exact_sum(wide(x), dims, keepdim)
    return rounded_to(total / (x.numel() / max(total.numel(), 1)), dtype or x.dtype)


@rule("var")
def _var(
    x: Tensor,
    dims: list[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Tensor:
    return _var64(x, dims, correction, keepdim).float()


@rule("std")
def _std(
    x: Tensor,
    dims: list[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Tensor:
    return sqrt64(_var64(x, dims, correction, keepdim)).float()


def _var64(x: Tensor, dims: list[int] | None, correction: float | None, keepdim: bool) -> Tensor:
    """The variance in float64, which holds the squares of all float32 numbers."""
    total = exact_sum(x, dims, True)
    n = x.numel() / max(total.numel(), 1)
    by = max(n - (1 if correction is None else correction), 0)
    return exact_sum((x.double() - total / n).square(), dims, keepdim) / by


@rule("linalg_vector_norm", "norm")
def _norm(
    x: Tensor,
    order: float = 2,
    dims: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if order == math.inf:
        largest: Tensor = torch.linalg.vector_norm(x, order, dims, keepdim)
        return largest.to(dtype or x.dtype)
    if order not in (1, 2):
        raise ConfigError(
            f"the order of a norm is {order}, expected 1, 2 or infinity in exact arithmetic"
        )
    terms = x.double().square() if order == 2 else x.double().abs()
    total = exact_sum(terms, dims, keepdim)
    return (sqrt64(total) if order == 2 else total).to(dtype or x.dtype)


@rule("native_layer_norm")
def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _normalized(x, shape, eps)
    y = y if weight is None else y * weight
    mean = mean.masked_fill(mean.isinf(), math.nan)  # as PyTorch's
    return y if bias is None else y + bias, mean, rstd


def _normalized(x: Tensor, shape: Sequence[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x − μ) / √(σ² + eps) over the last dimensions, of ``shape``, with μ and 1/√(σ² + eps)."""
    dims = [*range(-len(shape), 0)]
    mean = exact_sum(x, dims, True) / math.prod(shape)
    centred = x.double() - mean
    rstd = 1 / sqrt64(exact_sum(centred.square(), dims, True) / math.prod(shape) + eps)
    return (centred * rstd).float(), mean.float(), rstd.float()


@rule("native_layer_norm_backward")
def _layer_norm_backward(
    g: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dims, batch = [*range(-len(shape), 0)], [*range(x.dim() - len(shape))]
    n = math.prod(shape)
    normal = (x.double() - mean.double()) * rstd.double()
    scaled = g.double() if weight is None else g.double() * weight.double()
    along = exact_sum(scaled * normal, dims, True) / n
    dx = (rstd.double() * (scaled - exact_sum(scaled, dims, True) / n - normal * along)).float()
    dw, db = (
        (exact_sum(t, batch) if batch else t).float() for t in (g.double() * normal, g.double())
    )
    return dx, dw, db


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.group_norm` by a layer norm of each group."""
    if x.dtype in NARROW:
        return group_norm(wide(x), groups, wide(weight), wide(bias), eps).to(x.dtype)
    n = math.prod(x.shape[1:]) // groups
    y = torch.layer_norm(x.reshape(len(x), groups, n), [n], eps=eps).view(x.shape)
    return _affine(y, weight, bias)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`; in training by a layer norm of each channel.

    Running statistics are ``(1 − momentum)·running + momentum·batch``, where both products and the
    sum round. Without training y is ``(x − running_mean)·(weight / √(running_var + eps))``.
    """
    if x.dim() < 2:
        raise ConfigError(
            f"the input of a batch norm has shape {tuple(x.shape)}, expected (n, channels, *)"
        )
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (running_mean, running_var)
    ):
        raise RuntimeError(
            "batch norm is not differentiable with respect to its running statistics, of which one "
            "requires a gradient"
        )
    if not training:
        assert running_mean is not None  # PyTorch has checked it
        assert running_var is not None
        scale = (wide(running_var) + eps).rsqrt()
        scale = scale if weight is None else scale * wide(weight)
        centred = wide(x) - wide(running_mean).view(-1, *[1] * (x.dim() - 2))
        return _affine(centred, scale, wide(bias)).to(x.dtype)
    channels = wide(x).transpose(0, 1).flatten(1)  # (c, n)
    if channels.shape[1]:
        with torch.no_grad():
            for running, of_batch in (
                (running_mean, channels.mean(1)),
                (running_var, channels.var(1)),
            ):
                if running is not None:
                    running.copy_(wide(running) * (1 - momentum) + of_batch * momentum)
    y = torch.layer_norm(channels, [channels.shape[1]], eps=eps)
    y = y.view(x.shape[1], len(x), *x.shape[2:]).transpose(0, 1)
    return _affine(y, wide(weight), wide(bias)).to(x.dtype)


def batch_norm_of_torch(
    input: Tensor,  # as torch.batch_norm names it
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """`torch.batch_norm`, whose arguments have another order."""
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``y (n, channels, *)`` scaled and shifted by channel."""
    shape = -1, *[1] * (y.dim() - 2)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


@rule("native_group_norm")
def _group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    c: int,
    pixels: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    size = c // groups * pixels
    y, mean, rstd = _normalized(x.reshape(n, groups, size), [size], eps)
    return _affine(y.view(x.shape), weight, bias), mean.view(n, groups), rstd.view(n, groups)


@rule("native_group_norm_backward")
def _group_norm_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    n: int,
    c: int,
    pixels: int,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    of_groups, of_channels = (n, groups, c // groups * pixels), (n, groups, c // groups, pixels)
    mean, rstd = mean.view(n, groups, 1), rstd.view(n, groups, 1)
    scaled = _affine(g, weight, None).reshape(of_groups)
    dx, _, _ = _layer_norm_backward(
        scaled, x.reshape(of_groups), of_groups[2:], mean, rstd, None, None, output_mask
    )
    normal = (x.reshape(of_groups).double() - mean.double()) * rstd.double()
    terms = g.reshape(of_channels).double()
    dw, db = (
        exact_sum(t, [0, 3]).view(c).float() for t in (terms * normal.view(of_channels), terms)
    )
    return dx.view(x.shape), dw, db


def _parts(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m, x − m and p, float32, and Σp, float64. Where m is −∞, x replaces x − m.

    A tensor without dimensions takes the dimension 0 or −1, as in PyTorch.
    """
    empty = x.numel() == 0
    largest = x.sum(dims, True) if empty else x.amax(dims, True)
    shifted = x - torch.where(largest == -math.inf, 0.0, largest)
    p = in_pieces(exp64, shifted)
    return largest, shifted, p, exact_sum(p, dims, True)


@rule("_softmax")
def softmax(x: Tensor, dim: int, _: object = None) -> Tensor:
    """e^x / Σ e^x over ``dim`` of float32 ``x``; NaN where all are −∞."""
    _, _, p, total = _parts(x, [dim])
    return p / total.float()


@rule("_softmax_backward_data")
def _softmax_backward(g: Tensor, y: Tensor, dim: int, _: object) -> Tensor:
    total = exact_sum(g.double() * y.double(), [dim], True)
    return ((g.double() - total) * y.double()).float()


@rule("_log_softmax")
def _log_softmax(x: Tensor, dim: int, half: bool) -> Tensor:
    _, shifted, _, total = _parts(x, [dim])
    return (shifted.double() - log64(total)).float()


@rule("_log_softmax_backward_data")
def _log_softmax_backward(g: Tensor, y: Tensor, dim: int, _: object) -> Tensor:
    return (g.double() - exp64(y.double()) * exact_sum(g, [dim], True)).float()


@rule("logsumexp")
def _logsumexp(x: Tensor, dims: list[int], keepdim: bool = False) -> Tensor:
    largest, _, _, total = _parts(x, dims)
    result = torch.where(largest.isinf(), largest.double(), log64(total) + largest.double()).float()
    return (
        result if keepdim or not x.dim() else result.squeeze(tuple(dims) or tuple(range(x.dim())))
    )


@rule("embedding_dense_backward")
def _embedding_backward(
    g: Tensor, indices: Tensor, rows: int, padding: int, by_frequency: bool
) -> Tensor:
    if by_frequency:
        raise ConfigError(
            "exact arithmetic has no scale_grad_by_freq of an embedding; leave it out"
        )
    gradient = exact_index_sum(g.reshape(indices.numel(), g.shape[-1]), indices.flatten(), rows)
    if padding >= 0:
        gradient[padding] = 0
    return gradient


@rule("index_add", any_dtype=True)
def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    if not x.is_floating_point():
        return torch.index_add(x, dim, index, source, alpha=alpha)
    into, index = x if x.dim() else x.view(1), index.reshape(-1)
    shape = list(into.shape)
    shape[dim] = len(index)
    places = [None] * (dim % into.dim()) + [index]
    return _index_put(into, places, times(source.reshape(shape), alpha), True).view(x.shape)


@rule("mse_loss_backward")
def _mse_loss_backward(g: Tensor, x: Tensor, target: Tensor, reduction: int) -> Tensor:
    factor = 2 / x.numel() if reduction == 1 and x.numel() else 2.0  # 1: the mean
    return (x - target) * factor * g


@rule("_index_put_impl", any_dtype=True)
def _index_put(
    x: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
    *_: object,
) -> Tensor:
    adds_floats = accumulate and x.is_floating_point()
    if not adds_floats and (accumulate or values.numel() < 2):
        put: Tensor = torch.ops.aten.index_put(x, indices, values, accumulate)
        return put
    places = torch.arange(x.numel(), device=x.device).view(x.shape)  # in the flat tensor
    places = places[tuple(slice(None) if i is None else i for i in indices)]
    terms, places = values.expand(places.shape).reshape(-1, 1), places.flatten()
    if adds_floats:
        return x + exact_index_sum(terms, places, x.numel()).view(x.shape)
    # Several threads may write to a place, so all write the same value, the last.
    order = torch.arange(len(places), device=x.device)
    last = order.new_zeros(x.numel()).scatter_reduce(0, places, order, "amax")
    return torch.index_put(x.flatten(), (places,), terms[last[places], 0]).view(x.shape)


@rule("scatter_add", any_dtype=True)
def _scatter_add(
    x: Tensor, dim: int, index: Tensor, source: Tensor | float, accumulate: bool = True
) -> Tensor:
    if not (x.dim() and index.dim()):  # a number is a tensor of one element
        source = source.reshape(-1) if isinstance(source, Tensor) else source
        return _scatter_add(x.reshape(-1), dim, index.reshape(-1), source, accumulate).view(x.shape)
    if not index.numel():  # an empty index may have any dtype, and other dimensions
        return x.clone()
    indices = [torch.arange(n, device=x.device) for n in index.shape]
    places = [*torch.meshgrid(*indices, indexing="ij")]
    places[dim] = index
    values = (
        source[tuple(map(slice, index.shape))]
        if isinstance(source, Tensor)
        else x.new_tensor(source)
    )
    return _index_put(x, places, values, accumulate)


EXACT_RULES["scatter"] = widened(partial(_scatter_add, accumulate=False))


def _plus_zero(name: str, *operands: object, **options: object) -> Result:
    """The operator's results, with +0 for −0: processors differ in the zero that they choose."""
    result = getattr(torch.ops.aten, name)(*operands, **options)
    if not isinstance(result, Tensor):
        return tuple(t + 0.0 if t.is_floating_point() else t for t in result)
    return result + 0.0 if result.is_floating_point() else result


CHOOSING = ("amax", "amin", "clamp", "clamp_max", "clamp_min", "max", "maximum", "min", "minimum")
EXACT_RULES.update({name: partial(_plus_zero, name) for name in CHOOSING})


@rule("sort", any_dtype=True)
def _sort(
    x: Tensor, dim: int = -1, descending: bool = False, *, stable: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Sort stably: without, the order of equal elements depends on the width of vectors."""
    return tuple(torch.sort(x, dim=dim, descending=descending, stable=True))  # type: ignore[return-value]


@rule("topk", any_dtype=True)
def _topk(
    x: Tensor, k: int, dim: int = -1, largest: bool = True, _: bool = True
) -> tuple[Tensor, Tensor]:
    values, indices = _sort(x, dim, largest)
    if not x.dim():  # of a number, k is 0 or 1
        return (values, indices) if k else (values.new_empty(0), indices.new_empty(0))
    return values.narrow(dim, 0, k).contiguous(), indices.narrow(dim, 0, k).contiguous()


@rule("max_pool2d_with_indices_backward")
def _max_pool_backward(
    g: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    zeros, places = torch.zeros_like(x).flatten(-2), indices.flatten(-2)
    return _scatter_add(zeros, -1, places, g.flatten(-2)).view(x.shape)
