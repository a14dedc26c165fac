# SPDX-License-Identifier: MIT
"""Memory of tensors on the host, as a launch finds it: places, and what was never written."""

import ctypes
import gc
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import compress
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nogpu.machine.address_space import HIGHEST, LOWEST
from nogpu.machine.allocation import (
    ALIGNED,
    LARGEST_UNIT,
    Allocation,
    Unwritten,
    page_count,
    zeros,
)
from nogpu.machine.gpu_state import TooLarge
from nogpu.machine.memory import Space
from nogpu.machine.registers import Values
from nogpu.machine.vector_clocks import UNWRITTEN
from nogpu.native.layout import PAGE


class Storage(NamedTuple):
    """The memory of a tensor on the CPU."""

    address: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.address + self.nbytes


SMALL = 2**26  # bytes that are taken without a look at the free memory: they are asked for often
LiveTensor = tuple[int, int, Tensor]  # its first address, the one behind its last one, and it

# What the memory of torch.empty holds, by the bytes of an element: no number, and hardly what a
# program would write everywhere.
PATTERNS = {
    1: b"\xa7",
    2: b"\xd5\xff",
    4: b"\xc7\xa3\xd5\xff",
    8: b"\x6e\xd3\x91\x5b\xc7\xa3\xf5\xff",
}


def storage_of(t: Tensor) -> Storage:
    storage = t.untyped_storage()
    return Storage(storage.data_ptr(), storage.nbytes())


IS_CPU: Callable[[Tensor], bool] = torch._C.TensorBase.is_cpu.__get__  # type: ignore[attr-defined]


def has_host_memory(t: Tensor) -> bool:
    """Whether a tensor is on the CPU to PyTorch's C++, also if the stand-in shows it on "cuda"."""
    if not torch._C._is_torch_function_enabled():
        return IS_CPU(t)
    with torch._C.DisableTorchFunction():  # or the stand-in answers
        return IS_CPU(t)


def bytes_at(address: int, count: int) -> Values:
    """Return the memory at an address as an array of bytes."""
    return np.frombuffer(memoryview((ctypes.c_uint8 * count).from_address(address)), np.uint8)


