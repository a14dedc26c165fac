# SPDX-License-Identifier: MIT
"""Elementwise maximum.

    y = max(a, b)

With g = dL/dy:

    dL/da = g where a > b, g/2 where a = b, 0 where a < b        (dL/db with a and b exchanged)

Where a or b is NaN, both gradients are g, as in `torch.maximum`. Gradients are summed over
broadcast dimensions.

A second operator, used on GPUs, computes the gradients that are needed. It has no gradient: second
derivatives are derivatives of the plain formula.
"""

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from torchpar.kernels import Wrap
from torchpar.library import sample
from torchpar.library.rules import Context, Sharding, Spec, VmapInfo
from torchpar.library.transforms import needs_formula
from torchpar.ops._operator import (
    check_strided,
    is_emulating,
    operator,
    runs_kernels,
    save_operands,
)

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
_DTYPES = frozenset((*_INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64))


def maximum(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise maximum of two tensors, with `torch.maximum`'s semantics.

    ``y[i] = max(a[i], b[i])``; NaN in either operand gives NaN; of equal elements each gets half
    the gradient.

    Args:
        a: any shape; uint8, int8 to int64, bool, float16, bfloat16, float32 or float64.
        b: a shape that broadcasts with ``a``'s; any of the same dtypes.

    Returns:
        A new tensor of the broadcast shape, with the dtype of `torch.result_type` and the strides
        of `torch.maximum`.

    Raises:
        RuntimeError: an unsupported dtype, shapes that do not broadcast, or two devices (a
            zero-dimensional CPU tensor is taken with any).
    """
    return _op(a, b)  # type: ignore[no-any-return]


def _device(a: Tensor, b: Tensor) -> torch.device:
    """Check the arguments; return the device of the result."""
    if not (a.dtype in _DTYPES and b.dtype in _DTYPES):
        name, dtype = ("b", b.dtype) if a.dtype in _DTYPES else ("a", a.dtype)
        raise RuntimeError(
            f"torchpar::maximum: {name} has dtype {dtype}, expected a real integer dtype up to 64 "
            "bits, bool, float16, bfloat16, float32 or float64"
        )
    check_strided("maximum", "a", a)
    check_strided("maximum", "b", b)
    if a.shape != b.shape:  # broadcast_shapes takes longer than the rest of a small call
        try:
            torch.broadcast_shapes(a.shape, b.shape)
        except RuntimeError:
            raise RuntimeError(
                f"torchpar::maximum: b has shape {tuple(b.shape)}, which does not broadcast with "
                f"a's {tuple(a.shape)}"
            ) from None
    if a.device == b.device or (b.dim() == 0 and b.is_cpu):
        return a.device
    if a.dim() == 0 and a.is_cpu:
        return b.device
    raise RuntimeError(f"torchpar::maximum: b is on {b.device}, expected a's device {a.device}")


def _kernels() -> ModuleType:
    from torchpar.kernels import maximum

    return maximum


@operator("maximum(Tensor a, Tensor b) -> Tensor", kernels=_kernels)
def _op(a: Tensor, b: Tensor, *, wrap: Wrap) -> Tensor:
    if not (a.is_cuda or b.is_cuda or is_emulating()):
        device = _device(a, b)
        out = torch.maximum(a, b)
        # An empty result of ATen may have other strides.
        return out if out.numel() else _empty(a, b, device)
    from torchpar.kernels import maximum as kernel

    if wrap is None and (found := kernel.maximum_again(a, b)) is not None:
        return found
    device = _device(a, b)
    out = _empty_elementwise((a, b), torch.result_type(a, b), device)
    first, second = a.to(device), b.to(device)
    kernel.maximum(first.expand_as(out), second.expand_as(out), out, wrap)
    is_whole = first is a and second is b and a.device == device
    if wrap is None and is_whole and out.numel() and out.dtype != torch.bool:
        kernel.remember_maximum(a, b, out)
    return out


def _are_alike(a: Tensor, b: Tensor) -> bool:
    """Whether nothing is wrong, or to be broadcast, converted or moved.

    To check and to do all of this takes longer than a launch.
    """
    dtype = a.dtype
    return dtype == b.dtype and dtype in _DTYPES and a.shape == b.shape and a.device == b.device


def _empty_elementwise(
    operands: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An uninitialised tensor of the broadcast shape of ``operands``, with ATen's strides."""
    shape = operands[0].shape
    # The general rule takes 80 µs for shapes and strides that are new to it.
    if all([t.shape == shape and t.is_contiguous() for t in operands]):
        return torch.empty_like(
            operands[0], dtype=dtype, device=device, memory_format=torch.contiguous_format
        )
    shape = torch.broadcast_shapes(*(t.shape for t in operands))
    layouts = [(t.shape, t.stride()) for t in operands]
    try:
        strides = _strides(*layouts)
    except TypeError:  # the sizes of a compiler, which have no hash
        strides = _strides.__wrapped__(*layouts)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


@lru_cache(1024)
def _strides(*layouts: tuple[torch.Size, tuple[int, ...]]) -> tuple[int, ...]:
    """ATen's strides of an elementwise result, for the shapes and strides of the operands."""
    operands = [torch.empty_strided(*layout, device="meta") for layout in layouts]
    elementwise = torch.maximum if len(operands) == 2 else torch.addcmul  # of two, or of three
    return elementwise(*operands).stride()


@_op.register_fake
def _maximum_fake(a: Tensor, b: Tensor) -> Tensor:
    return _empty(a, b, _device(a, b))


def _empty(a: Tensor, b: Tensor, device: torch.device) -> Tensor:
    dtype = torch.result_type(a, b)
    if device.type != "cuda":
        # Except on CUDA, ATen casts its operands before it chooses the strides of the result.
        a, b = a.to(dtype), b.to(dtype)
    return _empty_elementwise((a, b), dtype, device)


def _formula(a: Tensor, b: Tensor) -> Tensor:
    _device(a, b)
    return torch.maximum(a, b)


def _backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad
    # One launch for both gradients costs less than ATen's launches for one.
    if runs_kernels(g) and not needs_formula(g, a, b):
        da, db = _backward_op(g, a, b, need_a, need_b)
    else:
        of_larger = torch.where(a == b, g / 2, g)
        da = _reduced(of_larger.masked_fill(a < b, 0), a) if need_a else None
        db = _reduced(of_larger.masked_fill(b < a, 0), b) if need_b else None
    return da.to(a) if need_a else None, db.to(b) if need_b else None


def _reduced(gradient: Tensor, t: Tensor) -> Tensor:
    # The call would take microseconds.
    return gradient if gradient.shape == t.shape else gradient.sum_to_size(t.shape)


_op.register_autograd(_backward, setup_context=save_operands, formula=_formula)


@_op.register_vmap
def _maximum_vmap(
    info: VmapInfo, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor
) -> tuple[Tensor, int]:
    samples = [sample(t, dim) for t, dim in zip((a, b), in_dims, strict=True)]
    _device(*samples)
    # Inside the vmap, a zero-dimensional tensor does not take part in type promotion.
    dtype = torch.result_type(*samples)
    dims = max(t.dim() for t in samples)
    return maximum(
        *(_aligned(t, dim, dims).to(dtype) for t, dim in zip((a, b), in_dims, strict=True))
    ), 0


def _aligned(t: Tensor, dim: int | None, dims: int) -> Tensor:
    """``t`` with its batch dimension before ``dims`` other dimensions."""
    if dim is None:
        return t
    t = t.movedim(dim, 0)
    return t.reshape(t.shape[0], *(1,) * (dims + 1 - t.dim()), *t.shape[1:])


@_op.register_sharding
def _maximum_sharding(a: Spec, b: Spec) -> list[Sharding]:
    from torch.distributed.tensor import Replicate, Shard

    rules: list[Sharding] = [([Replicate()], [Replicate(), Replicate()])]
    dims = max(a.ndim, b.ndim)
    for dim in range(dims):
        placed = [(t, dim - (dims - t.ndim)) for t in (a, b)]
        operands = [Shard(d) if d >= 0 and t.shape[d] > 1 else Replicate() for t, d in placed]
        rules.append(([Shard(dim)], operands))
    return rules


# The backward on a GPU, from g = dL/dy: gradients of the shapes of a and b, and of g's dtype. One
# that is not needed has no element.


@operator(
    "maximum_backward(Tensor g, Tensor a, Tensor b, bool need_a=True, bool need_b=True)"
    " -> (Tensor, Tensor)",
    kernels=_kernels,
)
def _backward_op(
    g: Tensor, a: Tensor, b: Tensor, need_a: bool = True, need_b: bool = True, *, wrap: Wrap
) -> tuple[Tensor, Tensor]:
    from torchpar.kernels import maximum as kernel

    if wrap is None and need_a and need_b:
        found = kernel.maximum_backward_again(g, a, b)
        if found is not None:
            return found
    da, db = _empty_backward(g, a, b, need_a, need_b)
    alike = _are_alike(a, b) and a.shape == g.shape and a.device == g.device
    if not alike:
        a, b = (t.to(g.device).expand_as(g) for t in (a, b))
    kernel.maximum_backward(g, a, b, da if need_a else None, db if need_b else None, wrap)
    if wrap is None and need_a and need_b and alike:
        kernel.remember_backward(g, a, b, da, db)
    return da, db


@_backward_op.register_fake
def _empty_backward(
    g: Tensor, a: Tensor, b: Tensor, need_a: bool = True, need_b: bool = True
) -> tuple[Tensor, Tensor]:
    da = _empty_gradient(a, g, a, b) if need_a else g.new_empty(0)
    if need_a and need_b and da.shape == b.shape == g.shape:
        return da, torch.empty_strided(da.shape, da.stride(), dtype=da.dtype, device=da.device)
    return da, _empty_gradient(b, g, a, b) if need_b else g.new_empty(0)


def _empty_gradient(t: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """An uninitialised gradient of ``t``: contiguous if it is a sum, else with ATen's strides."""
    added = g.dim() - t.dim()
    if t.shape != g.shape[added:] or any(size != 1 for size in g.shape[:added]):
        return g.new_empty(t.shape)
    whole = _empty_elementwise((g, a, b), g.dtype, g.device)
    return whole if added == 0 else g.new_empty_strided(t.shape, whole.stride()[added:])
