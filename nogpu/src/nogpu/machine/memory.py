# SPDX-License-Identifier: MIT
"""Memory that reports races: the accesses of warps, and the rules that they must keep.

There are two rules for each element:

- Who reads or writes it must know its last write.
- Who writes it must know all reads since.

So a missing barrier or wait is noticed in whatever order the warps run. Race detectors for threads
work in this way (Flanagan and Freund, "FastTrack", PLDI 2009). An element keeps two reads that do
not know each other. Of further ones some are forgotten, so that other schedules may notice more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nogpu.machine.address_space import AddressSpace, Rows
from nogpu.machine.allocation import MANY, POISON, Allocation, zeros
from nogpu.machine.registers import Cause, Values, all_true
from nogpu.machine.vector_clocks import EARLIER, GIVEN, UNWRITTEN, Events

if TYPE_CHECKING:
    from nogpu.machine.block import Warp


class Space(AddressSpace):
    """An address space whose accesses must keep the rules."""

    is_deferred = False  # what is undefined counts where it is used, and not where it is loaded

    # Accesses of a warp

    def load(
        self, warp: Warp, addresses: Values, width: int, line: int, atomic: bool = False
    ) -> tuple[Values, Values | None]:
        """Return the bytes ``(len(addresses), width)``, and those whose value is undefined.

        The latter is a mask, or None. A value is undefined that nobody has written, or that
        another program or warp writes at the same time.
        """
        event = warp.event(line, "a load", atomic)
        warp.count_access(self, addresses, width)
        raw = undefined = None
        for place, rows, lanes in self.pieces(warp, addresses, width, line, "load"):
            warp.count_place(place, rows * width)
            warp.piece = warp.lanes()[: len(addresses)][lanes]
            self._check_stack(warp, rows * width, width, line, "loads")
            self._note_lanes(warp, place, rows, width, line, False)
            bad = self._read(warp, place, rows, width, event, line, atomic)
            found = place.data.reshape(-1, width)[rows]
            if isinstance(lanes, slice):
                return found, bad
            if raw is None:
                raw = np.full((len(addresses), width), POISON, np.uint8)
            raw[lanes] = found
            if bad is not None:
                undefined = np.zeros(raw.shape, np.bool_) if undefined is None else undefined
                undefined[lanes] = bad
        if raw is None:
            raw = np.full((len(addresses), width), POISON, np.uint8)
        return raw, undefined

    def store(
        self, warp: Warp, addresses: Values, values: Values, line: int, atomic: bool = False
    ) -> None:
        width = values.shape[1]
        event = warp.event(line, "a store", atomic)
        warp.count_access(self, addresses, width)
        warp.block.gpu.changes += self is warp.block.gpu.space
        for place, rows, lanes in self.pieces(warp, addresses, width, line, "store"):
            warp.count_place(place, rows * width)
            mine = values[lanes]
            warp.piece = warp.lanes()[: len(addresses)][lanes]
            self._check_stack(warp, rows * width, width, line, "stores")
            self._note_lanes(warp, place, rows, width, line, True)
            self._write(warp, place, rows, width, event, line, mine, atomic)
            data = place.data.reshape(-1, width)
            data[rows] = mine
            if not all_true(data[rows] == mine):
                who = f"threads of {warp.name}"
                if warp.block.gpu.kernel.block is not None:
                    self._tell_writers(warp, place, rows * width, mine, line)
                    continue
                self._differ(warp, line, data[rows], mine, who)

    def _tell_writers(
        self, warp: Warp, place: Allocation, offsets: Values, values: Values, line: int
    ) -> None:
        """Report two threads of a warp that store different values to the same bytes."""
        held = place.data.reshape(-1, values.shape[1])[offsets // values.shape[1]]
        lost = int(np.flatnonzero((held != values).any(1))[0])
        here = (offsets == offsets[lost]) & (held == values).all(1)
        kept = int(np.flatnonzero(here)[0]) if here.any() else lost
        one, other = (warp.thread(int(warp.piece[n])) for n in (lost, kept))
        message = (
            f"{one} and {other} store different values to {place.where(int(offsets[lost]))} at "
            "once; one of them is lost"
        )
        warp.fault("error", "race", line, message)

    def _check_stack(self, warp: Warp, offsets: Values, width: int, line: int, does: str) -> None:
        """Report an access to the local memory of another thread."""
        kernel = warp.block.gpu.kernel
        if self is not warp.block.local or kernel.block is None:
            return
        own = offsets - (warp.first_thread + warp.piece) * kernel.local_bytes
        bad = np.flatnonzero((own < 0) | (own + width > kernel.local_bytes))
        if len(bad):
            n = int(bad[0])
            message = (
                f"{warp.thread(int(warp.piece[n]))} {does} byte {int(own[n])} of its local memory, "
                f"which has {kernel.local_bytes}: an index is outside of an array of its own"
            )
            warp.fault("error", "out of bounds", line, message)

    def _note_lanes(
        self, warp: Warp, place: Allocation, rows: Rows, width: int, line: int, is_write: bool
    ) -> None:
        """Note which threads of a warp access elements, and report those that should wait first.

        A thread knows what another one of its warp has done before the last `__syncwarp` or
        `__syncthreads`.
        """
        if place.lane_writes is None or place.lane_reads is None:
            return
        events, now = warp.block.gpu.events, int(warp.clocks.times[warp.index, warp.index])
        mine = np.repeat(warp.piece, width // place.unit).reshape(len(rows), -1)
        lanes = [place.shadow(one, width) for one in (place.lane_writes, place.lane_reads)]
        arrays = (place.writes, place.reads)
        for array, by, does in zip(arrays, lanes, ("writes", "reads"), strict=True):
            if does == "reads" and not is_write:
                continue
            numbers, theirs = place.shadow(array, width)[rows], by[rows]
            bad = (events.blocks[numbers] == warp.block.number) & (numbers > UNWRITTEN)
            bad &= (events.agents[numbers] == warp.index) & (events.times[numbers] == now)
            bad &= (theirs != mine) & ~events.atomic[numbers]
            if not bad.any():
                continue
            row, column = (int(one[0]) for one in np.nonzero(bad))
            lane, number = int(theirs[row, column]), int(numbers[row, column])
            who = warp.thread(lane) if lane < 32 else "another thread of its warp"
            where = place.where(int(rows[row]) * width + column * place.unit)
            at = warp.block.gpu.place_of(int(events.lines[number]))
            verb = "overwrites" if is_write else "reads"
            message = (
                f"{warp.thread(int(mine[row, 0]))} {verb} {where}, which {who} {does} ({at}), "
                "without __syncwarp or __syncthreads between them"
            )
            warp.fault("error", "race within a warp", line, message, number)
        if is_write:
            lanes[0][rows] = mine
            return
        reads = lanes[1]
        numbers = place.shadow(place.reads, width)[rows]
        again = (events.blocks[numbers] == warp.block.number) & (numbers > UNWRITTEN)
        again &= (events.agents[numbers] == warp.index) & (events.times[numbers] == now)
        reads[rows] = np.where(again & (reads[rows] != mine), np.uint8(MANY), mine)
        if len(rows) > 1:  # several of these threads read one element
            _, first, count = np.unique(rows, return_index=True, return_counts=True)
            reads[rows[first[count > 1]]] = MANY

    def _differ(self, warp: Warp, line: int, a: Values, b: Values, who: str) -> None:
        """Two agents store different values to the same bytes: by rounding, or others.

        No kernel has pointers to shared memory: there a warp stores copies of one number. Those of
        a sum of products are rounded differently, so that more than the last bits differ near zero.
        """
        how, kind = "", "error"
        if self.name == "shared memory" and (_are_close(a, b) or _are_floats(a, b)):
            how, kind = ": copies of one number, rounded differently", "note"
        elif _are_close(a, b):
            how, kind = ", which differ in the last bits", "note"
        message = f"{who} store different values to the same bytes{how}"
        warp.fault(kind, "different values", line, message)

    def change(
        self,
        warp: Warp,
        place: Allocation,
        rows: Rows,
        width: int,
        event: int,
        line: int,
        atomic: bool,
        reads: bool,
    ) -> None:
        """Note an atomic, which writes, and perhaps ``reads``."""
        if reads and self._read(warp, place, rows, width, event, line, atomic) is not None:
            message = f"{warp.cause.message}; an atomic changes it"
            warp.fault("error", warp.cause.name, line, message, *warp.cause.events[::-1])
        self._write(warp, place, rows, width, event, line, atomic=atomic)

    # The rules, of the accesses of a warp and of its asynchronous operations

    def read(
        self,
        warp: Warp,
        addresses: Values,
        width: int,
        event: int,
        line: int,
        fence: bool = False,
        lanes: Values | None = None,
    ) -> None:
        """An asynchronous operation reads at any time until it has been waited for.

        ``lanes``: the threads of the addresses, by default those that execute the instruction.
        """
        if warp.native is not None and warp.native.read(warp, self, addresses, width, event, fence):
            return
        for place, rows, _ in self.pieces(warp, addresses, width, line, "load", lanes):
            self.check_known(warp, place, rows, width, line, fence)
            self._note_read(warp, place, rows, width, event)

    def check_read(
        self, warp: Warp, addresses: Values, width: int, line: int
    ) -> tuple[Allocation, Rows]:
        """Locate addresses of one allocation, and refuse what the warp does not know."""
        place, rows = self.locate(addresses, width, line)
        self.check_known(warp, place, rows, width, line)
        return place, rows

    def check_known(
        self,
        warp: Warp,
        place: Allocation,
        rows: Rows,
        width: int,
        line: int,
        fence: bool = False,
    ) -> bool:
        """Refuse to read what the warp does not know, and return whether it knows it.

        ``fence``: the asynchronous proxy reads, for which generic writes need a fence.
        """
        writers = place.shadow(place.writes, width)[rows]
        known = warp.clocks.knows(warp.index, writers)
        is_known = all_true(known)
        if not is_known:
            self.conflict(warp, place, rows, width, writers, known, line, "read", "written")
        elif fence and not all_true(fenced := warp.clocks.is_fenced(warp.index, writers)):
            number = int(writers[~fenced][0])
            events = warp.block.gpu.events
            where = warp.block.gpu.place_of(int(events.lines[number]))
            what = f"reads what {events.who(number)} wrote ({where})"
            message = f"{what}, which needs a fence between the proxies"
            warp.fault("error", "missing fence", line, message, number)
        return is_known

    def _read(
        self,
        warp: Warp,
        place: Allocation,
        rows: Rows,
        width: int,
        event: int,
        line: int,
        atomic: bool,
    ) -> Values | None:
        """Note a load. Return the bytes whose value is undefined, or None."""
        writers = place.shadow(place.writes, width)[rows]
        undefined = None
        if writers.any():
            known = warp.clocks.knows(warp.index, writers)
            if atomic or warp.block.gpu.kernel.swaps:
                known |= warp.block.gpu.events.atomic[writers]
            if not all_true(known):
                if not self.is_deferred:
                    self.conflict(warp, place, rows, width, writers, known, line, "read", "written")
                else:
                    cause = self.describe(warp, place, rows, width, writers, known, line)
                    other = int(writers[~known][0])
                    warp.cause = cause if warp.block.trace is None else cause.between(event, other)
                    undefined = np.repeat(~known, place.unit, 1)
        self._note_read(warp, place, rows, width, event)
        return undefined

    def _note_read(self, warp: Warp, place: Allocation, rows: Rows, width: int, event: int) -> None:
        reads = place.shadow(place.reads, width)
        before = reads[rows]
        if before.any():
            known = warp.clocks.knows(warp.index, before)
            if not all_true(known):
                if place.others is None:
                    place.others = zeros(len(place.reads), np.int32)
                    place.changed()
                others = place.shadow(place.others, width)
                kept = others[rows]
                replaced = ~known & warp.clocks.knows(warp.index, kept)
                if replaced.any():
                    others[rows] = np.where(replaced, before, kept)
        reads[rows] = event

    def write(
        self,
        warp: Warp,
        addresses: Values,
        width: int,
        event: int,
        line: int,
        lanes: Values | None = None,
    ) -> None:
        """An asynchronous operation writes at any time until it has been waited for.

        ``lanes``: as in `read`.
        """
        for place, rows, _ in self.pieces(warp, addresses, width, line, "store", lanes):
            self._write(warp, place, rows, width, event, line)
            place.data.reshape(-1, width)[rows] = POISON

    def _write(
        self,
        warp: Warp,
        place: Allocation,
        rows: Rows,
        width: int,
        event: int,
        line: int,
        values: Values | None = None,
        atomic: bool = False,
    ) -> None:
        """Warps may store the same ``values`` unordered: Triton's layouts have copies in several
        warps."""
        clocks, events = warp.clocks, warp.block.gpu.events
        writers = place.shadow(place.writes, width)[rows]
        if writers.any():
            known = clocks.knows(warp.index, writers) | (writers == UNWRITTEN)
            if atomic:
                known |= events.atomic[writers]
            if not all_true(known) and values is not None:
                known = self._same(warp, place, rows, width, writers, known, line, values)
            if not all_true(known):
                self.conflict(
                    warp, place, rows, width, writers, known, line, "overwritten", "written"
                )
        self._check_readers(warp, place, rows, width, line, atomic)
        if place.barriers:
            self._check_barriers(warp, place, rows * width, width, line)
        place.shadow(place.writes, width)[rows] = event

    def _check_readers(
        self, warp: Warp, place: Allocation, rows: Rows, width: int, line: int, atomic: bool
    ) -> None:
        """Refuse to overwrite what others may still read; nobody has read it afterwards."""
        for array in (place.reads, place.others):
            if array is None:
                continue
            readers = place.shadow(array, width)[rows]
            if not readers.any():
                continue
            known = warp.clocks.knows(warp.index, readers)
            if atomic:
                known |= warp.block.gpu.events.atomic[readers] | warp.block.gpu.kernel.swaps
            if not all_true(known):
                self.conflict(warp, place, rows, width, readers, known, line, "overwritten", "read")
            place.shadow(array, width)[rows] = GIVEN

    def _check_barriers(
        self, warp: Warp, place: Allocation, offsets: Values, width: int, line: int
    ) -> None:
        for address, barrier in place.barriers.items():
            if ((offsets <= address + 7) & (offsets + width > address)).any():
                message = f"overwrites the mbarrier of {warp.block.gpu.place_of(barrier.line)}"
                warp.fault("error", "overwritten mbarrier", line, message)

    def _same(
        self,
        warp: Warp,
        place: Allocation,
        rows: Rows,
        width: int,
        writers: Values,
        known: Values,
        line: int,
        values: Values,
    ) -> Values:
        """Return ``known``, and what is overwritten by the value that it has, or nearly that."""
        events, block = warp.block.gpu.events, warp.block.number
        held = place.data.reshape(-1, width)[rows]
        same = (held == values).reshape(*known.shape, -1).all(-1)
        foreign = ~known & (events.blocks[writers] != block)
        if warp.block.gpu.kernel.block is not None and not foreign.any():
            return known | same
        if (foreign & same).any():
            name, _, other, _ = _agent(warp, int(writers[foreign & same][0]))
            message = (
                f"two {name.removeprefix('race between ')} write "
                f"{place.where(int(rows.flat[0]) * width)} without order, and both the same value "
                f"(the other one at {other})"
            )
            warp.fault("warning", name, line, message, int(writers[foreign & same][0]))
        if all_true(known | same) or foreign.any():
            return known | same
        if _are_close(held, values) or self._are_copies(
            events, writers, known | same, line, held, values
        ):
            self._differ(warp, line, held, values, "warps")
            return np.ones_like(known)
        return known | same

    def _are_copies(
        self,
        events: Events,
        writers: Values,
        known: Values,
        line: int,
        held: Values,
        values: Values,
    ) -> bool:
        """Whether what is overwritten are copies of one number that other warps have rounded.

        One instruction stores all copies. Numbers near zero differ in more than the last bits.
        """
        is_mine = bool((events.lines[writers[~known]] == line).all())
        return self.name == "shared memory" and is_mine and _are_floats(held, values)

    def describe(
        self,
        warp: Warp,
        place: Allocation,
        rows: Rows,
        width: int,
        numbers: Values,
        known: Values,
        line: int,
    ) -> Cause:
        """Return why what a warp has loaded is undefined."""
        row, column = (int(i[0]) for i in np.nonzero(~known))
        number = int(numbers[row, column])
        offset = int(rows.reshape(-1)[row]) * width + column * place.unit
        where = place.where(offset)
        events = warp.block.gpu.events
        if number == UNWRITTEN:
            what = f"{where} was not written before"
            if warp.block.gpu.kernel.block is not None:
                what = f"{_who(warp, row)} reads {where}, which was not written before"
            return Cause("uninitialised memory", what, line)
        name, who, by, waits = _agent(warp, number, place, offset)
        reader = _who(warp, row)
        message = f"{reader} reads {where}, which {who} writes ({by}), without {waits}"
        is_weak = name == "race" and not events.atomic[number]
        return Cause(name, message, line, is_weak and warp.block.gpu.kernel.block is None)

    def conflict(
        self,
        warp: Warp,
        place: Allocation,
        rows: Rows,
        width: int,
        numbers: Values,
        known: Values,
        line: int,
        what: str,
        other: str,
    ) -> None:
        """Report an access that does not know one of the events."""
        row, column = (int(i[0]) for i in np.nonzero(~known.reshape(-1, known.shape[-1])))
        number = int(numbers.reshape(-1, known.shape[-1])[row, column])
        place_of = int(rows.reshape(-1)[row]) * width + column * place.unit
        here = f"{_who(warp, row)} "
        here += "reads" if what == "read" else "overwrites"
        where = place.where(place_of)
        gpu = warp.block.gpu
        if number == UNWRITTEN and gpu.kernel.block is not None:
            message = f"{here} {where}, which was not written before"
            warp.block.note_unwritten(warp, place, line, message)
            return
        if number == UNWRITTEN:
            message = f"{where} was not written before"
            warp.fault("error", "uninitialised memory", line, message)
            return
        name, who, by, waits = _agent(warp, number, place, place_of, other)
        does = "writes" if other == "written" else "reads"
        warp.block.unwritten.pop((place.name, int(gpu.events.lines[number])), None)
        message = f"{here} {where}, which {who} {does} ({by}), without {waits}"
        # The value that was read may be one that nobody uses: Triton has copies in several warps.
        is_weak = self.is_deferred and other == "read" and name == "race"
        is_weak &= gpu.kernel.block is None
        warp.fault("warning" if is_weak else "error", name, line, message, number)


def _who(warp: Warp, row: int) -> str:
    """Name who accesses the row of an access: the thread in CUDA C++, and in Triton the warp."""
    if warp.block.gpu.kernel.block is None or row >= len(warp.piece):
        return warp.name
    return warp.thread(int(warp.piece[row]))


def _agent(
    warp: Warp,
    number: int,
    place: Allocation | None = None,
    offset: int = 0,
    other: str = "written",
) -> tuple[str, str, str, str]:
    """Return the name of a race with an event, what has accessed the memory, where, and how to wait
    for it."""
    gpu, events = warp.block.gpu, warp.block.gpu.events
    block, who = int(events.blocks[number]), events.who(number)
    if gpu.kernel.block is not None and block != EARLIER:
        by = gpu.place_of(int(events.lines[number]))
        if block != warp.block.number:
            waits = "an atomic or another launch between them"
            if other == "written" and _have_counted(warp, number):
                waits = (
                    "__threadfence() between that store and its block's atomic, and between this "
                    "block's atomic and this read: an atomic alone orders no other memory"
                )
            return "race between blocks", f"{who} of {_other_block(warp, block)}", by, waits
        lanes = None
        if place is not None:
            lanes = place.lane_writes if other == "written" else place.lane_reads
        if int(events.agents[number]) >= len(warp.block.warps):  # an asynchronous copy
            waits = "__pipeline_wait_prior(0), or another wait for the copy, and __syncthreads"
            return "race", who, by, f"{waits} between them"
        lane = MANY if lanes is None or place is None else int(lanes[offset // place.unit])
        if lane < MANY:
            who = warp.block.warps[int(events.agents[number])].thread(lane)
        return "race", who, by, "__syncthreads between them"
    if block == EARLIER:
        waits = "waiting for that launch, as tl.extra.cuda.gdc_wait() does"
        return "race between launches", f"{who}, launched before,", events.places[number], waits
    by = gpu.place_of(int(events.lines[number]))
    if block == warp.block.number:
        return "race", who, by, "waiting for it"
    return "race between programs", f"{who} of another program", by, "waiting for it"


def _have_counted(warp: Warp, number: int) -> bool:
    """Whether a block has executed an atomic behind a store, and this warp's block one after it.

    So do blocks that count those which have written, and the last one reads what others wrote.
    """
    events = warp.block.gpu.events
    later = slice(number + 1, events.count)
    blocks = events.blocks[later][events.atomic[later]]
    by_writer = np.flatnonzero(blocks == events.blocks[number])
    return bool(by_writer.size and (blocks[by_writer[0] :] == warp.block.number).any())


def _other_block(warp: Warp, number: int) -> str:
    """Name a block by its position where its number tells that."""
    gpu = warp.block.gpu
    if gpu.schedule.order != "forward" or getattr(gpu, "takes_samples", False):
        return "another block"
    x, y, _ = gpu.grid
    return f"block ({number % x}, {number // x % y}, {number // (x * y)})"


def _are_close(a: Values, b: Values) -> bool:
    """Whether two arrays of bytes are alike as floating-point numbers, but for the last bits."""
    if a.shape[1] % 4:
        if a.shape[1] % 2:
            return False
        a, b = (np.ascontiguousarray(x).view(np.uint16).astype(np.int64) for x in (a, b))
        return bool((np.abs(a - b) <= 1).all())
    a, b = (np.ascontiguousarray(x).view(np.float32) for x in (a, b))
    with np.errstate(all="ignore"):
        return bool((np.abs(a - b) <= 2.0**-18 * np.maximum(np.abs(a), np.abs(b))).all())


def _are_floats(a: Values, b: Values) -> bool:
    """Whether the bytes that differ can be floating-point numbers, and not small integers."""
    for bits, dtype in ((np.uint16, np.float16), (np.uint32, np.float32), (np.uint64, np.float64)):
        if a.shape[1] % np.dtype(dtype).itemsize:
            continue
        words = np.stack([np.ascontiguousarray(x).view(bits) for x in (a, b)])
        numbers = np.abs(words[:, words[0] != words[1]].view(dtype))
        is_normal = (numbers >= np.finfo(dtype).tiny) & np.isfinite(numbers)
        if all_true(is_normal | (numbers == 0)):
            return True
    return False
