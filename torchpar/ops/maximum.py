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
from torchpar.library.private import has_unbacked_symbols
from torchpar.library.rules import Context, Sharding, Spec, VmapInfo
from torchpar.library.transforms import needs_formula
from torchpar.ops._operator import (
    check_strided,
    is_emulating,
    no_flops,
    operator,
    runs_kernels,
    save_operands,
)
from torchpar.ops.sizes import are_alike, has_symbols

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
    """Check all but the shapes of the arguments; return the device of the result."""
    if not (a.dtype in _DTYPES and b.dtype in _DTYPES):
        name, dtype = ("b", b.dtype) if a.dtype in _DTYPES else ("a", a.dtype)
        raise RuntimeError(
            f"torchpar::maximum: {name} has dtype {dtype}, expected a real integer dtype up to 64 "
            "bits, bool, float16, bfloat16, float32 or float64"
        )
    check_strided("maximum", "a", a)
    check_strided("maximum", "b", b)
    if a.device == b.device or (b.dim() == 0 and b.is_cpu):
        return a.device
    if a.dim() == 0 and a.is_cpu:
        return b.device
    raise RuntimeError(f"torchpar::maximum: b is on {b.device}, expected a's device {a.device}")


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if has_symbols(a, b) or a.shape != b.shape:  # broadcast_shapes takes longer than a launch
        try:
            torch.broadcast_shapes(a.shape, b.shape)
        except RuntimeError as e:
            if type(e) is not RuntimeError:  # a compiler's, of sizes that it cannot compare
                raise
            raise RuntimeError(
                f"torchpar::maximum: b has shape {tuple(b.shape)}, which does not broadcast with "
                f"a's {tuple(a.shape)}"
            ) from None


def _kernels() -> ModuleType:
    from torchpar.kernels import maximum

    return maximum


@operator("maximum(Tensor a, Tensor b) -> Tensor", kernels=_kernels, flops=no_flops)
def _op(a: Tensor, b: Tensor, *, wrap: Wrap) -> Tensor:
    if not (a.is_cuda or b.is_cuda or is_emulating(a, b)):
        device = _device(a, b)
        try:
            out = torch.maximum(a, b)
        except RuntimeError:  # to compare the shapes before would take time
            _check_shapes(a, b)
            raise
        # An empty result of ATen may have other strides. A symbol is no size of 0.
        is_dense = (wrap is not None and out._has_symbolic_sizes_strides) or out.numel()
        return out if is_dense else _empty(a, b, device)
    from torchpar.kernels import maximum as kernel

    if wrap is None and (found := kernel.new_maximum(a, b, _empty_result)) is not None:
        return found
    out = _empty_result(a, b)
    a, b = (t.to(out.device).expand_as(out) for t in (a, b))
    kernel.maximum(a, b, out, wrap)
    return out


def _empty_result(a: Tensor, b: Tensor) -> Tensor:
    """Check operands for a GPU, and make an uninitialised tensor for their maximum."""
    device = _device(a, b)
    _check_shapes(a, b)
    return _empty_elementwise((a, b), torch.result_type(a, b), device)


def _are_alike(a: Tensor, b: Tensor) -> bool:
    """Whether the operands are right, and need not be broadcast, converted or moved.

    To check for each of these, and to do it, takes longer than a launch.
    """
    dtype = a.dtype
    if dtype != b.dtype or dtype not in _DTYPES or a.device != b.device:
        return False
    return _have_one_shape(a, b)


def _have_one_shape(a: Tensor, b: Tensor) -> bool:
    return are_alike(a.shape, b.shape) if has_symbols(a, b) else a.shape == b.shape


