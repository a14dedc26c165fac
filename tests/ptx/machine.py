# SPDX-License-Identifier: MIT
"""A block of threads: warps with program counters of their own, run in the order of a schedule.

The 32 threads of a warp are one NumPy vector. Where they diverge, those with the smallest program counter run
first, so that they meet again behind the branch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from .memory import Allocation, Event, Events, Knowledge, Space
from .parse import Constant, Instruction, Kernel, PtxError, Register, Symbol

LANES = np.arange(32)
ALL = np.ones(32, np.bool_).tobytes()
NONE = np.zeros(32, np.bool_).tobytes()
SHARED_BASE = 1024  # not 0, so that an offset that is taken for an address is noticed
LIMIT = 3_000_000  # instructions of a warp
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

WAIT = object()  # An instruction returns it to be executed again when `Warp.waiting` allows.
YIELD = object()  # Another warp may run first.


@dataclass(frozen=True)
class Schedule:
    """When asynchronous operations complete ("early", "late", "random"), and the order in which warps run."""

    completion: str
    order: str
    seed: int = 0


SCHEDULES = (Schedule("early", "forward"), Schedule("late", "reverse"), Schedule("random", "random", 1))

Run = Callable[["Warp"], Any]
BUILDERS: dict[str, tuple[Callable[[Instruction], Run], int, bool]] = {}


def instruction(*opcodes: str, results: int = 1, whole: bool = False) -> Callable[[Any], Any]:
    """Register a function that makes an instruction of one of the ``opcodes`` executable.

    Args:
        results: how many operands, the first ones, are written.
        whole: all threads of a warp must execute it together (".aligned").
    """

    def register(build: Any) -> Any:
        for opcode in opcodes:
            BUILDERS[opcode] = build, results, whole
        return build

    return register


def unknown(i: Instruction) -> PtxError:
    return PtxError(i.line, f"unknown instruction {i.opcode}")


def dtype_of(name: str) -> Any:
    """The NumPy type of "s32", "b16" or "f64"; 16-bit floats are those that `arithmetic` converts."""
    kinds = {"s": SIGNED, "u": UNSIGNED, "b": UNSIGNED, "f": {4: np.float32, 8: np.float64}}
    return np.bool_ if name == "pred" else kinds[name[0]][int(name[1:]) // 8]


def reader(operand: Any, dtype: Any) -> Callable[["Warp"], Any]:
    """A function that gives the operand's value in each thread of a warp."""
    dtype = np.dtype(dtype)
    if isinstance(operand, Register):
        index, own = operand.index, np.dtype(operand.dtype)
        if own == dtype:
            return lambda warp: warp.registers[index]
        if own.itemsize == dtype.itemsize:
            return lambda warp: warp.registers[index].view(dtype)
        narrow = UNSIGNED[dtype.itemsize]
        return lambda warp: warp.registers[index].astype(narrow).view(dtype)
    if isinstance(operand, Constant):
        bits = operand.bits % 2 ** (8 * dtype.itemsize)
        if dtype.kind == "b":
            value = np.full(32, bits != 0)
        else:
            value = np.full(32, bits, UNSIGNED[dtype.itemsize]).view(dtype)
        return lambda warp: value
    assert isinstance(operand, Symbol), operand
    if operand.name == "global_smem":
        value = np.full(32, SHARED_BASE + operand.offset, dtype)
        return lambda warp: value
    return lambda warp: warp.special(operand.name).astype(dtype)


def write(operand: Any) -> Callable[["Warp", Any], None]:
    """A function that puts values into a register, extended to its width by their sign."""
    if not isinstance(operand, Register):
        return lambda warp, value: None  # "_"
    index, own = operand.index, np.dtype(operand.dtype)

    def put(warp: Warp, value: Any) -> None:
        if value.dtype.itemsize < own.itemsize:
            value = value.astype(SIGNED[own.itemsize] if value.dtype.kind == "i" else own)
        warp.registers[index] = value if value.dtype == own else value.view(own)

    return put


