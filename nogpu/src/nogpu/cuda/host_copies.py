# SPDX-License-Identifier: MIT
"""Copies between the host and the device in a capture: those that PyTorch refuses.

PyTorch refuses all copies from and to memory that is not pinned, and a GPU those that the program
waits for. A copy from pinned memory may take other memory on the way, which is not pinned: so it is
where the copy changes the order of the elements, or repeats them (`copy_kernel_cuda`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nogpu.cuda import places
from nogpu.cuda.devices import MASKS, fills_mask
from nogpu.cuda.operations import tensors_in
from nogpu.cuda.reading_operators import INDEXED
from nogpu.cuda.types import Function, Keywords, Operator
from nogpu.record.source import calls_under_way

PUT = INDEXED - {"index"}
SEQUENCES = (list, tuple, range, np.ndarray)  # of which PyTorch makes a tensor on the host
MOST_AS_TUPLE = 32  # a list that is shorter is a tuple if one of its items is no number
MAKING = {"tensor", "as_tensor", "asarray", "new_tensor"}  # tensors from numbers of Python
MAKING_SPARSE = {f"sparse_{name}_tensor" for name in ("coo", "csr", "csc", "bsr", "bsc")}
MAKING_SPARSE |= {"sparse_compressed_tensor"}
# Operators whose second operand PyTorch copies to where the first one is.
COPYING = {"bernoulli", "bernoulli_", "slice_scatter", "select_scatter", "diagonal_scatter"}
COPYING |= {"as_strided_scatter", "copy"}
COPIES = {torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten._foreach_copy_}

# The words of PyTorch and of CUDA.
CANNOT_COPY = (
    "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is "
    "pinned"
)
NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"

TO_DEVICE = "a copy from the host's memory"
FROM_DEVICE = "copy_ of a tensor to the host"
NOT_PINNED = "a copy with non_blocking=True between the device and memory that is not pinned"
REORDERED = (
    "a copy with non_blocking=True that rearranges pinned memory, for which PyTorch takes other "
    "memory that is not pinned,"
)
INDEX = "the copy of an index from the host's memory"
NUMBER_BY_INDEX = "the copy of a number of the host to where an index points"
NUMBER_IN_WHERE = "the copy of a number of the host that torch.where makes"
ONE_ELEMENT = (
    "the copy of a number into one element (x[0:1] = number makes none, x[0] = number does)"
)
ONE_PIXEL = "the copy of a number that affine_grid makes for one row or column"


@dataclass(frozen=True)
class HostCopy:
    """A copy that is refused; ``is_pinned`` if that is because the program waits for it alone."""

    what: str
    is_pinned: bool = False

    @property
    def words(self) -> str:
        return NOT_PERMITTED if self.is_pinned else CANNOT_COPY

    @property
    def why(self) -> str:
        if self.what in (NOT_PINNED, REORDERED):
            return "is refused in a capture"
        return "is one that the program waits for"


def copied_by_operator(func: Operator, args: Sequence[Any], kwargs: Keywords) -> HostCopy | None:
    """Return a copy between host and device that an operator makes, if a capture refuses it.

    PyTorch puts a number of Python into several elements by a kernel, and into one element, as in
    x[0] = 1.0, by such a copy.
    """
    name = func.overloadpacket.__name__ if func.namespace == "aten" else ""
    if name in INDEXED:
        return _copied_by_index(name, args)
    if name == "affine_grid_generator":
        return HostCopy(ONE_PIXEL) if any(size <= 1 for size in args[1][2:]) else None
    if name in COPYING and places.is_on_device(args[0]):
        return _first_on_host(TO_DEVICE, args[1:2])
    if func is torch.ops.aten.where.self and any(map(places.is_on_device, args)):
        return _first_on_host(NUMBER_IN_WHERE, args)
    if func.overloadpacket not in COPIES or name == "_to_copy":
        return None
    pairs = zip(tensors_in(args[:1]), tensors_in(args[1:2]), strict=False)
    found = (copied(*pair, is_asynchronous(args, kwargs)) for pair in pairs)
    return next(filter(None, found), None)


def _first_on_host(what: str, values: Sequence[object]) -> HostCopy | None:
    """Return the copy of the first of these that is on the host."""
    for t in values:
        if _is_on_host(t) and isinstance(t, Tensor):
            return HostCopy(what, places.is_pinned(t))
    return None


def _is_on_host(t: object) -> bool:
    return isinstance(t, Tensor) and places.mark_of(t) is False and t.numel() > 0


def _copied_by_index(name: str, args: Sequence[Any]) -> HostCopy | None:
    """Return what PyTorch copies for an operator with indices (`make_info`, `_index_put_impl_`).

    Of a mask of the host it copies from pinned memory, and does not wait.
    """
    if not places.is_on_device(args[0]):
        return None
    indices = [t for t in tensors_in([args[1]]) if t.dtype not in MASKS]
    if index := _first_on_host(INDEX, indices):
        return index
    is_put = name in PUT and not fills_mask(tuple(args))
    return _first_on_host(NUMBER_BY_INDEX, args[2:3]) if is_put else None


def copied_by_function(func: Function, args: Sequence[Any], kwargs: Keywords) -> HostCopy | None:
    """Return a copy as `copied_by_operator` does; also one of numbers and lists of Python."""
    if func in (Tensor.__getitem__, Tensor.__setitem__) and places.is_on_device(args[0]):
        indices = list(_indices(args[1]))
        if any(isinstance(one, SEQUENCES) and len(one) for one in indices):
            return HostCopy(INDEX)
        is_number = func is Tensor.__setitem__ and isinstance(args[2], Number)
        return HostCopy(NUMBER_BY_INDEX) if is_number and _is_by_tensors(indices) else None
    if makes_from_host(func, args, kwargs):
        return HostCopy(TO_DEVICE)
    if func != torch.Tensor.copy_ or len(args) < 2:
        return None
    to, source = args[:2]
    return copied(to, source, is_asynchronous(args, kwargs))


def _indices(index: object) -> Iterator[object]:
    """Yield the indices of ``x[index]``, as `treatSequenceAsTuple` of PyTorch does."""
    is_tuple = isinstance(index, tuple)
    if isinstance(index, (list, range)) and len(index) < MOST_AS_TUPLE:
        kinds = (Tensor, slice, type(None), type(...), *SEQUENCES)
        is_tuple = any(isinstance(one, kinds) for one in index)
    if is_tuple:
        yield from index  # type: ignore[misc]
    elif not isinstance(index, np.ndarray) or index.ndim:
        yield index


def _is_by_tensors(indices: Sequence[object]) -> bool:
    """Whether a number of Python goes to where tensors point, and not to where one mask is true."""
    tensors = [t for t in indices if isinstance(t, Tensor) and (t.dim() or t.dtype in MASKS)]
    is_mask = len(tensors) == 1 and tensors[0].dtype in MASKS
    return bool(tensors) and not (is_mask and places.mark_of(tensors[0]) is not False)


def copied(to: object, source: object, is_asynchronous: bool) -> HostCopy | None:
    """Return the copy of a tensor to another one, if a capture refuses it."""
    if not isinstance(to, Tensor) or not isinstance(source, Tensor):
        return None
    is_to_device = places.is_on_device(to)
    if is_to_device == places.is_on_device(source) or not to.numel():
        return None
    is_pinned = places.is_pinned(source if is_to_device else to)
    is_straight = is_pinned and not _takes_memory_on_the_way(to, source, is_asynchronous)
    if not is_asynchronous:
        is_number = is_to_device and source.dim() == to.dim() == 0
        what = (ONE_ELEMENT if is_number else TO_DEVICE) if is_to_device else FROM_DEVICE
        return HostCopy(what, is_straight)
    if is_straight:
        return None
    return HostCopy(REORDERED if is_pinned else NOT_PINNED)


def _takes_memory_on_the_way(to: Tensor, source: Tensor, is_asynchronous: bool) -> bool:
    """Whether PyTorch copies by memory of the host that it has allocated, which is not pinned."""
    sizes = tuple(to.size())
    given = _expanded(source, sizes)
    has_one_type = to.dtype == source.dtype
    if has_one_type and _are_one_block(sizes, to.stride(), given):
        return False
    is_to_device = places.is_on_device(to)
    is_dense = _is_contiguous(sizes, given if is_to_device else to.stride())
    # Types are converted on the device, if the program does not wait, and otherwise on the host.
    return not (is_dense and (is_asynchronous or has_one_type))


def _expanded(t: Tensor, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a tensor that is expanded to these sizes."""
    missing = len(sizes) - t.dim()
    own = zip(t.size(), t.stride(), sizes[missing:], strict=True)
    return (0,) * missing + tuple(stride if n == size else 0 for n, stride, size in own)


