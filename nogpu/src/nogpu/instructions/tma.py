# SPDX-License-Identifier: MIT
"""Bulk copies of boxes of tensors (TMA), their tensormaps, and the mbarriers that count their
bytes.

Sections 9.7.9 of the PTX ISA (cp.async.bulk.tensor, tensormap.replace), 9.7.13 (mbarrier, fences,
tensormap.cp_fenceproxy) and 5.5 (tensors, boxes and swizzling).
"""

import numpy as np

from nogpu.instructions.atomics import combination
from nogpu.instructions.copies import Copy, Places
from nogpu.machine.block import Warp
from nogpu.machine.decode import Run, action, instruction
from nogpu.machine.operation import Operation
from nogpu.machine.parse import Instruction, PtxError
from nogpu.machine.registers import DTYPES, HALVES, Values, reader, writer
from nogpu.machine.vector_clocks import UNWRITTEN
from nogpu.native.encoding import FIELDS

# mbarrier: counts arrivals, and bytes of bulk copies

SHARED = ("shared::cta", "shared", "shared::cluster")


class Barrier:
    """A phase ends when no arrival and no byte is missing; then the next one begins.

    ``ended`` are the copies of the phases that have ended, of which a warp with the index n has
    waited for the first ``waited[n]``.
    """

    def __init__(self, line: int, count: int):
        self.line, self.count = line, count
        self.pending, self.transactions, self.phase = count, 0, 0
        self.copies: list[Operation | Arrival] = []  # operations, and arrivals
        self.ended: list[Operation | Arrival] = []
        self.waited: dict[int, int] = {}

    def update(self, arrivals: int = 0, transactions: int = 0) -> None:
        self.pending -= arrivals
        self.transactions += transactions
        if self.pending == 0 and self.transactions == 0:
            self.phase += 1
            self.pending = self.count
            self.ended += self.copies
            self.copies = []

    def missing(self) -> str:
        """Say why the phase has not ended."""
        both = (self.pending, "arrival"), (self.transactions, "byte")
        numbers = [(n, f"{abs(n):,} {word}{'s' * (abs(n) != 1)}") for n, word in both]
        expected = " and ".join(text for n, text in numbers if n > 0)
        unexpected = " and ".join(text for n, text in numbers if n < 0)
        parts = (
            expected and f"expects {expected}",
            unexpected and f"got {unexpected} that it did not expect",
        )
        return f" (its mbarrier {' and '.join(filter(None, parts))})"


class Ended:
    """Whether the phase of an mbarrier with a parity has ended."""

    def __init__(self, barrier: Barrier, odd: int):
        self.barrier, self.odd = barrier, odd

    def __call__(self) -> bool:
        return self.barrier.phase % 2 != self.odd

    def missing(self) -> str:
        return self.barrier.missing()


class Arrival:
    """An arrival of a warp. Who waits for the phase learns what the warp knew then."""

    def __init__(self, warp: Warp, line: int):
        self.agent, self.line, self.name = warp.index, line, f"an arrival of {warp.name}"
        self.time = int(warp.clocks.times[warp.index, warp.index])
        self.known = warp.clocks.release(warp.index)
        self.fenced = warp.clocks.fenced[warp.index].copy()
        trace = warp.block.trace
        self.moment = None if trace is None else trace.moment(warp, line)

    def wait(self, warp: Warp) -> None:
        if self.moment is not None and warp.block.trace is not None:
            warp.block.trace.delay(warp, self.moment.time)
        warp.clocks.acquire(warp.index, self.known)
        fenced = warp.clocks.fenced[warp.index, : len(self.fenced)]
        np.maximum(fenced, self.fenced, out=fenced)


def barrier_at(warp: Warp, address: Values, line: int) -> Barrier:
    place, rows = warp.block.shared.locate(address, 8, line)
    barrier: Barrier | None = place.barriers.get(8 * int(rows[0]))
    if barrier is None or barrier not in warp.known_mbarriers:
        is_known = warp.block.shared.check_known(warp, place, rows, 8, line)
        if barrier is None:
            raise PtxError(line, "there is no mbarrier at this address")
        if is_known:  # from now on
            warp.known_mbarriers.add(barrier)
    return barrier


