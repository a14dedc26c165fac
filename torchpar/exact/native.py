# SPDX-License-Identifier: MIT
"""The native operator's checks and the metadata of its results, for operators that a rule computes.

The native operator is called on zeros of the operands' shapes and strides, once for each
combination of shapes and strides. So the exact mode refuses the same operands as PyTorch, by
PyTorch's error. On CPUs the zeros have memory, because PyTorch accepts meta tensors with biases of
any size, any range of `uniform_` and any dimension of a softmax. Where an operator writes, operands
that share memory get zeros that share memory.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

_REMEMBERED = 4096  # calls, of which each takes about 2 KB
_MASKS = (torch.bool, torch.uint8)


class Metadata(NamedTuple):
    """Shape, dtype and strides of a result."""

    shape: torch.Size
    dtype: torch.dtype
    strides: tuple[int, ...]


class _Memory(NamedTuple):
    """The bytes of a memory that several operands share; ``number`` identifies the memory."""

    number: int
    start: int
    size: int


class _Layout(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    memory: tuple[int, int, int] | None  # number, size and offset in bytes
    chosen: int  # number of elements that a mask among indices chooses


def check_native(
    func: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[Metadata | None, ...]:
    """Raise the error of the native operator, or return the metadata of each of its results.

    A result that is not a tensor has None. Values, such as indices, are not checked.
    """
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if any(t._has_symbolic_sizes_strides for t in tensors):  # while a program is traced
        return (None,)
    on_cpu = all(t.is_cpu for t in tensors)
    schema = getattr(func, "_schema", None)
    memories = _shared(tensors) if on_cpu and schema is not None and schema.is_mutable else {}
    described = (_described(tuple(part), memories) for part in (args, kwargs.items()))
    return _metadata(func, "cpu" if on_cpu else "meta", torch.get_default_dtype(), *described)


def like_native(result: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same tensor, with its elements in the order of ``strides``, as code may view it."""
    if result.stride() == strides or len(strides) != result.dim():
        return result
    order = sorted(range(result.dim()), key=lambda dim: -strides[dim])
    places = sorted(range(result.dim()), key=lambda i: order[i])
    return result.permute(order).contiguous().permute(places)


def _span(t: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its memory, and the byte after its last."""
    first = int(t.storage_offset())
    last = first + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return first * t.itemsize, (last + 1) * t.itemsize


def _shared(tensors: Iterable[Tensor]) -> dict[int, _Memory]:
    """The memories that several of the tensors share, by their addresses."""
    by_address: dict[int, list[tuple[int, int]]] = {}
    for t in tensors:
        if t.numel():
            by_address.setdefault(t.untyped_storage().data_ptr(), []).append(_span(t))
    shared = {address: spans for address, spans in by_address.items() if len(spans) > 1}
    memories = {}
    for number, (address, spans) in enumerate(shared.items()):
        # A multiple of 16 bytes, where an element of any dtype may begin.
        start = min(first for first, _ in spans) // 16 * 16
        memories[address] = _Memory(number, start, max(last for _, last in spans) - start)
    return memories


def _described(value: object, memories: Mapping[int, _Memory], is_listed: bool = False) -> Hashable:
    """A hashable description of an argument: a tensor's layout, or the type and the value."""
    if isinstance(value, Tensor):
        memory = (
            memories.get(value.untyped_storage().data_ptr()) if memories and value.numel() else None
        )
        if memory is None:
            place, strides = None, _dense(value)
        else:
            place = memory.number, memory.size, _span(value)[0] - memory.start
            strides = value.stride()
        chosen = int(value.count_nonzero()) if is_listed and value.dtype in _MASKS else 0
        return _Layout(tuple(value.shape), strides, value.dtype, place, chosen)
    if isinstance(value, list | tuple):
        return tuple([_described(one, memories, isinstance(value, list)) for one in value])
    if isinstance(value, torch.Generator | torch.device):
        return None
    return type(value), value


def _dense(t: Tensor) -> tuple[int, ...]:
    """The strides of a tensor without gaps, so that a view of a larger tensor takes less memory."""
    strides = t.stride()
    first, last = _span(t)
    if not t.numel() or last - first <= t.numel() * t.itemsize:
        return strides
    dense, step = [0] * t.dim(), 1
    for dim in sorted(range(t.dim()), key=lambda dim: (strides[dim], t.shape[dim])):
        dense[dim], step = step, step * t.shape[dim]
    return tuple(dense)


def _zeros(described: object, device: str, memories: dict[int, Tensor]) -> Any:
    """An argument that `_described` describes so, of zeros."""
    if isinstance(described, _Layout):
        shape, strides, dtype, memory, chosen = described
        if memory is None:
            zeros = torch.empty_strided(shape, strides, dtype=dtype, device=device).zero_()
        else:
            number, size, offset = memory
            shared = memories.setdefault(
                number, torch.zeros(size, dtype=torch.uint8, device=device)
            )
            zeros = torch.empty(0, dtype=dtype, device=device)
            zeros.set_(shared.untyped_storage(), offset // dtype.itemsize, shape, strides)
        if chosen and device != "meta":
            zeros[torch.unravel_index(torch.arange(chosen, device=device), shape)] = 1
        return zeros
    if not isinstance(described, tuple):
        return None
    if len(described) == 2 and isinstance(described[0], type):
        return described[1]
    return tuple([_zeros(one, device, memories) for one in described])


@lru_cache(_REMEMBERED)
def _metadata(
    func: Callable[..., object],
    device: str,
    default_dtype: torch.dtype,
    args: Hashable,
    kwargs: Hashable,
) -> tuple[Metadata | None, ...]:
    """The metadata. Integers to which a number is added get the default dtype."""
    state = torch.get_rng_state()
    memories: dict[int, Tensor] = {}
    try:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            named = dict(_zeros(kwargs, device, memories))
            if "device" in named:
                named["device"] = device
            results = func(*_zeros(args, device, memories), **named)
    finally:
        torch.set_rng_state(state)
    results = results if isinstance(results, tuple | list) else (results,)
    return tuple(
        Metadata(t.shape, t.dtype, t.stride()) if isinstance(t, Tensor) else None for t in results
    )
