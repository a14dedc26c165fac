# SPDX-License-Identifier: MIT
"""Warps, blocks and launches for the core in C: their registers and memory, and what they know."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nogpu.machine.registers import (
    ALL,
    DTYPES,
    NEVER_WRITTEN,
    UNWRITTEN,
    Cause,
    DType,
    Tainted,
    Values,
    content,
    left_out,
    unsigned,
)
from nogpu.native.encoding import KIND_BYTES, KINDS, Program
from nogpu.native.layout import (
    GROW,
    IN_LIST,
    IN_ROW,
    LEFT_OUT,
    NEVER,
    ROW,
    UNDEFINED,
    UNINITIALISED,
    AllocationStruct,
    CopiesStruct,
    EventsStruct,
    SpaceStruct,
    WarpStruct,
)

if TYPE_CHECKING:
    from nogpu.machine.allocation import Allocation
    from nogpu.machine.block import Block, Warp
    from nogpu.machine.instruction_counts import Counts
    from nogpu.machine.memory import Space
    from nogpu.machine.operation import Operation
    from nogpu.machine.vector_clocks import Events

NO_LIMIT = 2**31 - 1  # of an instruction's index


def elected_lane(completion: str, warp: int) -> int:
    """Return the lane of a warp that the instruction ``elect.sync`` chooses.

    The PTX ISA leaves the choice open; a schedule of an emulator makes it.
    """
    return {"early": 0, "late": 31}.get(completion, 7 * warp % 32)


def _bits_of(mask: Values) -> int:
    return int(np.packbits(mask, bitorder="little").view(np.uint32)[0])


def _mask_of(bits: int) -> Values:
    return np.unpackbits(np.array([bits], np.uint32).view(np.uint8), bitorder="little").view(
        np.bool_
    )


class NativeRegisters:
    """The registers of a warp: a row of the core, or an object in a list, or both.

    Of a `registers.Tainted` the core has the values in the row, and the undefined bits in the row
    of ``undefined``. Other objects of Python are in the list alone.

    Args:
        causes: of undefined bits, as numbers of ``known_causes``.
    """

    def __init__(
        self,
        dtypes: list[DType],
        rows: Values,
        undefined: Values,
        states: Values,
        versions: Values,
        causes: Values,
        known_causes: Causes,
    ):
        self.dtypes, self.rows, self.undefined = dtypes, rows, undefined
        self.states, self.versions = states, versions
        self.causes, self.known_causes = causes, known_causes
        self.held: list[Any] = [UNWRITTEN] * len(dtypes)

    def _part(self, rows: Values, index: int) -> Values:
        """Return the values of a register in its row, or in that of its undefined bits."""
        dtype = self.dtypes[index]
        return rows[index, : 32 * dtype.itemsize].view(dtype)

    def __getitem__(self, index: int) -> Any:
        if self.states[index] & IN_LIST:
            return self.held[index]
        value: Any = self._part(self.rows, index).copy()
        if self.states[index] & UNDEFINED:
            bits = self._part(self.undefined, index).view(unsigned(value.dtype)).copy()
            value = Tainted(value, bits, self.known_causes[int(self.causes[index])])
        self.held[index] = value
        self.states[index] |= IN_LIST
        return value

    def __setitem__(self, index: int, value: Any) -> None:
        self.held[index] = value
        self.versions[index] += 1
        if isinstance(value, np.ndarray):
            self._part(self.rows, index)[:] = value
            self.states[index] = IN_ROW | IN_LIST
        elif isinstance(value, Tainted):
            self._part(self.rows, index)[:] = value.values
            self._part(self.undefined, index)[:] = value.mask.view(self.dtypes[index])
            self.causes[index] = self.known_causes.number(value.cause)
            self.states[index] = UNDEFINED | IN_LIST
        else:
            self.states[index] = IN_LIST | (NEVER if value is UNWRITTEN else 0)

    def content(self) -> tuple[object, ...]:
        """Return the registers' contents, for comparisons."""
        apart = np.flatnonzero(self.states[: len(self.held)] & IN_ROW == 0).tolist()
        return self.rows.tobytes(), *((n, content(self[n])) for n in apart)

    def get_many(self, indices: Sequence[int]) -> list[Any]:
        if (self.states[indices] & IN_LIST).all():
            return [self.held[index] for index in indices]
        return [self[index] for index in indices]

    def set_many(self, indices: Sequence[int], values: Values) -> None:
        """Write rows of 32 values of 32 bits to the core's rows of registers."""
        self.rows[indices, :128] = values.view(np.uint8)
        self.versions[indices] += 1
        self.states[indices] = IN_ROW

    def set_same(self, indices: Sequence[int], value: Any) -> None:
        """Let all of these registers hold an object of Python."""
        for index in indices:
            self.held[index] = value
        self.versions[indices] += 1
        self.states[indices] = IN_LIST

    def stamp(self) -> Values:
        """Return the number of writes to each register, so far."""
        return self.versions.copy()

    def is_unchanged(self, index: int, stamp: Values) -> bool:
        return bool(self.versions[index] == stamp[index])

    def restamp(self, index: int, stamp: Values) -> None:
        """Count the writes to a register up to now in ``stamp``."""
        stamp[index] = self.versions[index]