def _are_one_block(
    sizes: tuple[int, ...], strides: tuple[int, ...], others: tuple[int, ...]
) -> bool:
    """Whether two tensors fill their memory without gaps, and in the same order."""
    if prod(sizes) == 1:
        return True
    long = [one for one in zip(sizes, strides, others, strict=True) if one[0] > 1]
    ordered = sorted(long, key=lambda one: one[1], reverse=True)
    in_order = [[one[n] for one in ordered] for n in range(3)]
    return in_order[1] == in_order[2] and _is_contiguous(in_order[0], in_order[1])


def _is_contiguous(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def is_later(func: Operator, args: Sequence[object], kwargs: Keywords) -> bool:
    """Whether a replay reads the memory of the host that an operator copies to the device."""
    if func.overloadpacket not in COPIES or not is_asynchronous(args, kwargs):
        return False
    source = args[0] if func.overloadpacket is torch.ops.aten._to_copy else args[1]
    return all(map(places.is_pinned, tensors_in([source])))


def is_asynchronous(args: Sequence[object], kwargs: Keywords) -> bool:
    """Whether copy_ with these arguments returns before it has copied."""
    return bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))


def makes_from_host(func: Function, args: Sequence[object], kwargs: Keywords) -> bool:
    """Whether a function makes a tensor on the device from numbers of Python."""
    if func is torch.unravel_index:  # of the shape
        return any(map(places.is_on_device, (*args[:1], kwargs.get("indices"))))
    name = getattr(func, "__name__", "")
    if name == "new" and places.is_on_device(args[0]):
        return any(isinstance(one, SEQUENCES) and len(one) for one in args[1:])
    if name in MAKING_SPARSE:
        is_there = all(map(places.is_on_device, args[:2]))
        return bool(kwargs.get("device") == places.DEVICE and not is_there)
    if name not in MAKING:
        return False
    if func is torch.Tensor.new_tensor and kwargs.get("device") is None:
        return places.is_on_device(args[0])
    is_there = len(args) > 0 and places.is_on_device(args[0])
    return bool(kwargs.get("device") == places.DEVICE and not is_there)


INSTEAD_OF_COPIES = {
    NOT_PINNED: "call pin_memory() on the tensor of the host before the capture",
    REORDERED: (
        "copy to a tensor of the same shape and order, and call contiguous() before pin_memory()"
    ),
    INDEX: "make the index on the device before the capture",
    NUMBER_BY_INDEX: "give a value on the device, or call index_fill_ or masked_fill_",
    NUMBER_IN_WHERE: "give a number of Python, or a tensor on the device",
    ONE_PIXEL: "make the grid before the capture",
}
COPY_BEFORE = "copy before the capture, into a tensor that the graph reads"
UPDATE_AFTER = "call update_parameters after graph.replay()"


def instead_of_copy(what: str) -> str:
    """Say what to write in the place of a copy between host and device."""
    for frame in calls_under_way():
        place = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if place == ("torch.optim.swa_utils", "update_parameters"):
            return UPDATE_AFTER
    return INSTEAD_OF_COPIES.get(what, COPY_BEFORE)
