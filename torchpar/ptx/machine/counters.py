# SPDX-License-Identifier: MIT
"""Count what a launch does, as a profiler would: instructions, sectors, wavefronts and FLOPs.

Both executors add to one table with a row for each instruction of the PTX, `Counts`. `Counters`
sums it up by line of the Python source.

Global memory moves in sectors of 32 bytes: an instruction of a warp is one request, and takes as
many sectors as its threads touch. Shared memory has 32 banks of 4 bytes. Threads that access
several words of a bank take turns, each of which is a wavefront. The threads of a warp access 4
bytes or less together, 8 bytes by halves of the warp, and 16 bytes by quarters. A word is read once
for all threads that ask for it, and no turn is taken for a half or a quarter that reads what the
one before it has read (NVIDIA, "Nsight Compute: Profiling Guide", "Memory Tables"). Each half or
quarter that stores takes its turn, as an H200 counts (tests/ptx/test_nsight.py).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from torchpar.ptx.machine.pages import page_count, zeros
from torchpar.ptx.machine.parse import Instruction, Kernel, qualifiers
from torchpar.ptx.machine.registers import FLOATS, PAIRS, Values
from torchpar.ptx.native.layout import PAGE

if TYPE_CHECKING:
    from torchpar.ptx.machine.memory import Allocation

SECTOR, WORD, BANKS = 32, 4, 32  # bytes, bytes, and a number
WAVEFRONT = WORD * BANKS  # bytes at most

Source = tuple[str, int] | None  # a file and a line


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
    steps = np.diff(numbers)
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


# What an instruction is, by its opcode

OPERATIONS = {"ld": "load", "st": "store", "atom": "atomic", "red": "atomic", "cp": "copy"}
OPERATIONS |= {"ldmatrix": "ldmatrix", "stmatrix": "stmatrix"}


def operation(i: Instruction) -> str:
    """Name an access to memory."""
    if i.opcode.startswith("cp.reduce"):
        return "atomic"
    if i.parts[:2] == ["cp", "reduce"]:
        return "TMA reduction"
    if i.opcode.startswith("cp.async.bulk"):
        return "TMA store" if i.parts[5:6] == ["global"] else "TMA load"
    return OPERATIONS.get(i.parts[0], i.parts[0])


def spaces(i: Instruction) -> tuple[str, ...]:
    """Return the memories that an instruction accesses."""
    name = i.parts[0]
    if name in ("ldmatrix", "stmatrix"):
        return ("shared",)
    if name == "cp":
        is_copy = i.parts[2:3] in (["cg"], ["ca"]) or "tensor" in i.parts
        return ("global", "shared") if is_copy else ()
    if name not in ("ld", "st", "atom", "red"):
        return ()
    rest, _, in_shared = qualifiers(i)
    if in_shared:
        return ("shared",)
    return (rest[0],) if rest[:1] in (["local"], ["param"]) else ("global",)


KINDS = (
    "tensor cores",
    "floating point",
    "special functions",
    "integers",
    "conversions",
    "moves",
    "exchange",
    "global memory",
    "shared memory",
    "synchronization",
    "control",
)
SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div")
BY_NAME = {
    "mma": "tensor cores",
    "cvt": "conversions",
    **dict.fromkeys(("mov", "cvta", "prmt", "selp"), "moves"),
    **dict.fromkeys(("shfl", "vote", "redux", "elect", "activemask", "match"), "exchange"),
    **dict.fromkeys(("bar", "barrier", "mbarrier", "fence", "membar"), "synchronization"),
    **dict.fromkeys(("bra", "brx", "ret", "call", "exit", "trap"), "control"),
}


def kind_of(i: Instruction) -> str:
    """Return what an instruction works with, one of `KINDS`."""
    name, where = i.parts[0], spaces(i)
    if name in ("wgmma", "tcgen05"):
        return "tensor cores" if i.parts[1] in ("mma_async", "mma") else "synchronization"
    if where:
        return f"{where[0]} memory" if where[0] in ("global", "shared") else "moves"
    if name == "cp":
        return "synchronization"
    if name in BY_NAME:
        return BY_NAME[name]
    is_float = any(part in FLOATS or part in PAIRS or part == "f32x2" for part in i.parts[1:])
    if is_float:
        return "special functions" if name in SPECIAL else "floating point"
    return "integers"


RATES = {"f16": "f16", "bf16": "f16", "tf32": "tf32", "f64": "f64"}
RATES |= dict.fromkeys(("s8", "u8"), "int8") | dict.fromkeys(("e4m3", "e5m2"), "fp8")
KINDS_OF_TCGEN05 = {"f16": "f16", "tf32": "tf32", "i8": "int8", "f8f6f4": "fp8"}


def tensor_flops(i: Instruction) -> tuple[str, float]:
    """Return the format and the FLOPs of a warp's product; those of tcgen05 are counted."""
    name = i.parts[0]
    if name == "tcgen05":
        return KINDS_OF_TCGEN05.get(i.parts[3].partition("::")[2], "f16"), 0.0
    shape = next(part for part in i.parts if part[0] == "m" and part[1:2].isdigit())
    m, n, k = (int(one) for one in shape[1:].replace("n", " ").replace("k", " ").split())
    kinds = [part for part in i.parts if part in RATES]
    # The formats are those of D, A, B and perhaps C.
    operand = kinds[0] if name == "wgmma" or len(kinds) == 2 else kinds[1]
    return RATES[operand], 2.0 * m * n * k / (4 if name == "wgmma" else 1)