class Causes:
    """Causes of undefined bits in a launch, by numbers: first those that the core gives."""

    def __init__(self, program: Program):
        self.instructions = program.kernel.instructions
        self.first = LEFT_OUT + len(self.instructions)  # the number of the first one of Python's
        self.found: list[Cause] = []
        self.numbers = {NEVER_WRITTEN: UNINITIALISED}

    def __getitem__(self, number: int) -> Cause:
        if number == UNINITIALISED:
            return NEVER_WRITTEN
        if number < self.first:
            return left_out(self.instructions[number - LEFT_OUT].opcode)
        return self.found[number - self.first]

    def number(self, cause: Cause) -> int:
        if cause not in self.numbers:
            self.numbers[cause] = self.first + len(self.found)
            self.found.append(cause)
        return self.numbers[cause]


class LaunchState:
    """What the core knows of a launch: its events and its global memory."""

    def __init__(self, program: Program, events: Events, space: Space, counts: Counts):
        self.program = program
        self.dtypes = [DTYPES[kind] for kind in program.kernel.registers]
        self.events, self.space = EventsView(events), SpaceView(space)
        self.counts = counts
        self.no_space = SpaceStruct()
        self.causes = Causes(program)
        self.rows: Values | None = None  # of the warps of a block, when it begins

    def begin(self, block: Block) -> None:
        """Make what all blocks begin with, when the first one begins."""
        program, warps = self.program, len(block.warps)
        self.rows = np.repeat(program.rows[None], warps, 0)
        for warp, rows in zip(block.warps, self.rows, strict=True):
            for (name, width), row in program.specials.items():
                values = warp.special(name).astype(f"u{width}")
                rows[row, : 32 * width] = values.view(np.uint8)
        self.states: Values = np.repeat(program.states[None], warps, 0)
        self.positions: list[Any] = [  # what differs by block
            (row, width, "xyz".index(name[-1]))
            for (name, width), row in program.specials.items()
            if name.startswith("%ctaid.")
        ]
        self.warps: ctypes.Array[WarpStruct] = (WarpStruct * warps)()
        code, widths = program.addresses
        for n, struct in enumerate(self.warps):
            struct.program, struct.widths, struct.index = code, widths, n
            struct.seed = block.gpu.schedule.seed
            struct.counts = self.counts.table.ctypes.data
            struct.events = ctypes.addressof(self.events.struct)
            struct.spaces[0] = ctypes.addressof(self.space.struct)
            struct.spaces[2] = ctypes.addressof(self.no_space)
            name = block.warps[n].name
            struct.load_name = self.events.events.name(f"a load of {name}")
            struct.store_name = self.events.events.name(f"a store of {name}")
            struct.atomic_name = self.events.events.name(f"an atomic of {name}")
            struct.load_box_name = self.events.events.name(f"a bulk load of warp {n}")
            struct.store_box_name = self.events.events.name(f"a bulk store of warp {n}")
            struct.fence_name = self.events.events.name(f"the fence of warp {n}")
            struct.elected = elected_lane(block.gpu.schedule.completion, n)
            struct.alive = struct.first_alive = _bits_of(block.warps[n].alive)
            struct.of_threads = program.kernel.block is not None
            struct.swaps = program.kernel.swaps
            struct.local_bytes = program.kernel.local_bytes if struct.of_threads else 0


