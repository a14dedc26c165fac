# SPDX-License-Identifier: MIT
"""Counters of a launch, as a profiler shows them: sums by line of the source."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from nogpu.machine.instruction_counts import Column, Counts
from nogpu.machine.kinds import flops, kind_of, operation, spaces, tensor_flops
from nogpu.machine.parse import Instruction, Source


@dataclass
class Access:
    """The requests of one line to one memory by one kind of instruction.

    Attributes:
        space: "global" or "shared".
        what: "load", "store", "atomic", "copy" (cp.async), "TMA load", "TMA store", "TMA
            reduction", "ldmatrix", or "stmatrix". What tensor cores read of shared memory is not
            counted.
        requests: instructions of warps, in number.
        bytes: those that threads have asked for.
        transactions: sectors (32 bytes) of global memory, or wavefronts of shared memory.
        least: the transactions that these bytes would take side by side.
        distinct: sectors, each of which counts once; 0 for shared memory.
    """

    source: Source
    space: str
    what: str
    requests: int = 0
    bytes: int = 0
    transactions: int = 0
    least: int = 0
    distinct: int = 0

    def add(self, other: "Access") -> None:
        """Add the numbers of another access."""
        for name in ("requests", "bytes", "transactions", "least", "distinct"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def per_request(self) -> float:
        """Transactions of a request, in the mean."""
        return self.transactions / max(self.requests, 1)

    @property
    def ratio(self) -> float:
        """`transactions` over `least`; 1 is the best."""
        return self.transactions / max(self.least, 1)

    @property
    def conflicts(self) -> int:
        """`transactions` beyond `least`; in shared memory, bank conflicts."""
        return self.transactions - self.least

    @property
    def unit(self) -> str:
        """Name the transactions: "sectors" or "wavefronts"."""
        return "sectors" if self.space == "global" else "wavefronts"


@dataclass
class Line:
    """What a line of the source does, beside its accesses to memory.

    Attributes:
        source: the file and the line; None if the compiler gave none.
        instructions: the number that warps have executed, by kind.
        threads: the sum over these instructions of the threads that executed them, at most 32 each.
        flops: floating-point operations outside of tensor cores, by format.
        tensor_flops: those of tensor cores, by format.
        special: results of special functions, such as exponentials.
        barriers: arrivals of warps at barriers of their program.
        waits: waits for asynchronous copies.
        in_flight: groups of copies still in flight after a wait, summed over the waits.
        most_in_flight: the same after a single wait, at most. If it is 0, the copies of a loop wait
            for its products, and the products for the copies.
    """

    source: Source
    instructions: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    threads: int = 0
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tensor_flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    special: int = 0
    barriers: int = 0
    waits: int = 0
    in_flight: int = 0
    most_in_flight: int = 0

    def add(self, other: "Line") -> None:
        """Add the numbers of another line."""
        for name in ("instructions", "flops", "tensor_flops"):
            sums = getattr(self, name)
            for key, value in getattr(other, name).items():
                sums[key] += value
        for name in ("threads", "special", "barriers", "waits", "in_flight"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.most_in_flight = max(self.most_in_flight, other.most_in_flight)

    @property
    def instruction_count(self) -> int:
        """Instructions of warps, of all kinds."""
        return sum(self.instructions.values())


@dataclass
class Counters:
    """What a launch does.

    Attributes:
        lines: the lines of the source, in their order.
        accesses: those to global and shared memory, by line.
        distinct_read: sectors of global memory that were loaded, each of which counts once.
        distinct_written: the same for stores.
    """

    lines: list[Line]
    accesses: list[Access]
    distinct_read: int
    distinct_written: int

    def in_space(self, space: str) -> list[Access]:
        """Return the accesses to "global" or "shared" memory."""
        return [one for one in self.accesses if one.space == space]

    @property
    def total(self) -> Line:
        """Return the sums of all lines."""
        result = Line(None)
        for line in self.lines:
            result.add(line)
        return result

    def sums(self, space: str) -> Access:
        """Return the sums of the accesses to a memory."""
        result = Access(None, space, "all")
        for one in self.in_space(space):
            result.add(one)
        # A sector that several lines access counts once.
        result.distinct = self.distinct_read + self.distinct_written if space == "global" else 0
        return result


def summarize(counts: Counts, moved: Callable[[Source], Source]) -> Counters:
    """Return the sums of a launch by line.

    Args:
        moved: a function of a source that returns its present place.
    """
    lines: dict[Source, Line] = {}
    accesses: dict[tuple[Source, str, str], Access] = {}
    for i, slot, row in zip(
        counts.kernel.instructions, counts.slots.tolist(), counts.table.tolist(), strict=True
    ):
        if not row[Column.EXECUTIONS]:
            continue
        source = moved(i.source)
        _add(lines.setdefault(source, Line(source)), i, row)
        where = (("global", Column.REQUESTS), ("shared", Column.SHARED_REQUESTS))
        for space, first in where:
            # Left out are an mbarrier, which lies in memory, and `__constant__` memory, which has
            # a cache of its own.
            if not row[first] or spaces(i) in ((), ("constant",)):
                continue
            key = source, space, operation(i)
            access = accesses.setdefault(key, Access(*key))
            access.requests += row[first]
            access.bytes += row[first + 1]
            access.transactions += row[first + 2]
            access.least += row[first + 3]
            if space == "global" and slot >= 0:
                access.distinct = int(counts.distinct[slot])
    in_order = sorted(lines, key=_order)
    found = sorted(accesses.values(), key=lambda one: (_order(one.source), one.space))
    return Counters(
        [lines[key] for key in in_order], found, counts.distinct_read, counts.distinct_written
    )


def _order(source: Source) -> tuple[str, int]:
    return source if source is not None else ("", 0)


def _add(line: Line, i: Instruction, row: list[int]) -> None:
    executions, threads = row[Column.EXECUTIONS], row[Column.THREADS]
    kind = kind_of(i)
    line.instructions[kind] += executions
    line.threads += threads
    if kind == "tensor cores":
        name, each = tensor_flops(i)
        line.tensor_flops[name] += executions * each + row[Column.TENSOR_FLOPS]
    if kind == "special functions":
        line.special += threads
    if i.parts[0] in ("bar", "barrier") and i.parts[1] != "warp":
        line.barriers += executions
    name, count = flops(i)
    if count:
        line.flops[name] += count * threads
    # Of loads: not of products, nor of boxes that are stored.
    if i.parts[0] != "wgmma" and "wait_group" not in i.opcode.partition("bulk")[2]:
        line.waits += row[Column.WAITS]
        line.in_flight += row[Column.IN_FLIGHT]
        line.most_in_flight = max(line.most_in_flight, row[Column.MOST_IN_FLIGHT])
