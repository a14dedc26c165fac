# SPDX-License-Identifier: MIT
"""A block of threads: its warps, the barriers at which they meet, and the order in which they run.

Each warp has a program counter of its own. Where the 32 threads of a warp diverge, those with the
smallest program counter run first, so that they meet again behind the branch.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from torchpar.ptx.machine import definedness
from torchpar.ptx.machine.cluster import Cluster, Phase
from torchpar.ptx.machine.memory import Allocation, Events, Knowledge, Space, merge
from torchpar.ptx.machine.parse import (
    Constant,
    Instruction,
    Kernel,
    PtxError,
    Register,
    Symbol,
    flat,
    own_error,
)
from torchpar.ptx.machine.protocols import Gpu, RegisterFile
from torchpar.ptx.machine.protocols import Operation as AnyOperation
from torchpar.ptx.machine.protocols import Warp as AnyWarp
from torchpar.ptx.machine.registers import (
    ALL,
    DTYPES,
    LANES,
    NO_CAUSE,
    SHARED_BASE,
    UNWRITTEN,
    WINDOW_BITS,
    Cause,
    Registers,
    Tainted,
    Unready,
    Values,
    reader,
    writer,
)
from torchpar.ptx.machine.trace import Trace
from torchpar.ptx.native.warps import BlockState

LIMIT = 3_000_000  # instructions of a warp
SPINS = 4  # accesses that find what they found before, after which other programs run
LOCAL_BASE = 2**20  # of the threads' stacks
ALL_BYTES, NO_BYTES = ALL.tobytes(), bytes(32)


@dataclass(frozen=True)
class Schedule:
    """When asynchronous operations complete ("early", "late", "random"), and the order in which
    warps run."""

    completion: str
    order: str
    seed: int = 0


SCHEDULES = (
    Schedule("early", "forward"),
    Schedule("late", "reverse"),
    Schedule("random", "random", 1),
)

Run = Callable[["Warp"], object]  # It returns True where another warp may run first.
LANE_MASKS = {
    "WARP_SZ": np.full(32, 32),
    "%laneid": LANES,
    "%lanemask_eq": np.uint32(1) << LANES.astype(np.uint32),
    "%lanemask_lt": (np.uint32(1) << LANES.astype(np.uint32)) - np.uint32(1),
    "%lanemask_le": ((np.uint64(2) << LANES.astype(np.uint64)) - np.uint64(1)).astype(np.uint32),
    "%lanemask_gt": ~((np.uint64(2) << LANES.astype(np.uint64)) - np.uint64(1)).astype(np.uint32),
    "%lanemask_ge": ~((np.uint32(1) << LANES.astype(np.uint32)) - np.uint32(1)),
}
Results = int | Callable[[Instruction], int]
Build = Callable[[Instruction], Run]
Action = TypeVar("Action", bound=Callable[..., object])
BUILDERS: dict[str, tuple[Callable[[Instruction], Run], Results, bool]] = {}


def instruction(
    *opcodes: str, results: Results = 1, whole: bool = False
) -> Callable[[Build], Build]:
    """Register a function that makes an instruction of one of the ``opcodes`` executable.

    It raises an error for a form of it that is not known.

    Args:
        results: how many operands, the first ones, are written; or a function that says it.
        whole: all threads of a warp must execute it together (".aligned").
    """

    def register(build: Build) -> Build:
        for opcode in opcodes:
            BUILDERS[opcode] = build, results, whole
        return build

    return register


def elementwise(i: Instruction, function: Callable[..., Values], result: str, *sources: str) -> Run:
    """Apply ``function`` to the operands but the first, which it gives its result; by their
    kinds."""
    put = writer(i.operands[0], result)
    reads = [reader(operand, kind) for operand, kind in zip(i.operands[1:], sources, strict=True)]
    return lambda warp: put(warp, function(*[read(warp) for read in reads]))


def action(*opcodes: str, whole: bool = False, single: bool = False) -> Callable[[Action], Action]:
    """Register a function of a warp, an instruction, and its operands' values in the threads that
    execute it.

    An address is followed by its coordinates. ``single``: one thread alone may execute the
    instruction.
    """

    def register(function: Action) -> Action:
        @instruction(*opcodes, results=0, whole=whole)
        def build(i: Instruction) -> Run:
            reads = []
            for operand in i.operands:
                if operand != Symbol("_"):
                    reads += [
                        reader(operand),
                        *(reader(one) for one in getattr(operand, "coordinates", [])),
                    ]

            def run(warp: Warp) -> object:
                lanes = warp.lanes()
                if single and len(lanes) != 1:
                    raise PtxError(
                        i.line, f"{len(lanes)} threads of {warp.name} execute {i.opcode}"
                    )
                return function(warp, i, *[read(warp)[lanes] for read in reads])

            return run

        return function

    return register


@lru_cache(None)
def _builder(opcode: str) -> tuple[Callable[[Instruction], Run], Results, bool]:
    """Return what was registered for an opcode, or for the longest beginning of it."""
    parts = opcode.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    found = (BUILDERS[prefix] for prefix in prefixes if prefix in BUILDERS)
    return next(found, (_unknown, 1, False))


def decode(kernel: Kernel) -> Kernel:
    """Note which instructions of a kernel whole warps execute."""
    for i in kernel.instructions:
        _, _, i.whole = _builder(i.opcode)
    return kernel


def prepare(i: Instruction) -> None:
    """Make an instruction executable, when Python executes it first: the core in C does most."""
    try:
        build, results, _ = _builder(i.opcode)
        i.run = build(i)
        count = results if isinstance(results, int) else results(i)
    except (LookupError, ValueError, AssertionError, TypeError):
        count, i.run = 1, _unknown(i)
    written = [one for operand in i.operands[:count] for one in flat(operand)]
    i.writes = [one.index for one in written if isinstance(one, Register)]


def _unknown(i: Instruction) -> Run:
    """An instruction that is not modelled is an error only where it is executed."""

    def run(warp: Warp) -> None:
        message = f"the executor does not know {i.opcode}"
        raise PtxError(i.line, message, "unknown instruction")

    return run


class Operation:
    """An asynchronous operation of a warp: `cp.async`, a bulk copy or `wgmma`. It has two events.

    It reads its sources and later writes its targets, at times that a schedule chooses. Who knows
    `read` may write its sources, and who knows `written` may read its targets.

    Args:
        generic: its accesses are not of the asynchronous proxy.
        after: an operation that completes before this one.
        continues: an operation of the same kind and warp, which this one always follows, so that
            who knows this one's events knows those of ``continues``.
    """

    targets: frozenset[int] = frozenset()  # ranks of blocks of the cluster to which it writes

    def __init__(
        self,
        warp: "Warp",
        line: int,
        what: str,
        generic: bool = False,
        after: "Operation | None" = None,
        continues: "Operation | None" = None,
    ):
        block: Block = warp.block
        self.what, self.after, self.line = what, after, line
        self.name = f"{what} of {warp.name}"
        if continues is None:
            self.agent, self.time = block.knowledge.add_agent(generic), 0
            block.cluster.owners.append(block.rank)
        else:
            self.agent, self.time = continues.agent, continues.time + 2
        self.read, self.written = (
            block.gpu.events.add(block.number, self.agent, self.time + n, line, self.name)
            for n in (1, 2)
        )
        self.steps: list[Callable[[], None]] = []
        warp.trace(self)

    def fetch(self) -> None:
        """Read the sources."""

    def store(self) -> None:
        """Write the targets."""

    def start(self, block: "Block") -> None:
        """Issue it. Its two steps are done at once, or when something waits for them, or at
        random."""
        self.steps = [self.fetch, self.store]
        block.flying.append(self)
        if block.gpu.schedule.completion == "early":
            self.advance()

    def advance(self, left: int = 0) -> None:  # the machine's states in one place
        """Do its steps but for the last ``left`` ones."""
        if self.after is not None:
            self.after.advance()
            self.after = None
        while len(self.steps) > left:
            self.steps.pop(0)()

    def wait(self, warp: "Warp", left: int = 0) -> None:
        """From now on the warp knows that the operation has read, or, with no step ``left``, is
        done."""
        self.advance(left)
        times = warp.knowledge.times[warp.index]
        times[self.agent] = max(times[self.agent], self.time + (1 if left else 2))
        warp.trace(self)


class Warp:
    """32 threads: their registers, and the groups of them that have diverged.

    Attributes:
        number: in its block.
        index: in its cluster, and of its vector clock.
        first_thread: the number of its first thread in its block.
    """

    def __init__(self, number: int, block: "Block"):
        self.number, self.first_thread, self.block = number, 32 * number, block
        self.knowledge: Knowledge = block.knowledge
        self.index = number + block.rank * (block.gpu.kernel.threads // 32)
        self.name: str = f"warp {number}{block.suffix}"
        self.registers: RegisterFile
        if not block.has_core:  # which gives it others
            self.registers = Registers([UNWRITTEN] * len(block.gpu.kernel.registers))
        self.core: Any = None  # which executes common instructions in C
        self.pc = 0
        self.active = ALL  # the threads at `pc`
        self.parked: dict[int, Values] = {}  # the others, by their program counters
        # Of the others those that wait for the whole warp, by their program counters.
        self.gathered: dict[int, Values] = {}
        self.mask = ALL  # the threads that execute the current instruction
        self.done = False
        self.waiting: Callable[[], bool] | None = None  # until it returns True
        self.count = 0  # instructions executed
        self.waited = 0  # the instructions that others executed while it waited at barriers
        # Of each kind the groups of operations that were not waited for; the last one is not
        # committed.
        self.groups: defaultdict[Any, list[list[Operation]]] = defaultdict(lambda: [[]])
        self.last_product: Operation | None = None
        self.fence: Any = None  # the stamp of the registers at the last wgmma.fence
        self.carry = ~ALL  # of the last addition with ".cc"
        self.cause = NO_CAUSE  # why the last load is undefined
        self.arguments: dict[tuple[str, int], Any] = {}  # of a call, by their places
        self.relaxed: list[int] = []  # what it has read by relaxed accesses since its last fence
        self.released: dict[int, Values] | None = None  # what its last fence releases
        self.phase: Phase | None = None  # of the cluster barrier, at which it has arrived
        # Mbarriers that it has initialised; those whose initialisation it has released by a fence,
        # and those of other blocks that it may use because it was released.
        self.own_mbarriers: set[Any] = set()
        self.released_mbarriers: set[Any] = set()
        self.known_mbarriers: set[Any] = set()

    def event(self, line: int, what: str, atomic: bool = False) -> int:
        """Return a new event of this warp, which it knows."""
        time = int(self.knowledge.times[self.index, self.index])
        name = f"{what} of {self.name}"
        events: Events = self.block.gpu.events
        return events.add(self.block.number, self.index, time, line, name, atomic)

    def release(self, address: int) -> None:
        """Let those who acquire from ``address`` know what this warp knows."""
        self.publish(address, self.knowledge.snapshot(self.index))

    def publish(self, address: int, known: dict[int, Values]) -> None:
        merge(self.block.gpu.released.setdefault(address, {}), known)

    def acquire(self, address: int) -> None:
        if known := self.block.gpu.released.get(address):
            self.knowledge.learn(self.index, known)

    def fence_memory(self) -> None:
        """``fence.acq_rel``: relaxed accesses before it acquire, and those after it release."""
        for address in self.relaxed:
            self.acquire(address)
        self.relaxed.clear()
        self.released = self.knowledge.snapshot(self.index)

    def special(self, name: str) -> Values:  # noqa: PLR0911  # a case for each kind of symbol
        if name in self.block.gpu.parameters:
            return np.full(32, self.block.gpu.parameters[name], np.uint64)
        block = self.block
        if name in block.gpu.symbols:
            return np.full(32, block.gpu.symbols[name], np.uint64)
        if name in block.gpu.kernel.locals:
            offset = block.gpu.kernel.locals[name]
            stacks = LOCAL_BASE + (LANES + self.first_thread) * block.gpu.kernel.local_bytes
            return (stacks + offset).astype(np.uint64)
        if name in LANE_MASKS:
            return LANE_MASKS[name]
        if name.startswith(("%clock", "%globaltimer")):
            return np.full(32, self.count)
        what, _, axis = name.removeprefix("%").partition(".")
        if (what, axis) == ("tid", "x"):
            return LANES + self.first_thread
        axes = {
            "tid": (0, 0, 0),
            "ntid": (block.gpu.kernel.threads, 1, 1),
            "ctaid": block.position,
            "nctaid": block.gpu.grid,
            "clusterid": block.program,
            "nclusterid": block.gpu.programs,
            "cluster_ctaid": tuple(map(int.__mod__, block.position, block.gpu.kernel.cluster)),
            "cluster_nctaid": block.gpu.kernel.cluster,
        }
        if what in axes:
            return np.full(32, axes[what]["xyz".index(axis)])
        size = block.cluster_size
        others = {
            "warpid": self.number,
            "nwarpid": len(block.warps),
            "smid": (block.number * size + block.rank) % block.gpu.multiprocessors,
            "nsmid": block.gpu.multiprocessors,
            "cluster_ctarank": block.rank,
            "cluster_nctarank": size,
            "is_explicit_cluster": size > 1,
            "dynamic_smem_size": block.gpu.shared_bytes,
            "total_smem_size": block.gpu.shared_bytes,
        }
        if what not in others:
            i = block.gpu.kernel.instructions[self.pc - 1]
            message = f"the executor does not know the operand {name} of {i.opcode}"
            raise PtxError(i.line, message, "unknown instruction")
        return np.full(32, others[what])

    def active_bits(self) -> int:
        """Return the threads at the program counter as bits."""
        if self.active is ALL:
            return 2**32 - 1
        return int(np.packbits(self.active, bitorder="little").view(np.uint32)[0])

    def count_access(self, space: Space, addresses: Values, width: int) -> None:
        """Count an access of the instruction that is executed."""
        counts = self.block.gpu.counts
        lanes = self.lanes()[: len(addresses)]
        if space is self.block.space:
            counts.access_global(self.pc - 1, addresses, width)
        elif space is self.block.shared:
            counts.access_shared(self.pc - 1, addresses, lanes, width)
        if self.block.trace is not None:
            name = space.name.removesuffix(" memory")
            self.block.trace.access(self, self.pc - 1, name, addresses, lanes, width)

    def count_copy(self, elements: Values, width: int, units: Values, unit: int) -> None:
        """Count a copy between global and shared memory, of `cp.async` or a box."""
        counts, space = self.block.gpu.counts, self.block.space
        counts.access_global(self.pc - 1, elements, width)
        lanes = self.lanes()
        by_lane = lanes if len(lanes) == len(units) else None
        counts.access_shared(self.pc - 1, units, by_lane, unit)
        if elements.size:
            place, rows = space.locate(elements, width, 0)
            self.count_place(place, rows * width)
        if (trace := self.block.trace) is not None:
            inside = None if by_lane is None else lanes[: elements.size]
            trace.access(self, self.pc - 1, "global", elements, inside, width)
            trace.access(self, self.pc - 1, "shared", units, by_lane, unit)

    def count_place(self, place: Allocation, offsets: Values) -> None:
        """Note which part of an allocation the instruction accesses."""
        self.block.gpu.counts.touch(self.pc - 1, place, offsets)

    def lanes(self) -> Values:
        """The threads that execute the instruction."""
        return LANES if self.mask is ALL else LANES[self.mask]

    def trace(self, operation: Operation) -> None:
        """An operation begins, or has been waited for."""
        if self.block.trace is not None:
            self.block.trace.operate(self, operation)

    def fill(self, registers: list[int], what: str) -> None:
        """Give undefined bits to registers that were not written, in the threads left out now."""
        for index in registers:
            if self.registers[index] is UNWRITTEN:
                raw = np.frombuffer(self.block.gpu.random.randbytes(256), np.uint8)
                dtype = DTYPES[self.block.gpu.kernel.registers[index]]
                values = raw[:32] > 127 if dtype == np.bool_ else raw.view(dtype)[:32]
                message = f"the result of {what} in a thread whose mask is false"
                cause = Cause("undefined value", message, 0)
                self.registers[index] = Tainted(values, definedness.full(dtype), cause)

    def advance(self, budget: int) -> None:
        """Run until the warp waits, ends, or has executed ``budget`` instructions."""
        gpu, instructions = self.block.gpu, self.block.gpu.kernel.instructions
        left = budget
        while left > 0:
            if self.parked:
                self.park(self.pc, self.active)
                self.pc = min(self.parked)
                self.active = self.parked.pop(self.pc)
            if self.core is not None:
                done = self.core.run(self, left)
                left -= done
                if left == 0 or (done and self.parked):
                    continue
            left -= 1
            i, pc = instructions[self.pc], self.pc
            self.count += 1
            try:
                stop = self.step(i)
            except (TypeError, AttributeError) as e:
                stop = self.step_tainted(i, pc, e)
            if stop:
                break
        if self.count > gpu.limit:
            reason = f"does not end after {self.count:,} instructions"
            raise PtxError(instructions[self.pc].line, reason, "endless loop")

    def step(self, i: Instruction) -> bool:
        """Execute an instruction. Return whether another warp may run first."""
        if i.run is None:
            prepare(i)
        if i.whole and self.active is not ALL and not self.gather(i):
            return False
        registers, mask = self.registers, self.active
        if i.guard is not None:
            mask = ~registers[i.guard.index] if i.negated else registers[i.guard.index]
            mask = mask if self.active is ALL else mask & self.active
            bits = mask.tobytes()
            mask = ALL if bits == ALL_BYTES else mask
            if bits == NO_BYTES:
                self.fill(i.writes, i.opcode)
                self.mask = mask
                self.pc += 1
                return False
        self.mask = mask
        if mask is not ALL:
            self.fill(i.writes, i.opcode)
            if i.whole:
                raise PtxError(i.line, f"a part of {self.name} executes {i.opcode}")
            if any(type(registers[index]) is Tainted for index in i.writes):
                raise TypeError(f"{i.opcode} writes a part of undefined bits")  # to `advance`
        pc, threads = self.pc, 32 if mask is ALL else mask.tobytes().count(1)
        self.pc += 1
        stop = False
        if i.target >= 0:
            self.branch(i.target)
        else:
            stop = bool(i.run(self))
        self.block.gpu.counts.execute(pc, threads)
        if self.block.trace is not None:
            self.block.trace.execute(self, pc)
        return stop

    def gather(self, i: Instruction) -> bool:
        """Wait with an instruction of all threads for those that have diverged.

        Where a branch's blocks lie behind their join, those with the smallest program counter
        reach it first.

        Returns:
            Whether all threads are here; otherwise others have become active.
        """
        here = self.gathered.pop(self.pc, False) | self.active
        if here.all():
            self.active = ALL
            return True
        self.gathered[self.pc] = here
        if not self.parked and not self.shuffle_apart():
            first = self.block.gpu.kernel.instructions[min(self.gathered)]
            reason = f"a part of {self.name} executes {first.opcode}"
            raise PtxError(first.line, reason, "diverged warp")
        self.pc = min(self.parked)
        self.active = self.parked.pop(self.pc)
        return False

    def shuffle_apart(self) -> bool:
        """Execute shfl.sync that the threads have reached at several places of the program.

        They may, as all of them execute it with the same mask: LLVM copies it into both sides of a
        branch.

        Returns:
            Whether that was it.
        """
        instructions = self.block.gpu.kernel.instructions
        places = [(pc, instructions[pc], mask) for pc, mask in sorted(self.gathered.items())]
        _, first, _ = places[0]
        # Of the operands all but the result, the value and the lane are the same constants.
        is_same = first.opcode.startswith("shfl.sync.") and all(
            i.opcode == first.opcode
            and i.guard is None
            and isinstance(i.operands[0], Register)
            and i.operands[3:] == first.operands[3:]
            for _, i, _ in places
        )
        is_whole = np.any([mask for *_, mask in places], 0).all()
        given = [self._given(n, places) for n in (1, 2)] if is_same and is_whole else [None]
        if any(one is None for one in given):
            return False
        self.gathered.clear()
        self.mask = self.active = ALL
        for pc, i, mask in places:
            self._shuffle_at(i, mask, given)
            self.block.gpu.counts.execute(pc, int(mask.sum()))
            if self.block.trace is not None:
                self.block.trace.execute(self, pc)
            self.park(pc + 1, mask)
        return True

    def _given(self, n: int, places: list[tuple[int, Instruction, Any]]) -> Any:
        """Return the threads' values of an operand at several places; None if one is undefined."""
        given = np.zeros(32, np.uint32)
        for _, i, mask in places:
            operand = i.operands[n]
            held: Any = None
            if isinstance(operand, Constant):
                held = np.full(32, operand.bits % 2**32, np.uint32)
            elif isinstance(operand, Register):
                held = self.registers[operand.index]
            if isinstance(held, Tainted) and not held.mask[mask].any():
                held = held.values
            if not isinstance(held, np.ndarray):
                return None
            given = np.where(mask, held.view(np.uint32), given)
        return given

    def _shuffle_at(self, i: Instruction, mask: Any, given: list[Any]) -> None:
        """Give the threads of ``mask`` what they take of the values ``given`` by all threads."""
        if i.run is None:
            prepare(i)
        to = i.operands[0].index
        self.fill([to], i.opcode)
        sources = {
            one.index: values
            for one, values in zip(i.operands[1:3], given, strict=True)
            if isinstance(one, Register)
        }
        kept = {
            index: held.copy() if isinstance(held := self.registers[index], np.ndarray) else held
            for index in (*sources, to)
        }
        for index, values in sources.items():
            self.registers[index] = values.view(DTYPES[self.block.gpu.kernel.registers[index]])
        i.run(self)
        taken, before = self.registers[to].copy(), kept.pop(to)
        for index, held in kept.items():
            self.registers[index] = held
        if isinstance(before, Tainted):
            undefined = np.where(mask, 0, before.mask).astype(before.mask.dtype)
            values = np.where(mask, taken, before.values)
            self.registers[to] = Tainted(values, undefined, before.cause)
        else:
            self.registers[to] = np.where(mask, taken, before)

    def step_tainted(self, i: Instruction, pc: int, error: Exception) -> bool:
        """Execute an instruction that has failed, if its registers have undefined bits."""
        held = [self.registers[one.index] for one in i.registers]
        if any(isinstance(one, Unready) and one.operation is not None for one in held):
            message = f"{i.opcode} takes a register of an asynchronous product"
            raise PtxError(i.line, message) from error
        self.pc = pc
        stop = definedness.execute(self, i, lambda: self.step(i))
        if stop is None:
            raise error
        return stop

    def branch(self, target: int) -> None:
        others = self.active & ~self.mask
        if others.any():
            self.park(self.pc, others)
        self.pc, self.active = target, self.mask

    def park(self, pc: int, mask: Values) -> None:
        both = self.parked.get(pc, False) | mask
        self.parked[pc] = ALL if both.all() else both