@dataclass(slots=True)
class Step:
    """An executable instruction."""

    run: Run
    guard: int | None
    negated: bool
    writes: list[int]
    whole: bool
    target: int
    instruction: Instruction


def decode(kernel: Kernel) -> list[Step]:
    steps = []
    for i in kernel.instructions:
        parts = i.parts
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        found = next((BUILDERS[prefix] for prefix in prefixes if prefix in BUILDERS), None)
        if found is None:
            raise unknown(i)
        build, results, whole = found
        try:
            run = build(i)
        except (KeyError, ValueError, IndexError, AssertionError) as e:
            raise unknown(i) from e
        written = [r for one in i.operands[:results] for r in (one if isinstance(one, tuple) else (one,))]
        writes = [r.index for r in written if isinstance(r, Register)]
        guard = None if i.guard is None else i.guard.index
        steps.append(Step(run, guard, i.negated, writes, whole, i.target, i))
    return steps


class InFlight:
    """The content of a register that an asynchronous operation will write."""

    def __init__(self, operation: Any):
        self.operation = operation

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError

    __array_ufunc__ = None


@dataclass
class Operation:
    """An asynchronous operation: ``steps`` complete it, of which the first ones only read.

    ``read`` is the event of its reads, and ``event`` that of its writes.
    """

    event: Event
    steps: list[Callable[[], None]]
    read: Event | None = None
    after: "Operation | None" = None  # which completes first

    def advance(self, left: int = 0) -> None:
        """Complete it but for the last ``left`` steps."""
        if self.after is not None:
            self.after.advance()
            self.after = None
        while len(self.steps) > left:
            self.steps.pop(0)()


@dataclass
class Launch:
    """What the blocks of a launch share."""

    kernel: Kernel
    steps: list[Step]
    grid: tuple[int, int, int]
    parameters: dict[str, Any]
    space: Space
    shared_bytes: int
    schedule: Schedule
    checks: bool = True
    trace: list[Any] | None = None
    random: Random = field(default_factory=Random)
    executed: set[int] = field(default_factory=set)  # the positions of instructions

    def run(self) -> None:
        """Execute all blocks, one after the other."""
        self.random.seed(self.schedule.seed)
        blocks = [
            (x, y, z) for z in range(self.grid[2]) for y in range(self.grid[1]) for x in range(self.grid[0])
        ]
        if self.schedule.order == "reverse":
            blocks.reverse()
        elif self.schedule.order == "random":
            self.random.shuffle(blocks)
        with np.errstate(all="ignore"):
            for block in blocks:
                Block(self, block).run()
        for allocation in self.space.allocations:
            allocation.end_launch()


