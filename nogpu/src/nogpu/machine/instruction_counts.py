# SPDX-License-Identifier: MIT
"""Counts of a launch: a table with a row for each instruction of the PTX.

Both executors add to it. `counters` sums it up by line of the Python source.

Global memory moves in sectors of 32 bytes: an instruction of a warp is one request, and takes as
many sectors as its threads touch. Shared memory has 32 banks of 4 bytes. Threads that access
several words of a bank take turns, each of which is a wavefront. The threads of a warp access 4
bytes or less together, 8 bytes by halves of the warp, and 16 bytes by quarters. A word is read once
for all threads that ask for it, and no turn is taken for a half or a quarter that reads what the
one before it has read (NVIDIA, "Nsight Compute: Profiling Guide", "Memory Tables"). Each half or
quarter that stores takes its turn, as an H200 counts (tests/emulated/test_nsight.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from nogpu.machine.allocation import Allocation, page_count, zeros
from nogpu.machine.kinds import operation, spaces
from nogpu.machine.parse import Kernel, Source
from nogpu.machine.registers import Values
from nogpu.native.layout import PAGE

SECTOR, WORD, BANKS = 32, 4, 32  # bytes, bytes, and a number
WAVEFRONT = WORD * BANKS  # bytes at most


class Column(IntEnum):
    """The numbers of an instruction, in the order of core.c."""

    EXECUTIONS = 0  # by warps
    THREADS = 1  # that have executed it
    REQUESTS = 2  # of global memory
    BYTES = 3
    SECTORS = 4
    LEAST_SECTORS = 5
    SHARED_REQUESTS = 6
    SHARED_BYTES = 7
    WAVEFRONTS = 8
    LEAST_WAVEFRONTS = 9
    TENSOR_FLOPS = 10  # of instructions whose opcode does not say how many
    WAITS = 11  # for asynchronous operations
    IN_FLIGHT = 12  # groups that go on after a wait, in all
    MOST_IN_FLIGHT = 13


def _distinct(numbers: Values) -> int:
    """Return how many different numbers there are."""
    steps = numbers[1:] - numbers[:-1]  # `np.diff` takes three times as long for a warp
    if (steps >= 0).all():
        return int(numbers.size > 0) + int(np.count_nonzero(steps))
    return len(np.unique(numbers[np.flatnonzero(np.append(True, steps != 0))]))


def sectors(addresses: Values, width: int) -> int:
    """Return the number of sectors that aligned accesses touch."""
    return _distinct(addresses // SECTOR) * -(-width // SECTOR)


def least_sectors(addresses: Values, width: int) -> int:
    """Return the number of sectors that the bytes would fill side by side."""
    return -(-_distinct(addresses) * width // SECTOR)


def wavefronts(
    addresses: Values, lanes: Values | None, width: int, is_store: bool = False
) -> tuple[int, int]:
    """Return the number of wavefronts of a request, and the least that its words need.

    Args:
        lanes: the threads; None for a box, whose rows are stored side by side.
        is_store: by threads, so that no half or quarter of a warp is served by another one's turn.
    """
    if lanes is None or width > WAVEFRONT // 8:
        count = -(-len(addresses) * width // WAVEFRONT)
        return count, count
    together = 32 * WORD // max(width, WORD)  # threads
    found = possible = 0
    before: set[int] = set()
    for first in range(0, 32, together):
        mine = addresses[(lanes >= first) & (lanes < first + together)]
        words = np.unique(mine // WORD + np.arange(-(-width // WORD))[:, None])
        asked = set(words.tolist())
        if not asked or (asked <= before and not is_store):
            continue
        before = asked
        found += int(np.bincount(words % BANKS).max())
        possible += -(-len(words) // BANKS)
    return found, possible


@dataclass
class Progress:
    """How many programs of a launch have ended.

    The workers share it, and count without a lock: it is for a line on the terminal alone.
    """

    done: int = 0
    count: int = 0


class Counts:
    """The numbers of a launch, a row for each instruction.

    Attributes:
        table: ``(instructions, columns)``.
        slots: of each instruction the number of its `Access` to global memory, or -1.
    """

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.table = np.zeros((len(kernel.instructions), len(Column)), np.int64)
        if kernel.slots is None:
            kernel.slots = _slots(kernel)
        self.slots, self.slot_count = kernel.slots.of_instructions, len(kernel.slots.reads)
        # Sectors by slot, when the launch has ended.
        self.distinct = np.zeros(self.slot_count, np.int64)
        self.distinct_read = self.distinct_written = 0

    def watch(self, place: "Allocation") -> None:
        """Note which sectors of an allocation are touched, by slot."""
        count = page_count(len(place.data)) * PAGE // SECTOR
        place.touched = zeros(self.slot_count * count, np.uint8).reshape(-1, count)
        place.changed()

    def execute(self, pc: int, threads: int, times: int = 1) -> None:
        self.table[pc, :2] += times, threads  # EXECUTIONS and THREADS

    def access_global(self, pc: int, addresses: Values, width: int) -> None:
        """Count the request of an instruction."""
        if addresses.size:  # `cp.async` may fill with zeros instead
            row = self.table[pc]
            row[Column.REQUESTS] += 1
            row[Column.BYTES] += addresses.size * width
            row[Column.SECTORS] += sectors(addresses, width)
            row[Column.LEAST_SECTORS] += least_sectors(addresses, width)

    def touch(self, pc: int, place: "Allocation", offsets: Values) -> None:
        """Note which sectors of an allocation an instruction touches."""
        slot = int(self.slots[pc])
        if slot >= 0 and place.touched is not None:
            place.touched[slot, offsets // SECTOR] = 1

    def access_shared(self, pc: int, addresses: Values, lanes: Values | None, width: int) -> None:
        row = self.table[pc]
        is_store = self.kernel.instructions[pc].parts[0] == "st"
        found, possible = wavefronts(addresses, lanes, width, is_store)
        row[Column.SHARED_REQUESTS] += 1
        row[Column.SHARED_BYTES] += addresses.size * width
        row[Column.WAVEFRONTS] += found
        row[Column.LEAST_WAVEFRONTS] += possible

    def multiply(self, pc: int, flops: int) -> None:
        """Count a product whose opcode does not say its size."""
        self.table[pc, Column.TENSOR_FLOPS] += flops

    def wait(self, pc: int, in_flight: int) -> None:
        """Count a wait after which groups of asynchronous operations go on."""
        row = self.table[pc]
        row[Column.WAITS] += 1
        row[Column.IN_FLIGHT] += in_flight
        row[Column.MOST_IN_FLIGHT] = max(int(row[Column.MOST_IN_FLIGHT]), in_flight)

    def equals(self, other: "Counts") -> bool:
        """Whether another launch of the same kernel has done the same."""
        mine, others = (
            (one.distinct_read, one.distinct_written, *one.distinct) for one in (self, other)
        )
        return mine == others and np.array_equal(self.table, other.table)

    def end(self, places: Iterable["Allocation"]) -> None:
        """The launch has ended: count the distinct sectors."""
        reads, writes = self.kernel.slots.reads, self.kernel.slots.writes
        for place in places:
            if place.touched is None:
                continue
            touched = place.touched_sectors()
            if touched.any():
                self.distinct += touched.sum((1, 2), dtype=np.int64)
                self.distinct_read += int(touched[reads].any(0).sum())
                self.distinct_written += int(touched[writes].any(0).sum())
            place.touched = None
            place.changed()


class Slots(NamedTuple):
    """The kinds of accesses to global memory in a kernel, which are numbered by line and operation.

    Attributes:
        of_instructions: the number of each instruction's kind, or -1.
        reads, writes: whether those of a kind read, and write.
    """

    of_instructions: Values
    reads: Values
    writes: Values


def _slots(kernel: Kernel) -> Slots:
    numbers: dict[tuple[Source, str], int] = {}
    slots = np.full(len(kernel.instructions), -1, np.int32)
    for n, i in enumerate(kernel.instructions):
        if "global" in spaces(i):
            slots[n] = numbers.setdefault((i.source, operation(i)), len(numbers))
    reads, writes = (np.zeros(max(len(numbers), 1), np.bool_) for _ in range(2))
    for (_, what), slot in numbers.items():
        reads[slot] = what not in ("store", "TMA store")
        writes[slot] = what in ("store", "atomic", "TMA store", "TMA reduction")
    return Slots(slots, reads, writes)
