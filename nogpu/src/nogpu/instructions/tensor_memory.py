# SPDX-License-Identifier: MIT
"""Tensor memory of sm_100, and the products of its tensor cores: 9.7.16 of the PTX ISA (tcgen05).

A block has 128 lanes of 512 columns of 32 bits. An address has the lane in its upper half, and the
column in its lower one. A warp reaches the 32 lanes of its place in its group of four warps.
Products run one after the other, while the warps go on. `tcgen05.commit` lets an mbarrier count
them; who waits for the mbarrier knows what they have written.

Sums of float16 have a column each, too, of which they take the lower half. Loads pack two of them
into a register (".pack::16b"), and stores unpack them.

Each cell has the event that wrote it. So a load of what was not written, or of a product that was
not waited for, is an error, as in `memory`. Limitation: a load is at once, where a GPU's ends with
`tcgen05.wait::ld`; and who overwrites what a product still reads is not noticed.
"""

import numpy as np

from nogpu.instructions.tensor_cores import OPERANDS, Matrix, add, numbers
from nogpu.instructions.tensor_cores import SUMS as SUM_TYPES
from nogpu.instructions.tma import Arrival, Barrier, barrier_at
from nogpu.machine.block import Warp
from nogpu.machine.decode import Run, action, instruction
from nogpu.machine.operation import Operation
from nogpu.machine.parse import Instruction, PtxError, flat
from nogpu.machine.registers import LANES, Values, reader, writer
from nogpu.machine.vector_clocks import UNWRITTEN

LANE_COUNT, COLUMNS = 128, 512
# By the kind of a product, the types of A and B by their numbers in the instruction descriptor.
TYPES = {
    "f16": {0: "f16", 1: "bf16"},
    "tf32": {2: "tf32"},
    "f8f6f4": {0: "e4m3", 1: "e5m2"},
    "i8": {0: "u8", 1: "s8"},
}
# Likewise the types of D
SUMS = {
    "f16": {0: "f16", 1: "f32"},
    "tf32": {1: "f32"},
    "f8f6f4": {0: "f16", 1: "f32"},
    "i8": {2: "s32"},
}


SHAPES = ("32x32b", "16x32bx2")


class TensorMemory:
    """The cells of a block's tensor memory, and who wrote each of them."""

    def __init__(self) -> None:
        self.cells = np.zeros((LANE_COUNT, COLUMNS), np.uint32)
        self.writers = np.full((LANE_COUNT, COLUMNS), UNWRITTEN, np.int32)
        self.allocated = np.zeros(COLUMNS, np.bool_)
        self.last: Operation | None = None  # product or commit
        self.products: dict[int, Operation] = {}  # the last one of each warp

    def check(self, warp: Warp, line: int, lanes: Values, columns: Values) -> None:
        """Refuse cells that were not allocated, or written by what the warp does not know."""
        self.check_allocated(line, columns)
        writers = self.writers[lanes, columns]
        known = warp.clocks.knows(warp.index, writers)
        if known.all():
            return
        number = int(writers[~known][0])
        gpu = warp.block.gpu
        if number == UNWRITTEN:
            message = "reads tensor memory that was not written"
            warp.fault("error", "uninitialised memory", line, message)
            return
        what = f"{gpu.events.who(number)} ({gpu.place_of(int(gpu.events.lines[number]))})"
        message = f"tensor memory is written by {what}, not waited for"
        warp.fault("error", "race", line, message, number)

    def check_allocated(self, line: int, columns: Values | slice) -> None:
        end = columns.stop if isinstance(columns, slice) else columns.max(initial=0) + 1
        if end > COLUMNS or not self.allocated[columns].all():
            raise PtxError(line, "tensor memory that is not allocated", "out of bounds")


def memory_of(warp: Warp) -> TensorMemory:
    block = warp.block
    if block.tensor_memory is None:
        block.tensor_memory = TensorMemory()
    found: TensorMemory = block.tensor_memory
    return found


@action("tcgen05.alloc", whole=True)
def _allocate(warp: Warp, i: Instruction, to: Values, count: Values) -> None:
    """Write the address of so many free columns to shared memory."""
    memory, columns = memory_of(warp), int(count[0])
    starts = range(0, COLUMNS - columns + 1, max(columns, 32))
    free = [n for n in starts if not memory.allocated[n : n + columns].any()]
    if not free:
        raise PtxError(i.line, f"tensor memory has no {columns} free columns", "deadlock")
    memory.allocated[free[0] : free[0] + columns] = True
    address = np.full((1, 1), free[0], np.uint32).view(np.uint8)
    warp.block.shared.store(warp, to[:1], address, i.line)


