# SPDX-License-Identifier: MIT
"""A block of threads: warps with program counters of their own, run in the order of a schedule.

Where the 32 threads of a warp diverge, those with the smallest program counter run first, so that
they meet again behind the branch.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchpar.ptx.memory import Allocation, Event, Events, Space
from torchpar.ptx.parse import Instruction, Kernel, PtxError, Register, Symbol, flat
from torchpar.ptx.registers import (
    ALL,
    DTYPES,
    LANES,
    SHARED_BASE,
    UNWRITTEN,
    Unready,
    reader,
    writer,
)

LIMIT = 3_000_000  # instructions of a warp
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

Run = Callable[["Warp"], Any]  # It returns True where another warp may run first.
BUILDERS: dict[str, tuple[Callable[[Instruction], Run], int, bool]] = {}


def instruction(*opcodes: str, results: int = 1, whole: bool = False) -> Callable[[Any], Any]:
    """Register a function that makes an instruction of one of the ``opcodes`` executable.

    It raises an error for a form of it that is not known.

    Args:
        results: how many operands, the first ones, are written.
        whole: all threads of a warp must execute it together (".aligned").
    """

    def register(build: Any) -> Any:
        for opcode in opcodes:
            BUILDERS[opcode] = build, results, whole
        return build

    return register


def elementwise(i: Instruction, function: Callable[..., Any], result: str, *sources: str) -> Run:
    """Apply ``function`` to the operands but the first, which it gives its result; by their
    kinds."""
    put = writer(i.operands[0], result)
    reads = [reader(operand, kind) for operand, kind in zip(i.operands[1:], sources, strict=True)]
    return lambda warp: put(warp, function(*[read(warp) for read in reads]))


def action(*opcodes: str, whole: bool = False, single: bool = False) -> Callable[[Any], Any]:
    """Register a function of a warp, an instruction, and its operands' values in the threads that
    execute it.

    An address is followed by its coordinates. ``single``: one thread alone may execute the
    instruction.
    """

    def register(function: Any) -> Any:
        @instruction(*opcodes, results=0, whole=whole)
        def build(i: Instruction) -> Run:
            reads = []
            for operand in i.operands:
                if operand != Symbol("_"):
                    reads += [
                        reader(operand),
                        *(reader(one) for one in getattr(operand, "coordinates", [])),
                    ]

            def run(warp: Warp) -> Any:
                lanes = warp.lanes()
                if single and len(lanes) != 1:
                    raise PtxError(
                        i.line, f"{len(lanes)} threads of warp {warp.index} execute {i.opcode}"
                    )
                return function(warp, i, *[read(warp)[lanes] for read in reads])

            return run

        return function

    return register


def decode(kernel: Kernel) -> Kernel:
    """Make the instructions of a kernel executable."""
    for i in kernel.instructions:
        prefixes = (".".join(i.parts[:n]) for n in range(len(i.parts), 0, -1))
        try:
            build, results, i.whole = next(
                BUILDERS[prefix] for prefix in prefixes if prefix in BUILDERS
            )
            i.run = build(i)
        except (LookupError, ValueError, AssertionError, StopIteration, TypeError):
            results, i.run = 1, _unknown(i)
        written = [one for operand in i.operands[:results] for one in flat(operand)]
        i.writes = [one.index for one in written if isinstance(one, Register)]
    return kernel


def _unknown(i: Instruction) -> Run:
    """An instruction that is not modelled is an error only where it is executed."""

    def run(warp: Warp) -> None:
        raise PtxError(i.line, f"unknown instruction {i.opcode}")

    return run


class Operation:
    """An asynchronous operation of a warp: `cp.async`, a bulk copy or `wgmma`. It has two events.

    It reads its sources and later writes its targets, at times that a schedule chooses. Who knows
    `read` may write its sources, and who knows `written` may read its targets.

    Args:
        generic: its accesses are not of the asynchronous proxy.
        after: an operation that completes before this one.
    """

    def __init__(
        self, warp: "Warp", line: int, what: str, generic: bool = False, after: Any = None
    ):
        self.what, self.after = what, after
        name = f"{what} of warp {warp.index}"
        self.read, self.written = (
            warp.block.events.add(Event(line, name, own=False, generic=generic)) for _ in range(2)
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
        warp.seen[self.read.number] = True
        if left == 0:
            warp.seen[self.written.number] = True
        warp.trace(self)


class Warp:
    """32 threads: their registers, and the groups of them that have diverged."""

    def __init__(self, index: int, block: "Block"):
        self.index, self.block = index, block
        self.registers: list[Any] = [UNWRITTEN] * len(block.gpu.kernel.registers)
        self.pc = 0
        self.active = ALL  # the threads at `pc`
        self.parked: dict[int, Any] = {}  # the others, by their program counters
        self.mask = ALL  # the threads that execute the current instruction
        self.done = False
        self.waiting: Callable[[], bool] | None = None  # until it returns True
        self.count = 0  # instructions executed
        self.waited = 0  # the instructions that others executed while it waited at barriers
        # Of each kind the groups of operations that were not waited for; the last one is not
        # committed.
        self.groups: defaultdict[Any, list[list[Operation]]] = defaultdict(lambda: [[]])
        self.last_product: Operation | None = None
        self.fence: list[Any] = []  # the registers at the last wgmma.fence

    @property
    def seen(self) -> Any:
        return self.block.events.seen[self.index]

    @property
    def fenced(self) -> Any:
        return self.block.events.fenced[self.index]

    def event(self, line: int, what: str) -> Event:
        """A new event of this warp, which it knows."""
        event = self.block.events.add(Event(line, f"{what} of warp {self.index}"))
        self.seen[event.number] = True
        return event

    def special(self, name: str) -> Any:
        if name in self.block.gpu.parameters:
            return np.full(32, self.block.gpu.parameters[name], np.uint64)
        what, _, axis = name.removeprefix("%").partition(".")
        if (what, axis) == ("tid", "x"):
            return LANES + 32 * self.index
        values = {"ctaid": self.block.position, "nctaid": self.block.gpu.grid}[what]
        return np.full(32, values["xyz".index(axis)])

    def lanes(self) -> Any:
        """The threads that execute the instruction."""
        return LANES if self.mask is ALL else LANES[self.mask]

    def trace(self, operation: Operation) -> None:
        """An operation begins, or has been waited for; `timeline` notes when."""

    def fill(self, registers: list[int]) -> None:
        """Give garbage to registers that were not written, for the threads that do not write them
        now."""
        for index in registers:
            if self.registers[index] is UNWRITTEN:
                raw = np.frombuffer(self.block.gpu.random.randbytes(256), np.uint8)
                dtype = DTYPES[self.block.gpu.kernel.registers[index]]
                self.registers[index] = (
                    raw[:32] > 127 if dtype == np.bool_ else raw.view(dtype)[:32]
                )

    def advance(self, budget: int) -> None:  # noqa: C901  # a warp's states in one place
        """Run until the warp waits, ends, or has executed ``budget`` instructions."""
        gpu, registers = self.block.gpu, self.registers
        instructions, executed = gpu.kernel.instructions, gpu.executed
        for _ in range(budget):
            if self.parked:
                self.park(self.pc, self.active)
                self.pc = min(self.parked)
                self.active = self.parked.pop(self.pc)
            i = instructions[self.pc]
            self.count += 1
            try:
                mask = self.active
                if i.guard is not None:
                    mask = ~registers[i.guard.index] if i.negated else registers[i.guard.index]
                    mask = mask if self.active is ALL else mask & self.active
                    bits = mask.tobytes()
                    mask = ALL if bits == ALL_BYTES else mask
                    if bits == NO_BYTES:
                        self.fill(i.writes)
                        self.pc += 1
                        continue
                if mask is not ALL:
                    self.fill(i.writes)
                    if i.whole:
                        raise PtxError(i.line, f"a part of warp {self.index} executes {i.opcode}")
                self.mask = mask
                executed.add(self.pc)
                self.pc += 1
                if i.target >= 0:
                    self.branch(i.target)
                elif i.run(self):
                    break
            except (TypeError, AttributeError) as e:
                unready = [v for r in i.registers if isinstance(v := registers[r.index], Unready)]
                if not unready:
                    raise
                flying = any(one.operation is not None for one in unready)
                what = "of an asynchronous product" if flying else "that was not written"
                raise PtxError(i.line, f"{i.opcode} takes a register {what}") from e
        if self.count > LIMIT:
            raise PtxError(instructions[self.pc].line, "does not end")

    def branch(self, target: int) -> None:
        others = self.active & ~self.mask
        if others.any():
            self.park(self.pc, others)
        self.pc, self.active = target, self.mask

    def park(self, pc: int, mask: Any) -> None:
        both = self.parked.get(pc, False) | mask
        self.parked[pc] = ALL if both.all() else both


class Block:
    """A block of threads with its shared memory."""

    def __init__(self, gpu: Any, position: tuple[int, ...]):
        self.gpu, self.position, self.space = gpu, position, gpu.space
        self.events = Events(gpu.kernel.threads // 32)
        self.shared = Space("shared memory")
        self.memory = self.shared.add(Allocation("shared memory", SHARED_BASE, gpu.shared_bytes))
        self.warps = [Warp(i, self) for i in range(gpu.kernel.threads // 32)]
        self.at_barrier = 0  # warps
        self.flying: list[Operation] = []  # asynchronous operations, some of which have completed

    def arrive(self, warp: Warp) -> None:
        """``bar.sync``: the warp waits for all others."""
        self.at_barrier += 1
        warp.waiting = lambda: False
        if self.at_barrier == len(self.warps):
            self.at_barrier = 0
            latest = max(one.count + one.waited for one in self.warps)
            for one in self.warps:
                one.waited = latest - one.count
                one.waiting = None
            self.events.share()

    def run(self) -> None:
        schedule, rng = self.gpu.schedule, self.gpu.random
        choose = {
            "forward": lambda ready: ready[0],
            "reverse": lambda ready: ready[-1],
            "random": rng.choice,
        }
        while running := [warp for warp in self.warps if not warp.done]:
            self.flying = [one for one in self.flying if one.steps]
            if schedule.completion == "random":
                for one in rng.sample(self.flying, rng.randint(0, len(self.flying))):
                    one.advance(rng.randrange(2))
            ready = [warp for warp in running if warp.waiting is None or warp.waiting()]
            if ready:
                warp = choose[schedule.order](ready)
                warp.waiting = None
                warp.advance(rng.randint(1, 400) if schedule.order == "random" else LIMIT + 1)
            elif self.flying:
                self.flying.pop().advance()
            else:
                lines = {
                    warp.index: self.gpu.kernel.instructions[warp.pc - 1].line for warp in running
                }
                raise PtxError(min(lines.values()), f"deadlock: the warps wait at lines {lines}")
        self.end()

    def end(self) -> None:
        """Complete the asynchronous stores to global memory, and forget the events.

        A block that writes nothing, not even its tensormaps, is one too many. No values would show
        it.
        """
        for address, barrier in self.memory.barriers.items():
            if barrier.transactions:
                raise PtxError(barrier.line, f"the mbarrier at {address} still expects bytes")
        for one in self.flying:
            if one.steps and not self.events.seen[:, one.read.number].any():
                raise PtxError(one.read.line, "its block ends before it has read shared memory")
            one.advance()
        if not any([allocation.end_block() for allocation in self.space.allocations]):
            raise PtxError(
                self.gpu.kernel.instructions[-1].line, f"block {self.position} writes nothing"
            )


@action("ret", whole=True)
def _return(warp: Warp, i: Instruction) -> bool:
    warp.done = True
    return True


@action("bar.sync", whole=True)
def _synchronize(warp: Warp, i: Instruction, number: Any) -> bool:
    if number[0]:
        raise PtxError(i.line, f"barrier {number[0]} is not modelled")
    warp.block.arrive(warp)
    return True


@instruction("bra", results=0)
@instruction("bar.warp.sync", results=0, whole=True)
def _pass(i: Instruction) -> Run:
    """`Warp.branch` follows a branch. Limitation: a missing `bar.warp.sync` is not detected."""
    return lambda warp: None
