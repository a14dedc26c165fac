# SPDX-License-Identifier: MIT
"""Bulk copies of boxes of tensors (TMA), their tensormaps, and the mbarriers that count their bytes.

Sections 9.7.9 of the PTX ISA (cp.async.bulk.tensor, tensormap.replace), 9.7.13 (mbarrier, fences,
tensormap.cp_fenceproxy) and 5.5 (tensors, boxes and swizzling).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .copies import address_reader, finish
from .machine import SHARED_BASE, WAIT, YIELD, Operation, Run, Warp, dtype_of, instruction, reader, write
from .memory import Event
from .parse import Address, Constant, Instruction, PtxError, Symbol

# mbarrier: counts arrivals, and bytes of bulk copies


class Barrier:
    """A phase ends when no arrival and no byte is missing; then the next one begins.

    ``ended`` are the copies of the phases that have ended.
    """

    def __init__(self, line: int, count: int):
        self.line, self.count = line, count
        self.pending, self.transactions, self.phase = count, 0, 0
        self.copies: list[Operation] = []
        self.ended: list[Operation] = []

    def update(self, arrivals: int = 0, transactions: int = 0) -> None:
        self.pending -= arrivals
        self.transactions += transactions
        if self.pending == 0 and self.transactions == 0:
            self.phase += 1
            self.pending = self.count
            self.ended += self.copies
            self.copies = []


def barrier_at(warp: Warp, addresses: Any, line: int) -> Barrier:
    place, rows = warp.block.shared.locate(addresses[:1], 8, line)
    if warp.block.launch.checks:
        warp.block.shared.check_read(warp, place, rows, 8, line)
    barrier = place.barriers.get(8 * int(rows[0]))
    if barrier is None:
        raise PtxError(line, "there is no mbarrier at this address")
    return barrier


def _single(warp: Warp, values: Any) -> Any:
    """The value of the one thread that executes the instruction."""
    return values[warp.lanes()]


@instruction("mbarrier.init.shared::cta.b64", "mbarrier.init.shared.b64", results=0)
def _init(i: Instruction) -> Run:
    address, count = address_reader(i.operands[0]), reader(i.operands[1], np.uint32)

    def run(warp: Warp) -> None:
        at = _single(warp, address(warp))
        warp.block.shared.store(warp, at[:1], np.zeros((1, 8), np.uint8), i.line)
        barriers = warp.block.memory.barriers
        barriers[int(at[0]) - SHARED_BASE] = Barrier(i.line, int(_single(warp, count(warp))[0]))

    return run


@instruction("mbarrier.inval.shared::cta.b64", "mbarrier.inval.shared.b64", results=0)
def _invalidate(i: Instruction) -> Run:
    address = address_reader(i.operands[0])

    def run(warp: Warp) -> None:
        at = _single(warp, address(warp))
        barrier = barrier_at(warp, at, i.line)
        if warp.block.launch.checks and (barrier.copies or barrier.pending != barrier.count):
            raise PtxError(i.line, f"the mbarrier of line {barrier.line} is in use")
        del warp.block.memory.barriers[int(at[0]) - SHARED_BASE]

    return run


@instruction("mbarrier.arrive.expect_tx.shared::cta.b64", "mbarrier.arrive.expect_tx.shared.b64", results=0)
def _expect(i: Instruction) -> Run:
    address, count = address_reader(i.operands[1]), reader(i.operands[2], np.uint32)
    assert i.operands[0] == Symbol("_")

    def run(warp: Warp) -> None:
        at = _single(warp, address(warp))
        barrier = barrier_at(warp, at, i.line)
        barrier.update(transactions=int(_single(warp, count(warp))[0]) * len(at))
        barrier.update(arrivals=len(at))

    return run


@instruction("mbarrier.try_wait.parity.shared::cta.b64", "mbarrier.try_wait.parity.shared.b64", whole=True)
def _try_wait(i: Instruction) -> Run:
    """It may give up before the phase has ended: here it does each other time."""
    put, address = write(i.operands[0]), address_reader(i.operands[1])
    parity = reader(i.operands[2], np.uint32)

    def run(warp: Warp) -> Any:
        barrier, odd = barrier_at(warp, address(warp), i.line), int(parity(warp)[0])

        def ended() -> bool:
            return barrier.phase % 2 != odd

        if ended():
            for copy in barrier.ended:
                warp.knowledge.learn(copy.event)
            warp.block.trace(warp, "loaded", [copy.event for copy in barrier.ended])
            put(warp, np.ones(32, np.bool_))
            return None
        warp.failed_waits += 1
        if warp.failed_waits % 2:
            put(warp, np.zeros(32, np.bool_))
            return YIELD
        warp.waiting = ended
        return WAIT

    return run


# Tensors in global memory, and boxes of them in shared memory

# The fields of a tensormap, of 128 bytes. NVIDIA documents the fields and not their places: these are ours.
FIELDS = {
    "global_address": (0, "b64"),
    "rank": (8, "b32"),  # less one
    "box_dim": (12, "b32"),
    "global_dim": (32, "b32"),
    "global_stride": (52, "b64"),
    "element_stride": (84, "b32"),
    "elemtype": (104, "b32"),
    "interleave_layout": (108, "b32"),
    "swizzle_mode": (112, "b32"),
    "fill_mode": (116, "b32"),
}
ELEMENT_BYTES = {
    0: 1,
    1: 2,
    2: 4,
    3: 4,
    4: 8,
    5: 8,
    6: 2,
    7: 4,
    8: 4,
    9: 8,
    10: 2,
    11: 4,
    12: 4,
}  # by elemtype
SWIZZLE_BYTES = {0: 16, 1: 32, 2: 64, 3: 128}  # by swizzle_mode


def swizzle(addresses: Any, size: int) -> Any:
    """5.5.6: bits 4, 5 and 6 of an address are changed by bits 7, 8 and 9, as many as ``size`` has."""
    return addresses ^ (addresses >> 3 & (size - 16)) if size > 16 else addresses


@instruction("tensormap.replace.tile", results=0)
def _replace(i: Instruction) -> Run:
    field = i.parts[3]
    start, kind = FIELDS[field]
    assert i.parts[4:] == ["shared::cta", "b1024", kind]
    dtype = np.dtype(dtype_of(kind))
    *ordinal, value = i.operands[1:]
    start += ordinal[0].bits * dtype.itemsize if ordinal else 0
    address, value = address_reader(i.operands[0]), reader(value, dtype)

    def run(warp: Warp) -> None:
        lanes = warp.lanes()
        at = address(warp)[lanes]
        if (at % 128).any():
            raise PtxError(i.line, "a tensormap is not aligned to 128 bytes")
        space = warp.block.shared
        place, rows = space.locate(at, 128, i.line)
        if warp.block.launch.checks:  # the fields that are not replaced must have been written
            space.check_read(warp, place, rows, 128, i.line)
        for part in range(0, dtype.itemsize, 4):
            words = np.ascontiguousarray(value(warp)[lanes]).view(np.uint8).reshape(len(lanes), -1)
            space.store(warp, at + start + part, words[:, part : part + 4], i.line)

    return run


@instruction(
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned",
    results=0,
    whole=True,
)
def _publish(i: Instruction) -> Run:
    """Copy a tensormap to global memory, for the tensormap proxy to acquire."""
    to, source = (address_reader(one) for one in i.operands[:2])
    assert i.operands[2] == Constant(128)

    def run(warp: Warp) -> None:
        values = warp.block.shared.load(warp, source(warp)[:1], 128, i.line)
        at = to(warp)[:1]
        warp.block.space.store(warp, at, values, i.line)
        if warp.block.launch.checks:
            place, rows = warp.block.space.locate(at, 128, i.line)
            place.published[int(rows[0])] = i.line
            place.acquired.pop(int(rows[0]), None)

    return run


@instruction("fence.proxy.tensormap::generic.acquire.gpu", results=0)
def _acquire(i: Instruction) -> Run:
    address = address_reader(i.operands[0])
    assert i.operands[1] == Constant(128)

    def run(warp: Warp) -> None:
        at = address(warp)[warp.lanes()][:1]
        place, rows = warp.block.space.locate(at, 128, i.line)
        row = int(rows[0])
        if not warp.block.launch.checks:
            return
        warp.block.space.check_read(warp, place, rows, 128, i.line)
        if row not in place.published:
            raise PtxError(i.line, "acquires a tensormap that was not published")
        place.acquired[row] = warp.knowledge.add(Event(i.line, f"the fence of warp {warp.index}"))

    return run


@instruction("fence.proxy.async", results=0)
def _fence_async(i: Instruction) -> Run:
    assert i.opcode in ("fence.proxy.async.shared::cta", "fence.proxy.async")
    return lambda warp: warp.knowledge.fence()


class Tensor:
    """A tensor as its tensormap describes it. Dimension 0 is contiguous."""

    def __init__(self, warp: Warp, address: Any, line: int):
        space = warp.block.space
        place, rows = space.locate(address, 128, line)
        if warp.block.launch.checks:
            space.check_read(warp, place, rows, 128, line)
            event = place.acquired.get(int(rows[0]))
            if event is None or not warp.knowledge.seen[event.number]:
                raise PtxError(line, "uses a tensormap that was not acquired by the tensormap proxy")
        raw = space.peek(address, 128, line).tobytes()

        def field(name: str, count: int = 1) -> list[int]:
            start, kind = FIELDS[name]
            return [int(n) for n in np.frombuffer(raw, dtype_of(kind), count, start)]

        (self.base,), (rank,) = field("global_address"), field("rank")
        self.rank = rank + 1
        self.box, self.sizes = field("box_dim", self.rank), field("global_dim", self.rank)
        self.bytes = ELEMENT_BYTES[field("elemtype")[0]]
        self.strides = [self.bytes, *field("global_stride", self.rank - 1)]
        self.swizzle = SWIZZLE_BYTES[field("swizzle_mode")[0]]
        # 5.5, and the restrictions of cuTensorMapEncodeTiled
        row = self.box[0] * self.bytes
        if field("element_stride", self.rank) != [1] * self.rank or field("interleave_layout") + field(
            "fill_mode"
        ) != [0, 0]:
            raise PtxError(line, "element strides, interleaved layouts and NaN for a fill are not modelled")
        if self.base % 16 or any(stride % 16 for stride in self.strides[1:]):
            raise PtxError(line, "the address or a stride of the tensor is not a multiple of 16 bytes")
        if row % 16 or not all(0 < n <= 256 for n in self.box) or (self.swizzle > 16 and row > self.swizzle):
            raise PtxError(line, f"a box {self.box} cannot have a swizzle of {self.swizzle} bytes")

    def addresses(self, corner: list[int], shared: int, line: int) -> tuple[Any, Any, Any]:
        """Of the box at ``corner`` the address of each element, and whether it is inside of the tensor.

        Third, the addresses in shared memory of its units of 16 bytes.
        """
        align = max(128, 8 * self.swizzle if self.swizzle > 16 else 128)
        if shared % align:
            raise PtxError(line, f"a box in shared memory is not aligned to {align} bytes")
        shape = self.box[::-1]
        index = [
            np.arange(n).reshape([-1 if d == e else 1 for e in range(self.rank)]) for d, n in enumerate(shape)
        ]
        at, inside = np.full(shape, self.base), np.ones(shape, np.bool_)
        for d in range(self.rank):
            position = index[self.rank - 1 - d] + corner[d]
            at = at + position * self.strides[d]
            inside &= (position >= 0) & (position < self.sizes[d])
        place = shared + np.arange(0, self.bytes * at.size, 16)
        return at.reshape(-1), inside.reshape(-1), swizzle(place, self.swizzle)


def _tensor_copy(i: Instruction, tensor: Address, shared: Address) -> Callable[[Warp], tuple[Any, ...]]:
    """The tensor, corner and box's place of a bulk copy, and the thread that executes it."""
    map_address, place = address_reader(tensor), address_reader(shared)
    corner = [reader(one, np.int32) for one in tensor.coordinates]
    assert len(corner) == int(i.parts[4][0])

    def evaluate(warp: Warp) -> tuple[Any, ...]:
        lanes = warp.lanes()
        if len(lanes) != 1:
            raise PtxError(i.line, f"{len(lanes)} threads of warp {warp.index} make the same bulk copy")
        lane = int(lanes[0])
        described = Tensor(warp, map_address(warp)[lanes], i.line)
        if described.rank != len(corner):
            raise PtxError(i.line, f"the tensor has {described.rank} dimensions")
        at = [int(one(warp)[lane]) for one in corner]
        return lane, described, at, int(place(warp)[lane])

    return evaluate