@action("tcgen05.dealloc", whole=True)
def _free(warp: Warp, i: Instruction, address: Values, count: Values) -> None:
    memory, start = memory_of(warp), int(address[0]) & 0xFFFF
    columns = slice(start, start + int(count[0]))
    if not memory.allocated[columns].all():
        raise PtxError(i.line, "frees tensor memory that is not allocated")
    memory.allocated[columns] = False
    memory.writers[:, columns] = UNWRITTEN


@instruction(
    "tcgen05.relinquish_alloc_permit",
    "tcgen05.wait::ld",
    "tcgen05.wait::st",
    "tcgen05.fence::before_thread_sync",
    "tcgen05.fence::after_thread_sync",
    results=0,
)
def _nothing(i: Instruction) -> Run:
    """Loads and stores are at once, and barriers order them."""
    return lambda warp: None


def _places(i: Instruction, address: Values, count: int, split: int) -> tuple[Values, Values]:
    """Return the lane and the column of each of a thread's ``count`` registers."""
    lane, column = address >> 16, address & 0xFFFF
    registers = np.arange(count)
    if "32x32b" in i.parts:
        return (lane + LANES)[:, None], column[:, None] + registers
    assert "16x32bx2" in i.parts  # the upper half of the warp takes columns further on
    columns = column[:, None] + (LANES // 16 * split)[:, None] + registers
    return (lane + LANES % 16)[:, None], columns


@instruction("tcgen05.ld", whole=True)
def _load(i: Instruction) -> Run:
    puts = [writer(one, "b32") for one in flat(i.operands[0])]
    address = reader(i.operands[1])
    split = i.operands[2].bits if len(i.operands) > 2 else 0
    assert set(i.parts[4:]) <= {*SHAPES, f"x{len(puts)}", "pack::16b", "b32"}
    packed = "pack::16b" in i.parts

    def run(warp: Warp) -> None:
        memory = memory_of(warp)
        places = _places(i, address(warp), len(puts) << packed, split)
        memory.check(warp, i.line, *places)
        found = memory.cells[places]
        if packed:
            found = found.astype(np.uint16).view(np.uint32)
        for n, put in enumerate(puts):
            put(warp, np.ascontiguousarray(found[:, n]))

    return run


@instruction("tcgen05.st", results=0, whole=True)
def _store(i: Instruction) -> Run:
    address = reader(i.operands[0])
    reads = [reader(one, "b32") for one in flat(i.operands[-1])]
    split = i.operands[1].bits if len(i.operands) > 2 else 0
    assert set(i.parts[4:]) <= {*SHAPES, f"x{len(reads)}", "unpack::16b", "b32"}
    packed = "unpack::16b" in i.parts

    def run(warp: Warp) -> None:
        memory = memory_of(warp)
        places = _places(i, address(warp), len(reads) << packed, split)
        memory.check_allocated(i.line, places[1])
        values = np.stack([read(warp) for read in reads], 1)
        memory.cells[places] = values.view(np.uint16) if packed else values
        memory.writers[places] = warp.event(i.line, "a store")

    return run


# Of a matrix in tensor memory: its rows' lanes, and its columns
Cells = tuple[slice | Values, slice]


def _cells(address: int, lanes: Values, columns: int) -> Cells:
    """Return the cells of a matrix, those of all lanes as a view, which costs no copy."""
    lanes, first = lanes + (address >> 16), address & 0xFFFF
    is_whole = lanes[0] == 0 and len(lanes) == LANE_COUNT
    return slice(None) if is_whole else lanes, slice(first, first + columns)


def _distinct(numbers: Values) -> Values:
    """Return each number once: nearly always all are one."""
    first = numbers.reshape(-1)[:1]
    return first if (numbers == first).all() else np.unique(numbers)


class Tcgen05Mma(Operation):
    """D = A·B + D, or A·B: D in tensor memory, A there or in shared memory, B in shared memory."""

    def __init__(
        self,
        warp: Warp,
        i: Instruction,
        d: int,
        a: int | Values,
        b: Values,
        bits: int,
        adds: bool,
    ):
        memory = memory_of(warp)
        earlier = memory.products.get(warp.index)
        super().__init__(warp, i.line, "a product", after=memory.last, continues=earlier)
        memory.products[warp.index] = memory.last = self
        self.memory, self.warp, self.block, self.adds = memory, warp, warp.block, adds
        kind = i.parts[3].partition("::")[2]
        types, sums = TYPES[kind], SUMS[kind].get(bits >> 4 & 3)
        numbers_of = bits >> 7 & 7, bits >> 10 & 7
        # Sparse and negated operands
        if sums is None or not set(numbers_of) <= set(types) or bits & (1 << 2 | 3 << 13):
            raise PtxError(i.line, f"the instruction descriptor {bits:#x} is not modeled")
        self.sum = np.dtype(SUM_TYPES[sums])
        self.saturates = bool(bits >> 3 & 1)
        self.kinds = types[numbers_of[0]], types[numbers_of[1]]
        n, m = (bits >> 17 & 63) * 8, (bits >> 24 & 31) * 16
        rows = np.arange(m)
        # Of 64 rows, each warp has 16 in its 32 lanes.
        lanes = rows if m == LANE_COUNT else rows // 16 * 32 + rows % 16
        self.to = _cells(d, lanes, n)
        self.flops = 2 * m * n * 32 // np.dtype(OPERANDS[self.kinds[1]]).itemsize
        memory.check_allocated(i.line, self.to[1])
        if adds:
            self._check_known(warp, self.to)
        window = warp.block.window
        self.b = Matrix(b, range(n), not bits >> 16 & 1, self.kinds[1], i.line, window)
        operands = [self.b]
        self.a: int | Matrix
        if isinstance(a, int):
            self.a = a
            self.from_memory = _cells(a, lanes, 8)
            memory.check_allocated(i.line, self.from_memory[1])
            self._check_known(warp, self.from_memory)
        else:
            self.a = Matrix(a, range(m), not bits >> 15 & 1, self.kinds[0], i.line, window)
            operands.append(self.a)
        for matrix in operands:
            matrix.check(warp, self.read, i.line)
        memory.writers[self.to] = self.written

    def _check_known(self, warp: Warp, places: Cells) -> None:
        """Operands that an earlier product writes are in order; others must be known."""
        events = warp.block.gpu.events
        writers = _distinct(self.memory.writers[places])
        others = [n for n in writers.tolist() if not events.who(n).startswith("a product")]
        if others and not warp.clocks.knows(warp.index, np.array(others, np.int32)).all():
            message = "takes tensor memory that was not written, or not waited for"
            warp.fault("error", "race", self.line, message)

    def fetch(self) -> None:
        shared = self.block.shared
        if isinstance(self.a, int):
            raw = np.ascontiguousarray(self.memory.cells[self.from_memory])
            left = numbers(self.kinds[0], raw.view(OPERANDS[self.kinds[0]]))
        else:
            left = self.a.read(self.warp, shared)
        product = left @ self.b.read(self.warp, shared).T
        unsigned = f"u{self.sum.itemsize}"
        old = self.memory.cells[self.to].astype(unsigned).view(self.sum)
        old = old if self.adds else np.zeros_like(old)
        self.memory.cells[self.to] = add(product, old, self.saturates).view(unsigned)


@instruction("tcgen05.mma.cta_group::1", results=0)
def _multiply(i: Instruction) -> Run:
    d, a, b, descriptor, adds = i.operands[:5]
    assert i.parts[3].startswith("kind::")
    assert i.parts[3].partition("::")[2] in TYPES
    in_memory = hasattr(a, "coordinates")
    to, right, bits = reader(d), reader(b, "u64"), reader(descriptor, "u32")
    left, keep = reader(a) if in_memory else reader(a, "u64"), reader(adds, "pred")

    def run(warp: Warp) -> None:
        lanes = warp.lanes()
        if len(lanes) != 1:
            raise PtxError(i.line, f"{len(lanes)} threads of warp {warp.index} execute {i.opcode}")
        lane = lanes[0]

        def one(values: Values) -> Values:
            return np.full(1, values[lane], np.uint64)

        first = int(left(warp)[lane]) if in_memory else one(left(warp))
        arguments = int(bits(warp)[lane]), bool(keep(warp)[lane])
        product = Tcgen05Mma(warp, i, int(to(warp)[lane]), first, one(right(warp)), *arguments)
        product.start(warp.block)
        warp.block.gpu.counts.multiply(warp.pc - 1, product.flops)

    return run


class Commit(Operation):
    """An arrival at an mbarrier, when all products of the warp before it have ended."""

    last_access = "arrived at its mbarrier"

    def __init__(self, warp: Warp, line: int, barrier: Barrier):
        memory = memory_of(warp)
        super().__init__(warp, line, "a commit", after=memory.last)
        self.barrier, self.product = barrier, memory.products.get(warp.index)
        memory.last = self

    def store(self) -> None:
        self.barrier.update(arrivals=1)

    def wait(self, warp: Warp, left: int = 0) -> None:
        super().wait(warp, left)
        if self.product is not None:
            self.product.wait(warp, left)


@action("tcgen05.commit.cta_group::1", single=True)
def _commit(warp: Warp, i: Instruction, address: Values, mask: Values | None = None) -> None:
    if mask is not None:  # of the CTAs whose mbarriers count it
        raise PtxError(i.line, f"the executor does not know {i.opcode}", "unknown instruction")
    barrier = barrier_at(warp, address, i.line)
    commit = Commit(warp, i.line, barrier)
    # Who waits for the products knows what their operands waited for.
    barrier.copies += [commit, Arrival(warp, i.line)]
    commit.start(warp.block)