class Block:
    """A block of threads with its shared memory, and the stacks of its threads.

    Args:
        number: in the launch; the blocks of a cluster have one number.
        trace: a record of what it does, for which Python executes all of it.
        cluster: that has begun; the block is the next one of it. None: it is not executed, but
            shows the core in C how each block begins.

    Attributes:
        flying: asynchronous operations of the cluster.
        rank: in its cluster.
        window: where its shared addresses begin.
        program: the position of its cluster, which is a program of Triton.
        suffix: behind the number of a warp in messages, "" without a cluster.
    """

    def __init__(
        self,
        gpu: Gpu,
        position: tuple[int, ...],
        number: int,
        trace: Trace | None = None,
        cluster: Cluster | None = None,
    ):
        self.gpu, self.position, self.number, self.space = gpu, position, number, gpu.space
        warps, self.cluster_size = gpu.kernel.threads // 32, math.prod(gpu.kernel.cluster)
        self.cluster: Cluster
        self.knowledge: Knowledge
        if cluster is None:
            self.knowledge = Knowledge(gpu.events, number, warps)
            self.shared, self.flying, self.rank = Space("shared memory"), list[AnyOperation](), 0
        else:
            self.cluster, self.knowledge, self.shared = cluster, cluster.knowledge, cluster.shared
            self.flying, self.rank = cluster.flying, len(cluster.blocks)
            cluster.blocks.append(self)
        self.window = self.rank << WINDOW_BITS
        self.program = tuple(map(int.__floordiv__, position, gpu.kernel.cluster))
        self.suffix: str = f" of CTA {self.rank}" if self.cluster_size > 1 else ""
        self.trace = trace
        launch = gpu.core if trace is None else None  # of the core in C
        self.has_core: bool = launch is not None
        name = f"shared memory{self.suffix}"
        self.memory = Allocation(name, SHARED_BASE | self.window, gpu.shared_bytes)
        if launch is not None:  # which leaves what is made later to Python
            self.memory.refine(launch.program.shared_unit)
            self.memory.others = np.zeros_like(self.memory.reads)
        self.shared.add(self.memory)
        self.local = Space("local memory")
        if gpu.kernel.local_bytes:
            size = gpu.kernel.local_bytes * gpu.kernel.threads
            self.local.add(Allocation("local memory", LOCAL_BASE, size))
        self.warps = [Warp(i, self) for i in range(warps)]
        self.core = None if launch is None else BlockState(launch, self)
        # By barrier the warps that have arrived, and whether they wait.
        self.at_barrier: dict[int, list[tuple[Warp, bool]]] = {}
        self.tensor_memory: Any = None  # of sm_100
        self.bulk: list[tuple[int, int, str]] = []  # bulk copies: agent, line, what must have ended
        self.loads: set[Any] = set()  # mbarriers whose boxes nobody has waited for
        self.spins, self.spin_line = 0, 0
        self.found: dict[tuple[int, int], bytes] = {}  # by what a warp has accessed at a place

    def arrive(self, warp: Warp, barrier: int, count: int, waits: bool = True) -> None:
        """``bar.sync`` and ``bar.arrive``: ``count`` warps meet."""
        arrived = self.at_barrier.setdefault(barrier, [])
        arrived.append((warp, waits))
        if waits:
            warp.waiting = lambda: False
        if len(arrived) < count:
            return
        del self.at_barrier[barrier]
        latest = max(one.count + one.waited for one, _ in arrived)
        learned = [one.index for one, _ in arrived]
        self.knowledge.share(learned)
        for one, was_waiting in arrived:
            if was_waiting:
                if self.trace is not None:
                    self.trace.wait(one, latest)
                one.waited = latest - one.count
                one.waiting = None

    def spin(self, warp: Warp, line: int, found: bytes) -> bool:
        """Count an access that has found what it found before. Return whether others should run.

        Args:
            found: the addresses, and what was there.
        """
        place = warp.index, warp.pc
        if self.found.get(place) != found:
            self.found[place] = found
            return False
        first = self.cluster.blocks[0]
        first.spins += 1
        first.spin_line = line
        return first.spins >= SPINS

    def turns(self) -> Iterator[bool]:
        """Run the blocks of the cluster, and yield False where other clusters should run.

        The first block does that for all of them.
        """
        schedule, rng = self.gpu.schedule, self.gpu.random
        choose = {
            "forward": lambda ready: ready[0],
            "reverse": lambda ready: ready[-1],
            "random": rng.choice,
        }
        warps, spun = self.cluster.warps, None
        while running := [warp for warp in warps if not warp.done]:
            self.flying[:] = [one for one in self.flying if one.steps]
            if schedule.completion == "random":
                for one in rng.sample(self.flying, rng.randint(0, len(self.flying))):
                    one.advance(rng.randrange(2))
            ready = [warp for warp in running if warp.waiting is None or warp.waiting()]
            if ready:
                others = [warp for warp in ready if warp is not spun]
                warp = choose[schedule.order](others or ready)
                warp.waiting = None
                spun = None
                budget = rng.randint(1, 400) if schedule.order == "random" else self.gpu.limit + 1
                try:
                    warp.advance(budget)
                except (PtxError, MemoryError):
                    raise
                except Exception as e:
                    line = self.gpu.kernel.instructions[max(warp.pc - 1, 0)].line
                    raise own_error(e, line) from e
                if self.spins >= SPINS:
                    self.spins, spun = 0, warp
                    yield False
            elif self.flying:
                self.flying.pop().advance()
            else:
                lines = [self.gpu.kernel.instructions[warp.pc - 1].line for warp in running]
                waiting = (
                    f"{w.name.removeprefix('warp ')} at {self.gpu.place_of(n)}{_missing(w)}"
                    for w, n in zip(running, lines, strict=True)
                )
                message = f"warps wait for what nobody will do: {', '.join(waiting)}"
                self.gpu.fault("error", "deadlock", min(lines), message, running[0])
                return
        for block in self.cluster.blocks:
            block.end()

    def end(self) -> None:
        """Complete the asynchronous stores to global memory."""
        self.gpu.executed_instructions += sum(warp.count for warp in self.warps)
        warp = self.warps[0]
        for address, barrier in self.memory.barriers.items():
            if barrier.transactions:
                what = "still expects" if barrier.transactions > 0 else "has got unexpected"
                message = f"the mbarrier at {address}{self.suffix} {what} bytes"
                self.gpu.fault("error", "unfinished copy", barrier.line, message, warp)
        of_bulk = {agent for agent, _, _ in self.bulk}
        known: Any = self.knowledge.times.any(0)
        for agent, line, what in self.bulk:  # also those that this schedule has completed
            if not known[agent]:
                self._note_unfinished(line, what)
        mine = [one for one in self.flying if self.cluster.owners[one.agent] == self.rank]
        for one in mine:
            if one.steps and one.agent not in of_bulk and not known[one.agent]:
                self._note_unfinished(one.line, "read")
            one.advance()

    def _note_unfinished(self, line: int, what: str) -> None:
        message = f"the program may end before this copy has {what} its shared memory"
        self.gpu.fault("error", "unfinished copy", line, message, self.warps[0])