TILES = ("cp.async.bulk.tensor.2d", "cp.async.bulk.tensor.3d")
LOADS = tuple(
    f"{one}.shared::{scope}.global.mbarrier::complete_tx::bytes"
    for one in TILES
    for scope in ("cta", "cluster")
)
STORES = tuple(f"{one}.global.shared::cta.bulk_group" for one in TILES)


@instruction(*LOADS, results=0)
def _load_box(i: Instruction) -> Run:
    """What is outside of the tensor becomes zero. The mbarrier counts the bytes of the whole box."""
    shared, tensor, barrier_address = i.operands
    evaluate, barrier_address = _tensor_copy(i, tensor, shared), address_reader(barrier_address)

    def run(warp: Warp) -> None:
        block = warp.block
        lane, described, corner, place = evaluate(warp)
        barrier = barrier_at(warp, barrier_address(warp)[lane : lane + 1], i.line)
        sources, inside, targets = described.addresses(corner, place, i.line)
        width = described.bytes
        event = block.events.add(Event(i.line, f"a bulk load of warp {warp.index}", generic=False))
        block.shared.begin_write(warp, targets, 16, event)
        if inside.any():
            block.space.begin_read(warp, sources[inside], width, event)
        block.trace(warp, "load", [event])

        def complete() -> None:
            values = np.zeros((inside.size, width), np.uint8)
            if inside.any():
                values[inside] = block.space.peek(sources[inside], width, i.line)
            block.shared.poke(targets, values.reshape(-1, 16), i.line)
            barrier.update(transactions=-values.size)

        operation = Operation(event, [complete])
        barrier.copies.append(operation)
        block.start(operation)

    return run


