# SPDX-License-Identifier: MIT
"""Pages of a tensor's memory: a launch takes time for those that it touches, not for all.

What is kept of each element begins as zeros, which the system makes where they are touched. The
first access to a page begins it (`memory.Allocation.begin`, and `begin_page` in core.c): it is
noted as touched, and what is unwritten of it is found. All that is read, compared or copied
afterwards is that of touched pages.
"""

import copy
import math
import mmap
from contextlib import suppress
from typing import Any

import numpy as np

from torchpar.ptx.machine.registers import Values
from torchpar.ptx.native.layout import PAGE

ALIGNED = 128  # to which an allocation's base is rounded down
LARGEST = 16  # bytes of an element
LARGE = 2**25  # bytes, from which on no huge pages are taken


def zeros(count: int, dtype: Any) -> Values:
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

    def copy(self) -> "Unwritten":
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