class EventsView:
    """`vector_clocks.Events` for the core."""

    def __init__(self, events: Events):
        self.events, self.struct = events, EventsStruct()
        events.view = self
        self.update()

    def update(self) -> None:
        for name in ("lines", "what", "agents", "times", "blocks", "atomic"):
            setattr(self.struct, name, getattr(self.events, name).ctypes.data)
        self.struct.capacity = len(self.events.lines)


class AllocationView:
    """A `allocation.Allocation` for the core."""

    def __init__(self, allocation: Allocation):
        self.allocation, self.struct = allocation, AllocationStruct()
        self.spare: Values | None = None  # lent by `blocks`
        allocation.view = self
        self.update()

    def update(self) -> None:
        """Take its arrays anew, some of which have been replaced."""
        struct, one = self.struct, self.allocation
        struct.start, struct.base, struct.end = one.start, one.base, one.end
        struct.data, struct.writes = one.data.ctypes.data, one.writes.ctypes.data
        struct.reads = one.reads.ctypes.data
        if one.touched is not None:
            struct.touched, struct.sectors = one.touched.ctypes.data, one.touched.shape[1]
        else:
            struct.touched = None
        struct.others = None if one.others is None else one.others.ctypes.data
        struct.pages = None if one.pages is None else one.pages.ctypes.data
        struct.saved = None if one.saved is None else one.saved.ctypes.data
        struct.unwritten_first = struct.unwritten_end = 0
        if one.unwritten is not None:
            struct.written = one.unwritten.written.ctypes.data
            struct.unwritten_first = one.unwritten.first
            struct.unwritten_end = one.unwritten.end
            struct.pattern[:] = one.unwritten.pattern
        struct.unit, struct.barrier_count = one.unit, len(one.barriers)
        if one.lane_writes is not None and one.lane_reads is not None:
            struct.lane_writes = one.lane_writes.ctypes.data
            struct.lane_reads = one.lane_reads.ctypes.data
        self.barriers = np.array(list(one.barriers), np.int64)
        struct.barriers = self.barriers.ctypes.data


class SpaceView:
    """A `memory.Space` for the core."""

    def __init__(self, space: Space):
        self.space, self.struct = space, SpaceStruct()
        self.struct.is_deferred = space.is_deferred
        space.view = self
        self.update()

    def update(self) -> None:
        """Take its allocations anew."""
        views = [one.view or AllocationView(one) for one in self.space.allocations]
        self.pointer = ctypes.addressof(self.struct)
        self.pointers = (ctypes.c_void_p * max(len(views), 1))(
            *(ctypes.addressof(view.struct) for view in views)
        )
        self.struct.allocations = ctypes.addressof(self.pointers)
        self.struct.count, self.struct.last = len(views), None