@instruction(*STORES, results=0)
def _store_box(i: Instruction) -> Run:
    """What is outside of the tensor is not stored."""
    tensor, shared = i.operands
    evaluate = _tensor_copy(i, tensor, shared)

    def run(warp: Warp) -> None:
        block = warp.block
        lane, described, corner, place = evaluate(warp)
        targets, inside, sources = described.addresses(corner, place, i.line)
        width = described.bytes
        read = block.events.add(Event(i.line, f"a bulk store of warp {warp.index}", generic=False))
        event = block.events.add(Event(i.line, f"a bulk store of warp {warp.index}", generic=False))
        block.shared.begin_read(warp, sources, 16, read, fence=True)
        if inside.any():
            block.space.begin_write(warp, targets[inside], width, event)
        block.trace(warp, "store", [read])
        values: list[Any] = []

        def fetch() -> None:
            values.append(block.shared.peek(sources, 16, i.line).reshape(-1, width))

        def complete() -> None:
            if inside.any():
                block.space.poke(targets[inside], values[0][inside], i.line)

        operation = Operation(event, [fetch, complete], read)
        warp.bulk.setdefault(lane, []).append(operation)
        block.start(operation)

    return run


@instruction("cp.async.bulk.commit_group", results=0)
def _commit_bulk(i: Instruction) -> Run:
    def run(warp: Warp) -> None:
        for lane in warp.lanes():
            warp.bulk_groups.setdefault(int(lane), []).append(warp.bulk.pop(int(lane), []))

    return run


@instruction("cp.async.bulk.wait_group", "cp.async.bulk.wait_group.read", results=0)
def _wait_bulk(i: Instruction) -> Run:
    """``read``: until shared memory has been read; otherwise, until global memory has been written."""
    left, steps = i.operands[0].bits, int("read" in i.parts)

    def run(warp: Warp) -> None:
        for lane in warp.lanes():
            groups = warp.bulk_groups.get(int(lane), [])
            done = groups[: max(0, len(groups) - left)]
            finish(warp, groups, min(left, len(groups)), steps)
            warp.block.trace(warp, "stored", [one.read for group in done for one in group])

    return run
