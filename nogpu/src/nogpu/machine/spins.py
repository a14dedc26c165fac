# SPDX-License-Identifier: MIT
"""Loops in which a cluster of blocks waits for other clusters, and a proof that it waits for ever.

A cluster runs until each of its warps waits. A warp *spins* if its accesses find what they found
before. The other clusters run then. A cluster whose state repeats, while nobody has changed global
memory, does the same for ever, since the emulator chooses the next warp by the state alone: it is
*stuck* until another cluster changes global memory. If all clusters that the GPU holds are stuck,
then no one will change it, and that is a deadlock.

The state is what decides what the warps do: registers, program counters, shared and local memory,
tensor memory, and barriers. Vector clocks decide only which faults are told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nogpu.machine.registers import ALL, Values

if TYPE_CHECKING:
    from nogpu.machine.block import Block, Warp
    from nogpu.machine.cluster import Cluster

SPINS = 4  # accesses that find what they found before, after which other programs run
# The same, of a cluster whose state does not repeat, as where it counts its accesses or looks at a
# clock, if the memory does not change meanwhile: so long a loop may wait that gives up in the end.
PATIENCE = 2000
PASSES = 3  # turns of each cluster in which nothing has changed, before one is so patient
LOOKS = 32  # accesses between which nobody has changed memory, after which states are compared


State = tuple[object, ...]


def _by_place(threads: dict[int, Values]) -> State:
    return tuple((pc, mask.tobytes()) for pc, mask in sorted(threads.items()))


def _of_warp(warp: Warp) -> State:
    """Return the part of the state that no other warp changes."""
    return (
        warp.pc,
        warp.done,
        warp.active is ALL or warp.active.tobytes(),
        _by_place(warp.parked),
        _by_place(warp.gathered),
        warp.carry.tobytes(),
        tuple((kind, *map(len, groups)) for kind, groups in warp.groups.items()),
        warp.registers.content(),
    )


def _waits(warp: Warp) -> State:
    waiting, phase = warp.waiting, warp.phase
    parity = getattr(waiting, "odd", -1)  # of an mbarrier's phase
    return waiting is not None and parity, phase is not None and phase.is_complete


def _of_block(block: Block) -> State:
    """Return the part of the state that the warps share."""
    tensors = block.tensor_memory
    places = (*block.shared.allocations, *block.local.allocations)
    return (
        tuple(map(_waits, block.warps)),
        tuple(place.content().tobytes() for place in places),
        tuple(
            (address, one.pending, one.transactions, one.phase % 2)
            for address, one in block.memory.barriers.items()
        ),
        tuple(
            (barrier, *((one.number, waits) for one, waits in arrived))
            for barrier, arrived in block.at_barrier.items()
        ),
        tensors is not None and (tensors.cells.tobytes(), tensors.allocated.tobytes()),
    )


class Spins:
    """How a cluster waits for other ones.

    Attributes:
        line: of the last access that has found what it found before.
        patience: accesses that find what they found before, after which others run.
        is_idle: no cluster has changed anything for as long as each one had a turn.
        is_stuck: the cluster can do nothing until another one changes global memory.
        reads_clock: a warp has read a clock, which the state does not have.
        spun: the indices of warps that spin. The others run first.
    """

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.line, self.patience = 0, SPINS
        self.is_idle = self.is_stuck = self.reads_clock = False
        self.spun: set[int] = set()
        self._found: dict[tuple[int, int], bytes] = {}  # by what a warp has accessed at a place
        self._changes = self._looks = 0  # since the last change of global memory
        # Of the warp that looks: an earlier state, those of the others when one of them ran, which
        # have run since, and the comparisons.
        self._before: State | None = None
        self._others: State | None = None
        self._ran: set[int] = set()
        self._count = self._compared = 0
        self._repeats = False
        self._alone: dict[int, State] = {}  # by warps that spin alone, what is shared
        self._rest: int | None = None  # at the end of the last turn

    @property
    def is_random(self) -> bool:
        """Whether the schedule draws the next warp: not where the state must decide it."""
        return self.cluster.gpu.schedule.order == "random" and not self.is_idle

    @property
    def has_spun(self) -> bool:
        """Whether the warp that has run last spins."""
        return self._repeats or self._count >= self.patience

    def look(self, warp: Warp, line: int, found: bytes) -> bool:
        """Note what an access has found. Return whether the warp spins.

        Args:
            found: the addresses, and what was there.
        """
        changes, place = self.cluster.gpu.changes, (warp.index, warp.pc)
        self._looks = self._looks + 1 if changes == self._changes else 0
        self._changes = changes
        if self._found.get(place) == found:
            self._count += 1
        else:
            self._found[place] = found
            # A loop may look at several places in turns.
            if self._looks % LOOKS != LOOKS - 1:
                return False
        self.line = line
        self._compare(warp)
        return self.has_spun

    def _compare(self, warp: Warp) -> None:
        """Compare the state with an earlier one, as Brent's search for a cycle does."""
        shared = self._shared()
        if shared is None:
            return
        now = (warp.index, _of_warp(warp), shared)
        self._repeats = now == self._before and self._others in (None, self._of_others(warp.index))
        if self._repeats:
            if self._others is None:
                self._alone[warp.index] = shared
            ready = (one.index for one in self.cluster.warps if one.is_ready)
            self.is_stuck = not self.is_random and self._ran.issuperset(ready)
        self._compared += 1
        if self._compared & (self._compared - 1) == 0:  # the distances double
            self._before, self._others, self._ran = now, None, {warp.index}

    def _shared(self) -> State | None:
        """Return the part of the state that warps share.

        It is None if something else decides what the cluster does next: asynchronous operations
        that have not ended, or a clock.
        """
        if self.reads_clock or any(one.steps for one in self.cluster.flying):
            return None
        arrived = frozenset(self.cluster.phase.arrived)
        return self.cluster.gpu.changes, arrived, *map(_of_block, self.cluster.blocks)

    def _of_others(self, index: int) -> State:
        return tuple(_of_warp(one) for one in self.cluster.warps if one.index != index)

    def begin_warp(self, warp: Warp) -> None:
        """The warp runs next."""
        if self.has_spun:
            self._forget()
        elif self._before is not None and self._others is None and warp.index not in self._ran:
            index = self._before[0]
            assert isinstance(index, int)
            self._others = self._of_others(index)  # as when the state was kept
        self._ran.add(warp.index)

    def _forget(self) -> None:
        self._before = self._others = None
        self._ran = set()
        self._count = self._compared = 0
        self._repeats = False

    def begin_turn(self, passes: int) -> None:
        """Other clusters have run.

        One warp spins in a turn, until nothing has changed for a pass. Then all of them do.

        Args:
            passes: turns of each cluster, one after the other, in which nothing has changed.
        """
        self.is_idle, self.patience = passes > 0, PATIENCE if passes >= PASSES else SPINS
        if self.is_idle:
            self.spun.clear()
        self._forget()
        self._alone, self.is_stuck = {}, False

    def end_turn(self) -> None:
        """All warps that do not wait spin, one after the other: note whether they do for ever.

        They do if each one does so alone, and what they share is the same. Other ones, such as
        those of a loop with a barrier, are where they were at the end of the last turn.
        """
        shared = None if self.is_random else self._shared()
        if shared is None:
            return
        ready = [one for one in self.cluster.warps if one.is_ready]
        self.is_stuck = all(self._alone.get(one.index) == shared for one in ready)
        if not self.is_stuck:
            rest = hash((shared, self._of_others(-1), *self._found.items()))
            self.is_stuck, self._rest = rest == self._rest, rest
