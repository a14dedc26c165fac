# SPDX-License-Identifier: MIT
"""Global memory of a stand-in for a GPU, and launches of PTX kernels on it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from random import Random

import numpy as np

# Importing these registers their instructions.
from nogpu.instructions import (  # noqa: F401
    arithmetic,
    atomics,
    bits,
    clusters,
    control,
    conversions,
    copies,
    driver_functions,
    rare,
    tensor_cores,
    tensor_memory,
    tma,
    wmma,
)
from nogpu.machine import dependents
from nogpu.machine.allocation import Allocation
from nogpu.machine.block import Block
from nogpu.machine.cluster import Cluster
from nogpu.machine.decode import decode
from nogpu.machine.gpu_state import GpuState, Schedule
from nogpu.machine.instruction_counts import Counts, Progress
from nogpu.machine.parse import Kernel, PtxError, parse
from nogpu.machine.program_sample import LEAST, ProgramSample
from nogpu.machine.registers import Values
from nogpu.machine.spins import PATIENCE
from nogpu.machine.trace import Trace
from nogpu.machine.vector_clocks import Events
from nogpu.machine.workers import least_seconds, run_by_workers
from nogpu.native import core as native
from nogpu.native.blocks import Blocks
from nogpu.native.encoding import Program
from nogpu.native.layout import WAIT_ADDRESS
from nogpu.native.warps import LaunchState

Turns = Iterator[bool]  # of `Block.turns`
# The memory of the launches has addresses that no process has; between allocations are gaps.
FIRST_ADDRESS, GAP = 2**56, 2**20


def _blocks(gpu: GpuState, position: tuple[int, ...]) -> Blocks:
    return Blocks(Block(gpu, position, 0), copies.COPIES_NEED_FENCE)


@lru_cache(32)
def _decoded(text: str, entry: str = "", block: tuple[int, int, int] | None = None) -> Kernel:
    return decode(parse(text, entry, block))


class Residents:
    """The clusters that the GPU holds, each by its first block, in turns.

    Attributes:
        idle: turns, one after the other, in which nothing has changed.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Block, Turns]] = deque()
        self.idle = self._stuck = 0

    def __len__(self) -> int:
        return len(self._queue)

    def begin(self, block: Block) -> None:
        """Add a cluster, which has the next turn."""
        self._queue.appendleft((block, block.turns()))

    def take(self) -> tuple[Block, Turns]:
        """Return the cluster that has the next turn; it is no longer among these."""
        block, turns = self._queue.popleft()
        block.cluster.spins.begin_turn(self.idle // (len(self) + 1))
        return block, turns

    def put(self, block: Block, turns: Turns) -> None:
        """Take back a cluster that waits for others."""
        self._queue.append((block, turns))

    def is_deadlock(self, block: Block, is_idle: bool) -> bool:
        """Whether all clusters wait for ever, now that the one of ``block`` had a turn.

        Args:
            is_idle: it waits, and nothing has changed in its turn.
        """
        spins = block.cluster.spins
        self.idle = self.idle + 1 if is_idle else 0
        self._stuck = self._stuck + 1 if is_idle and spins.is_stuck else 0
        has_given_up = is_idle and spins.patience == PATIENCE and not spins.is_stuck
        return has_given_up or (is_idle and self._stuck >= len(self))


class Gpu(GpuState):
    """A GPU: global memory, and the launches on it.

    Args:
        change: of the PTX of each kernel, before it is executed; None: there is none.
    """

    keeps_allocations = True  # for the next launch
    most_programs: int | None = None  # of a launch that are executed; None: all
    most_seconds: float | None = None  # for which more of them are executed than `LEAST`; None: any
    sample: ProgramSample | None = None  # of the last launch; None: all were executed

    def __init__(self, schedule: Schedule, change: Callable[[str], str] | None = None):
        super().__init__(schedule)
        self.change = change
        self.next = FIRST_ADDRESS
        self.counted: list[Counts] = []  # of all launches
        self.trace: Trace | None = None  # of the first programs of the next launch
        # Grids that may still run when the next launch begins, the last one first.
        self.earlier: list[dependents.EarlierGrid] = []
        self.core_blocks: Blocks | None = None  # of the last launch

    @property
    def takes_samples(self) -> bool:
        """Whether programs may be executed in another order than that of the grid."""
        return self.most_programs is not None or self.most_seconds is not None

    def prepare(self, kernel: Kernel) -> None:
        """A launch of ``kernel`` begins."""

    def allocate(self, name: str, size: int) -> Allocation:
        """Return memory that nobody has written."""
        allocation = self.space.add(Allocation(name, self.next, size))
        self.next += -(-size // GAP) * GAP + GAP
        return allocation

    def launch(
        self,
        text: str,
        parameters: Sequence[int],
        grid: tuple[int, int, int] = (1, 1, 1),
        shared: int = 0,
        entry: str = "",
        block: tuple[int, int, int] | None = None,
    ) -> None:
        """Execute the kernel of ``text`` on ``grid`` blocks.

        Those of a cluster, whose size the text gives, run together.

        Args:
            parameters: the bits of each one.
            shared: bytes of dynamic shared memory.
            entry: the name of the kernel, if the text has several.
            block: the threads of a block of CUDA C++ in each dimension; None: the text, by Triton,
                gives their number.
        """
        text = text if self.change is None else self.change(text)
        self.kernel, self.grid = _decoded(text, entry, block), grid
        self.shared_bytes = shared
        self._place_constants()
        self.prepare(self.kernel)
        self.parameters = dict(zip(self.kernel.parameters, parameters, strict=True))
        self.executed_instructions = 0
        self.random = Random(self.schedule.seed)
        self.counts = self.space.counts = Counts(self.kernel)
        self.counted.append(self.counts)
        for allocation in self.space.allocations:
            self.counts.watch(allocation)
        self.programs = self._programs()
        self.sample, most = None, self.most_programs
        if self.most_seconds is not None:
            most = LEAST  # which say how many there is time for
        if most is not None and most < math.prod(self.programs):
            self.sample = ProgramSample(self.programs, most, self.counts)
        blocks = self._positions()
        if self.schedule.order == "reverse":
            blocks.reverse()
        elif self.schedule.order == "random":
            self.random.shuffle(blocks)
        self.events, self.released = Events(), {}
        self._begin_dependents()
        self.native = self._native_state()
        has_ended = False
        try:
            with np.errstate(all="ignore"):
                self._run(blocks)
            has_ended = True
        finally:
            if self.sample is not None and not has_ended:  # the counts are of what was executed
                self.sample.give_back()
            self.counts.end(self.space.allocations)
            self.space.counts = None
            if self.sample is not None and has_ended:
                self.sample.scale()
        if self.keeps_allocations:
            for allocation in self.space.allocations:
                allocation.end_launch()

    def _place_constants(self) -> None:
        """Give the kernel's constants, and variables that nobody keeps, memory of the launch."""
        self.symbols = dict(self.variables)
        for name, content in self.kernel.constants.items():
            if name in self.symbols:
                continue
            place = self.allocate(name, len(content))
            place.content()[:] = np.frombuffer(content, np.uint8)
            place.give()
            self.symbols[name] = place.base

    def _begin_dependents(self) -> None:
        """Note what blocks do to control grids, and what earlier grids may still do."""
        has_controls = self.kernel.controls_grids
        self.controls = np.zeros(math.prod(self.programs), np.uint8) if has_controls else None
        if self.earlier:
            dependents.begin(self.earlier, self.events, self.space, self.released)

    def _native_state(self) -> LaunchState | None:
        """Return what the core in C needs of the launch; None: Python executes all of it."""
        library = native.library()
        if library is None:
            return None
        if self.kernel.program is None:
            self.kernel.program = Program(self.kernel, library)
        return LaunchState(self.kernel.program, self.events, self.space, self.counts)

    def _programs(self) -> tuple[int, int, int]:
        """Return how many clusters the grid has in each dimension.

        Raises:
            ValueError: a part of a cluster is left.
        """
        if any(map(int.__mod__, self.grid, self.kernel.cluster)):
            raise ValueError(
                f"the grid is {self.grid} CTAs, expected a multiple of {self.kernel.cluster}, "
                "which is a cluster"
            )
        x, y, z = map(int.__floordiv__, self.grid, self.kernel.cluster)
        return x, y, z

    def _positions(self) -> list[tuple[int, ...]]:
        """Return the first block of each cluster that is executed, in the order of the grid."""
        if self.sample is None:
            chosen = [index[::-1] for index in np.ndindex(self.programs[::-1])]
        else:  # `np.ndindex` would hold a number for each program of the grid
            chosen = self.sample.positions
        return self._placed(chosen)

    def _placed(self, programs: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the first block of each of these clusters."""
        return [tuple(map(int.__mul__, index, self.kernel.cluster)) for index in programs]

    def released_addresses(self) -> set[int]:
        """Return where blocks of the last launch have released what they know."""
        of_core = set() if self.core_blocks is None else self.core_blocks.released_addresses()
        return {*self.released, *of_core} - {WAIT_ADDRESS}

    def _begin(self, position: tuple[int, ...], number: int) -> Block:
        """Return the block at a position, having begun the others of its cluster, too."""
        trace = None if self.trace is None else self.trace.of(number)
        sizes = self.kernel.cluster
        cluster = Cluster(self, number, sizes[0] * sizes[1] * sizes[2])
        first: Block | None = None
        for index in np.ndindex(sizes[::-1]):
            place = tuple(map(int.__add__, position, index[::-1]))
            block = Block(self, place, number, trace, cluster)
            first = first or block
        assert first is not None
        if trace is not None:
            trace.program, trace.multiprocessors = first.program, self.multiprocessors
        return first

    def _run(self, positions: list[tuple[int, ...]]) -> None:
        """Run blocks, and those behind them that there is time for, if these are a sample."""
        self.core_blocks, self.progress = None, Progress(0, 0)
        started, done = time.perf_counter(), 0
        while done < len(positions):
            positions = self._run_all(positions, done)
            done = len(positions)
            positions = self._with_more(positions, time.perf_counter() - started)

    def _run_all(self, positions: list[tuple[int, ...]], started: int) -> list[tuple[int, ...]]:
        """Run blocks one after the other; where one waits for another, run those in turn.

        Args:
            started: how many of them have run before.

        Returns:
            The positions, with those behind them for which one of a sample has waited.
        """
        resident, blocks = Residents(), self.core_blocks
        count, as_array = len(positions), np.array(positions, np.int32)
        self.progress.count = count
        while started < count or len(resident):
            before = self.changes, started
            begins = started < count and self._has_room(len(resident))
            if begins and blocks is None and self._can_run_blocks(started):
                self.core_blocks = blocks = _blocks(self, positions[started])
            if begins and blocks is not None and blocks.works:
                may_share = not len(resident)  # who must be able to see who has written what
                started += self._run_blocks(blocks, as_array[started:], started, may_share)
                if started == count:
                    begins = False
                    if not len(resident):
                        break
            if begins:
                resident.begin(self._begin(positions[started], started))
                started += 1
            block, turns = resident.take()
            has_ended = self._turn(block, turns)
            if not has_ended:
                resident.put(block, turns)
            is_idle = not has_ended and before == (self.changes, started)
            if resident.is_deadlock(block, is_idle):
                if self.sample is None:
                    raise self._deadlock(block, count - started)
                positions = self._take_all(positions)
                count, as_array = len(positions), np.array(positions, np.int32)
                self.progress.count, resident.idle = count, 0  # others begin
        return positions

    def _with_more(self, positions: list[tuple[int, ...]], seconds: float) -> list[tuple[int, ...]]:
        """Return the positions with those behind them that there is time for, too.

        Args:
            seconds: that executing the positions has taken.
        """
        if self.sample is None or self.most_seconds is None:
            return positions
        most = int(self.most_seconds / max(seconds, 1e-9) * len(positions))
        if most >= self.sample.size:
            return self._take_all(positions)
        if most < 2 * len(positions):  # to grow by less is not worth it
            return positions
        return [*positions, *self._placed(self.sample.grow(most))]

    def _has_room(self, resident: int) -> bool:
        """Whether the GPU holds one more cluster.

        Of a sample one runs at a time, or what each of them has counted would not be known.
        """
        if self.sample is not None:
            return resident == 0
        return resident == 0 or self.holds((resident + 1) * math.prod(self.kernel.cluster))

    def holds(self, blocks: int) -> bool:
        """Whether the multiprocessors have room for so many blocks at once: one each."""
        return blocks <= self.multiprocessors

    def _turn(self, block: Block, turns: Iterator[bool]) -> bool:
        """Let a cluster go on until it waits, and return whether it has ended."""
        try:
            has_ended = next(turns, True)
        except PtxError as e:
            e.program = block.program
            raise
        self.progress.done += has_ended
        if has_ended and self.sample is not None:
            self.sample.end(block.program, self.space.allocations)
        return has_ended

    def _deadlock(self, block: Block, left: int) -> PtxError:
        reason = "each program waits for a value that no other program writes"
        if left:
            who = "1 program waits" if left == 1 else f"{left} programs wait"
            reason += f"; {who} for a place on the GPU"
        deadlock = PtxError(block.cluster.spins.line, reason, "deadlock")
        deadlock.program = block.position
        if block.trace is not None:
            running = (one for one in block.cluster.warps if not one.done)
            block.trace.stop(reason, ((one, block.cluster.spins.line) for one in running))
        return deadlock

    def _take_all(self, positions: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Execute the others, too: there is time, or a program waits for one of them.

        Returns:
            The positions with those that were left out behind them.
        """
        assert self.sample is not None
        self.sample.give_back()
        self.sample, taken = None, set(positions)
        return [*positions, *(one for one in self._positions() if one not in taken)]

    def _run_blocks(self, blocks: Blocks, positions: Values, number: int, may_share: bool) -> int:
        """Let the core execute blocks as a whole, and return how many.

        Args:
            may_share: several workers may execute them.
        """
        if self.sample is not None:
            done = 0
            while done < len(positions) and blocks.run(positions[done:][:1], number + done):
                self.sample.end(tuple(positions[done].tolist()), self.space.allocations)
                done += 1
            return done
        if len(positions) < 4 or not blocks.program.is_for_workers or not may_share:
            done = blocks.run(positions, number)
            if not may_share:
                blocks.tell_releases()
            return done
        # The first blocks say how long the others will take.
        start = time.perf_counter()
        first = blocks.run(positions[:2], number)
        left = (time.perf_counter() - start) / 2 * (len(positions) - 2)
        if first < 2:
            return first
        if left > least_seconds(self.space.allocations):
            blocks.tell_releases()
            make = partial(_blocks, position=tuple(positions[2].tolist()))
            was_possible = run_by_workers(self, positions[2:], number + 2, make)
            if was_possible:
                return len(positions)
            blocks.program.is_for_workers = was_possible is None
            self.progress.done = number + 2  # what the workers have done is undone
        return 2 + blocks.run(positions[2:], number + 2)

    def _can_run_blocks(self, started: int) -> bool:
        """Whether the core may execute the next blocks as a whole."""
        return (
            self.native is not None
            and self.native.program.is_for_blocks
            and self.kernel.cluster == (1, 1, 1)
            and (self.schedule.completion, self.schedule.order) == ("early", "forward")
            and (self.trace is None or self.trace.of(started) is None)
        )
