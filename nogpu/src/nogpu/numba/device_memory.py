# SPDX-License-Identifier: MIT
"""Device memory of numba.cuda, which is memory of this process, and copies of it."""

import ctypes
from bisect import bisect_right, insort
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nogpu.triton.host_memory import HostMemory, storage_of

ALIGNED = 256  # to which CUDA aligns allocations
GAP = 1024  # bytes on both sides of an allocation that belong to nobody


class DeviceArray(NamedTuple):
    """An array that a kernel is given: its address, its type, and its shape, with strides."""

    address: int
    dtype: npt.DTypeLike
    shape: Sequence[int]
    strides: Sequence[int]  # in bytes


class DeviceMemory:
    """The allocations of numba.cuda; a launch finds them as the memory of tensors.

    Args:
        host_memory: of the emulator, which knows what nobody has written.

    Attributes:
        tensors: those of PyTorch that kernels are given, by their addresses.
    """

    def __init__(self, host_memory: HostMemory):
        self.host_memory = host_memory
        self.tensors: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._starts: list[int] = []  # in their order
        self._bytes: dict[int, Tensor] = {}  # uint8, by the address
        # What the last launch has called an allocation, and the bytes of an element, by address.
        self._named: dict[int, tuple[str, int]] = {}

    def allocate(self, size: int, is_given: bool = False) -> int:
        """Return the address of new memory, which nobody has written.

        Args:
            is_given: the host may write it without this class, as mapped memory.
        """
        raw = np.zeros(max(size, 1) + 2 * GAP + ALIGNED, np.uint8)
        start = -(-(raw.ctypes.data + GAP) // ALIGNED) * ALIGNED - raw.ctypes.data
        made = torch.from_numpy(raw[start : start + max(size, 1)])
        address = made.data_ptr()
        insort(self._starts, address)
        self._bytes[address] = made
        if not is_given:
            width = next(width for width in (8, 4, 2, 1) if size % width == 0)
            integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[width]
            self.host_memory.note_empty(_strided(made, 0, integer, [size // width], [width]))
        return address

    def free(self, address: int) -> None:
        """Forget an allocation, or memory that was none."""
        held = self._bytes.pop(address, None)
        if held is not None:
            self._starts.remove(address)
            self._named.pop(address, None)
            self.host_memory.unwritten.pop(storage_of(held), None)

    @property
    def size(self) -> int:
        """The bytes of all allocations."""
        return sum(map(Tensor.numel, self._bytes.values()))

    def extents(self, address: int) -> tuple[int, int]:
        """Return the first address and the size of the allocation that has an address."""
        held = self._at(address, 0)
        if held is None:
            raise ValueError(f"the address {address:#x} is in no device memory")
        return held.data_ptr(), held.numel()

    def _at(self, address: int, size: int) -> Tensor | None:
        """Return the bytes of the allocation that has so many bytes from an address on."""
        before = bisect_right(self._starts, address) - 1
        if before < 0:
            return None
        held = self._bytes[self._starts[before]]
        return held if address + size <= held.data_ptr() + held.numel() else None

    def place(self, array: DeviceArray, name: str) -> None:
        """Let the present launch know an array by the name of its parameter."""
        held = self._at(array.address, 0)
        if held is None:
            if (tensor := self.tensors.get(array.address)) is not None:
                self.host_memory.place(tensor, name)
            return
        itemsize = np.dtype(array.dtype).itemsize
        self._named[held.data_ptr()] = name, itemsize
        dtype = _type_of(np.dtype(array.dtype))
        offset, strides = array.address - held.data_ptr(), list(array.strides)
        width = 1 if dtype is None else dtype.itemsize
        if dtype is None or offset % width or any(stride % width for stride in strides):
            self.host_memory.place(held, name)  # its elements have no name
        elif min(strides, default=0) < 0 or 0 in array.shape:
            whole = held.numel() // width
            self.host_memory.place(_strided(held, 0, dtype, [whole], [width]), name)
        else:
            self.host_memory.place(_strided(held, offset, dtype, array.shape, strides), name)

    # Copies

    def to_device(self, to: int, source: int, size: int) -> None:
        """Copy bytes of the host to the device."""
        held = self._at(to, size)
        ctypes.memmove(to, source, size)
        self._note_written(held, to, size)

    def to_host(self, to: int, source: int, size: int) -> str:
        """Copy bytes of the device to the host.

        Returns:
            Which of them nobody has written; "" if all were.
        """
        ctypes.memmove(to, source, size)
        held = self._at(source, size)
        entry = None if held is None else self.host_memory.unwritten.get(storage_of(held))
        if held is None or entry is None:
            return ""
        start = source - entry.base
        left = int(np.count_nonzero(~entry.written[start : start + size]))
        if not left:
            return ""
        name, itemsize = self._named.get(held.data_ptr(), ("an array", 1))
        what = "elements" if itemsize > 1 else "bytes"
        return f"{left // itemsize:,} of {size // itemsize:,} {what} of {name}"

    def between(self, to: int, source: int, size: int) -> None:
        """Copy bytes within the device."""
        self.to_device(to, source, size)

    def fill(self, to: int, value: int, size: int) -> None:
        """Set bytes of the device."""
        held = self._at(to, size)
        ctypes.memset(to, value, size)
        self._note_written(held, to, size)

    def _note_written(self, held: Tensor | None, address: int, size: int) -> None:
        if held is not None and size:
            start = address - held.data_ptr()
            self.host_memory.note_written(_strided(held, start, torch.uint8, [size], [1]))


def _type_of(dtype: np.dtype[np.generic]) -> torch.dtype | None:
    """Return PyTorch's type for NumPy's; None if there is none."""
    try:
        return torch.from_numpy(np.empty(0, dtype)).dtype
    except TypeError:  # of records and dates
        return None


def _strided(
    held: Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]
) -> Tensor:
    """Return a view of an allocation, whose offset and strides are in bytes.

    Each operator here returns a view: a mode of PyTorch takes other ones for writes.
    """
    width = dtype.itemsize
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    flat = held[offset : offset + last + width].view(dtype)
    return flat.as_strided(tuple(shape), [stride // width for stride in strides])
