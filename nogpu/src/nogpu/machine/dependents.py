# SPDX-License-Identifier: MIT
"""Programmatic dependent launch: grids that may still run when a launch begins.

A launch with this attribute may begin when all blocks of the grid before it have executed
``griddepcontrol.launch_dependents``, or have ended. What that grid and those before it have stored
need not be visible yet, not even what they had stored before. ``griddepcontrol.wait`` waits until
they have ended, and what they have stored is visible. Sources are the section on programmatic
dependent launch of the CUDA Programming Guide, and `griddepcontrol` of the PTX ISA.

Here grids run one after the other. So the accesses of the earlier ones become events of the launch,
of which its warps know nothing before they wait. Then the rules of `memory` say what is a race.

Two things are known without a wait. A block that has ended reads no more. And where a block has
waited itself before it let the next grid begin, the grids before its own had ended then.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nogpu.machine.allocation import Allocation
from nogpu.machine.memory import Space
from nogpu.machine.registers import Values
from nogpu.machine.vector_clocks import EARLIER, GIVEN, Events
from nogpu.native.layout import EARLY, PAGE, TRIGGERED, WAIT_ADDRESS, WAITED

ALL_OF_THEM = {EARLIER: np.ones(1, np.int32)}  # what a warp knows after it has waited
MOST_GRIDS = 8  # that may still run; those before them count as ended


class Access(NamedTuple):
    """What a line of an earlier grid does.

    Attributes:
        what: such as "a store of producer".
        place: of its source.
    """

    what: str
    place: str
    is_atomic: bool


class Shadow(NamedTuple):
    """Who has accessed the pages of an allocation, by numbers of accesses; 0: nobody.

    Attributes:
        start: the address of the first page.
        pages: the numbers of those that were accessed.
        writes, reads: of each unit of these pages ``(pages, units)``.
    """

    start: int
    unit: int
    pages: Values
    writes: Values
    reads: Values


class EarlierGrid(NamedTuple):
    """The accesses of a grid, and the addresses at which it has released what it knew."""

    accesses: list[Access]
    shadows: list[Shadow]
    released: set[int]


def has_waited_first(controls: Values | None) -> bool:
    """Whether a block has waited for earlier grids before it let the next one begin.

    Args:
        controls: what each block has done of griddepcontrol; None: the kernel has none.
    """
    return controls is not None and bool(((controls & (WAITED | EARLY)) == WAITED).any())


def kinds_of(events: Events, controls: Values | None) -> tuple[Values, Values]:
    """Sort a launch's own accesses into kinds: by line, what, atomicity, and whether a block may
    still run that does it.

    Returns:
        An event of each kind; and of each event the number of its kind, from 1 on, or 0 for those
        of others.
    """
    count = events.count
    blocks, numbers = events.blocks[:count], np.zeros(count, np.int32)
    own = np.flatnonzero(blocks >= 0)
    runs = np.zeros(len(own), np.int64)
    if controls is not None:
        runs = (controls[blocks[own]] & TRIGGERED > 0).astype(np.int64)
    flags = 2 * runs + events.atomic[own]
    keys = (events.lines[own].astype(np.int64) * len(events.names) + events.what[own]) * 4 + flags
    event_of = np.full(keys.max(initial=-1) + 1, -1)
    event_of[keys] = own
    kinds = event_of[event_of >= 0]
    numbers[own] = np.cumsum(event_of >= 0)[keys]
    return kinds, numbers


def grid_of(
    events: Events,
    allocations: list[Allocation],
    controls: Values | None,
    released: set[int],
    describe: Callable[[int], Access],
) -> EarlierGrid:
    """Return what a launch that is over has accessed.

    Args:
        describe: a function of an event.
    """
    kinds, numbers = kinds_of(events, controls)
    still_read = numbers.copy()
    blocks = np.maximum(events.blocks[: events.count], 0)
    still_read[True if controls is None else controls[blocks] & TRIGGERED == 0] = 0
    shadows = []
    for place in allocations:
        pages = place.touched_pages()
        writes, reads = (place.by_page(one)[pages] for one in (place.writes, place.reads))
        of_reads = still_read[reads]
        if place.others is not None:
            others = still_read[place.by_page(place.others)[pages]]
            of_reads = np.where(of_reads > 0, of_reads, others)
        found = numbers[writes], of_reads
        if any(one.any() for one in found):
            shadows.append(Shadow(place.base, place.unit, pages, *found))
    return EarlierGrid(list(map(describe, kinds.tolist())), shadows, released)


def begin(
    grids: list[EarlierGrid], events: Events, space: Space, released: dict[int, dict[int, Values]]
) -> None:
    """Let the accesses of earlier grids, of which the last one comes first, be events of a launch.

    Args:
        released: what blocks have released, by address, to which is added what the grids have.
    """
    released[WAIT_ADDRESS] = ALL_OF_THEM
    marks = []
    for grid in reversed(grids):
        released.update(dict.fromkeys(grid.released, ALL_OF_THEM))
        made = [GIVEN]
        for one in grid.accesses:
            made.append(events.add(EARLIER, 0, 1, 0, one.what, one.is_atomic))
            events.places[made[-1]] = one.place
        numbers = np.array(made, np.int32)
        marks += [(shadow, numbers) for shadow in grid.shadows]

    def mark(place: Allocation) -> None:
        for shadow, numbers in marks:
            _mark(place, shadow, numbers)

    for place in space.allocations:
        mark(place)
    space.mark = mark


def _mark(place: Allocation, shadow: Shadow, numbers: Values) -> None:
    """Let an allocation have the accesses to its bytes."""
    for page, writes, reads in zip(shadow.pages.tolist(), shadow.writes, shadow.reads, strict=True):
        start = shadow.start + page * PAGE
        first, end = max(start, place.base), min(start + len(writes) * shadow.unit, place.end)
        if end <= first or not (writes.any() or reads.any()):
            continue
        if shadow.unit < place.unit:
            place.refine(shadow.unit)
        offset = first - place.base
        place.touch(np.arange(offset // PAGE, (end - 1 - place.base) // PAGE + 1) * PAGE, 1)
        for array, found in ((place.writes, writes), (place.reads, reads)):
            units = np.repeat(found, shadow.unit // place.unit)
            units = units[(first - start) // place.unit :][: -(-(end - first) // place.unit)]
            to = array[offset // place.unit :][: len(units)]
            to[units > 0] = numbers[units[units > 0]]