class Warp:
    """32 threads: their registers, and the groups of them that have diverged."""

    def __init__(self, index: int, block: "Block"):
        self.index, self.block = index, block
        self.knowledge = Knowledge(block.events)
        self.registers: list[Any] = [None] * len(block.launch.kernel.dtypes)
        self.pc = 0
        self.active: Any = None  # the threads at `pc`; None for all
        self.parked: list[tuple[int, Any]] = []  # the others, at greater program counters
        self.mask: Any = None  # the threads that execute the current instruction; None for all
        self.done = False
        self.waiting: Callable[[], bool] | None = None
        self.count = 0  # instructions executed
        self.waited = 0  # the instructions that others executed while it waited at barriers
        self.copies: list[Operation] = []  # of cp.async, before they are committed to a group
        self.copy_groups: list[list[Operation]] = []
        self.bulk: dict[int, list[Operation]] = {}  # as these two, of each thread
        self.bulk_groups: dict[int, list[list[Operation]]] = {}
        self.products: list[Operation] = []  # wgmma
        self.product_groups: list[list[Operation]] = []
        self.last_product: Operation | None = None
        self.fenced: list[Any] | None = None  # the registers at the last wgmma.fence
        self.failed_waits = 0

    def special(self, name: str) -> Any:
        what, _, axis = name.removeprefix("%").partition(".")
        launch, i = self.block.launch, "xyz".index(axis or "x")
        if what == "tid":
            return LANES + 32 * self.index if i == 0 else np.zeros(32, np.int64)
        if what == "laneid":
            return LANES
        single = {"ctaid": self.block.position, "nctaid": launch.grid, "ntid": (launch.kernel.threads, 1, 1)}
        return np.full(32, single[what][i])

    def garbage(self, register: int) -> Any:
        """The content of a register that has not been written in threads that do not write it."""
        raw = self.block.launch.random.randbytes(256)
        dtype = self.block.launch.kernel.dtypes[register]
        return (
            np.frombuffer(raw, np.uint8)[:32] > 127 if dtype == np.bool_ else np.frombuffer(raw, dtype)[:32]
        )

    def lanes(self) -> Any:
        """The threads that execute the instruction."""
        return LANES if self.mask is None else LANES[self.mask]

    def advance(self, budget: int) -> None:
        """Run until the warp waits, ends, or has executed ``budget`` instructions."""
        steps, registers = self.block.launch.steps, self.registers
        pc, active, parked = self.pc, self.active, self.parked
        executed = self.block.launch.executed
        step = steps[pc]
        try:
            while budget:
                while parked and pc >= parked[0][0]:
                    if pc == parked[0][0]:
                        active = parked.pop(0)[1] | active
                        active = None if active.all() else active
                    else:
                        parked.append((pc, active))
                        parked.sort(key=lambda group: group[0])
                        pc, active = parked.pop(0)
                budget -= 1
                self.count += 1
                step = steps[pc]
                mask = active
                if step.guard is not None:
                    mask = ~registers[step.guard] if step.negated else registers[step.guard]
                    if active is not None:
                        mask = mask & active
                    bits = mask.tobytes()
                    if bits == NONE:
                        for i in step.writes:
                            if registers[i] is None:
                                registers[i] = self.garbage(i)
                        pc += 1
                        continue
                    if bits == ALL:
                        mask = None
                self.mask = mask
                executed.add(pc)
                if step.target >= 0:
                    if mask is None or (active is not None and not (active & ~mask).any()):
                        pc = step.target
                    else:
                        parked.append((step.target, mask))
                        parked.append((pc + 1, ~mask if active is None else active & ~mask))
                        parked.sort(key=lambda group: group[0])
                        pc, active = parked.pop(0)
                elif mask is None:
                    result = step.run(self)
                    if result is WAIT:
                        break
                    pc += 1
                    if result is not None:
                        break
                else:
                    if step.whole:
                        raise PtxError(
                            step.instruction.line,
                            f"a part of warp {self.index} executes {step.instruction.opcode}",
                        )
                    old = [registers[i] for i in step.writes]
                    result = step.run(self)
                    for i, before in zip(step.writes, old, strict=True):
                        if before is None:
                            before = self.garbage(i)
                        registers[i] = np.where(mask, registers[i], before)
                    if result is WAIT:
                        break
                    pc += 1
                    if result is not None:
                        break
        except (TypeError, AttributeError) as e:
            i = step.instruction
            values = [registers[r.index] for r in _registers(i)]
            if any(isinstance(value, InFlight) for value in values):
                raise PtxError(i.line, f"{i.opcode} takes a register of an asynchronous product") from e
            if any(value is None for value in values):
                raise PtxError(i.line, f"{i.opcode} takes a register that was not written") from e
            raise
        self.pc, self.active = pc, active
        if self.count > LIMIT:
            raise PtxError(step.instruction.line, "does not end")


def _registers(i: Instruction) -> list[Register]:
    flat = [i.guard]
    for one in i.operands:
        flat += one if isinstance(one, tuple) else [getattr(one, "base", one)]
    return [one for one in flat if isinstance(one, Register)]


