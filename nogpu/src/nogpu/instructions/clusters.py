# SPDX-License-Identifier: MIT
"""Instructions of clusters: the cluster barrier, and shared memory of other blocks.

Sections 9.7.13 of the PTX ISA (barrier.cluster), 9.7.9 (mapa, getctarank, st.async, and the
multicast of cp.async.bulk.tensor).
"""

import numpy as np

from nogpu.instructions.copies import Places
from nogpu.instructions.tma import (
    DIMENSIONS,
    LOADED,
    Barrier,
    Load,
    Tensor,
    barrier_at,
    places_of,
)
from nogpu.machine.block import Warp
from nogpu.machine.cluster import rank_of
from nogpu.machine.decode import Run, action, elementwise, instruction
from nogpu.machine.operation import Operation
from nogpu.machine.parse import Instruction, PtxError, flat
from nogpu.machine.registers import DTYPES, WINDOW_BITS, Values, reader

OFFSETS = 2**WINDOW_BITS - 1  # the bits of an address within a window


@action("barrier.cluster.arrive", whole=True)
def _arrive(warp: Warp, i: Instruction) -> None:
    """A relaxed arrival orders nothing but the mbarriers' initialization, with a fence for it."""
    warp.block.cluster.arrive(warp, "relaxed" not in i.parts, i.line)


@action("barrier.cluster.wait", whole=True)
def _wait(warp: Warp, i: Instruction) -> bool:
    """Threads that have ended are not waited for."""
    phase = warp.phase
    if phase is None:
        raise PtxError(
            i.line, f"{warp.name} waits at the cluster barrier, at which it did not arrive"
        )

    def is_complete() -> bool:
        if not phase.is_complete:
            return False
        if warp.phase is phase:
            phase.acquire(warp)
            warp.phase = None
        return True

    warp.waiting = None if is_complete() else is_complete
    return True


@instruction("mapa.shared::cluster.u32")
def _map(i: Instruction) -> Run:
    """The address of the same place in the shared memory of the block of a rank."""
    size_of = reader(i.operands[2], "u32")

    def mapped(address: Values, rank: Values) -> Values:
        return address & np.uint32(OFFSETS) | rank << np.uint32(WINDOW_BITS)

    compute = elementwise(i, mapped, "u32", "u32", "u32")

    def run(warp: Warp) -> None:
        size = warp.block.cluster.size
        if (ranks := size_of(warp)[warp.lanes()]).max(initial=0) >= size:
            raise PtxError(i.line, f"a cluster of {size} CTAs has no rank {int(ranks.max())}")
        compute(warp)

    return run


@instruction("getctarank.shared::cluster.u32")
def _rank(i: Instruction) -> Run:
    return elementwise(i, lambda address: address >> np.uint32(WINDOW_BITS), "u32", "u32")


class Multicast(Load):
    """A copy of a box to the shared memory of several blocks, each of which counts its bytes."""

    def __init__(
        self,
        warp: Warp,
        line: int,
        places: Places,
        tensor: Tensor,
        to: list[tuple[int, Barrier]],
    ):
        (first, barrier), *self.rest = to
        units = places.units & OFFSETS
        super().__init__(
            warp, line, places._replace(units=units | first << WINDOW_BITS), tensor, barrier
        )
        self.targets = frozenset(rank for rank, _ in to)
        self.copies = [(units | rank << WINDOW_BITS, one) for rank, one in self.rest]
        for at, _ in self.copies:
            warp.block.shared.write(warp, at, self.unit, self.written, line)
            warp.block.gpu.counts.access_shared(warp.pc - 1, at, None, self.unit)

    def store(self) -> None:
        super().store()
        for at, barrier in self.copies:
            self.block.shared.poke(at, self.values.reshape(-1, self.unit))
            barrier.update(transactions=-self.values.size)


@action(
    *(
        f"cp.async.bulk.tensor.{count}d.shared::cluster.{LOADED}.multicast::cluster"
        for count in DIMENSIONS
    ),
    single=True,
)
def _load_boxes(
    warp: Warp, i: Instruction, shared: Values, address: Values, *others: Values
) -> None:
    """Each bit of a mask is a rank. The offsets of the box and of the mbarrier are the same in
    all blocks."""
    *corner, counting, mask = others
    cluster, bits = warp.block.cluster, int(mask[0]) & 0xFFFF
    if bits == 0 or bits >> cluster.size:
        raise PtxError(
            i.line,
            f"the mask is {bits:#x}, expected bits of the {cluster.size} CTAs of the cluster",
        )
    ranks = [rank for rank in range(cluster.size) if bits >> rank & 1]
    at = counting.astype(np.int64) & OFFSETS
    to = [(rank, barrier_at(warp, at | rank << WINDOW_BITS, i.line)) for rank in ranks]
    places, tensor = places_of(warp, i, address, tuple(corner), shared)
    load = Multicast(warp, i.line, places, tensor, to)
    for rank, barrier in to:
        barrier.copies.append(load)
        cluster.blocks[rank].loads.add(barrier)
    load.start(warp.block)


class RemoteStore(Operation):
    """A store of a warp's threads to shared memory of any blocks of the cluster (``st.async``).

    It is of the generic proxy. The mbarriers count its bytes.
    """

    last_access = "written shared memory"

    def __init__(
        self, warp: Warp, line: int, addresses: Values, values: Values, counting: list[Barrier]
    ):
        super().__init__(warp, line, "an asynchronous store", generic=True)
        self.block, self.addresses, self.values = warp.block, addresses, values
        self.counting, self.width = counting, values.shape[1]
        self.targets = frozenset(rank_of(one) for one in addresses.tolist())
        # The space is that of all windows; an operation's accesses are in one of them at a time.
        self.parts = [np.flatnonzero(addresses >> WINDOW_BITS == rank) for rank in self.targets]
        lanes = warp.lanes()
        for part in self.parts:
            at = addresses[part]
            warp.block.shared.write(warp, at, self.width, self.written, line, lanes[part])
        warp.block.gpu.counts.access_shared(warp.pc - 1, addresses, warp.lanes(), self.width)

    def store(self) -> None:
        for part in self.parts:
            self.block.shared.poke(self.addresses[part], self.values[part])
        for barrier in self.counting:
            barrier.update(transactions=-self.width)


@instruction("st.async", results=0)
def _store_async(i: Instruction) -> Run:
    *parts, kind = i.parts[2:]
    vector = [part for part in parts if part in ("v2", "v4")]
    assert {*parts} - {"weak", *vector} == {"shared::cluster", "mbarrier::complete_tx::bytes"}
    to, source, counting = i.operands
    address, of_barrier = reader(to), reader(counting)
    reads = [reader(one, kind) for one in flat(source)]
    assert len(reads) == (int(vector[0][1:]) if vector else 1)
    assert DTYPES[kind].itemsize in (4, 8)

    def run(warp: Warp) -> None:
        lanes = warp.lanes()
        values = np.stack([read(warp)[lanes] for read in reads], 1)
        raw = np.ascontiguousarray(values).view(np.uint8)
        at, places = address(warp)[lanes], of_barrier(warp)[lanes]
        if (at >> WINDOW_BITS != places >> WINDOW_BITS).any():
            raise PtxError(i.line, "stores to one CTA, and counts at an mbarrier of another one")
        known = {int(one): barrier_at(warp, np.array([one]), i.line) for one in np.unique(places)}
        store = RemoteStore(warp, i.line, at, raw, [known[int(one)] for one in places])
        for barrier in known.values():
            barrier.copies.append(store)
        store.start(warp.block)

    return run