@action("mbarrier.init.shared::cta.b64", single=True)
def _init(warp: Warp, i: Instruction, address: Values, count: Values) -> None:
    warp.block.shared.store(warp, address, np.zeros((1, 8), np.uint8), i.line)
    memory, barrier = warp.block.memory, Barrier(i.line, int(count[0]))
    memory.barriers[int(address[0]) - memory.base] = barrier
    memory.changed()
    warp.own_mbarriers.add(barrier)


@action("mbarrier.inval.shared::cta.b64", single=True)
def _invalidate(warp: Warp, i: Instruction, address: Values) -> None:
    barrier = barrier_at(warp, address, i.line)
    if barrier.copies or barrier.pending != barrier.count:
        raise PtxError(i.line, f"the mbarrier of line {barrier.line} is in use")
    del warp.block.memory.barriers[int(address[0]) - warp.block.memory.base]
    warp.block.memory.changed()


@action(
    *(f"mbarrier.arrive.expect_tx.{shared}.b64" for shared in SHARED),
    single=True,
)
def _expect(warp: Warp, i: Instruction, address: Values, count: Values) -> None:
    barrier = barrier_at(warp, address, i.line)
    barrier.copies.append(Arrival(warp, i.line))
    barrier.update(arrivals=1, transactions=int(count[0]))


@action(*(f"mbarrier.arrive.{shared}.b64" for shared in SHARED))
def _arrive(warp: Warp, i: Instruction, address: Values, count: Values | None = None) -> None:
    barrier = barrier_at(warp, address[:1], i.line)
    barrier.copies.append(Arrival(warp, i.line))
    barrier.update(arrivals=len(address) if count is None else int(count[0]))


@instruction(
    "mbarrier.try_wait.parity.shared::cta.b64", "mbarrier.try_wait.parity.shared.b64", whole=True
)
def _try_wait(i: Instruction) -> Run:
    """It may give up before the phase has ended. Here it does, and the warp goes on when it has
    ended."""
    put, address = writer(i.operands[0], "pred"), reader(i.operands[1])
    parity = reader(i.operands[2], "u32")

    def run(warp: Warp) -> bool:
        barrier, odd = barrier_at(warp, address(warp)[:1], i.line), int(parity(warp)[0])

        ended = Ended(barrier, odd)
        put(warp, np.full(32, ended()))
        if ended():
            for copy in barrier.ended[barrier.waited.get(warp.index, 0) :]:
                copy.wait(warp)
            barrier.waited[warp.index] = len(barrier.ended)
            _count_wait(warp, barrier)
            return False
        warp.waiting = ended
        return True

    return run


def _count_wait(warp: Warp, barrier: Barrier) -> None:
    """Count the first wait for boxes, and the mbarriers whose boxes nobody has waited for."""
    loads = warp.block.loads
    if barrier in loads:
        loads.remove(barrier)
        warp.block.gpu.counts.wait(warp.pc - 1, len(loads))


# Tensors in global memory, and boxes of them in shared memory

# By elemtype; 8 is that of float32 whose subnormal numbers are flushed.
ELEMENTS = ("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f32", "f64", "bf16", "f32")
TF32 = 11  # the elemtype of float32 whose loads are rounded
STRIDES_END = 2**40  # bytes, which a stride does not reach


def swizzle(addresses: Values, size: int) -> Values:
    """5.5.6: bits 4, 5 and 6 of an address are changed by bits 7, 8 and 9, as many as ``size``
    has."""
    return addresses ^ (addresses >> 3 & (size - 16))


@instruction("tensormap.replace.tile", results=0)
def _replace(i: Instruction) -> Run:
    start, kind = FIELDS[i.parts[3]]
    assert i.parts[4:] == ["shared::cta", "b1024", kind]
    *ordinal, source = i.operands[1:]
    start += ordinal[0].bits * DTYPES[kind].itemsize if ordinal else 0
    address, value = reader(i.operands[0]), reader(source, kind)

    def run(warp: Warp) -> None:
        space, lanes = warp.block.shared, warp.lanes()
        at = address(warp)[lanes]
        # The fields that are not replaced must have been written.
        space.check_read(warp, at, 128, i.line)
        space.store(warp, at + start, value(warp)[lanes][:, None].view(np.uint8), i.line)

    return run


