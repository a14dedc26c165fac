# SPDX-License-Identifier: MIT
"""Allocations: bytes, and a shadow that says of each element who wrote it and who has read it.

A launch takes time for the pages that it touches, not for all of a tensor's memory. What is kept of
each element begins as zeros, which the system makes where they are touched. The first access to a
page begins it (`Allocation.begin`, and `begin_page` in core.c): it is noted as touched, and what is
unwritten of it is found. All that is read, compared or copied afterwards is that of touched pages.
"""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nogpu.machine.registers import Values, all_true
from nogpu.machine.vector_clocks import GIVEN, UNWRITTEN
from nogpu.native.layout import PAGE

if TYPE_CHECKING:
    from nogpu.native.warps import AllocationView

ALIGNED = 128  # to which an allocation's base is rounded down
LARGEST = 16  # bytes of an element
LARGE = 2**25  # bytes, from which on no huge pages are taken


def zeros(count: int, dtype: npt.DTypeLike) -> Values:
    """Return zeros of which the system makes those pages that are touched.

    `numpy.zeros` asks for huge pages, of 2 MiB each, which take less time where all are touched.
    """
    size = count * np.dtype(dtype).itemsize
    if size < LARGE or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(count, dtype)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype)


def page_count(size: int) -> int:
    return -(-size // PAGE)


def by_page(array: Values, count: int) -> Values:
    """Return a view of an array with a row for each of ``count`` pages."""
    return array.reshape(count, -1)


class Unwritten:
    """Memory of torch.empty, of which nobody has written some bytes.

    Args:
        pattern: 1, 2, 4 or 8 bytes, which the host has put there again and again.

    Attributes:
        first: the offset of the memory from ``base``, an aligned address.
        written: whether a byte from ``base`` on was written, zeros at first.
        left: how many bytes nobody has written.
        unit: elements of so many bytes were written as a whole.
    """

    def __init__(self, address: int, nbytes: int, pattern: bytes):
        self.base = address & -ALIGNED
        self.first, self.end = address - self.base, address - self.base + nbytes
        self.pattern = pattern * (8 // len(pattern))
        self.pages = page_count(self.end)
        self.written = zeros(self.pages * PAGE, np.bool_)
        self.written[: self.first] = self.written[self.end :] = True
        self.left, self.unit = nbytes, math.gcd(self.first, LARGEST)

    def copy(self) -> Unwritten:
        made = copy.copy(self)
        made.written = self.written.copy()
        return made

    def note(self, pages: Values, written: Values, unit: int) -> None:
        """Note which bytes of pages were written ``(len(pages), PAGE)``."""
        rows = self.by_page(self.written)
        before = rows[pages]
        after = rows[pages] = before | written
        self.note_count(int(np.count_nonzero(after)) - int(np.count_nonzero(before)), unit)

    def note_count(self, count: int, unit: int) -> int:
        """Note that so many bytes of ``written`` were changed, and return how many are left."""
        self.unit = math.gcd(self.unit, unit)
        self.left -= count
        if self.left <= 0:  # elements that share memory were counted several times
            self.left = int(np.count_nonzero(~self.written))
        return self.left

    def by_page(self, array: Values) -> Values:
        """Return a view of ``array`` with a row for each page."""
        return by_page(array, self.pages)

    def of_page(self, page: int, data: Values) -> Values:
        """Return which bytes of a page from ``base`` on are unwritten, given its bytes.

        If one of these has changed, then the host has written the page by other means than
        PyTorch's operators, such as NumPy, or another tensor has the address now.
        """
        start = page * PAGE
        unwritten = ~self.written[start : start + len(data)]
        place = (start - self.first) % 8
        pattern = np.frombuffer(self.pattern * (len(data) // 8 + 2), np.uint8)[place:]
        is_untouched = (data == pattern[: len(data)])[unwritten].all()
        return unwritten if is_untouched else np.zeros_like(unwritten)


MANY = 32  # threads of a warp have read an element
POISON = 0xFF  # NaN in each format, and −1
LARGEST_UNIT = 16  # bytes that an element of the shadow stands for at first


class Allocation:
    """Bytes from address ``base``, and of each of their units who wrote and who has read it.

    Args:
        unit: bytes; accesses of fewer bytes make it smaller.
        data: the bytes; by default they are new, and nobody has written them.
        start: the first address that belongs to it, where ``base`` is rounded down.

    Attributes:
        pages: of memory that is given, whether each page was accessed; None: all were.
        unwritten: what nobody has written of it, for pages that are accessed later.
        saved: the bytes of each page before its first access, or None.
    """

    def __init__(
        self,
        name: str,
        base: int,
        size: int,
        unit: int = LARGEST_UNIT,
        data: Values | None = None,
        start: int | None = None,
    ):
        self.name, self.base, self.size, self.unit = name, base, size, unit
        self.start = base if start is None else start
        padded = -(-size // 128) * 128
        self.data = np.full(padded, POISON, np.uint8) if data is None else data
        self.pages: Values | None = None
        self.unwritten: Unwritten | None = None
        self.saved: Values | None = None
        if data is None:
            self.writes = np.full(padded // unit, UNWRITTEN, np.int32)
        else:
            self.pages = np.zeros(page_count(len(data)), np.bool_)
            self.writes = zeros(len(self.pages) * PAGE // unit, np.int32)
        self.reads = zeros(len(self.writes), np.int32)
        # Reads that the last read did not know; made when there are any.
        self.others: Values | None = None
        # Of CUDA C++: the thread of a warp that has written an element, and that has read it, which
        # is MANY for several; None: that is not followed.
        self.lane_writes: Values | None = None
        self.lane_reads: Values | None = None
        self.barriers: dict[int, Any] = {}  # the mbarriers in it, by their offsets
        self.published: set[int] = set()  # the tensormaps in it, by their places
        self.acquired: dict[int, int] = {}  # the event of the last fence for each of these
        self.index: Callable[[int], str] | None = (
            None  # a function that names the element at an offset
        )
        self.itemsize = 0  # bytes of an element, where the allocation is a tensor's
        self.touched: Values | None = None  # sectors, by slots of the counters
        self.view: AllocationView | None = None  # for the core in C

    def changed(self) -> None:
        """Tell the core that one of the arrays is another one, or a barrier was made."""
        if self.view is not None:
            self.view.update()

    def follow_lanes(self) -> None:
        """Note from now on which thread of a warp accesses an element."""
        self.lane_writes = np.zeros(len(self.writes), np.uint8)
        self.lane_reads = np.zeros(len(self.writes), np.uint8)
        self.changed()

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.base + self.size

    def content(self) -> Values:
        """Return the bytes that belong to it, without those that pad them."""
        return self.data[self.start - self.base : self.size]

    def refine(self, unit: int) -> None:
        """Let each element of the shadow stand for ``unit`` bytes."""
        count, self.unit = self.unit // unit, unit
        if count == 1:
            return
        self.writes, self.reads = (self._repeat(a, count) for a in (self.writes, self.reads))
        if self.others is not None:
            self.others = self._repeat(self.others, count)
        if self.lane_writes is not None and self.lane_reads is not None:
            self.lane_writes = self._repeat(self.lane_writes, count)
            self.lane_reads = self._repeat(self.lane_reads, count)
        self.changed()

    def _repeat(self, array: Values, count: int) -> Values:
        if self.pages is None:
            return np.repeat(array, count)
        made = zeros(len(array) * count, array.dtype)
        touched = self.touched_pages()
        self.by_page(made)[touched] = np.repeat(self.by_page(array)[touched], count, 1)
        return made

    # Pages

    def by_page(self, array: Values) -> Values:
        """Return a view of ``array`` with a row for each page that has memory, or with one row."""
        return by_page(array, 1 if self.pages is None else len(self.pages))

    def touched_pages(self) -> Values:
        """Return the numbers of the pages that were accessed."""
        return np.zeros(1, np.int64) if self.pages is None else np.flatnonzero(self.pages)

    def copy_of(self, array: Values) -> Values:
        """Return a copy of ``array``, which is zero in other pages."""
        if self.pages is None:
            return array.copy()
        made, touched = zeros(len(array), array.dtype), self.touched_pages()
        self.by_page(made)[touched] = self.by_page(array)[touched]
        return made

    def touch_also(self, other: Allocation) -> None:
        """Note what was touched of another allocation of the same bytes."""
        assert self.touched is not None
        assert other.touched is not None
        if self.pages is None or other.pages is None:
            self.touched |= other.touched
            return
        self.pages |= other.pages
        pages = other.touched_pages()
        for mine, its in zip(self.touched, other.touched, strict=True):
            self.by_page(mine)[pages] |= self.by_page(its)[pages]

    def touched_sectors(self) -> Values:
        """Return which sectors were touched, ``(slots, touched pages, sectors of a page)``."""
        assert self.touched is not None
        if self.pages is None:
            return self.touched[:, None]
        rows = self.touched.reshape(len(self.touched), len(self.pages), -1)
        return rows if self.pages.all() else rows[:, self.touched_pages()]

    def touch(self, offsets: Values, width: int) -> None:
        """Begin the pages of accesses, each of which is in one page."""
        if self.pages is None:
            return
        numbers = offsets // PAGE
        if not all_true(self.pages[numbers]):
            for page in np.unique(numbers[~self.pages[numbers]]).tolist():
                self.begin(page)

    def begin(self, page: int) -> None:
        """Find what is unwritten of a page before its first access, as `begin_page` of core.c."""
        start = page * PAGE
        data = self.data[start : start + PAGE]
        assert self.pages is not None
        self.pages[page] = True
        if self.saved is not None:
            self.saved[start : start + len(data)] = data
        if self.unwritten is not None and page < self.unwritten.pages:
            of_page = self.unwritten.of_page(page, data)[:: self.unit]
            rows = self.writes[start // self.unit :][: len(of_page)]
            rows[of_page] = UNWRITTEN

    def begin_all(self) -> None:
        """Begin each page."""
        assert self.pages is not None
        for page in np.flatnonzero(~self.pages).tolist():
            self.begin(page)

    def _held_and_saved(self) -> Iterator[tuple[int, Values, Values]]:
        """Yield of each page that was accessed its offset, its bytes, and what was saved of it."""
        assert self.saved is not None
        for page in self.touched_pages().tolist():
            first = max(page * PAGE, self.start - self.base)
            held = self.data[first : min((page + 1) * PAGE, self.size)]
            yield first, held, self.saved[first:][: len(held)]

    def restore(self) -> None:
        """Give the pages that were accessed what was saved of them."""
        for _, held, saved in self._held_and_saved():
            changed = held != saved  # memory may be read-only
            held[changed] = saved[changed]

    def first_change(self) -> str:
        """Name the first element that is not as it was saved; "" if all are."""
        for first, held, saved in self._held_and_saved():
            changed = np.flatnonzero(held != saved)
            if len(changed):
                return self.where(first + int(changed[0]))
        return ""

    def shadow(self, array: Values, width: int) -> Values:
        """Return a view of ``array`` with a row for each ``width`` bytes."""
        return array.reshape(-1, width // self.unit)

    def give(self, written: Values | None = None) -> None:
        """Let the host have written all bytes, or those that are ``written``."""
        if written is None:
            self.writes[:] = GIVEN
            return
        self.refine(1)
        self.writes[: len(written)][written] = GIVEN

    def end_launch(self) -> None:
        pages = self.touched_pages()
        for array in (self.by_page(self.writes), self.by_page(self.reads)):
            events = array[pages]
            events[events != UNWRITTEN] = GIVEN
            array[pages] = events
        self.others = None
        self.changed()

    def where(self, offset: int) -> str:
        """Name the element at ``offset``."""
        if self.index is not None:
            return str(self.index(offset - (self.start - self.base)))
        return f"byte {offset} of {self.name}"