class HostMemory:
    """The memory of tensors: their places in the address space of a launch, and what is unwritten.

    Attributes:
        unwritten: what nobody has written, by the storages of tensors.
        saves: whether the bytes that a launch accesses are saved, so that they can be restored.
    """

    def __init__(self) -> None:
        self.unwritten: dict[Storage, Unwritten] = {}
        self.saves = False
        self._saved: list[Allocation] = []
        # The memory of each launch of a block that is undone; None outside of one.
        self._undo: list[Allocation] | None = None

    def begin(self, space: Space) -> None:
        """Let tensors have places in the space of another launch, or of another schedule."""
        self.space, space.find, space.between = space, self._find, self._between
        self._places: dict[Storage, Allocation] = {}
        self._live: list[LiveTensor] | None = None
        self._is_tidy = False  # without tensors that nothing refers to

    def place(self, t: Tensor, name: str) -> Allocation:
        """Return the memory of a tensor on the CPU, at its own address."""
        storage = storage_of(t)
        if storage not in self._places:
            self._places[storage] = self._placed(t, storage, name)
        return self._places[storage]

    def _placed(self, t: Tensor, storage: Storage, name: str) -> Allocation:
        start, end = storage.address, storage.end
        overlapping = self.space.overlapping(start, end)  # storages share memory, by NumPy perhaps
        for one in overlapping:
            if one.start <= start and end <= one.end:
                return one
            start, end = min(start, one.start), max(end, one.end)
            self.space.allocations.remove(one)
        base = start & -ALIGNED
        padded = -(-(end - base) // ALIGNED) * ALIGNED
        data = bytes_at(base, padded)
        unit = min(t.element_size(), LARGEST_UNIT)
        dtype = str(t.dtype).removeprefix("torch.")
        full_name = f"{name} ({dtype} {list(t.shape)})"
        _check_memory(full_name, padded // unit)
        made = Allocation(full_name, base, end - base, unit, data, start)
        if (start, end) == (storage.address, storage.end):
            made.index = _index_of(t, name)
            made.itemsize = t.element_size()
        merged = [other for other, place in self._places.items() if place in overlapping]
        for member in (storage, *merged):
            self._places[member] = made
        if self.saves or self._undo is not None:
            made.saved = zeros(page_count(len(data)) * PAGE, np.uint8)
            self._saved.append(made)
        self._mark_unwritten([storage, *merged], made)
        return self.space.add(made)

    def _mark_unwritten(self, storages: Sequence[Storage], place: Allocation) -> None:
        """Let nobody have written those bytes that hold what `note_empty` put there."""
        found = [self.unwritten[one] for one in storages if one in self.unwritten]
        if len(found) == 1 and found[0].base == place.base:
            place.unwritten = found[0]
            place.refine(min(place.unit, found[0].unit))
        elif found:  # storages that share memory
            place.refine(1)
            place.begin_all()
            for one in found:
                start = one.base - place.base
                for n in range(one.pages):
                    held = place.data[start : start + one.end][n * PAGE : (n + 1) * PAGE]
                    of_page = one.of_page(n, held)
                    place.writes[start + n * PAGE :][: len(held)][of_page] = UNWRITTEN

    def written_by_launch(self, t: Tensor) -> Tensor | None:
        """Return which elements of a tensor the last launch has written.

        Returns:
            None if others than this launch have written the tensor's memory, too.
        """
        place = self._places.get(storage_of(t))
        if place is None or place.unwritten is None or t.element_size() % place.unit:
            return None
        units = t.element_size() // place.unit
        strides = (*(units * stride for stride in t.stride()), 1)
        first = (t.data_ptr() - place.base) // place.unit
        written = torch.from_numpy(place.writes > UNWRITTEN)
        return written.as_strided((*t.shape, units), strides, first).all(-1)

    def _find(self, address: int) -> Allocation | None:
        """Return the memory of a live tensor that has the address, which a kernel has loaded."""
        if self._live is None:
            self._live, self._is_tidy = _live_tensors(), False
        found = _at(address, self._live)
        if found is not None and not self._is_tidy:  # nothing may refer to what was found
            del found
            self._live = None
            gc.collect()
            self._live, self._is_tidy = _live_tensors(), True
            found = _at(address, self._live)
        return None if found is None else self.place(found, "a tensor")

    def _between(self, address: int) -> tuple[int, int]:
        """Return the first and the last address around one of no live tensor that have none."""
        live = self._live or []
        after = bisect_right(live, address, key=itemgetter(0))
        first = live[after - 1][1] if after else LOWEST
        return first, live[after][0] - 1 if after < len(live) else HIGHEST

    def keep_unwritten(self) -> None:
        """Remember what is still unwritten after the launch."""
        for storage, place in self._places.items():
            if storage not in self.unwritten:
                continue
            one, unit = self.unwritten[storage], place.unit
            if one is place.unwritten:
                pages = place.touched_pages()
                pages = pages[pages < one.pages]
                rows = place.by_page(place.writes)
                rows = rows[pages] if len(pages) < len(rows) else rows
            else:  # it shares memory with others
                pages, first = np.arange(one.pages), (one.base - place.base) // unit
                elements = np.arange(first, first + one.pages * PAGE // unit)
                rows = one.by_page(place.writes[np.minimum(elements, len(place.writes) - 1)])
            written = rows != UNWRITTEN
            is_whole = len(pages) == one.pages and written.all()
            if not is_whole:
                one = self._own(storage)
                one.note(pages, np.repeat(written, unit, 1), unit)
            if is_whole or not one.left:
                del self.unwritten[storage]

    def forget_unwritten(self) -> None:
        """Take all memory of the launch for written."""
        for storage in self._places:
            self.unwritten.pop(storage, None)

    def _own(self, storage: Storage) -> Unwritten:
        """Return what is unwritten of a storage, to be changed: `undone` keeps what it was."""
        if self._undo is not None:
            self.unwritten[storage] = self.unwritten[storage].copy()
        return self.unwritten[storage]

    def note_written(self, t: Tensor) -> None:
        """An operator has written a tensor, which may be a part of its storage."""
        storage, size = storage_of(t), t.element_size()
        entry = self.unwritten.get(storage)
        if entry is None:
            return
        if storage.nbytes % size or (t.is_contiguous() and t.numel() * size == storage.nbytes):
            del self.unwritten[storage]
            return
        entry = self._own(storage)
        strides = (*(size * stride for stride in t.stride()), 1)
        of_t = torch.from_numpy(entry.written).as_strided(
            (*t.shape, size), strides, entry.first + size * t.storage_offset()
        )
        written = int((~of_t).sum())
        of_t.fill_(True)
        if entry.note_count(written, size) == 0:
            del self.unwritten[storage]

    def note_empty(self, t: Tensor) -> None:
        """An operator such as torch.empty has returned a tensor."""
        storage = storage_of(t)
        if storage.nbytes:
            pattern = PATTERNS[min(t.element_size(), 8)]
            whole = bytes_at(storage.address, storage.nbytes // len(pattern) * len(pattern))
            elements = whole.view(f"u{len(pattern)}")
            elements[:] = np.frombuffer(pattern, elements.dtype)
            self.unwritten[storage] = Unwritten(*storage, pattern)

    # Bytes as they were before a launch

    def restore(self) -> None:
        """Give memory the content that was saved, and forget that."""
        _restore(self._saved)

    def forget_saved(self) -> None:
        """Take for granted what launches have written so far; `undone` restores it still."""
        if self._undo is not None:
            self._undo += self._saved
        self._saved.clear()

    @contextmanager
    def undone(self) -> Iterator[list[Allocation]]:
        """Let memory be after the block as it was before, but for what is written without launches.

        The faults and the launches stay. The block gets a list of what its launches have accessed.
        """
        unwritten, self._undo = dict(self.unwritten), []
        try:
            yield self._undo
        finally:
            before, self._undo = self._undo, None
            _restore(before)
            self.unwritten = unwritten


def _restore(before: list[Allocation]) -> None:
    """Give memory the content that it had before, the last one first."""
    while before:
        before.pop().restore()


def _at(address: int, live: list[LiveTensor]) -> Tensor | None:
    """Return the tensor that has an address."""
    after = bisect_right(live, address, key=itemgetter(0))
    return live[after - 1][2] if after and address < live[after - 1][1] else None


def _live_tensors() -> list[LiveTensor]:
    """Return the tensors on the CPU that live now, in the order of their addresses.

    Each has its first address, and the one behind its last one. Tensors within others are left out.
    """
    found = []
    objects = gc.get_objects()
    are_tensors = map((Tensor, torch.nn.Parameter).__contains__, map(type, objects))
    for one in compress(objects, are_tensors):
        if not has_host_memory(one):
            continue
        try:
            start, nbytes = storage_of(one)
        except (RuntimeError, NotImplementedError):  # sparse tensors, for example
            continue
        if nbytes:
            found.append((start, start + nbytes, one))
    found.sort(key=lambda one: (one[0], -one[1]))
    kept, end = [], 0
    for one in found:
        if one[1] > end:
            kept.append(one)
            end = one[1]
    return kept


def _index_of(t: Tensor, name: str) -> Callable[[int], str]:
    """Return a function that names the element at an offset in the storage of ``t``."""
    shape, strides = [int(n) for n in t.shape], [int(n) for n in t.stride()]
    width, first = t.element_size(), int(t.storage_offset())

    def index(offset: int) -> str:
        position = offset // width - first
        order = sorted(range(len(shape)), key=lambda d: -strides[d])
        found, rest = [0] * len(shape), position
        for d in order:
            if strides[d] > 0:
                found[d], rest = divmod(rest, strides[d])
        if (
            rest == 0
            and position >= 0
            and all(0 <= i < n for i, n in zip(found, shape, strict=True))
        ):
            return f"{name}[{', '.join(map(str, found))}]"
        return f"element {offset // width} of the storage of {name}"

    return index


def free_memory(
    machine: Path = Path("/proc/meminfo"), container: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return the bytes of memory that this process can get, or None if the system does not say so.

    A container may have a limit below what the machine has (files ``memory.*`` of cgroup v2).
    """
    found = []
    with suppress(OSError):
        sizes = dict(line.split(":") for line in machine.read_text("utf-8").splitlines())
        found += [1024 * int(sizes["MemAvailable"].split()[0])] if "MemAvailable" in sizes else []
    with suppress(OSError):
        limit, used = ((container / f"memory.{name}").read_text() for name in ("max", "current"))
        if limit.strip() != "max":
            uses = (container / "memory.stat").read_text("utf-8").splitlines()
            # Copies of files, which the system drops when it needs their memory.
            dropped = int(dict(line.split() for line in uses)["inactive_file"])
            found.append(max(0, int(limit) - int(used) + dropped))
    return min(found, default=None)


def _check_memory(name: str, elements: int) -> None:
    """Raise `TooLarge` if who has read and written each element cannot be kept."""
    check_memory(f"{name} takes", 8 * elements, " to be emulated, 8 bytes for each element")


def check_memory(what: str, needed: int, why: str = "") -> None:
    """Raise `TooLarge` if so many bytes are not free.

    Where the system promises more memory than there is, it would kill the process instead.

    Args:
        what: the beginning of the message, "x takes".
        why: its words behind the number.
    """
    if needed < SMALL:
        return
    there = free_memory()
    if there is not None and needed > there:
        raise TooLarge(
            f"{what} {needed / 2**30:,.1f} GiB{why}, and {there / 2**30:,.1f} GiB are free; take a "
            "smaller tensor"
        )
