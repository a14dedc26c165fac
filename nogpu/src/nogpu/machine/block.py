# SPDX-License-Identifier: MIT
"""A block of threads: its warps, and the barriers at which they meet, in turns.

`execute` has what Python does for an instruction of a warp, and `native` what C does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from nogpu.machine import simt
from nogpu.machine.allocation import Allocation
from nogpu.machine.cluster import Cluster, Phase
from nogpu.machine.execute import advance
from nogpu.machine.gpu_state import GpuState
from nogpu.machine.memory import Space
from nogpu.machine.operation import Operation
from nogpu.machine.parse import (
    Instruction,
    PtxError,
    own_error,
    source_name,
    why_no_operand,
)
from nogpu.machine.registers import (
    ALL,
    DTYPES,
    LANES,
    NO_CAUSE,
    SHARED_BASE,
    UNWRITTEN,
    WINDOW_BITS,
    RegisterFile,
    Registers,
    Values,
)
from nogpu.machine.trace import Trace
from nogpu.machine.vector_clocks import Events, VectorClocks, merged
from nogpu.native.warps import BlockState, LaunchState, WarpState

LOCAL_BASE = 2**20  # of the threads' stacks; Triton has addresses of 32 bits there
TURN = 20_000  # instructions of a warp of CUDA C++, after which others have their turn
# The same of CUDA C++, whose addresses tell which memory they are in: it is none of a process.
GENERIC_BASE = 2**57


LANE_MASKS = {
    "WARP_SZ": np.full(32, 32),
    "%laneid": LANES,
    "%lanemask_eq": np.uint32(1) << LANES.astype(np.uint32),
    "%lanemask_lt": (np.uint32(1) << LANES.astype(np.uint32)) - np.uint32(1),
    "%lanemask_le": ((np.uint64(2) << LANES.astype(np.uint64)) - np.uint64(1)).astype(np.uint32),
    "%lanemask_gt": ~((np.uint64(2) << LANES.astype(np.uint64)) - np.uint64(1)).astype(np.uint32),
    "%lanemask_ge": ~((np.uint32(1) << LANES.astype(np.uint32)) - np.uint32(1)),
}


class Warp:
    """32 threads: their registers, and the groups of them that have diverged.

    Attributes:
        number: in its block.
        index: in its cluster, and of its vector clock.
        first_thread: the number of its first thread in its block.
    """

    def __init__(self, number: int, block: Block):
        self.number, self.first_thread, self.block = number, 32 * number, block
        self.clocks: VectorClocks = block.clocks
        self.index: int = number + block.rank * (block.gpu.kernel.threads // 32)
        self.name: str = f"warp {number}{block.suffix}"
        self.registers: RegisterFile
        if not block.is_native:  # which gives it others
            kinds = block.gpu.kernel.registers
            if block.gpu.kernel.block is None:
                self.registers = Registers([UNWRITTEN] * len(kinds))
            else:
                self.registers = Registers([np.zeros(32, DTYPES[kind]) for kind in kinds])
        self.native: WarpState | None = None  # which executes common instructions in C
        self.pc = 0
        self.active = ALL  # the threads at `pc`
        self.alive: Values = ALL  # those that have not ended
        if block.gpu.kernel.block is not None:
            count = math.prod(block.gpu.kernel.block) - self.first_thread
            if count < 32:
                self.active = self.alive = count > LANES
        # Of CUDA C++: how long a group may go on in a loop, and others after that; and where a
        # group has found all threads that it waits for.
        self.patience, self.held, self.converged = simt.PATIENCE, 0, -1
        self.early: Values = ~ALL  # threads that a branch has led to their end
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
        self.piece = LANES  # the threads of the access that is checked
        self.carry = ~ALL  # of the last addition with ".cc"
        self.cause = NO_CAUSE  # why the last load is undefined
        self.arguments: dict[tuple[str, int], Any] = {}  # of a call, by their places
        self.relaxed: list[int] = []  # what it has read by relaxed accesses since its last fence
        self.released: dict[int, Values] | None = None  # what its last fence releases
        self.phase: Phase | None = None  # of the cluster barrier, at which it has arrived
        self.has_waited = False  # for earlier grids
        # Mbarriers that it has initialised; those whose initialization it has released by a fence,
        # and those of other blocks that it may use because it was released.
        self.own_mbarriers: set[Any] = set()
        self.released_mbarriers: set[Any] = set()
        self.known_mbarriers: set[Any] = set()

    @property
    def is_ready(self) -> bool:
        """Whether it has not ended, and does not wait."""
        return not self.done and (self.waiting is None or self.waiting())

    def event(self, line: int, what: str, atomic: bool = False) -> int:
        """Return a new event of this warp, which it knows."""
        time = int(self.clocks.times[self.index, self.index])
        name = f"{what} of {self.name}"
        events: Events = self.block.gpu.events
        number = events.add(self.block.number, self.index, time, line, name, atomic)
        if self.block.trace is not None:
            self.block.trace.event(self, number, line)
        return number

    def fault(
        self, kind: str, name: str, line: int, message: str, other: int = 0, event: int = 0
    ) -> None:
        """Report a fault of an instruction of this warp.

        Args:
            other: the event with which it conflicts; 0: there is none.
            event: an earlier access of this warp that is the fault; 0: the present instruction.
        """
        if (trace := self.block.trace) is not None:
            trace.fault(message, trace.events.get(event) or trace.moment(self, line), other)
        self.block.gpu.fault(kind, name, line, message, self.block.program)

    def release(self, address: int) -> None:
        """Let those who acquire from ``address`` know what this warp knows."""
        self.publish(address, self.clocks.release(self.index))

    def publish(self, address: int, known: dict[int, Values]) -> None:
        if self.block.trace is not None:
            self.block.trace.release(self, address)
        released = self.block.gpu.released
        released[address] = merged(released.get(address, {}), known)

    def acquire(self, address: int) -> None:
        if known := self.block.gpu.released.get(address):
            if self.block.trace is not None:
                self.block.trace.acquire(self, address)
            self.clocks.acquire(self.index, known)

    def fence_memory(self) -> None:
        """``fence.acq_rel``: relaxed accesses before it acquire, and those after it release."""
        for address in self.relaxed:
            self.acquire(address)
        self.relaxed.clear()
        self.released = self.clocks.release(self.index)

    def special(self, name: str) -> Values:  # noqa: PLR0911  # a case for each kind of symbol
        block = self.block
        if (given := self._given(name)) is not None:
            return given
        if name in block.gpu.symbols:
            return np.full(32, block.gpu.symbols[name], np.uint64)
        if name in block.gpu.kernel.locals:
            offset = block.gpu.kernel.locals[name]
            base = LOCAL_BASE if block.gpu.kernel.block is None else GENERIC_BASE
            stacks = base + (LANES + self.first_thread) * block.gpu.kernel.local_bytes
            return (stacks + offset).astype(np.uint64)
        if name in LANE_MASKS:
            return LANE_MASKS[name]
        if name.startswith(("%clock", "%globaltimer")) and block.gpu.kernel.block is not None:
            return np.full(32, self.count + self.waited)
        if name.startswith(("%clock", "%globaltimer")):
            block.cluster.spins.reads_clock = True
            return np.full(32, self.count)
        what, _, axis = name.removeprefix("%").partition(".")
        sizes = block.gpu.kernel.block or (block.gpu.kernel.threads, 1, 1)
        if what == "tid":
            return self.positions()["xyz".index(axis)]
        axes = {
            "ntid": sizes,
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
            "total_smem_size": block.gpu.shared_bytes
            + sum(size for _, size in block.gpu.kernel.shared.values()),
        }
        if what not in others:
            i = block.gpu.kernel.instructions[self.pc - 1]
            message = f"the executor does not know the operand {name} of {i.opcode}"
            reason = why_no_operand(block.gpu.kernel, name)
            raise PtxError(i.line, f"{message}{reason}", "unknown instruction")
        return np.full(32, others[what])

    def positions(self) -> tuple[Values, Values, Values]:
        """Return the positions of the threads in their block, in each dimension."""
        numbers = LANES + self.first_thread
        if self.block.gpu.kernel.block is None:
            return numbers, np.zeros(32, np.int64), np.zeros(32, np.int64)
        x, y, _ = self.block.gpu.kernel.block
        return numbers % x, numbers // x % y, numbers // (x * y)

    def thread(self, lane: int) -> str:
        """Name a thread by its position in its block."""
        x, y, z = (int(one[lane]) for one in self.positions())
        return f"thread ({x}, {y}, {z})"

    def threads_of(self, mask: Values) -> str:
        """Name the threads of a mask by the first and the last one."""
        lanes = LANES[mask]
        first, last = (self.thread(int(lanes[n])).removeprefix("thread ") for n in (0, -1))
        return (
            f"thread {first}" if len(lanes) == 1 else f"{len(lanes)} threads from {first} to {last}"
        )

    def _given(self, name: str) -> Values | None:
        """Return a parameter, or what a call has returned, from an offset on; None for others."""
        parameter, _, added = name.partition("+")
        offset = int(added or 0)
        if parameter in self.block.gpu.parameters:
            bits = self.block.gpu.parameters[parameter] >> 8 * offset
            return np.full(32, bits % 2**64, np.uint64)
        if (parameter, offset) in self.arguments:
            return np.asarray(self.arguments[parameter, offset]).astype(np.uint64)
        return None

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
            for place, rows, _ in space.parts(elements, width):
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
        """Note that an operation begins, or was waited for, if the launch is traced."""
        if self.block.trace is not None:
            self.block.trace.operate(self, operation)


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
        gpu: GpuState,
        position: tuple[int, ...],
        number: int,
        trace: Trace | None = None,
        cluster: Cluster | None = None,
    ):
        self.gpu, self.position, self.number, self.space = gpu, position, number, gpu.space
        warps, self.cluster_size = gpu.kernel.threads // 32, math.prod(gpu.kernel.cluster)
        self.cluster: Cluster
        self.clocks: VectorClocks
        if cluster is None:
            self.clocks = VectorClocks(gpu.events, number, warps)
            self.shared, self.flying, self.rank = Space("shared memory"), list[Operation](), 0
        else:
            self.cluster, self.clocks, self.shared = cluster, cluster.clocks, cluster.shared
            self.flying, self.rank = cluster.flying, len(cluster.blocks)
            cluster.blocks.append(self)
        self.window = self.rank << WINDOW_BITS
        self.program = tuple(map(int.__floordiv__, position, gpu.kernel.cluster))
        self.suffix: str = f" of CTA {self.rank}" if self.cluster_size > 1 else ""
        self.trace = trace
        launch = gpu.native if trace is None else None  # of the core in C
        self.is_native: bool = launch is not None
        name = f"shared memory{self.suffix}"
        self.memory = Allocation(name, SHARED_BASE | self.window, gpu.shared_bytes)
        if launch is not None:  # which leaves what is made later to Python
            self.memory.refine(launch.program.shared_unit)
            self.memory.others = np.zeros_like(self.memory.reads)
        self.shared.add(self.memory)
        self.variables = self._variables(launch)
        self.local = Space("local memory")
        if gpu.kernel.local_bytes:
            size = gpu.kernel.local_bytes * gpu.kernel.threads
            base = LOCAL_BASE if gpu.kernel.block is None else GENERIC_BASE
            stacks = Allocation("local memory", base, size)
            if launch is not None and gpu.kernel.block is not None:
                stacks.refine(launch.program.local_unit)
                stacks.others = np.zeros_like(stacks.reads)
            self.local.add(stacks)
        self.warps = [Warp(i, self) for i in range(warps)]
        self.native = None if launch is None else BlockState(launch, self)
        # By barrier the warps that have arrived, and whether they wait.
        self.at_barrier: dict[int, list[tuple[Warp, bool]]] = {}
        self.expected: dict[
            int, int | None
        ] = {}  # warps at each barrier; None: all that have not ended
        # By barrier what is done when all have arrived: `bar.red` gives each warp a result.
        self.results: dict[int, list[Callable[[], None]]] = {}
        # Reads of shared memory that nobody has written, by what and where.
        self.unwritten: dict[tuple[str, int], str] = {}
        self.votes: dict[int, list[Values]] = {}  # of `bar.red`, by barrier
        self.tensor_memory: Any = None  # of sm_100
        self.bulk: list[tuple[int, int, str]] = []  # bulk copies: agent, line, what must have ended
        self.loads: set[Any] = set()  # mbarriers whose boxes nobody has waited for

    def _variables(self, launch: LaunchState | None) -> list[Allocation]:
        """Make the variables in shared memory that CUDA C++ declares."""
        gpu = self.gpu
        variables = [
            Allocation(source_name(one), address, size)
            for one, (address, size) in gpu.kernel.shared.items()
        ]
        for one in variables:
            if one.name in gpu.shared_types:
                one.index = partial(_element, one.name, *gpu.shared_types[one.name])
            if launch is not None:
                one.refine(min(launch.program.shared_unit, one.unit))
                one.others = np.zeros_like(one.reads)
            self.shared.add(one)
        if gpu.kernel.block is not None:
            for one in (self.memory, *variables):
                one.follow_lanes()
        return variables

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
        self.clocks.join(learned)
        if self.trace is not None:
            self.trace.meet(arrived, latest)
        for one, was_waiting in arrived:
            if was_waiting:
                one.waited = latest - one.count
                one.waiting = None

    def note_unwritten(self, warp: Warp, place: Allocation, line: int, message: str) -> None:
        """Note a read of shared memory that nobody has written so far.

        If another thread writes it before a barrier, then that is a race; otherwise
        `tell_unwritten` reports it.
        """
        if self.trace is not None:
            self.trace.fault(message, self.trace.moment(warp, line))
        self.unwritten.setdefault((place.name, line), message)

    def tell_unwritten(self) -> None:
        for (_, line), message in self.unwritten.items():
            self.gpu.fault("error", "uninitialised memory", line, message, self.program)
        self.unwritten.clear()

    def arrive_threads(self, warp: Warp, i: Instruction, barrier: int, count: int | None) -> None:
        """A barrier of CUDA C++, at which threads that have ended are not waited for.

        Raises:
            PtxError: warps wait at different lines.
        """
        self.expected[barrier] = count
        kernel, arrived = self.gpu.kernel, self.at_barrier.setdefault(barrier, [])
        for other, _ in arrived if count is None else []:
            one = kernel.instructions[other.pc - 1]
            if one.source != i.source:
                places = (
                    f"{who.threads_of(who.alive)} at {self.gpu.place_of(place.line)}"
                    for who, place in ((other, one), (warp, i))
                )
                message = "__syncthreads is in a branch that not all threads take: "
                raise PtxError(one.line, message + "; ".join(places), simt.DIVERGED)
        arrived.append((warp, True))
        warp.waiting = lambda: False
        self.complete_barriers()

    def complete_barriers(self) -> None:
        """Let warps go on at whose barrier all others have arrived or ended."""
        living = [one for one in self.warps if not one.done]
        for barrier, arrived in list(self.at_barrier.items()):
            count = self.expected.get(barrier)
            if len(arrived) < (len(living) if count is None else count):
                continue
            if count is None:
                self._note_ended(arrived[0][0])
            for end in self.results.pop(barrier, []):
                end()
            latest = max(one.count + one.waited for one, _ in arrived)
            self.clocks.join([one.index for one, _ in arrived])
            del self.at_barrier[barrier]
            if self.trace is not None:
                self.trace.meet(arrived, latest)
            for one, _ in arrived:
                one.waited = latest - one.count
                one.waiting = None

    def _note_ended(self, warp: Warp) -> None:
        """Say that threads have ended without a barrier that the others have reached."""
        assert self.gpu.kernel.block is not None
        count = math.prod(self.gpu.kernel.block)
        ended = sum(
            max(0, min(32, count - w.first_thread)) - int(w.alive.sum()) for w in self.warps
        )
        if not ended:
            return
        i = self.gpu.kernel.instructions[warp.pc - 1]
        passed = [
            w.thread(lane)
            for w in self.warps
            for lane in range(max(0, min(32, count - w.first_thread)))
            if not w.alive[lane] and not w.early[lane]
        ]
        if passed:
            others = f"{passed[0]} has"
            if len(passed) > 1:
                others = f"{len(passed)} others, such as {passed[0]}, have"
            message = (
                "__syncthreads is in a branch that not all threads take: "
                f"{warp.threads_of(warp.alive)} {'waits' if warp.alive.sum() == 1 else 'wait'} "
                f"here, and {others} gone past it and ended"
            )
            raise PtxError(i.line, message, simt.DIVERGED)
        gone = next(
            w.thread(lane)
            for w in self.warps
            for lane in range(max(0, min(32, count - w.first_thread)))
            if not w.alive[lane]
        )
        who = f"{ended} threads of the block, such as {gone}, have" if ended > 1 else f"{gone} has"
        them = "them" if ended > 1 else "it"
        message = (
            f"{who} ended without this __syncthreads, which CUDA wants all threads to reach; let "
            f"{them} skip the work, and not return"
        )
        warp.fault("warning", simt.DIVERGED, i.line, message)

    def turns(self) -> Iterator[bool]:
        """Run the blocks of the cluster, and yield False where other clusters should run.

        The first block does that for all of them.
        """
        spins, warps = self.cluster.spins, list[Any](self.cluster.warps)
        if self.gpu.schedule.order == "reverse":
            warps.reverse()
        while not all(warp.done for warp in warps):
            self._complete_some()
            if (warp := self._next(warps)) is not None:
                self._advance(warp)
                if spins.has_spun:
                    spins.spun.add(warp.index)
                    if spins.is_stuck or not spins.is_idle:
                        yield False
            elif spins.spun and not (spins.is_idle and self.flying):
                if spins.is_idle:
                    spins.end_turn()
                    yield False
                spins.spun.clear()
            elif self.flying:
                self.flying.pop().advance()
                spins.spun.clear()
            else:
                self._tell_deadlock()
                return
        for block in self.cluster.blocks:
            block.end()

    def _complete_some(self) -> None:
        """Forget asynchronous operations that have completed; at random, complete others."""
        self.flying[:] = [one for one in self.flying if one.steps]
        if self.gpu.schedule.completion == "random" and not self.cluster.spins.is_idle:
            rng = self.gpu.random
            for one in rng.sample(self.flying, rng.randint(0, len(self.flying))):
                one.advance(rng.randrange(2))

    def _tell_deadlock(self) -> None:
        running = [warp for warp in self.cluster.warps if not warp.done]
        lines = [self.gpu.kernel.instructions[warp.pc - 1].line for warp in running]
        waiting = (
            f"{w.name.removeprefix('warp ')} at {self.gpu.place_of(n)}{_missing(w)}"
            for w, n in zip(running, lines, strict=True)
        )
        message = f"warps wait for what nobody will do: {', '.join(waiting)}"
        if self.trace is not None:
            self.trace.stop(message, zip(running, lines, strict=True))
        self.gpu.fault("error", "deadlock", min(lines), message, self.program)

    def _next(self, warps: list[Any]) -> Warp | None:
        """Return the one of these warps that runs next; None: all wait, have ended or spin."""
        spins = self.cluster.spins
        ready = (warp for warp in warps if warp.is_ready and warp.index not in spins.spun)
        if spins.is_random:
            found = list(ready)
            return self.gpu.random.choice(found) if found else None
        return next(ready, None)

    def _advance(self, warp: Warp) -> None:
        """Run a warp until it waits, spins or ends."""
        spins, budget = self.cluster.spins, self.gpu.limit + 1
        if spins.is_random:
            budget = self.gpu.random.randint(1, 400)
        spins.begin_warp(warp)
        warp.waiting = None
        try:
            if self.gpu.kernel.block is None:
                advance(warp, budget)
            else:
                simt.advance(warp, min(budget, TURN))
                if not warp.done and warp.waiting is None:  # it may wait for another warp's store
                    spins.spun.add(warp.index)
        except (PtxError, MemoryError) as e:
            self.tell_unwritten()
            if self.trace is not None and isinstance(e, PtxError):
                self.trace.fault(e.reason, self.trace.moment(warp, e.line))
            raise
        except Exception as e:
            line = self.gpu.kernel.instructions[max(warp.pc - 1, 0)].line
            raise own_error(e, line) from e

    def end(self) -> None:
        """Complete the asynchronous stores to global memory."""
        self.gpu.executed_instructions += sum(warp.count for warp in self.warps)
        self.tell_unwritten()
        warp = self.warps[0]
        for address, barrier in self.memory.barriers.items():
            if barrier.transactions:
                what = "still expects" if barrier.transactions > 0 else "has got unexpected"
                message = f"the mbarrier at {address}{self.suffix} {what} bytes"
                self.gpu.fault(
                    "error", "unfinished copy", barrier.line, message, warp.block.program
                )
        of_bulk = {agent for agent, _, _ in self.bulk}
        known = self.clocks.times.max(0)
        for agent, line, what in self.bulk:  # also those that this schedule has completed
            if not known[agent]:
                self._note_unfinished(line, f"this copy has {what} its shared memory")
        mine = [one for one in self.flying if self.cluster.owners[one.agent] == self.rank]
        for one in mine:
            if one.steps and one.agent not in of_bulk and not known[one.agent]:
                _, name = one.what.split(maxsplit=1)
                self._note_unfinished(one.line, f"this {name} has {one.last_access}")
            one.advance()

    def _note_unfinished(self, line: int, what: str) -> None:
        message = f"the program may end before {what}"
        self.gpu.fault("error", "unfinished copy", line, message, self.program)


def _element(name: str, width: int, sizes: tuple[int, ...], offset: int) -> str:
    """Name the element of an array at an offset in bytes."""
    number, found = offset // width, list[int]()
    for size in sizes[:0:-1]:
        number, rest = divmod(number, size)
        found.append(rest)
    return name + "".join(f"[{n}]" for n in ([number] if sizes else []) + found[::-1])


def _missing(warp: Warp) -> str:
    """Say what an mbarrier misses for which a warp waits; "" for other waits."""
    found = getattr(warp.waiting, "missing", None)
    return "" if found is None else str(found())
