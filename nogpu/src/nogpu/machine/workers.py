# SPDX-License-Identifier: MIT
"""The blocks of a launch, executed by several workers, which are threads of this CPU.

Each worker has blocks that follow each other, and a copy of the shadow of global memory. If no
worker has written what another one has accessed, then the order of the blocks makes no difference,
and the results are those of one worker. Otherwise, and if a block needs Python, all of it is
undone, and the blocks are executed one after the other. So the faults and their order are the same
each time.
"""

from __future__ import annotations

import copy
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np

from nogpu.machine.allocation import Allocation, zeros
from nogpu.machine.dependents import kinds_of
from nogpu.machine.gpu_state import GpuState
from nogpu.machine.instruction_counts import Column, Counts
from nogpu.machine.memory import Space
from nogpu.machine.registers import Values
from nogpu.machine.vector_clocks import Events
from nogpu.native.blocks import Blocks
from nogpu.native.warps import LaunchState

LEAST_SECONDS = 0.004  # of the blocks that are left, below which one worker executes them
# To copy the shadow of an element, and to compare it; a few times what memory takes.
SECONDS_OF_ELEMENT = 3e-8
MOST_BYTES = 2**29  # of copies, of memory and of shadows


def worker_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def least_seconds(places: list[Allocation]) -> float:
    """Return for how long one worker must run before it is worth to take all."""
    elements = sum(len(place.writes) for place in places)
    count = worker_count()
    return LEAST_SECONDS + SECONDS_OF_ELEMENT * elements * count * count / max(count - 1, 1)


class Worker:
    """A worker's blocks of a launch, and what it knows of global memory."""

    def __init__(self, gpu: GpuState, make: Callable[[GpuState], Blocks]):
        self.gpu = copy.copy(gpu)
        self.gpu.changes = self.gpu.executed_instructions = 0
        self.gpu.counts = Counts(gpu.kernel)
        self.gpu.released = dict(gpu.released)
        self.gpu.events, self.first_event = _copy_of(gpu.events), gpu.events.count
        self.gpu.space = Space(gpu.space.name)
        for place in gpu.space.allocations:
            self.gpu.space.allocations.append(_mirror(place))
        assert gpu.native is not None
        program = gpu.native.program
        self.gpu.native = LaunchState(program, self.gpu.events, self.gpu.space, self.gpu.counts)
        self.blocks = make(self.gpu)
        self.blocks.may_refine = False  # shadows are compared in the end

    def changes(self, n: int, place: Allocation, pages: Values) -> tuple[Values, Values]:
        """Return which elements of pages of the n-th allocation it has written, and which read."""

        def differs(mine: Values, theirs: Values) -> Values:
            return place.by_page(mine)[pages] != place.by_page(theirs)[pages]

        mine = self.gpu.space.allocations[n]
        reads = differs(mine.reads, place.reads)
        if mine.others is not None:
            others = zeros(len(mine.others), np.int32) if place.others is None else place.others
            reads |= differs(mine.others, others)
        return differs(mine.writes, place.writes), reads


def _copy_of(events: Events) -> Events:
    made = copy.copy(events)
    made.names, made.numbers, made.view = list(events.names), dict(events.numbers), None
    for name in ("lines", "what", "agents", "times", "blocks", "atomic"):
        setattr(made, name, getattr(events, name).copy())
    return made


def _mirror(place: Allocation) -> Allocation:
    """Return an allocation of the same bytes, with a shadow of its own."""
    made = copy.copy(place)
    made.view = None
    made.writes, made.reads = place.copy_of(place.writes), place.copy_of(place.reads)
    made.others = None if place.others is None else place.copy_of(place.others)
    made.pages = None if place.pages is None else place.pages.copy()
    assert place.touched is not None
    made.touched = zeros(place.touched.size, np.uint8).reshape(place.touched.shape)
    made.published, made.acquired = set(place.published), dict(place.acquired)
    return made


