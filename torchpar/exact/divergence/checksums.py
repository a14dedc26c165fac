# SPDX-License-Identifier: MIT
"""Checksums of tensors' bits: sums of integers, which no device and no order of addition changes.

The bytes of a tensor, in the order of its elements, are cut into words of 64 bits. Word i is added
to column i mod 509 of the tensor's row of sums, modulo 2⁶⁴. A step has a row for each tensor, on
the tensor's device. At the end of the step the rows are read, and each becomes one number:

    c = Σⱼ Wⱼ·(sⱼ xor (sⱼ >> 32)) mod 2⁶⁴

where the W are fixed odd numbers that look random. The shift lets the highest bits, those of signs
and exponents, reach all of c. A tensor of at most 8 bytes is its own checksum.

A change of one element always changes the row. Of two changes in one tensor, the second cancels
the first only if both are in one column, that is a multiple of 4072 bytes apart, and opposite. 509
is a prime, so that rows of a matrix that change places change columns, too.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COLUMNS = 509  # words: a row stays in a processor's first cache while a tensor is added to it
WORD = 8  # bytes
_ROW = COLUMNS * WORD  # bytes
_FIRST = 64  # rows, of which there are twice as many whenever they do not suffice
_SHIFT = np.uint64(32)
_MOST_VIEWS = 1024
WHOLE = slice(None)
SHARE = 16  # rows, at most, of a large tensor that a step may add in place of all


def _odd_numbers() -> NDArray[np.uint64]:
    """The first outputs of SplitMix64, made odd (Steele, Lea and Flood, 2014)."""
    z = np.arange(1, COLUMNS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


_WEIGHTS = _odd_numbers()


def checksums(rows: NDArray[np.uint64], sizes: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The checksums ``(n)`` of rows of sums ``(n, COLUMNS)`` of tensors of so many bytes.

    The rows are overwritten.
    """
    first = rows[:, 0].copy()
    rows ^= rows >> _SHIFT
    rows *= _WEIGHTS
    return np.where(sizes <= WORD, first, rows.sum(axis=1))


def share(size: int, step: int) -> slice:
    """The rows of a tensor of so many bytes that stand for it in a step: about 16, or all.

    They lie at equal distances, and are others in the next step.
    """
    distance = -(-size // _ROW // SHARE)
    return slice(step % distance, None, distance) if distance > 1 else WHOLE


class HostRows:
    """Rows of sums of tensors on the CPU, by NumPy, whose calls cost less than PyTorch's."""

    def __init__(self) -> None:
        self._used = 0
        self._sizes: list[int] = []
        self._views: dict[tuple[int, int], NDArray[np.uint64]] = {}
        self._last = np.zeros(COLUMNS, np.uint64)  # for words that do not fill a row
        self._last_start = self._last.ctypes.data
        self._put(np.zeros((_FIRST, COLUMNS), np.uint64))

    def _put(self, rows: NDArray[np.uint64]) -> None:
        self._rows, self._start, self._limit = rows, rows.ctypes.data, len(rows)

    def add(self, start: int, size: int, part: slice = WHOLE) -> None:
        """Add the row of a contiguous tensor that begins at an address, of so many bytes.

        Args:
            part: which rows of COLUMNS words are added; the last, which is not full, always is.
        """
        used = self._used
        if used == self._limit:
            self._put(np.concatenate([self._rows, np.zeros_like(self._rows)]))
        self._used = used + 1
        self._sizes.append(size)
        if size <= _ROW:
            ctypes.memmove(self._start + used * _ROW, start, size)
            return
        row = self._rows[used]
        words = self._views.get((start, size))
        if words is None:
            words = self._view(start, size)
        np.add.reduce(words if part is WHOLE else words[part], axis=0, out=row)
        if rest := size % _ROW:
            count = -(-rest // WORD)
            self._last[count - 1] = 0
            ctypes.memmove(self._last_start, start + size - rest, rest)
            row[:count] += self._last[:count]

    def _view(self, start: int, size: int) -> NDArray[np.uint64]:
        """The full rows of the memory of a tensor. Many tensors lie where one lay a step before."""
        if len(self._views) == _MOST_VIEWS:
            self._views.clear()
        memory = (ctypes.c_char * size).from_address(start)
        count = size // _ROW
        words = np.frombuffer(memoryview(memory), np.uint64, count * COLUMNS)
        view = self._views[start, size] = words.reshape(count, COLUMNS)
        return view

    def __len__(self) -> int:
        return self._used

    def take(self) -> NDArray[np.uint64]:
        """The checksums of the tensors, in the order in which they were added; empty the rows."""
        rows = self._rows[: self._used]
        result = checksums(rows, np.array(self._sizes, np.int64))
        rows.fill(0)
        self._used = 0
        self._sizes.clear()
        return result


class DeviceRows:
    """Rows of sums of tensors on another device, where they stay until a step ends."""

    def __init__(self, device: torch.device):
        self._rows = torch.zeros(_FIRST, COLUMNS, dtype=torch.int64, device=device)
        self._used = 0
        self._sizes: list[int] = []

    def add(self, t: Tensor, part: slice = WHOLE) -> None:
        """Add the row of a contiguous tensor, by one or two kernels for most tensors."""
        if self._used == len(self._rows):
            self._rows = torch.cat([self._rows, torch.zeros_like(self._rows)])
        row, size = self._rows[self._used], t.nbytes
        self._used += 1
        self._sizes.append(size)
        data = t.reshape(-1).view(torch.uint8)
        if size <= _ROW:
            row.view(torch.uint8)[:size].copy_(data)
            return
        if data.storage_offset() % WORD:
            data = data.clone()
        rest = size % _ROW
        words = data[: size - rest].view(torch.int64).view(-1, COLUMNS)
        torch.sum(words[part], 0, out=row)
        if rest:
            last = data[size - rest :]
            if rest % WORD:
                last = torch.cat([last, last.new_zeros(WORD - rest % WORD)])
            row[: last.numel() // WORD].add_(last.view(torch.int64))

    def end_step(self) -> "Reading":
        """Begin to copy the rows to the host, and empty them."""
        reading = Reading(self._rows[: self._used], self._sizes)
        self._rows[: self._used].zero_()
        self._used, self._sizes = 0, []
        return reading


class Reading:
    """A copy of rows to the host, for which the host waits when it needs them.

    Args:
        rows: on any device; the copy is made in the order of the current stream's work.
        sizes: of the tensors, in bytes.
    """

    def __init__(self, rows: Tensor, sizes: list[int]):
        self._event: Any = None
        self._sizes = np.array(sizes, np.int64)
        copy = rows.to("cpu", non_blocking=rows.is_cuda, copy=True)  # to pinned memory
        # Later it would be an operator on a tensor of another step, of which `graphed` takes note.
        self._rows: NDArray[np.uint64] = copy.numpy().view(np.uint64)
        if rows.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(rows.device))

    def checksums(self) -> NDArray[np.uint64]:
        if self._event is not None:
            self._event.synchronize()
        return checksums(self._rows, self._sizes)
