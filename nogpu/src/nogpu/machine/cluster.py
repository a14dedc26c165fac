# SPDX-License-Identifier: MIT
"""A cluster of blocks (CTAs): their vector clocks, their shared memory, and the cluster barrier.

The warps of all blocks of a cluster run in turns, and have one vector clock each, so that the rules
of `memory` hold for accesses of one block to another one's shared memory as within a block. A block
alone is a cluster of one.

Each block has a window of shared addresses, by its rank: those of rank r begin at r · 2²⁴, as on
sm_90 and sm_100, where Triton finds the address of the first block by a mask. A block's shared
memory exists until its last warp ends. Accesses by others of its cluster must be known to it then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nogpu.machine.allocation import Allocation
from nogpu.machine.gpu_state import GpuState
from nogpu.machine.memory import Space
from nogpu.machine.parse import PtxError
from nogpu.machine.registers import WINDOW_BITS, Values
from nogpu.machine.spins import Spins
from nogpu.machine.vector_clocks import VectorClocks, merged

if TYPE_CHECKING:
    from nogpu.machine.block import Block, Warp
    from nogpu.machine.operation import Operation

ENDED = "ended CTA"  # the name of a fault


class SharedMemory(Space):
    """The shared memory of a cluster's blocks."""

    def __init__(self) -> None:
        super().__init__("shared memory")
        self.ended: list[Allocation] = []  # those of blocks that have ended

    def remove(self, allocation: Allocation) -> None:
        self.allocations.remove(allocation)
        self.ended.append(allocation)
        self.last = None
        if self.view is not None:
            self.view.update()

    def why_ended(self, address: int) -> str:
        """Say to which ended block an address belongs; "" if there is none."""
        for one in self.ended:
            if one.start <= address < one.end:
                return f"{one.where(address - one.base)}, which has ended"
        return ""

    def locate(self, addresses: Values, width: int, line: int) -> tuple[Allocation, Values]:
        try:
            return super().locate(addresses, width, line)
        except PtxError as e:
            if addresses.size and (why := self.why_ended(int(addresses.flat[0]))):
                raise PtxError(line, f"an access to {why}", ENDED) from e
            raise

    def tell(
        self, warp: Warp, place: Allocation | None, address: int, width: int, line: int, does: str
    ) -> None:
        if why := self.why_ended(address):
            warp.fault("error", ENDED, line, f"{does} {why}")
            return
        super().tell(warp, place, address, width, line, does)


class Arrival(Protocol):
    """An arrival at an mbarrier: of a thread, or of an asynchronous operation."""

    @property
    def agent(self) -> int: ...

    @property
    def time(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def line(self) -> int: ...


class Phase:
    """A phase of the cluster barrier: who has arrived, and what those know who wait for it.

    Attributes:
        initialised: the mbarriers whose initialization was released by a fence of its own.
    """

    def __init__(self) -> None:
        self.arrived: set[int] = set()
        self.is_complete = False
        self.known: dict[int, Values] = {}
        self.fenced = np.zeros(0, np.int32)
        self.initialised: set[Any] = set()
        self.latest = 0  # the time of the last arrival, if the program is traced

    def arrive(self, warp: Warp, releases: bool) -> None:
        if warp.block.trace is not None:
            self.latest = max(self.latest, warp.block.trace.now(warp))
        self.arrived.add(warp.index)
        self.initialised |= warp.released_mbarriers
        if releases:
            clocks = warp.clocks
            self.known = merged(self.known, clocks.release(warp.index))
            fenced = clocks.fenced[warp.index].copy()
            fenced[: len(self.fenced)] = np.maximum(fenced[: len(self.fenced)], self.fenced)
            self.fenced = fenced

    def acquire(self, warp: Warp) -> None:
        """A warp has waited for the phase."""
        if warp.block.trace is not None:
            warp.block.trace.delay(warp, self.latest)
        clocks = warp.clocks
        clocks.acquire(warp.index, self.known)
        fenced = clocks.fenced[warp.index, : len(self.fenced)]
        np.maximum(fenced, self.fenced, out=fenced)
        warp.known_mbarriers |= self.initialised


class Cluster:
    """The blocks of a cluster, and what they share.

    Args:
        number: in the launch.
        size: blocks.
    """

    def __init__(self, gpu: GpuState, number: int, size: int):
        warps = gpu.kernel.threads // 32
        self.gpu, self.number, self.size = gpu, number, size
        self.blocks: list[Block] = []  # by their ranks
        self.clocks = VectorClocks(gpu.events, number, size * warps)
        self.shared = SharedMemory()
        self.flying: list[Operation] = []  # asynchronous operations, some of which have completed
        self.owners = np.repeat(np.arange(size), warps).tolist()  # ranks, by the agents
        self.phase = Phase()
        self.spins = Spins(self)

    @property
    def warps(self) -> list[Warp]:
        return [warp for block in self.blocks for warp in block.warps]

    def arrive(self, warp: Warp, releases: bool, line: int) -> None:
        """``barrier.cluster.arrive``."""
        if warp.phase is not None:
            message = f"{warp.name} arrives twice at the cluster barrier, and does not wait"
            raise PtxError(line, message)
        warp.phase = self.phase
        self.phase.arrive(warp, releases)
        self.complete()

    def complete(self) -> None:
        """Complete the phase, if all warps that have not ended have arrived."""
        phase = self.phase
        if phase.arrived and all(one.done or one.index in phase.arrived for one in self.warps):
            phase.is_complete = True
            self.phase = Phase()

    def leave(self, block: Block) -> None:
        """The last warp of a block has ended, and with it the block's shared memory."""
        self.complete()
        if self.size == 1:
            return
        for one in self.flying:
            if block.rank in one.targets:
                one.advance()
        mine = [warp.index for warp in block.warps]
        known = self.clocks.times[mine].max(0)
        self._check_accesses(block, known)
        for barrier in block.memory.barriers.values():
            for arrival in (*barrier.copies, *barrier.ended):
                self._check_arrival(block, known, arrival)
        self.shared.remove(block.memory)

    def _check_accesses(self, block: Block, known: Values) -> None:
        """Refuse accesses by other blocks that the block does not know when it ends."""
        events, memory, warp = self.gpu.events, block.memory, block.warps[0]
        owners = np.array(self.owners)
        for what, array in (
            ("writes", memory.writes),
            ("reads", memory.reads),
            ("reads", memory.others),
        ):
            if array is None:
                continue
            numbers = np.unique(array)
            numbers = numbers[events.blocks[numbers] == self.number]
            agents = events.agents[numbers]
            foreign = owners[agents] != block.rank
            for number in numbers[foreign & (events.times[numbers] > known[agents])].tolist():
                message = (
                    f"{events.who(number)} {what} shared memory of CTA {block.rank}, which may "
                    "have ended: this CTA does not wait for the access"
                )
                line = int(events.lines[number])
                self.gpu.fault("error", ENDED, line, message, warp.block.program)

    def _check_arrival(self, block: Block, known: Values, arrival: Arrival) -> None:
        agent = arrival.agent
        if self.owners[agent] != block.rank and arrival.time > known[agent]:
            message = (
                f"{arrival.name} reaches an mbarrier of CTA {block.rank}, which may have ended: "
                "this CTA does not wait for the arrival"
            )
            self.gpu.fault("error", ENDED, arrival.line, message, block.program)


def rank_of(address: int) -> int:
    """Return the rank of the block to whose window an address of shared memory belongs."""
    return address >> WINDOW_BITS