def run_by_workers(
    gpu: GpuState, positions: Values, number: int, make: Callable[[GpuState], Blocks]
) -> bool | None:
    """Execute all blocks that are left, and return whether that was possible; None: not tried.

    Args:
        positions: of the blocks ``(n, 3)``, int32.
        number: of the first one.
        make: a function of a GPU that returns its `Blocks`.
    """
    places = gpu.space.allocations
    count = min(worker_count(), len(positions))
    copied = sum(len(place.data) + 8 * count * len(place.writes) for place in places)
    if count < 2 or copied > MOST_BYTES:
        return None
    _begin_pages(gpu)
    before = [place.content().copy() for place in places]
    workers = [Worker(gpu, make) for _ in range(count)]
    shares = np.array_split(positions, count)
    starts = number + np.cumsum([0, *map(len, shares[:-1])])
    stopped = Event()

    def work(worker: Worker, share: Values, start: int) -> bool:
        done = worker.blocks.run(np.ascontiguousarray(share), start, stopped)
        if done < len(share):
            stopped.set()
        return done == len(share)

    try:
        with ThreadPoolExecutor(count) as pool:
            try:
                ended = list(pool.map(work, workers, shares, starts.tolist()))
            except BaseException:
                stopped.set()
                raise
    except BaseException:
        _restore(places, before)
        raise
    accessed = (_accessed_pages(n, place, workers) for n, place in enumerate(places))
    pages = list(accessed) if all(ended) else [None]
    if any(one is None for one in pages):
        _restore(places, before)
        if gpu.controls is not None:
            gpu.controls[number:] = 0
        return False
    _take_accesses(gpu, workers, [one for one in pages if one is not None])
    return True


def _take_accesses(gpu: GpuState, workers: list[Worker], pages: list[Values]) -> None:
    """Note what the workers have accessed and counted.

    Args:
        pages: of each allocation those that they have accessed.
    """
    places = gpu.space.allocations
    changes = [
        [worker.changes(n, place, pages[n]) for n, place in enumerate(places)] for worker in workers
    ]
    for worker, of_worker in zip(workers, changes, strict=True):
        numbers, mirrors = _add_events(gpu, worker), worker.gpu.space.allocations
        for place, mine, both, here in zip(places, mirrors, of_worker, pages, strict=True):
            for name, mask in zip(("writes", "reads"), both, strict=True):
                to, found = (one.by_page(getattr(one, name)) for one in (place, mine))
                to[here] = np.where(mask, numbers[found[here]], to[here])
            place.touch_also(mine)
            place.published |= mine.published
        _add(gpu, worker)


def _add_events(gpu: GpuState, worker: Worker) -> Values:
    """Add an event for each kind of a worker's accesses, and return the number for each of its own.

    Those that it has begun with keep theirs.
    """
    events = worker.gpu.events
    kinds, of_each = kinds_of(events, gpu.controls)
    made = [0]
    for n in kinds.tolist():
        block, agent, time, line = (
            int(one[n]) for one in (events.blocks, events.agents, events.times, events.lines)
        )
        made.append(gpu.events.add(block, agent, time, line, events.who(n), bool(events.atomic[n])))
    numbers = np.array(made, np.int32)[of_each]
    numbers[: worker.first_event] = np.arange(worker.first_event)
    return numbers


def _begin_pages(gpu: GpuState) -> None:
    """Find what is unwritten of each page before one of the workers writes there."""
    assert gpu.native is not None
    for place in gpu.space.allocations:
        if place.unwritten is not None or place.saved is not None:
            assert place.view is not None
            gpu.native.program.library.begin_pages(ctypes.addressof(place.view.struct))


def _accessed_pages(n: int, place: Allocation, workers: list[Worker]) -> Values | None:
    """Return the pages of the n-th allocation that the workers have accessed.

    It is None if a worker has written what another one has accessed.
    """
    mirrors = [worker.gpu.space.allocations[n] for worker in workers]
    pages = np.unique(np.concatenate([mine.touched_pages() for mine in mirrors]))
    written = np.zeros_like(place.by_page(place.writes)[pages], np.bool_)
    accessed = written.copy()
    for worker in workers:
        writes, reads = worker.changes(n, place, pages)
        both = writes | reads
        if (writes & accessed).any() or (both & written).any():
            return None
        written |= writes
        accessed |= both
    return pages


def _restore(places: list[Allocation], before: list[Values]) -> None:
    for place, data in zip(places, before, strict=True):
        content = place.content()
        changed = content != data  # memory may be read-only
        content[changed] = data[changed]


def _add(gpu: GpuState, worker: Worker) -> None:
    """Add what a worker has counted."""
    most = Column.MOST_IN_FLIGHT
    together, mine = gpu.counts.table, worker.gpu.counts.table
    largest = np.maximum(together[:, most], mine[:, most])
    together += mine
    together[:, most] = largest
    for address in worker.blocks.released_addresses():
        gpu.released.setdefault(address, {})
    gpu.changes += worker.gpu.changes
    gpu.executed_instructions += worker.gpu.executed_instructions
