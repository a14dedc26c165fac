# SPDX-License-Identifier: MIT
"""Bulk copies of boxes of tensors (TMA), their tensormaps, and the mbarriers that count their bytes.

Sections 9.7.9 of the PTX ISA (cp.async.bulk.tensor, tensormap.replace), 9.7.13 (mbarrier, fences,
tensormap.cp_fenceproxy) and 5.5 (tensors, boxes and swizzling).
"""

from typing import Any

import numpy as np

from .asynchronous import Operation
from .copies import Copy, address_reader
from .machine import Run, Warp, instruction
from .parse import Constant, Instruction, PtxError, Symbol
from .registers import DTYPES, SHARED_BASE, reader, writer

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


def barrier_at(warp: Warp, address: Any, line: int) -> Barrier:
    place, rows = warp.block.shared.check_read(warp, address, 8, line)
    barrier: Barrier | None = place.barriers.get(8 * int(rows[0]))
    if barrier is None:
        raise PtxError(line, "there is no mbarrier at this address")
    return barrier


def single(warp: Warp, i: Instruction, *values: Any) -> list[Any]:
    """The values in the one thread that executes the instruction."""
    lanes = warp.lanes()
    if len(lanes) != 1:
        raise PtxError(i.line, f"{len(lanes)} threads of warp {warp.index} execute {i.opcode}")
    return [value[lanes] for value in values]


@instruction("mbarrier.init.shared::cta.b64", results=0)
def _init(i: Instruction) -> Run:
    address, count = address_reader(i.operands[0]), reader(i.operands[1], "u32")

    def run(warp: Warp) -> None:
        at, arrivals = single(warp, i, address(warp), count(warp))
        warp.block.shared.store(warp, at, np.zeros((1, 8), np.uint8), i.line)
        warp.block.memory.barriers[int(at[0]) - SHARED_BASE] = Barrier(i.line, int(arrivals[0]))

    return run


@instruction("mbarrier.inval.shared::cta.b64", results=0)
def _invalidate(i: Instruction) -> Run:
    address = address_reader(i.operands[0])

    def run(warp: Warp) -> None:
        (at,) = single(warp, i, address(warp))
        barrier = barrier_at(warp, at, i.line)
        used = barrier.copies or barrier.pending != barrier.count
        warp.block.space.check(not used, i.line, f"the mbarrier of line {barrier.line} is in use")
        del warp.block.memory.barriers[int(at[0]) - SHARED_BASE]

    return run


@instruction("mbarrier.arrive.expect_tx.shared::cta.b64", "mbarrier.arrive.expect_tx.shared.b64", results=0)
def _expect(i: Instruction) -> Run:
    address, count = address_reader(i.operands[1]), reader(i.operands[2], "u32")
    assert i.operands[0] == Symbol("_")

    def run(warp: Warp) -> None:
        at, expected = single(warp, i, address(warp), count(warp))
        barrier = barrier_at(warp, at, i.line)
        barrier.update(transactions=int(expected[0]))
        barrier.update(arrivals=1)

    return run


@instruction("mbarrier.try_wait.parity.shared::cta.b64", "mbarrier.try_wait.parity.shared.b64", whole=True)
def _try_wait(i: Instruction) -> Run:
    """It may give up before the phase has ended. Here it does, and the warp goes on when it has ended."""
    put, address = writer(i.operands[0], "pred"), address_reader(i.operands[1])
    parity = reader(i.operands[2], "u32")

    def run(warp: Warp) -> bool:
        barrier, odd = barrier_at(warp, address(warp)[:1], i.line), int(parity(warp)[0])

        def ended() -> bool:
            return barrier.phase % 2 != odd

        put(warp, np.full(32, ended()))
        if ended():
            for copy in barrier.ended:
                copy.wait(warp)
            return False
        warp.waiting = ended
        return True

    return run


# Tensors in global memory, and boxes of them in shared memory

# The fields of a tensormap, of 128 bytes. NVIDIA documents the fields and not their places: these are ours.
FIELDS = {
    "global_address": (0, "b64"),
    "rank": (8, "b32"),  # less one
    "box_dim": (12, "b32"),
    "global_dim": (32, "b32"),
    "element_stride": (52, "b32"),
    "global_stride": (72, "b64"),
    "elemtype": (104, "b32"),
    "interleave_layout": (108, "b32"),
    "swizzle_mode": (112, "b32"),
    "fill_mode": (116, "b32"),
}
ELEMENT_BYTES = {1: 2, 2: 4, 6: 2, 7: 4, 10: 2}  # by elemtype: u16, u32, f16, f32, bf16


def swizzle(addresses: Any, size: int) -> Any:
    """5.5.6: bits 4, 5 and 6 of an address are changed by bits 7, 8 and 9, as many as ``size`` has."""
    return addresses ^ (addresses >> 3 & (size - 16))


@instruction("tensormap.replace.tile", results=0)
def _replace(i: Instruction) -> Run:
    start, kind = FIELDS[i.parts[3]]
    assert i.parts[4:] == ["shared::cta", "b1024", kind]
    *ordinal, source = i.operands[1:]
    start += ordinal[0].bits * DTYPES[kind].itemsize if ordinal else 0
    address, value = address_reader(i.operands[0]), reader(source, kind)

    def run(warp: Warp) -> None:
        space, lanes = warp.block.shared, warp.lanes()
        at = address(warp)[lanes]
        space.check_read(warp, at, 128, i.line)  # the fields that are not replaced must have been written
        space.store(warp, at + start, value(warp)[lanes][:, None].view(np.uint8), i.line)

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
        at, space = to(warp)[:1], warp.block.space
        space.store(warp, at, warp.block.shared.load(warp, source(warp)[:1], 128, i.line), i.line)
        place, rows = space.locate(at, 128, i.line)
        place.published.add(int(rows[0]))
        place.acquired.pop(int(rows[0]), None)

    return run