class BlockState:
    """The registers of a block's warps, and what the core knows of its memory."""

    def __init__(self, launch: LaunchState, block: Block):
        if launch.rows is None:
            launch.begin(block)
        assert launch.rows is not None
        self.rows: Values = launch.rows.copy()
        self.states: Values = launch.states.copy()
        self.versions = np.zeros(self.states.shape, np.uint32)
        # The system gives these pages where something is undefined.
        self.undefined = np.zeros(self.rows.shape, np.uint8)
        self.causes = np.zeros(self.states.shape, np.int32)
        for row, width, axis in launch.positions:
            self.rows[:, row, : 32 * width].view(f"u{width}")[:] = block.position[axis]
        if block.window:
            for (_, width), row in launch.program.places.items():
                self.rows[:, row, : 32 * width].view(f"u{width}")[:] |= block.window
        self.warps: ctypes.Array[WarpStruct] = type(launch.warps).from_buffer_copy(launch.warps)
        self.spaces = [block.shared.view or SpaceView(block.shared)]
        if block.local.allocations:
            self.spaces.append(SpaceView(block.local))
        addresses = [ctypes.addressof(view.struct) for view in self.spaces]
        rows, states, versions, undefined, causes = (
            array.ctypes.data
            for array in (self.rows, self.states, self.versions, self.undefined, self.causes)
        )
        size = self.states.shape[1]
        for n, (warp, struct) in enumerate(zip(block.warps, self.warps, strict=True)):
            struct.rows, struct.states = rows + n * size * ROW, states + n * size
            struct.versions, struct.block = versions + n * size * 4, block.number
            struct.undefined, struct.causes = undefined + n * size * ROW, causes + n * size * 4
            struct.spaces[1 : 1 + len(addresses)] = addresses
            if block.window:  # `launch` has those of the first block
                struct.index = warp.index
                struct.load_name = launch.events.events.name(f"a load of {warp.name}")
                struct.store_name = launch.events.events.name(f"a store of {warp.name}")
                struct.atomic_name = launch.events.events.name(f"an atomic of {warp.name}")
            warp.registers = NativeRegisters(
                launch.dtypes,
                self.rows[n],
                self.undefined[n],
                self.states[n],
                self.versions[n],
                self.causes[n],
                launch.causes,
            )
            warp.native = WarpState(launch, struct)