FLOPS = {"add": 1, "sub": 1, "mul": 1, "fma": 2}


def flops(i: Instruction) -> tuple[str, int]:
    """Return the format and the FLOPs of a thread: those of sums, products, and both at once."""
    count, kind = FLOPS.get(i.parts[0], 0), i.parts[-1]
    if kind == "f32x2":
        return "f32", 2 * count
    if not count or kind not in FLOATS:
        return "", 0
    return ("f16", 2 * count) if kind in PAIRS else (PAIRS_OF.get(kind, kind), count)


PAIRS_OF = {"bf16": "f16", "f16": "f16"}


# Sums by line of the source


@dataclass
class Access:
    """The requests of one line to one memory by one kind of instruction.

    Attributes:
        space: "global" or "shared".
        what: "load", "store", "atomic", "copy" (cp.async), "TMA load", "TMA store", "TMA
            reduction", "ldmatrix", or "stmatrix". What tensor cores read of shared memory is not
            counted.
        bytes: that threads have asked for.
        transactions: sectors of global memory, or wavefronts of shared memory.
        least: the transactions that these bytes would take side by side.
        distinct: sectors, each of which counts once; 0 of shared memory.
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
        for name in ("requests", "bytes", "transactions", "least", "distinct"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def per_request(self) -> float:
        return self.transactions / max(self.requests, 1)

    @property
    def ratio(self) -> float:
        """Transactions over the least."""
        return self.transactions / max(self.least, 1)

    @property
    def conflicts(self) -> int:
        """Transactions beyond the least."""
        return self.transactions - self.least

    @property
    def unit(self) -> str:
        return "sectors" if self.space == "global" else "wavefronts"


@dataclass
class Line:
    """What a line of the source does, beside its accesses to memory.

    Attributes:
        instructions: of warps, by their kinds.
        threads: that have executed them, at most 32 each.
        flops: by format, of sums and products.
        tensor_flops: by format.
        special: results of special functions, such as exponentials.
        barriers: arrivals of warps at barriers of their program.
        waits: for asynchronous copies.
        in_flight: groups of copies that go on after a wait, in all.
        most_in_flight: after one wait. If it is 0, the copies of a loop wait for its products, and
            the products for the copies.
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
        for name in ("instructions", "flops", "tensor_flops"):
            sums = getattr(self, name)
            for key, value in getattr(other, name).items():
                sums[key] += value
        for name in ("threads", "special", "barriers", "waits", "in_flight"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.most_in_flight = max(self.most_in_flight, other.most_in_flight)

    @property
    def instruction_count(self) -> int:
        return sum(self.instructions.values())


@dataclass
class Counters:
    """What a launch does.

    Attributes:
        lines: of the source, in their order.
        accesses: to global and shared memory, by line.
        distinct_read: sectors of global memory, each of which counts once.
        distinct_written: the same of stores.
    """

    lines: list[Line]
    accesses: list[Access]
    distinct_read: int
    distinct_written: int

    def in_space(self, space: str) -> list[Access]:
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
            if not row[first] or not spaces(i):  # such as an mbarrier, which lies in memory
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
