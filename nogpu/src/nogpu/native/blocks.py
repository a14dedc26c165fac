# SPDX-License-Identifier: MIT
"""Blocks that the core in C executes as a whole (blocks.c), one after the other.

A block that needs Python is undone, and Python executes it from its beginning.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from threading import Event
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from nogpu.machine.allocation import zeros
from nogpu.machine.registers import Values
from nogpu.native.layout import (
    BUDGET,
    GROW,
    LEFT,
    PYTHON,
    REFINE,
    CoordinateStruct,
    CountedStruct,
    PastStruct,
    ReleaseStruct,
    RunnerStruct,
    StateStruct,
    TensormapStruct,
)

if TYPE_CHECKING:
    from nogpu.machine.allocation import Allocation
    from nogpu.machine.block import Block
    from nogpu.native.warps import AllocationView, LaunchState

C = TypeVar("C", PastStruct, ReleaseStruct, TensormapStruct, ctypes.c_int32)

SECONDS = 0.1  # of a call of the core, about, so that Ctrl-C has its effect
MOST_FAILURES = 4  # blocks of a launch that are left to Python, after which all of them are


def _free(library: ctypes.CDLL, runner: RunnerStruct, states: ctypes.Array[StateStruct]) -> None:
    """Free what the core has allocated; ``states`` live so long."""
    library.free_runner(ctypes.addressof(runner))


def _view(place: Allocation) -> AllocationView:
    """Return what the core knows of an allocation; each one of a launch has been told to it."""
    assert place.view is not None
    return place.view


def _array(kind: type[C], address: int | None, count: int) -> ctypes.Array[C] | tuple[()]:
    """Return the ``count`` structures that lie at an address of the core."""
    if not count:
        return ()
    assert address is not None
    return (kind * count).from_address(address)


def _pasts_of(known: int, taken: dict[int, Values]) -> dict[int, Values]:
    """Return by block the times of its agents, as `vector_clocks.VectorClocks.foreign` has them.

    Args:
        taken: the times that were taken before, by their addresses.
    """
    found, size = {}, ctypes.sizeof(CountedStruct)
    for past in _array(PastStruct, known + size, CountedStruct.from_address(known).count):
        if past.times not in taken:
            count = CountedStruct.from_address(past.times).count
            taken[past.times] = np.array(_array(ctypes.c_int32, past.times + size, count), np.int32)
        found[past.block] = taken[past.times]
    return found


class Blocks:
    """The blocks of a launch.

    Args:
        template: a block that has not begun, whose arrays become those of all blocks.
        copies_need_fence: those of `cp.async`, before tensor cores read what was copied.

    Attributes:
        may_refine: an element of a shadow may become one of fewer bytes.
    """

    def __init__(self, template: Block, copies_need_fence: bool):
        gpu = template.gpu
        assert template.native is not None
        assert gpu.native is not None
        self.gpu, self.template = gpu, template
        self.launch: LaunchState = gpu.native
        self.program, self.library = self.launch.program, self.launch.program.library
        self.failures, self.may_refine = 0, True
        warps, rows = template.native.states.shape
        self.counts = np.zeros_like(gpu.counts.table)
        self.owners = np.zeros((warps, rows), np.int32)
        self.fences = np.zeros((warps, rows), np.uint32)
        self.states = (StateStruct * warps)()
        self.coordinates = (CoordinateStruct * max(len(self.launch.positions), 1))(
            *self.launch.positions
        )
        events = self.launch.events
        self.struct = RunnerStruct(
            warps=ctypes.addressof(template.native.warps),
            states=ctypes.addressof(self.states),
            template_states=self.launch.states.ctypes.data,
            coordinates=ctypes.addressof(self.coordinates),
            shared=ctypes.addressof(_view(template.memory).struct),
            events=ctypes.addressof(events.struct),
            counts=self.counts.ctypes.data,
            total_counts=gpu.counts.table.ctypes.data,
            controls=None if gpu.controls is None else gpu.controls.ctypes.data,
            count_size=self.counts.size,
            rows=rows,
            limit=gpu.limit + 1,
            warp_count=warps,
            coordinate_count=len(self.launch.positions),
            copies_need_fence=copies_need_fence,
            atomics=self.program.atomics,
        )
        self.is_told = True  # Python knows what the core's blocks have released
        for n, (warp, state) in enumerate(zip(template.native.warps, self.states, strict=True)):
            warp.runner = ctypes.addressof(self.struct)
            warp.undo = ctypes.addressof(self.struct) + RunnerStruct.undo.offset
            warp.counts = self.counts.ctypes.data
            state.copy_name = events.events.name(f"a copy of warp {n}")
            state.product_name = events.events.name(f"a product of warp {n}")
            state.owners = self.owners[n].ctypes.data
            state.fence_versions = self.fences[n].ctypes.data
        weakref.finalize(self, _free, self.library, self.struct, self.states)

    def run(self, positions: Values, number: int, stopped: Event | None = None) -> int:
        """Execute blocks, of which the first one has this number, and return how many.

        Args:
            positions: of all blocks that are left ``(n, 3)``, int32.
            stopped: another worker has set it, and no more blocks are to begin.
        """
        events, done, why = self.launch.events, 0, ctypes.c_int(BUDGET)
        together = 1
        self._take_releases()
        self._take_maps()
        self._lend_spare_arrays()
        while why.value != PYTHON and done < len(positions):
            if stopped is not None and stopped.is_set():
                break
            start = time.perf_counter()
            events.struct.count = events.events.count
            ended = self.library.run_blocks(
                ctypes.addressof(self.struct),
                positions.ctypes.data + 12 * done,
                min(together, len(positions) - done),
                number + done,
                ctypes.byref(why),
            )
            done += ended
            self.gpu.progress.done += ended
            events.events.count = events.struct.count
            self.gpu.check_limits()
            if why.value == GROW:
                events.events.grow()
            elif why.value == REFINE:
                if not self.may_refine:
                    break
                self._refine()
            elif time.perf_counter() - start < SECONDS / 4:
                together *= 4
        self._take_spare_arrays()
        self._tell_maps()
        self.gpu.changes += self.struct.stores
        self.gpu.executed_instructions += self.struct.executed
        self.struct.stores = self.struct.executed = 0
        if why.value == PYTHON:
            self._note_failure()
            self.tell_releases()
        return done

    def tell_releases(self) -> None:
        """Let Python know what the core's blocks have released."""
        if self.is_told:
            return
        self.is_told = True
        all_of_them, known = self.struct.releases, dict[int, dict[int, Values]]()
        times: dict[int, Values] = {}
        for entry in _array(ReleaseStruct, all_of_them.table, all_of_them.capacity):
            if entry.known:
                if entry.known not in known:
                    known[entry.known] = _pasts_of(entry.known, times)
                self.gpu.released[entry.address] = dict(known[entry.known])

    def released_addresses(self) -> set[int]:
        """Return where the core's blocks have released what they know."""
        all_of_them = self.struct.releases
        entries = _array(ReleaseStruct, all_of_them.table, all_of_them.capacity)
        return {entry.address for entry in entries if entry.known}

    def _take_releases(self) -> None:
        """Let the core know what Python's blocks have released."""
        if not self.is_told or not (self.program.atomics or self.program.controls_grids):
            return
        self.is_told = False
        runner, taken = ctypes.addressof(self.struct), dict[int, int]()
        self.library.clear_releases(runner)
        for address, known in self.gpu.released.items():
            numbers = sorted(known)
            for times in known.values():
                if id(times) not in taken:
                    array = np.ascontiguousarray(times, np.int32)
                    taken[id(times)] = self.library.add_times(runner, array.ctypes.data, len(array))
            blocks = np.array(numbers, np.int64)
            pointers = np.array([taken[id(known[number])] for number in numbers], np.uint64)
            self.library.add_release(
                runner, address, len(numbers), blocks.ctypes.data, pointers.ctypes.data
            )

    def _take_maps(self) -> None:
        """Let the core know which tensormaps Python knows."""
        self.struct.map_count = 0
        for place in self.gpu.space.allocations:
            for row in place.published:
                self.library.add_map(
                    ctypes.addressof(self.struct),
                    ctypes.addressof(_view(place).struct),
                    row,
                    True,
                    place.acquired.get(row, -1),
                )

    def _tell_maps(self) -> None:
        """Let Python know which tensormaps the core knows."""
        places = {
            ctypes.addressof(_view(place).struct): place for place in self.gpu.space.allocations
        }
        for one in _array(TensormapStruct, self.struct.maps, self.struct.map_count):
            place = places[one.place]
            place.published.add(one.row)
            if one.acquired < 0:
                place.acquired.pop(one.row, None)
            else:
                place.acquired[one.row] = one.acquired

    def _refine(self) -> None:
        """Refine the shadow that the core in C has found too coarse, and let it go on."""
        self._take_spare_arrays()
        for place in self.gpu.space.allocations:
            if ctypes.addressof(_view(place).struct) == self.struct.coarse:
                place.refine(self.struct.finer)
        self._lend_spare_arrays()

    def _note_failure(self) -> None:
        """Leave all blocks to Python where the reason is in each of them."""
        self.failures += 1
        pc = self.struct.fault_pc
        if pc >= 0 and self.program.instructions[pc].kind == LEFT:
            self.program.is_for_blocks = False

    @property
    def works(self) -> bool:
        return self.failures < MOST_FAILURES and self.program.is_for_blocks

    def _lend_spare_arrays(self) -> None:
        """Give the core arrays for second reads, which it takes where it needs them."""
        for one in self.gpu.space.allocations:
            if one.others is None:
                view, spare = _view(one), zeros(len(one.reads), np.int32)
                view.spare, view.struct.spare = spare, spare.ctypes.data

    def _take_spare_arrays(self) -> None:
        for one in self.gpu.space.allocations:
            view = _view(one)
            if one.others is None and view.struct.others:
                one.others = view.spare
            view.struct.spare = view.spare = None