class WarpState:
    """A warp for the core."""

    def __init__(self, launch: LaunchState, struct: WarpStruct):
        self.launch, self.struct, self.pointer = launch, struct, ctypes.addressof(struct)
        self.library, self.left = launch.program.library, launch.program.left

    def run(self, warp: Warp, budget: int) -> int:
        """Execute instructions of the core, at most ``budget``, and return how many."""
        if self.struct.of_threads:
            return self._run_threads(warp, budget)
        struct, events = self.struct, self.launch.events
        struct.pc, struct.active = warp.pc, warp.active_bits()
        self._tell_clocks(warp)
        events.struct.count = events.events.count
        limit = min(warp.parked) if warp.parked else NO_LIMIT
        struct.count = 0
        why = self.library.run(self.pointer, budget, limit)
        events.events.count = events.struct.count
        while why == GROW:
            events.events.grow()
            why = self.library.run(self.pointer, budget - struct.count, limit)
            events.events.count = events.struct.count
        if struct.stores:
            warp.block.gpu.changes += struct.stores
            struct.stores = 0
        warp.pc, done = struct.pc, int(struct.count)
        warp.count += done
        return done

    def _run_threads(self, warp: Warp, budget: int) -> int:
        """Execute instructions of threads that may diverge, and return how many."""
        struct, events = self.struct, self.launch.events
        struct.pc, struct.active = warp.pc, warp.active_bits()
        struct.alive, struct.patience, struct.held = _bits_of(warp.alive), warp.patience, warp.held
        groups = [(pc, mask, 0) for pc, mask in warp.parked.items()]
        groups += [(pc, mask, 1) for pc, mask in warp.gathered.items()]
        struct.group_count, struct.early = len(groups), 0
        for one, (pc, mask, waits) in zip(struct.groups, groups, strict=False):
            one.pc, one.mask, one.waits = pc, _bits_of(mask), waits
        self._tell_clocks(warp)
        events.struct.count = events.events.count
        struct.count = 0
        why = self.library.run_threads(self.pointer, budget)
        events.events.count = events.struct.count
        while why == GROW:
            events.events.grow()
            why = self.library.run_threads(self.pointer, budget - struct.count)
            events.events.count = events.struct.count
        warp.block.gpu.changes += struct.stores
        struct.stores = 0
        warp.pc, done, warp.active = struct.pc, int(struct.count), _mask_of(struct.active)
        if struct.active == 2**32 - 1:
            warp.active = ALL
        warp.patience, warp.held = struct.patience, struct.held
        if struct.early:
            warp.early = warp.early | _mask_of(struct.early)
        warp.parked, warp.gathered = {}, {}
        for n in range(struct.group_count):
            one = struct.groups[n]
            (warp.gathered if one.waits else warp.parked)[one.pc] = _mask_of(one.mask)
        warp.count += done
        return done

    def repeat(self, warp: Warp) -> bool:
        """Let the core execute the instruction that Python has begun, and return whether it did."""
        struct, events = self.struct, self.launch.events
        struct.pc, struct.active, struct.count = warp.pc - 1, warp.active_bits(), 0
        self._tell_clocks(warp)
        events.struct.count = events.events.count
        self.library.run(self.pointer, 1, NO_LIMIT)
        events.events.count = events.struct.count
        if struct.count:  # Python counts it
            self.launch.counts.execute(warp.pc - 1, -len(warp.lanes()), -1)
        return bool(struct.count)

    def _tell_clocks(self, warp: Warp) -> None:
        clocks = warp.clocks
        self.struct.times = clocks.address + warp.index * clocks.stride
        self.struct.knows_others = bool(clocks.foreign[warp.index])

    def read(
        self, warp: Warp, space: Space, addresses: Values, width: int, event: int, fence: bool
    ) -> bool:
        """`Space.read` of an asynchronous operation, if it is no fault."""
        at = np.ascontiguousarray(addresses, np.int64)
        return self.read_at(warp, space, at.ctypes.data, at.size, width, event, fence)

    def read_at(
        self,
        warp: Warp,
        space: Space,
        addresses: int,
        count: int,
        width: int,
        event: int,
        fence: bool,
    ) -> bool:
        """The same, of ``count`` addresses that lie in memory."""
        if space.view is None:
            return False
        self._tell_clocks(warp)
        clocks = warp.clocks
        fenced = clocks.fenced_address + warp.index * clocks.stride if fence else None
        pointer = space.view.pointer
        return bool(
            self.library.read_many(self.pointer, pointer, addresses, count, width, event, fenced)
        )

    def numbers(
        self, space: Space, chunks: int, rows: int, by_rows: bool, kind: str
    ) -> Values | None:
        """`tensor_cores.Matrix.read`, or None if the core does not know the kind."""
        if kind not in KINDS or space.view is None:
            return None
        found = np.empty((rows, 32 // KIND_BYTES[kind]))
        done = self.library.decode_matrix(
            found.ctypes.data, space.view.pointer, chunks, rows, by_rows, KINDS[kind]
        )
        return found if done else None

    def tell_fence(self, versions: Values) -> None:
        """Note the versions of the registers at a wgmma.fence."""
        self.struct.fence = versions.ctypes.data

    def copies(self, group: Operation) -> CopiesState:
        """Begin a group of copies, to which the core adds."""
        found = CopiesState(self.library, self.launch.events.events, group)
        self.struct.copies = ctypes.addressof(found.struct)
        return found

    def end_copies(self) -> None:
        self.struct.copies = None


class CopiesState:
    """What the core has added to a group of copies."""

    def __init__(self, core: ctypes.CDLL, events: Events, group: Operation):
        name = events.name(group.name)
        self.library, self.struct = core, CopiesStruct(None, 0, 0, group.agent, name, group.time, 0)

    def __del__(self) -> None:  # a tenth of the time of `weakref.finalize`
        self.library.free_copies(self.struct)  # of a launch that has failed

    def read(self) -> None:
        self.library.read_copies(ctypes.addressof(self.struct))

    def write(self) -> None:
        self.library.write_copies(ctypes.addressof(self.struct))