def _empty_elementwise(
    operands: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An uninitialised tensor of the broadcast shape of ``operands``, with ATen's strides."""
    layouts = [(t.shape, t.stride()) for t in operands]
    if any([t._has_symbolic_sizes_strides for t in operands]):  # which have no hash
        return torch.empty_strided(*_layout.__wrapped__(*layouts), dtype=dtype, device=device)
    shape = operands[0].shape
    # The general rule takes 80 µs for shapes and strides that are new to it.
    if all([t.shape == shape and t.is_contiguous() for t in operands]):
        return torch.empty_like(
            operands[0], dtype=dtype, device=device, memory_format=torch.contiguous_format
        )
    return torch.empty_strided(*_layout(*layouts), dtype=dtype, device=device)


@lru_cache(1024)
def _layout(
    *layouts: tuple[torch.Size, tuple[int, ...]],
) -> tuple[torch.Size, tuple[int, ...]]:
    """ATen's shape and strides of an elementwise result, for those of the operands."""
    operands = [torch.empty_strided(*layout, device="meta") for layout in layouts]
    elementwise = torch.maximum if len(operands) == 2 else torch.addcmul  # of two, or of three
    result = elementwise(*operands)
    return result.shape, result.stride()


@_op.register_fake
def _maximum_fake(a: Tensor, b: Tensor) -> Tensor:
    device = _device(a, b)
    _check_shapes(a, b)
    return _empty(a, b, device)


def _empty(a: Tensor, b: Tensor, device: torch.device) -> Tensor:
    dtype = torch.result_type(a, b)
    if device.type != "cuda":
        # Except on CUDA, ATen casts its operands before it chooses the strides of the result.
        a, b = a.to(dtype), b.to(dtype)
    return _empty_elementwise((a, b), dtype, device)


def _formula(a: Tensor, b: Tensor) -> Tensor:
    _device(a, b)
    _check_shapes(a, b)
    return torch.maximum(a, b)


def _backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad
    # One launch for both gradients costs less than ATen's launches for one gradient. Sizes that
    # depend on data may be 1: then the layout of a sum is not known before the launch.
    depends_on_data = type(g) is not Tensor and has_unbacked_symbols(g)
    if runs_kernels(g, a, b) and not depends_on_data and not needs_formula(g, a, b):
        da, db = _backward_op(g, a, b, need_a, need_b)
        return da.to(a) if need_a else None, db.to(b) if need_b else None
    # Autograd sums over broadcast dimensions, of symbols too, and then converts to the dtype.
    of_larger = torch.where(a == b, g / 2, g)
    da = of_larger.masked_fill(a < b, 0) if need_a else None
    return da, of_larger.masked_fill(b < a, 0) if need_b else None


_op.register_autograd(_backward, setup_context=save_operands, formula=_formula)


@_op.register_vmap
def _maximum_vmap(
    info: VmapInfo, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor
) -> tuple[Tensor, int]:
    samples = [sample(t, dim) for t, dim in zip((a, b), in_dims, strict=True)]
    _device(*samples)
    _check_shapes(*samples)
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
    return t[(slice(None), *[None] * (dims + 1 - t.dim()))]


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


# The backward on a GPU, from g = dL/dy: gradients of the shapes of a and b, and of g's dtype. A
# gradient that is not needed has no element.


@operator(
    "maximum_backward(Tensor g, Tensor a, Tensor b, bool need_a=True, bool need_b=True)"
    " -> (Tensor, Tensor)",
    kernels=_kernels,
    flops=no_flops,
)
def _backward_op(
    g: Tensor, a: Tensor, b: Tensor, need_a: bool = True, need_b: bool = True, *, wrap: Wrap
) -> tuple[Tensor, Tensor]:
    from torchpar.kernels import maximum as kernel

    if wrap is None and need_a and need_b:
        found = kernel.new_gradients(g, a, b, _empty_backward)
        if found is not None:
            return found
    da, db = _empty_backward(g, a, b, need_a, need_b)
    if not (_are_alike(a, b) and a.device == g.device and _have_one_shape(a, g)):
        a, b = (t.to(g.device).expand_as(g) for t in (a, b))
    kernel.maximum_backward(g, a, b, da if need_a else None, db if need_b else None, wrap)
    return da, db


@_backward_op.register_fake
def _empty_backward(
    g: Tensor, a: Tensor, b: Tensor, need_a: bool = True, need_b: bool = True
) -> tuple[Tensor, Tensor]:
    da = _empty_gradient(a, g, a, b) if need_a else g.new_empty(0)
    if need_a and need_b and _have_one_shape(da, b) and _have_one_shape(b, g):
        return da, torch.empty_strided(da.shape, da.stride(), dtype=da.dtype, device=da.device)
    return da, _empty_gradient(b, g, a, b) if need_b else g.new_empty(0)


def _empty_gradient(t: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """An uninitialised gradient of ``t``: contiguous if it is a sum, else with ATen's strides."""
    added = g.dim() - t.dim()
    if not are_alike((1,) * added + t.shape, g.shape):
        return g.new_empty(t.shape)
    whole = _empty_elementwise((g, a, b), g.dtype, g.device)
    return whole if added == 0 else g.new_empty_strided(t.shape, whole.stride()[added:])
