# SPDX-License-Identifier: MIT
"""Events of a launch, and the vector clocks by which warps know of each other's events.

Each access of a warp or of an asynchronous operation is an event: an agent at a time. Agents are
the warps of a block, and its asynchronous operations. A warp knows its own events. It learns those
of the block's other warps at a barrier, those of asynchronous operations when it waits for them,
and those of other blocks by an atomic that acquires what they have released at its address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nogpu.machine.registers import Values, all_true

if TYPE_CHECKING:
    from nogpu.native.warps import EventsView

# Numbers of events: what the host did before the launch; what nobody did.
GIVEN, UNWRITTEN = 0, 1
EARLIER = -3  # the block of all events of earlier grids, which may still run


class Events:
    """The accesses of a launch, by their numbers: their block, agent, time and line."""

    def __init__(self) -> None:
        self.count = 2
        self.names: list[str] = ["the host", "nobody"]  # of what accesses
        self.numbers = {name: n for n, name in enumerate(self.names)}
        self.places: dict[int, str] = {}  # of events of earlier grids, which have other lines
        self.view: EventsView | None = None  # for the core in C, which takes the arrays
        self.lines = np.zeros(2**12, np.int32)
        self.what = np.arange(2**12, dtype=np.int32)  # by their numbers
        self.agents = np.zeros(2**12, np.int32)
        self.times = np.zeros(2**12, np.int32)
        self.blocks = np.full(2**12, -1, np.int32)
        self.atomic = np.zeros(2**12, np.bool_)
        self.blocks[UNWRITTEN] = -2

    def add(
        self, block: int, agent: int, time: int, line: int, what: str, atomic: bool = False
    ) -> int:
        number = self.count
        if number == len(self.agents):
            self.grow()
        self.count += 1
        self.lines[number], self.what[number] = line, self.name(what)
        self.agents[number], self.times[number] = agent, time
        self.blocks[number], self.atomic[number] = block, atomic
        return number

    def name(self, what: str) -> int:
        """Return the number of a name."""
        if what not in self.numbers:
            self.numbers[what] = len(self.names)
            self.names.append(what)
        return self.numbers[what]

    def who(self, number: int) -> str:
        """Name what has accessed memory."""
        return self.names[int(self.what[number])]

    def grow(self) -> None:
        for name in ("lines", "what", "agents", "times", "blocks", "atomic"):
            setattr(self, name, np.concatenate([getattr(self, name)] * 2))
        if self.view is not None:
            self.view.update()


class VectorClocks:
    """The vector clock of each warp of a block: of each agent, the last time that the warp knows.

    Attributes:
        times: of the block's agents ``(warps, agents)``.
        fenced: the times that each warp knew at its last fence between the proxies.
        foreign: of each warp the times of other blocks' agents, by block. Warps may share a
            dictionary, which is never changed.
    """

    def __init__(self, events: Events, block: int, warps: int):
        self.events, self.block, self.warps, self.agents = events, block, warps, warps
        self.times = np.zeros((warps, max(64, 2 * warps)), np.int32)
        self.fenced = np.zeros_like(self.times)
        self.times[range(warps), range(warps)] = 1
        self.foreign: list[dict[int, Values]] = [{} for _ in range(warps)]
        self._tell()

    def _tell(self) -> None:
        """Note where the arrays lie, for the core in C."""
        self.address, self.stride = self.times.ctypes.data, self.times.strides[0]
        self.fenced_address = self.fenced.ctypes.data

    def add_agent(self, generic: bool) -> int:
        """Return the number of a new asynchronous operation, of which no warp knows."""
        agent = self.agents
        self.agents += 1
        if agent == self.times.shape[1]:
            self.times, self.fenced = (
                np.hstack([a, np.zeros_like(a)]) for a in (self.times, self.fenced)
            )
            self._tell()
        if not generic:
            self.fenced[:, agent] = 2
        return agent

    def knows(self, warp: int, numbers: Values) -> Values:
        """Return for each event whether the warp knows it."""
        events = self.events
        if not numbers.any():  # the host's
            return np.ones(numbers.shape, np.bool_)
        mine = events.blocks[numbers] == self.block
        agents = np.where(mine, events.agents[numbers], 0)
        known = mine & (events.times[numbers] <= self.times[warp][agents]) | (numbers == GIVEN)
        if self.foreign[warp] and not all_true(known):
            for number in np.unique(numbers[~known & ~mine]).tolist():
                times = self.foreign[warp].get(int(events.blocks[number]), ())
                agent = int(events.agents[number])
                if agent < len(times) and events.times[number] <= times[agent]:
                    known |= numbers == number
        return known

    def is_fenced(self, warp: int, numbers: Values) -> Values:
        """Return for each event, which the warp knows, whether a fence between proxies is after."""
        mine = self.events.blocks[numbers] == self.block
        agents = np.where(mine, self.events.agents[numbers], 0)
        return ~mine | (self.events.times[numbers] <= self.fenced[warp][agents])

    def join(self, warps: list[int]) -> None:
        """At a barrier, each of these warps learns what one of them knows."""
        self.times[warps] = self.times[warps].max(0)
        self.fenced[warps] = self.fenced[warps].max(0)
        self.times[warps, warps] += 1
        # Most warps hold the dictionary that they got at the last barrier.
        different = list({id(self.foreign[warp]): self.foreign[warp] for warp in warps}.values())
        together = different[0]
        for known in different[1:]:
            together = merged(together, known)
        for warp in warps:
            self.foreign[warp] = together

    def release(self, warp: int) -> dict[int, Values]:
        """Return what the warp knows now; it begins another time, which nobody knows yet."""
        found = {**self.foreign[warp], self.block: self.times[warp, : self.agents].copy()}
        self.times[warp, warp] += 1
        return found

    def acquire(self, warp: int, known: dict[int, Values]) -> None:
        if (times := known.get(self.block)) is not None:
            mine = self.times[warp, : len(times)]
            np.maximum(mine, times, out=mine)
            known = {block: times for block, times in known.items() if block != self.block}
        self.foreign[warp] = merged(self.foreign[warp], known)


def merged(a: dict[int, Values], b: dict[int, Values]) -> dict[int, Values]:
    """Return what is known by block of those who know ``a`` or ``b``.

    Neither is changed, and the result may be one of them: warps share what they know. It has arrays
    of theirs where one knows all that the other one does, so that these are found to be the same
    the next time.
    """
    if not a or a is b:
        return b
    together = dict(a)
    for block, times in b.items():
        before = together.get(block)
        if before is not times:
            together[block] = times if before is None else _latest(before, times)
    return together


def _latest(a: Values, b: Values) -> Values:
    """Return the later one of two times of each agent: one of the arrays, or another one."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    begin = longer[: len(shorter)]
    if (begin >= shorter).all():
        return longer
    if len(longer) == len(shorter) and (shorter >= longer).all():
        return shorter
    together = longer.copy()
    np.maximum(begin, shorter, out=together[: len(shorter)])
    return together