def _missing(warp: AnyWarp) -> str:
    """Say what an mbarrier misses for which a warp waits; "" for other waits."""
    found = getattr(warp.waiting, "missing", None)
    return "" if found is None else str(found())


@action("ret", whole=True)
def _return(warp: Warp, i: Instruction) -> bool:
    warp.done = True
    if all(one.done for one in warp.block.warps):
        warp.block.cluster.leave(warp.block)
    else:
        warp.block.cluster.complete()
    return True


@action("bar.sync", "barrier.sync", whole=True)
def _synchronize(warp: Warp, i: Instruction, number: Values, count: Values | None = None) -> bool:
    warps = len(warp.block.warps) if count is None else int(count[0]) // 32
    warp.block.arrive(warp, int(number[0]), warps)
    return True


@action("bar.arrive", "barrier.arrive", whole=True)
def _arrive(warp: Warp, i: Instruction, number: Values, count: Values) -> None:
    warp.block.arrive(warp, int(number[0]), int(count[0]) // 32, waits=False)


@instruction("brx.idx", results=0)
def _branch_by_index(i: Instruction) -> Run:
    index = reader(i.operands[0])

    def run(warp: Warp) -> None:
        chosen = set(index(warp)[warp.lanes()].tolist())
        if len(chosen) > 1:
            raise PtxError(i.line, "threads of a warp branch by different indices", "diverged warp")
        warp.pc = i.table[chosen.pop()]

    return run


@instruction("bra", results=0)
@instruction("bar.warp.sync", results=0, whole=True)
def _pass(i: Instruction) -> Run:
    """`Warp.branch` follows a branch. Limitation: a missing `bar.warp.sync` is not detected."""
    return lambda warp: None