class Block:
    """A block of threads with its shared memory."""

    def __init__(self, launch: Launch, position: tuple[int, int, int]):
        self.launch, self.position = launch, position
        self.events = Events()
        self.space = launch.space
        self.shared = Space("shared memory", launch.checks)
        self.memory = self.shared.add(Allocation("shared memory", SHARED_BASE, launch.shared_bytes))
        self.warps = [Warp(i, self) for i in range(launch.kernel.threads // 32)]
        self.at_barrier: dict[int, int] = {}  # warps, and the lines where they wait
        self.flying: list[Operation] = []  # asynchronous operations that have not completed

    def start(self, operation: Operation) -> None:
        """Begin an asynchronous operation; if early, it completes at once."""
        if self.launch.schedule.completion == "early":
            operation.advance()
        else:
            self.flying.append(operation)

    def trace(self, warp: Warp, what: str, events: list[Any]) -> None:
        """Note what happened, for `timeline`."""
        if self.launch.trace is not None:
            time = warp.count + warp.waited
            self.launch.trace += [(self.position, warp.index, what, one.number, time) for one in events]

    def arrive(self, warp: Warp, line: int) -> None:
        """``bar.sync``: the warp waits for all others."""
        self.at_barrier[warp.index] = line
        warp.waiting = lambda: False
        if len(self.at_barrier) == len(self.warps):
            self.at_barrier.clear()
            latest = max(one.count + one.waited for one in self.warps)
            for one in self.warps:
                one.waited = latest - one.count
            self.events.share()
            for one in self.warps:
                one.waiting = None

    def run(self) -> None:
        schedule, rng = self.launch.schedule, self.launch.random
        while not all(warp.done for warp in self.warps):
            if schedule.completion == "random":
                self.flying = [one for one in self.flying if one.steps]
                for one in rng.sample(self.flying, rng.randint(0, len(self.flying))):
                    one.advance(rng.randrange(2))
            ready = [
                warp for warp in self.warps if not warp.done and (warp.waiting is None or warp.waiting())
            ]
            if ready:
                random_budget = rng.randint(1, 400) if schedule.order == "random" else LIMIT + 1
                warp = {"forward": ready[0], "reverse": ready[-1], "random": rng.choice(ready)}[
                    schedule.order
                ]
                warp.waiting = None
                warp.advance(random_budget)
            else:
                self.flying = [one for one in self.flying if one.steps]
                if not self.flying:
                    lines = {
                        w.index: self.launch.steps[w.pc].instruction.line for w in self.warps if not w.done
                    }
                    raise PtxError(min(lines.values()), f"deadlock: the warps wait at lines {lines}")
                self.flying.pop().advance()
        self.end()

    def end(self) -> None:
        """Complete the asynchronous stores to global memory, and forget the events."""
        for address, barrier in self.memory.barriers.items():
            if self.launch.checks and barrier.transactions:
                raise PtxError(barrier.line, f"the mbarrier at {address} still expects bytes")
        for operation in self.flying:
            if operation.steps and self.launch.checks and operation.read is not None:
                seen = any(warp.knowledge.seen[operation.read.number] for warp in self.warps)
                if not seen:
                    raise PtxError(operation.event.line, "its block ends before it has read shared memory")
            operation.advance()
        for allocation in self.space.allocations:
            allocation.end_block()


@instruction("ret", "exit", results=0)
def _ret(i: Instruction) -> Run:
    def run(warp: Warp) -> Any:
        if warp.mask is not None:
            raise PtxError(i.line, f"a part of warp {warp.index} returns")
        warp.done = True
        return YIELD

    return run


@instruction("bra", results=0)
def _bra(i: Instruction) -> Run:
    return lambda warp: None  # `Warp.advance` follows its target


@instruction("bar.sync", "barrier.sync", results=0, whole=True)
def _bar_sync(i: Instruction) -> Run:
    (which,) = i.operands
    if which != Constant(0):
        raise unknown(i)

    def run(warp: Warp) -> Any:
        warp.block.arrive(warp, i.line)
        return YIELD

    return run


@instruction("bar.warp.sync", results=0, whole=True)
def _bar_warp_sync(i: Instruction) -> Run:
    """Nothing: what one thread of a warp knows of memory, all know."""
    return lambda warp: None