@instruction("fence.proxy.tensormap::generic.acquire.gpu", results=0)
def _acquire(i: Instruction) -> Run:
    address = address_reader(i.operands[0])
    assert i.operands[1] == Constant(128)

    def run(warp: Warp) -> None:
        at = address(warp)[warp.lanes()][:1]
        place, rows = warp.block.space.check_read(warp, at, 128, i.line)
        published = int(rows[0]) in place.published
        warp.block.space.check(published, i.line, "acquires a tensormap that was not published")
        place.acquired[int(rows[0])] = warp.knowledge.add(i.line, f"the fence of warp {warp.index}")

    return run


@instruction("fence.proxy.async.shared::cta", results=0)
def _fence_async(i: Instruction) -> Run:
    def run(warp: Warp) -> None:
        warp.knowledge.fenced |= warp.knowledge.seen

    return run


class Tensor:
    """A tensor as its tensormap describes it. Dimension 0 is contiguous."""

    def __init__(self, warp: Warp, address: Any, line: int):
        space = warp.block.space
        place, rows = space.check_read(warp, address, 128, line)
        fence = place.acquired.get(int(rows[0]))
        known = fence is not None and warp.knowledge.seen[fence.number]
        space.check(known, line, "uses a tensormap that was not acquired by the tensormap proxy")
        raw = space.peek(address, 128, line).tobytes()

        def field(name: str, count: int = 1) -> list[int]:
            start, kind = FIELDS[name]
            return np.frombuffer(raw, DTYPES[kind], count, start).tolist()

        (self.base,), self.rank = field("global_address"), field("rank")[0] + 1
        self.box, self.sizes = field("box_dim", self.rank), field("global_dim", self.rank)
        self.bytes = ELEMENT_BYTES[field("elemtype")[0]]
        self.strides = [self.bytes, *field("global_stride", self.rank - 1)]
        self.swizzle = 16 << field("swizzle_mode")[0]
        # 5.5, and the restrictions of cuTensorMapEncodeTiled
        row = self.box[0] * self.bytes
        plain = field("element_stride", self.rank) + field("interleave_layout") + field("fill_mode")
        if plain != [1] * self.rank + [0, 0]:
            raise PtxError(line, "element strides, interleaved layouts and NaN for a fill are not modelled")
        if any(address % 16 for address in (self.base, *self.strides[1:])):
            raise PtxError(line, "the address or a stride of the tensor is not a multiple of 16 bytes")
        if row % 16 or not all(0 < n <= 256 for n in self.box) or (self.swizzle > 16 and row > self.swizzle):
            raise PtxError(line, f"a box {self.box} cannot have a swizzle of {self.swizzle} bytes")

    def copied(self, corner: list[int], shared: int, line: int) -> dict[str, Any]:
        """The arguments of a `Copy` of the box at ``corner``, whose place is at ``shared``."""
        align = max(128, 8 * self.swizzle if self.swizzle > 16 else 128)
        if shared % align:
            raise PtxError(line, f"a box in shared memory is not aligned to {align} bytes")
        at, inside = np.full(self.box[::-1], self.base), np.ones(self.box[::-1], np.bool_)
        for d, index in enumerate(np.indices(self.box[::-1])[::-1]):
            position = index + corner[d]
            at = at + position * self.strides[d]
            inside &= (position >= 0) & (position < self.sizes[d])
        units = swizzle(shared + np.arange(0, self.bytes * at.size, 16), self.swizzle)
        return {
            "elements": at.reshape(-1),
            "inside": inside.reshape(-1),
            "width": self.bytes,
            "units": units,
            "unit": 16,
        }


@instruction("cp.async.bulk.tensor", results=0)
def _copy_box(i: Instruction) -> Run:
    """What is outside of the tensor becomes zero, or is not stored.

    Of a load an mbarrier counts the bytes of the whole box. Stores are in groups of a thread.
    """
    stores = i.parts[5:] == ["global", "shared::cta", "bulk_group"]
    assert stores or ".".join(i.parts[6:]) == "global.mbarrier::complete_tx::bytes"
    tensor, shared = i.operands[:2] if stores else i.operands[1::-1]
    places = [address_reader(one) for one in (tensor, shared, *i.operands[2:])]
    coordinates = [reader(one, "s32") for one in tensor.coordinates]
    assert i.parts[4] == f"{len(coordinates)}d"

    def run(warp: Warp) -> None:
        at, place, *barriers = single(warp, i, *(read(warp) for read in places))
        corner = [int(one[0]) for one in single(warp, i, *(read(warp) for read in coordinates))]
        described = Tensor(warp, at, i.line)
        if described.rank != len(corner):
            raise PtxError(i.line, f"the tensor has {described.rank} dimensions")
        copied = described.copied(corner, int(place[0]), i.line)
        if stores:
            operation = Copy(warp, i.line, "a bulk store", to_shared=False, **copied)
            warp.groups["cp.async.bulk", int(warp.lanes()[0])].issued.append(operation)
        else:
            barrier = barrier_at(warp, barriers[0], i.line)
            operation = Copy(warp, i.line, "a bulk load", to_shared=True, barrier=barrier, **copied)
            barrier.copies.append(operation)
        operation.start(warp.block)

    return run
