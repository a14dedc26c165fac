# SPDX-License-Identifier: MIT
"""Elementwise maximum.

    y = max(a, b)

With g = dL/dy:

    dL/da = g where a > b, g/2 where a = b, 0 where a < b        (dL/db with a and b exchanged)

Where a or b is NaN, both gradients are g, as in `torch.maximum`. Gradients are summed over broadcast
dimensions.
"""

from typing import Any

import torch
from torch import Tensor

from torchpar.ops._library import (
    Wrap,
    empty_elementwise,
    operator,
    register_autograd,
    register_fake,
    register_sharding,
    register_vmap,
    sample,
)

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
_DTYPES = (*_INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def maximum(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise maximum of two tensors, with `torch.maximum`'s semantics.

    ``y[i] = max(a[i], b[i])``; NaN in either operand gives NaN; equal elements share the gradient.

    Args:
        a: any shape; uint8, int8 to int64, bool, float16, bfloat16, float32 or float64.
        b: a shape that broadcasts with ``a``'s; any of the same dtypes.

    Returns:
        A new tensor of the broadcast shape, with the dtype of `torch.result_type` and the strides of
        `torch.maximum`.

    Raises:
        RuntimeError: an unsupported dtype, shapes that do not broadcast, or two devices (a
            zero-dimensional CPU tensor is taken with any).
    """
    return _op(a, b)  # type: ignore[no-any-return]


def _device(a: Tensor, b: Tensor) -> torch.device:
    """Check the arguments; return the device of the result."""
    for name, t in (("a", a), ("b", b)):
        if t.dtype not in _DTYPES:
            raise RuntimeError(
                f"torchpar::maximum: {name} has dtype {t.dtype}, expected a real integer dtype up to 64 "
                "bits, bool, float16, bfloat16, float32 or float64"
            )
    if a.shape != b.shape:  # broadcast_shapes takes longer than the rest of a small call
        try:
            torch.broadcast_shapes(a.shape, b.shape)
        except RuntimeError:
            raise RuntimeError(
                f"torchpar::maximum: b has shape {tuple(b.shape)}, which does not broadcast with a's "
                f"{tuple(a.shape)}"
            ) from None
    if a.device == b.device or (b.dim() == 0 and b.is_cpu):
        return a.device
    if a.dim() == 0 and a.is_cpu:
        return b.device
    raise RuntimeError(f"torchpar::maximum: b is on {b.device}, expected a's device {a.device}")


@operator("maximum(Tensor a, Tensor b) -> Tensor", kernels="maximum")
def _maximum(a: Tensor, b: Tensor, *, wrap: Wrap) -> Tensor:
    device = _device(a, b)
    if device.type != "cuda":
        out = torch.maximum(a, b)
        return out if out.numel() else _empty(a, b, device)  # ATen may give an empty result other strides
    from torchpar.kernels import maximum as kernels

    out = empty_elementwise(a, b, torch.result_type(a, b), device)
    kernels.maximum(a.to(device).expand(out.shape), b.to(device).expand(out.shape), out, wrap)
    return out


_op = torch.ops.torchpar.maximum.default


@register_fake("maximum")
def _(a: Tensor, b: Tensor) -> Tensor:
    return _empty(a, b, _device(a, b))


def _empty(a: Tensor, b: Tensor, device: torch.device) -> Tensor:
    dtype = torch.result_type(a, b)
    if device.type != "cuda":
        # Except on CUDA, ATen casts its operands before it chooses the strides of the result.
        a, b = a.to(dtype), b.to(dtype)
    return empty_elementwise(a, b, dtype, device)


def _formula(a: Tensor, b: Tensor) -> Tensor:
    _device(a, b)
    return torch.maximum(a, b)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    need_a, need_b, _ = ctx.needs_input_grad
    return _share(g, a, b) if need_a else None, _share(g, b, a) if need_b else None


def _share(g: Tensor, mine: Tensor, other: Tensor) -> Tensor:
    share = torch.where(mine == other, g / 2, g).masked_fill(mine < other, 0)
    return share.sum_to_size(mine.shape).to(mine)


register_autograd("maximum", _backward, setup_context=_setup_context, formula=_formula)


@register_vmap("maximum")
def _(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    samples = [sample(t, dim) for t, dim in zip((a, b), in_dims, strict=True)]
    _device(*samples)
    # Inside the vmap, a zero-dimensional tensor does not take part in type promotion.
    dtype = torch.result_type(*samples)
    dims = max(t.dim() for t in samples)

    def align(t: Tensor, dim: int | None) -> Tensor:
        if dim is not None:
            t = t.movedim(dim, 0)
            t = t.reshape(t.shape[0], *(1,) * (dims + 1 - t.dim()), *t.shape[1:])
        return t.to(dtype)

    return maximum(align(a, in_dims[0]), align(b, in_dims[1])), 0


@register_sharding("maximum")
def _(a: Any, b: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    rank = max(a.ndim, b.ndim)

    def placement(t: Any, dim: int) -> Any:
        own = dim - (rank - t.ndim)
        return Shard(own) if own >= 0 and t.shape[own] > 1 else Replicate()

    split = [([Shard(dim)], [placement(a, dim), placement(b, dim)]) for dim in range(rank)]
    return [([Replicate()], [Replicate(), Replicate()]), *split]