@action(
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned",
    whole=True,
)
def _publish(warp: Warp, i: Instruction, to: Values, source: Values, size: Values) -> None:
    """Copy a tensormap to global memory, for the tensormap proxy to acquire."""
    space = warp.block.space
    content, _ = warp.block.shared.load(warp, source[:1], int(size[0]), i.line)
    space.store(warp, to[:1], content, i.line)
    place, rows = space.locate(to[:1], 128, i.line)
    place.published.add(int(rows[0]))
    place.acquired.pop(int(rows[0]), None)


@action("fence.proxy.tensormap::generic.acquire.gpu")
def _acquire(warp: Warp, i: Instruction, address: Values, size: Values) -> None:
    place, rows = warp.block.space.check_read(warp, address[:1], int(size[0]), i.line)
    if int(rows[0]) not in place.published:
        raise PtxError(i.line, "acquires a tensormap that was not published")
    place.acquired[int(rows[0])] = warp.event(i.line, "the fence")


@action("fence.proxy.async.shared::cta")
def _fence_async(warp: Warp, i: Instruction) -> None:
    fenced = warp.clocks.fenced[warp.index]
    np.maximum(fenced, warp.clocks.times[warp.index], out=fenced)


class Tensor:
    """A tensor as its tensormap describes it. Dimension 0 is contiguous."""

    def __init__(self, warp: Warp, address: Values, line: int):
        space = warp.block.space
        place, rows = space.check_read(warp, address, 128, line)
        fence = place.acquired.get(int(rows[0]))
        if fence is None or not warp.clocks.knows(warp.index, np.array([fence])).all():
            raise PtxError(line, "uses a tensormap that was not acquired by the tensormap proxy")
        raw = space.peek(address, 128).tobytes()

        def field(name: str, count: int = 1) -> list[int]:
            start, kind = FIELDS[name]
            numbers: list[int] = np.frombuffer(raw, DTYPES[kind], count, start).tolist()
            return numbers

        (self.base,), self.rank = field("global_address"), field("rank")[0] + 1
        self.box, self.sizes = field("box_dim", self.rank), field("global_dim", self.rank)
        (element,), (fill,) = field("elemtype"), field("fill_mode")
        self.kind, self.is_tf32, self.has_nan_outside = ELEMENTS[element], element == TF32, fill > 0
        self.bytes = DTYPES[HALVES.get(self.kind, self.kind)].itemsize
        self.strides = [self.bytes, *field("global_stride", self.rank)[:-1]]
        self.swizzle = 16 << field("swizzle_mode")[0]
        # 5.5, and the restrictions of cuTensorMapEncodeTiled
        row = self.box[0] * self.bytes
        if field("element_stride", self.rank) + field("interleave_layout") != [1] * self.rank + [0]:
            raise PtxError(line, "element strides and interleaved layouts are not modeled")
        if self.has_nan_outside and "f" not in self.kind:
            raise PtxError(
                line, f"NaN cannot fill a box of {self.kind}, expected f16, bf16, f32 or f64"
            )
        if wrong := self._wrong_address():
            found = space.at(self.base)
            made = int(warp.block.gpu.events.lines[fence])  # 0 if the host has made it
            whose = "the descriptor" if found is None else f"the descriptor of {found.name}"
            where = f", made at {warp.block.gpu.place_of(made)}," if made else ""
            raise PtxError(line, f"{whose}{where} has {wrong}")
        if row % 16:
            raise PtxError(line, f"a row of the box has {row} bytes, expected a multiple of 16")
        if not all(0 < n <= 256 for n in self.box) or (self.swizzle > 16 and row > self.swizzle):
            raise PtxError(line, f"a box {self.box} cannot have a swizzle of {self.swizzle} bytes")

    def _wrong_address(self) -> str:
        """Say which address or stride TMA refuses; "" if it takes all of them."""
        for stride in self.strides[1:]:
            if stride >= STRIDES_END:
                signed = stride - 2**64 if stride >> 63 else stride
                return f"a stride of {signed} bytes, expected 0 to 2⁴⁰ - 16"
            if stride % 16:
                return f"a stride of {stride} bytes, expected a multiple of 16"
        if rest := self.base % 16:
            return f"an address {rest} bytes behind a multiple of 16, expected a multiple of 16"
        return ""

    def places(self, corner: list[int], shared: int, line: int) -> Places:
        """The elements of the box at ``corner``, and its units at ``shared``."""
        align = max(128, 8 * self.swizzle if self.swizzle > 16 else 128)
        if shared % align:
            raise PtxError(line, f"a box in shared memory is not aligned to {align} bytes")
        at, inside = np.full(self.box[::-1], self.base), np.ones(self.box[::-1], np.bool_)
        for d, index in enumerate(np.indices(self.box[::-1])[::-1]):
            position = index + corner[d]
            at = at + position * self.strides[d]
            inside &= (position >= 0) & (position < self.sizes[d])
        units = swizzle(shared + np.arange(0, self.bytes * at.size, 16), self.swizzle)
        return Places(at.reshape(-1), inside.reshape(-1), self.bytes, units, 16)

    def rest(self, corner: list[int]) -> Values:
        """Which elements of the box at ``corner`` a store writes outside of the tensor.

        It writes whole pieces of 16 bytes, also where a row of the tensor ends within one
        (triton-lang/triton#11583).
        """
        end = -(-self.sizes[0] * self.bytes // 16) * 16 // self.bytes
        outside = np.ones(self.box[::-1], np.bool_)
        for d, index in enumerate(np.indices(self.box[::-1])[::-1]):
            position = index + corner[d]
            first = 0 if d else self.sizes[0]
            outside &= (position >= first) & (position < (self.sizes[d] if d else end))
        return outside.reshape(-1)

    @property
    def has_padded_rows(self) -> bool:
        """Whether nothing but what fills up 16 bytes lies behind a row."""
        return self.rank > 1 and self.strides[1] == -(-self.sizes[0] * self.bytes // 16) * 16


def places_of(
    warp: Warp, i: Instruction, address: Values, corner: tuple[Values, ...], shared: Values
) -> tuple[Places, Tensor]:
    """Return the places of a box, and its tensor."""
    tensor = Tensor(warp, address, i.line)
    if f"{len(corner)}d" not in i.parts or tensor.rank != len(corner):
        raise PtxError(i.line, f"the tensor has {tensor.rank} dimensions")
    position = [int(one.view(np.int32)[0]) for one in corner]
    return tensor.places(position, int(shared[0]), i.line), tensor


class Load(Copy):
    """A copy of a box to shared memory. What is outside of the tensor becomes zero, or NaN."""

    def __init__(self, warp: Warp, line: int, places: Places, tensor: Tensor, barrier: Barrier):
        super().__init__(warp, line, "a bulk load", places, barrier=barrier)
        self.tensor = tensor

    def fetch(self) -> None:
        super().fetch()
        if self.tensor.is_tf32:  # to the nearest even number, as Triton does where it has no TMA
            numbers = self.values.view(np.uint32)
            rounded = numbers + 0xFFF + (numbers >> 13 & 1) & 0xFFFFE000
            np.copyto(numbers, rounded, where=~numbers & 0x7F800000 != 0)  # finite ones
        if self.tensor.has_nan_outside:
            self.values[~self.inside] = 0xFF
            self.values[~self.inside, -1] = 0x7F


DIMENSIONS = range(1, 6)
TILES = [f"cp.async.bulk.tensor.{count}d" for count in DIMENSIONS]
LOADED = "global.mbarrier::complete_tx::bytes"


@action(
    *(f"{tile}.shared::{scope}.{LOADED}" for tile in TILES for scope in ("cta", "cluster")),
    single=True,
)
def _load_box(warp: Warp, i: Instruction, shared: Values, address: Values, *others: Values) -> None:
    """The mbarrier counts the bytes of the whole box."""
    *corner, counting = others
    barrier = barrier_at(warp, counting, i.line)
    places, tensor = places_of(warp, i, address, tuple(corner), shared)
    load = Load(warp, i.line, places, tensor, barrier)
    barrier.copies.append(load)
    load.start(warp.block)
    warp.block.loads.add(barrier)


@action(*(f"{tile}.global.shared::cta.bulk_group" for tile in TILES), single=True)
def _store_box(warp: Warp, i: Instruction, address: Values, *others: Values) -> None:
    """What is outside of the tensor is not stored, but for the rest of 16 bytes."""
    *corner, shared = others
    places, tensor = places_of(warp, i, address, tuple(corner), shared)
    places = _with_rest(warp, i, places, tensor, tuple(corner))
    operation = Copy(warp, i.line, "a bulk store", places, to_shared=False)
    warp.groups["cp.async.bulk", int(warp.lanes()[0])][-1].append(operation)
    operation.start(warp.block)


def _with_rest(
    warp: Warp, i: Instruction, places: Places, tensor: Tensor, corner: tuple[Values, ...]
) -> Places:
    """Return the places of a store with what it writes outside of the tensor.

    What lies behind the storage, and what nobody has written, is left out: nobody minds.
    """
    if tensor.sizes[0] * tensor.bytes % 16 == 0:
        return places
    rest = tensor.rest([int(one.view(np.int32)[0]) for one in corner])
    space = warp.block.space
    place = space.known(tensor.base)
    if place is None or not rest.any():
        return places
    rest &= (places.elements >= place.start) & (places.elements + places.width <= place.end)
    if not rest.any():
        return places
    if places.width < place.unit:
        place.refine(places.width)
    offsets = places.elements[rest] - place.base
    place.touch(offsets, places.width)  # what is unwritten of a page is known from its first access
    rows = offsets // places.width
    rest[rest] = (place.shadow(place.writes, places.width)[rows] != UNWRITTEN).any(1)
    if not rest.any():
        return places
    first = place.where(int(places.elements[rest][0]) - place.base)
    message = (
        f"writes {first}, which is outside of the descriptor's tensor: TMA stores whole pieces of "
        f"16 bytes, and a row of it has {tensor.sizes[0] * tensor.bytes} bytes"
    )
    kind = "warning" if tensor.has_padded_rows else "error"
    warp.fault(kind, "out of bounds", i.line, message)
    return places._replace(inside=places.inside | rest)


class Reduction(Operation):
    """A box in shared memory is added to one of a tensor, element by element, or combined with it
    in another way. Each element is changed at once, as by an atomic."""

    def __init__(self, warp: Warp, line: int, places: Places, name: str, kind: str):
        super().__init__(warp, line, "a bulk reduction")
        self.block, self.combine = warp.block, combination(name, kind)
        self.raw = DTYPES[HALVES.get(kind, kind)]
        elements, self.inside, self.width, self.units, self.unit = places
        self.elements = elements[self.inside]
        self.block.shared.read(warp, self.units, self.unit, self.read, line, fence=True)
        space, events = self.block.space, self.block.gpu.events
        events.atomic[self.written] = True
        if self.elements.size:
            for place, rows, _ in space.pieces(warp, self.elements, self.width, line, "store"):
                space.change(warp, place, rows, self.width, self.written, line, True, True)
        warp.count_copy(self.elements, self.width, self.units, self.unit)
        self.block.bulk.append((self.agent, line, "read"))

    def fetch(self) -> None:
        values = self.block.shared.peek(self.units, self.unit)
        self.values = values.reshape(-1, self.width)[self.inside].view(self.raw)[:, 0]

    def store(self) -> None:
        if not self.elements.size:
            return
        old = self.block.space.peek(self.elements, self.width).view(self.raw)[:, 0]
        new = np.ascontiguousarray(self.combine(old, self.values))
        raw = new.view(np.uint8).reshape(-1, self.width)
        self.block.space.poke(self.elements, raw)
        self.block.gpu.changes += 1


@action(
    *(f"cp.reduce.async.bulk.tensor.{count}d.global.shared::cta" for count in DIMENSIONS),
    single=True,
)
def _reduce_box(warp: Warp, i: Instruction, address: Values, *others: Values) -> None:
    """What is outside of the tensor is left out."""
    *corner, shared = others
    name, *mode = i.parts[8:]
    if mode not in (["bulk_group"], ["tile", "bulk_group"]):
        raise PtxError(i.line, f"unknown instruction {i.opcode}", "unknown instruction")
    places, tensor = places_of(warp, i, address, tuple(corner), shared)
    operation = Reduction(warp, i.line, places, name, tensor.kind)
    warp.groups["cp.async.bulk", int(warp.lanes()[0])][-1].append(operation)
    operation.start(warp.block)
