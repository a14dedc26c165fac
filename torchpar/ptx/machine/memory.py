# SPDX-License-Identifier: MIT
"""Memory that knows, for each element, who wrote it and who has read it, and that reports races.

Each access of a warp or of an asynchronous operation is an event: an agent at a time. Agents are
the warps of a block, and its asynchronous operations. A warp knows its own events. It learns those
of the block's other warps at a barrier, those of asynchronous operations when it waits for them,
and those of other blocks by an atomic that acquires what they have released at its address. There
are two rules for each element:

- Who reads or writes it must know its last write.
- Who writes it must know all reads since.

So a missing barrier or wait is noticed in whatever order the warps run. Race detectors for threads
work in this way (Flanagan and Freund, "FastTrack", PLDI 2009). An element keeps two reads that do
not know each other. Of further ones some are forgotten, so that other schedules may notice more.
"""

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from torchpar.ptx.machine.pages import Unwritten, by_page, page_count, zeros
from torchpar.ptx.machine.parse import PtxError
from torchpar.ptx.machine.protocols import AllocationView, SpaceView, View, Warp
from torchpar.ptx.machine.registers import Cause, Values
from torchpar.ptx.native.layout import PAGE

# Numbers of events: what the host did before the launch; what nobody did.
GIVEN, UNWRITTEN = 0, 1
POISON = 0xFF  # NaN in each format, and −1
LARGEST_UNIT = 16  # bytes that an element of the shadow stands for at first

Rows = Values  # positions in an allocation, in units of an access


def all_true(mask: Values) -> bool:
    return b"\0" not in mask.tobytes()  # for short arrays several times as fast as their method


class Events:
    """The accesses of a launch, by their numbers: their block, agent, time and line."""

    def __init__(self) -> None:
        self.count = 2
        self.names: list[str] = ["the host", "nobody"]  # of what accesses
        self.numbers = {name: n for n, name in enumerate(self.names)}
        self.view: View | None = None  # for the core in C, which takes the arrays
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


class Knowledge:
    """What each warp of a block knows: of each agent of the block the last time, and of others'.

    ``fenced`` has the times of what each warp knew at its last fence between the proxies.
    ``foreign`` has by block the times of its agents.
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

    def share(self, warps: list[int]) -> None:
        """At a barrier, each of these warps learns what one of them knows."""
        self.times[warps] = self.times[warps].max(0)
        self.fenced[warps] = self.fenced[warps].max(0)
        self.times[warps, warps] += 1
        together: dict[int, Values] = {}
        for warp in warps:
            merge(together, self.foreign[warp])
        for warp in warps:
            self.foreign[warp] = dict(together) if together else {}

    def snapshot(self, warp: int) -> dict[int, Values]:
        """Return what the warp knows now; it begins another time, which nobody knows yet."""
        found = {**self.foreign[warp], self.block: self.times[warp, : self.agents].copy()}
        self.times[warp, warp] += 1
        return found

    def learn(self, warp: int, known: dict[int, Values]) -> None:
        for block, times in known.items():
            if block == self.block:
                mine = self.times[warp, : len(times)]
                np.maximum(mine, times, out=mine)
            else:
                merge(self.foreign[warp], {block: times})


def merge(into: dict[int, Values], known: dict[int, Values]) -> None:
    for block, times in known.items():
        before = into.get(block)
        if before is times:
            continue
        if before is None:
            into[block] = times
            continue
        longer, shorter = (before, times) if len(before) >= len(times) else (times, before)
        together = longer.copy()
        np.maximum(together[: len(shorter)], shorter, out=together[: len(shorter)])
        into[block] = together


def free_memory(
    machine: Path = Path("/proc/meminfo"), container: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return the bytes of memory that this process can get, or None if the system does not say so.

    A container may have a limit below what the machine has (files ``memory.*`` of cgroup v2).
    """
    found = []
    with suppress(OSError):
        sizes = dict(line.split(":") for line in machine.read_text("utf-8").splitlines())
        found += [1024 * int(sizes["MemAvailable"].split()[0])] if "MemAvailable" in sizes else []
    with suppress(OSError):
        limit, used = ((container / f"memory.{name}").read_text() for name in ("max", "current"))
        if limit.strip() != "max":
            uses = (container / "memory.stat").read_text("utf-8").splitlines()
            # Copies of files, which the system drops when it needs their memory.
            dropped = int(dict(line.split() for line in uses)["inactive_file"])
            found.append(max(0, int(limit) - int(used) + dropped))
    return min(found, default=None)


class Allocation:
    """Bytes from address ``base``, and of each of their units who wrote and who has read it.

    Args:
        unit: bytes; accesses of fewer bytes make it smaller.
        data: the bytes; by default they are new, and nobody has written them.
        start: the first address that belongs to it, where ``base`` is rounded down.

    Attributes:
        pages: of memory that is given, whether each page was accessed; None: all were.
        unwritten: what nobody has written of it, for pages that are accessed later.
        saved: the bytes of each page before its first access, or None.
    """

    def __init__(
        self,
        name: str,
        base: int,
        size: int,
        unit: int = LARGEST_UNIT,
        data: Values | None = None,
        start: int | None = None,
    ):
        self.name, self.base, self.size, self.unit = name, base, size, unit
        self.start = base if start is None else start
        padded = -(-size // 128) * 128
        self.data = np.full(padded, POISON, np.uint8) if data is None else data
        self.pages: Values | None = None
        self.unwritten: Unwritten | None = None
        self.saved: Values | None = None
        if data is None:
            self.writes = np.full(padded // unit, UNWRITTEN, np.int32)
        else:
            self.pages = np.zeros(page_count(len(data)), np.bool_)
            self.writes = zeros(len(self.pages) * PAGE // unit, np.int32)
        self.reads = zeros(len(self.writes), np.int32)
        # Reads that the last read did not know; made when there are any.
        self.others: Values | None = None
        self.barriers: dict[int, Any] = {}  # the mbarriers in it, by their offsets
        self.published: set[int] = set()  # the tensormaps in it, by their places
        self.acquired: dict[int, int] = {}  # the event of the last fence for each of these
        self.index: Callable[[int], str] | None = (
            None  # a function that names the element at an offset
        )
        self.touched: Values | None = None  # sectors, by slots of the counters
        self.view: AllocationView | None = None  # for the core in C

    def changed(self) -> None:
        """Tell the core that one of the arrays is another one, or a barrier was made."""
        if self.view is not None:
            self.view.update()

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.base + self.size

    def content(self) -> Values:
        """Return the bytes that belong to it, without those that pad them."""
        return self.data[self.start - self.base : self.size]

    def refine(self, unit: int) -> None:
        """Let each element of the shadow stand for ``unit`` bytes."""
        count, self.unit = self.unit // unit, unit
        if count == 1:
            return
        self.writes, self.reads = (self._repeat(a, count) for a in (self.writes, self.reads))
        if self.others is not None:
            self.others = self._repeat(self.others, count)
        self.changed()

    def _repeat(self, array: Values, count: int) -> Values:
        if self.pages is None:
            return np.repeat(array, count)
        made = zeros(len(array) * count, array.dtype)
        touched = self.touched_pages()
        self.by_page(made)[touched] = np.repeat(self.by_page(array)[touched], count, 1)
        return made

    # Pages

    def by_page(self, array: Values) -> Values:
        """Return a view of ``array`` with a row for each page."""
        return by_page(array, 1 if self.pages is None else len(self.pages))

    def touched_pages(self) -> Values:
        """Return the numbers of the pages that were accessed."""
        return np.zeros(1, np.int64) if self.pages is None else np.flatnonzero(self.pages)

    def copy_of(self, array: Values) -> Values:
        """Return a copy of ``array``, which is zero in other pages."""
        if self.pages is None:
            return array.copy()
        made, touched = zeros(len(array), array.dtype), self.touched_pages()
        self.by_page(made)[touched] = self.by_page(array)[touched]
        return made

    def touch_also(self, other: "Allocation") -> None:
        """Note what was touched of another allocation of the same bytes."""
        assert self.touched is not None
        assert other.touched is not None
        if self.pages is None or other.pages is None:
            self.touched |= other.touched
            return
        self.pages |= other.pages
        pages = other.touched_pages()
        for mine, its in zip(self.touched, other.touched, strict=True):
            self.by_page(mine)[pages] |= self.by_page(its)[pages]

    def touched_sectors(self) -> Values:
        """Return which sectors were touched, ``(slots, touched pages, sectors of a page)``."""
        assert self.touched is not None
        if self.pages is None:
            return self.touched[:, None]
        rows = self.touched.reshape(len(self.touched), len(self.pages), -1)
        return rows if self.pages.all() else rows[:, self.touched_pages()]

    def touch(self, offsets: Values, width: int) -> None:
        """Begin the pages of accesses, each of which is in one page."""
        if self.pages is None:
            return
        numbers = offsets // PAGE
        if not all_true(self.pages[numbers]):
            for page in np.unique(numbers[~self.pages[numbers]]).tolist():
                self.begin(page)

    def begin(self, page: int) -> None:
        """Find what is unwritten of a page before its first access, as `begin_page` of core.c."""
        start = page * PAGE
        data = self.data[start : start + PAGE]
        assert self.pages is not None
        self.pages[page] = True
        if self.saved is not None:
            self.saved[start : start + len(data)] = data
        if self.unwritten is not None and page < self.unwritten.pages:
            of_page = self.unwritten.of_page(page, data)[:: self.unit]
            rows = self.writes[start // self.unit :][: len(of_page)]
            rows[of_page] = UNWRITTEN

    def begin_all(self) -> None:
        """Begin each page."""
        assert self.pages is not None
        for page in np.flatnonzero(~self.pages).tolist():
            self.begin(page)

    def restore(self) -> None:
        """Give the pages that were accessed what was saved of them."""
        assert self.saved is not None
        for page in self.touched_pages().tolist():
            first = max(page * PAGE, self.start - self.base)
            held = self.data[first : min((page + 1) * PAGE, self.size)]
            saved = self.saved[first:][: len(held)]
            changed = held != saved  # memory may be read-only
            held[changed] = saved[changed]

    def shadow(self, array: Values, width: int) -> Values:
        """Return a view of ``array`` with a row for each ``width`` bytes."""
        return array.reshape(-1, width // self.unit)

    def give(self, written: Values | None = None) -> None:
        """Let the host have written all bytes, or those that are ``written``."""
        if written is None:
            self.writes[:] = GIVEN
            return
        self.refine(1)
        self.writes[: len(written)][written] = GIVEN

    def end_launch(self) -> None:
        pages = self.touched_pages()
        for array in (self.by_page(self.writes), self.by_page(self.reads)):
            events = array[pages]
            events[events != UNWRITTEN] = GIVEN
            array[pages] = events
        self.others = None
        self.changed()

    def where(self, offset: int) -> str:
        """Name the element at ``offset``."""
        if self.index is not None:
            return str(self.index(offset - (self.start - self.base)))
        return f"byte {offset} of {self.name}"


class Space:
    """An address space: its allocations, and accesses of ``width`` bytes at several addresses."""

    def __init__(self, name: str):
        self.name = name
        self.allocations: list[Allocation] = []  # in the order of their addresses
        self.last: Allocation | None = None
        self.find: Callable[[int], Allocation | None] | None = (
            None  # of an address in no allocation: another allocation, or None
        )
        self.counts: Any = None  # of the launch
        self.view: SpaceView | None = None  # for the core in C

    def add(self, allocation: Allocation) -> Allocation:
        insort(self.allocations, allocation, key=lambda one: one.start)
        if self.counts is not None:
            self.counts.watch(allocation)
        if self.view is not None:
            self.view.update()
        return allocation

    def known(self, address: int) -> Allocation | None:
        """Return the allocation that has the address."""
        after = bisect_right(self.allocations, address, key=lambda one: one.start)
        before = self.allocations[after - 1] if after else None
        return before if before is not None and address < before.end else None

    def overlapping(self, start: int, end: int) -> list[Allocation]:
        """Return the allocations that have one of the addresses from ``start`` to ``end``."""
        return [one for one in self.allocations if one.start < end and start < one.end]

    def at(self, address: int) -> Allocation | None:
        """Return the allocation that has the address, also one that must be found first."""
        found = self.known(address)
        return found if found is not None or self.find is None else self.find(address)

    def locate(self, addresses: Values, width: int, line: int) -> tuple[Allocation, Rows]:
        """Return the allocation of all addresses, and their positions in units of ``width``.

        Raises:
            PtxError: an address outside of it, or one that is not aligned.
        """
        if addresses.size == 0:
            return self.allocations[0], addresses
        first = int(addresses.flat[0])
        last = self.last
        if last is None or not last.start <= first < last.end:
            self.last = last = self.at(first)
        if last is None:
            raise PtxError(line, self.outside(first, width), "out of bounds")
        if width < last.unit:
            last.refine(width)
        offsets = addresses - last.base
        if not all_true((offsets >= last.start - last.base) & (offsets <= last.size - width)):
            message = f"an access that begins in {last.name} ends outside of it"
            raise PtxError(line, message, "out of bounds")
        rows = offsets // width
        if not all_true(rows * width == offsets):
            message = f"an address in {last.name} is not a multiple of {width}"
            raise PtxError(line, message, "misaligned access")
        last.touch(offsets, width)
        return last, rows

    def outside(self, address: int, width: int) -> str:
        """Say where an address lies that is in no allocation."""
        near = min(
            self.allocations,
            key=lambda one: max(one.start - address, address - (one.base + one.size)),
            default=None,
        )
        text = f"address {address:#x}, which is outside of each allocation of {self.name}"
        if near is None:
            return text
        if near.index is not None:
            return f"{near.where(address - near.base)}, which is outside of {near.name}"
        if address < near.start:
            return f"{text}: {near.start - address} bytes before {near.name}"
        return f"{text}: {address + width - near.base - near.size} bytes after {near.name}"

    def pieces(
        self, warp: Warp, addresses: Values, width: int, line: int, what: str
    ) -> Iterator[tuple[Allocation, Rows, Rows | slice]]:
        """Yield the allocations of the addresses, the positions there, and the threads.

        Threads outside of all allocations, or misaligned, are faults, and left out.
        """
        try:
            place, rows = self.locate(addresses, width, line)
        except PtxError as e:
            yield from self._each(warp, addresses, width, line, what, e)
            return
        yield place, rows, slice(None)

    def _each(
        self, warp: Warp, addresses: Values, width: int, line: int, what: str, first: PtxError
    ) -> Iterator[tuple[Allocation, Rows, Rows | slice]]:
        groups: dict[int, tuple[Allocation, list[int], list[int]]] = {}
        told = False
        for n, address in enumerate(addresses.tolist()):
            place = self.at(address)
            offset = address - (place.base if place else 0)
            if place is None or offset + width > place.size or offset % width:
                if not told:
                    told = True
                    self.tell(warp, place, address, width, line, what, n)
                continue
            if width < place.unit:
                place.refine(width)
            place.touch(np.array([offset]), width)
            _, rows, lanes = groups.setdefault(id(place), (place, [], []))
            rows.append(offset // width)
            lanes.append(n)
        if not told and len(groups) < 2:
            raise first
        for place, rows, lanes in groups.values():
            yield place, np.array(rows), np.array(lanes)

    def tell(
        self,
        warp: Warp,
        place: Allocation | None,
        address: int,
        width: int,
        line: int,
        what: str,
        lane: int,
    ) -> None:
        thread = warp.first_thread + int(warp.lanes()[lane % len(warp.lanes())])
        if place is not None and (address - place.base) % width:
            message = f"an address in {place.name} is not a multiple of {width}"
            warp.block.gpu.fault("error", "misaligned access", line, message, warp)
            return
        if place is not None:
            message = f"{width} bytes that begin in {place.name} and end outside of it"
        else:
            message = self.outside(address, width)
        message = f"thread {thread}{warp.block.suffix} {what}s {message}"
        warp.block.gpu.fault("error", "out of bounds", line, message, warp)

    # Accesses of a warp, and the bytes without an access

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
        for place, rows, lanes in self.pieces(warp, addresses, width, line, "store"):
            warp.count_place(place, rows * width)
            mine = values[lanes]
            self._write(warp, place, rows, width, event, line, mine, atomic)
            data = place.data.reshape(-1, width)
            data[rows] = mine
            if not all_true(data[rows] == mine):
                who = f"threads of {warp.name}"
                self._differ(warp, line, data[rows], mine, who)

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
        warp.block.gpu.fault(kind, "different values", line, message, warp)

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
            warp.block.gpu.fault("error", warp.cause.name, line, message, warp)
        self._write(warp, place, rows, width, event, line, atomic=atomic)

    def peek(self, addresses: Values, width: int, line: int) -> Values:
        place, rows = self.locate(addresses, width, line)
        return place.data.reshape(-1, width)[rows]

    def poke(self, addresses: Values, values: Values, line: int) -> None:
        place, rows = self.locate(addresses, values.shape[1], line)
        place.data.reshape(-1, values.shape[1])[rows] = values

    # The rules, of the accesses of a warp and of its asynchronous operations

    def read(
        self, warp: Warp, addresses: Values, width: int, event: int, line: int, fence: bool = False
    ) -> None:
        """An asynchronous operation reads at any time until it has been waited for."""
        if warp.core is not None and warp.core.read(warp, self, addresses, width, event, fence):
            return
        place, rows = self.check_read(warp, addresses, width, line, fence)
        self._note_read(warp, place, rows, width, event)

    def check_read(
        self, warp: Warp, addresses: Values, width: int, line: int, fence: bool = False
    ) -> tuple[Allocation, Rows]:
        """Refuse to read what the warp does not know.

        ``fence``: the asynchronous proxy reads, for which generic writes need a fence.
        """
        place, rows = self.locate(addresses, width, line)
        writers = place.shadow(place.writes, width)[rows]
        known = warp.knowledge.knows(warp.index, writers)
        if not all_true(known):
            self.conflict(warp, place, rows, width, writers, known, line, "read", "written")
        elif fence and not all_true(fenced := warp.knowledge.is_fenced(warp.index, writers)):
            number = int(writers[~fenced][0])
            events = warp.block.gpu.events
            where = warp.block.gpu.place_of(int(events.lines[number]))
            what = f"reads what {events.who(number)} wrote ({where})"
            message = f"{what}, which needs a fence between the proxies"
            warp.block.gpu.fault("error", "missing fence", line, message, warp)
        return place, rows

    def _read(
        self,
        warp: Warp,
        place: Allocation,
        rows: Rows,
        width: int,
        event: int,
        line: int,
        atomic: bool,
    ) -> Any:
        """Note a load. Return the bytes whose value is undefined, or None."""
        writers = place.shadow(place.writes, width)[rows]
        undefined = None
        if writers.any():
            known = warp.knowledge.knows(warp.index, writers)
            if atomic:
                known |= warp.block.gpu.events.atomic[writers]
            if not all_true(known):
                if not self.is_deferred:
                    self.conflict(warp, place, rows, width, writers, known, line, "read", "written")
                else:
                    warp.cause = self.describe(warp, place, rows, width, writers, known, line)
                    undefined = np.repeat(~known, place.unit, 1)
        self._note_read(warp, place, rows, width, event)
        return undefined

    is_deferred = False  # what is undefined counts where it is used, and not where it is loaded

    def _note_read(self, warp: Warp, place: Allocation, rows: Rows, width: int, event: int) -> None:
        reads = place.shadow(place.reads, width)
        before = reads[rows]
        if before.any():
            known = warp.knowledge.knows(warp.index, before)
            if not all_true(known):
                if place.others is None:
                    place.others = zeros(len(place.reads), np.int32)
                    place.changed()
                others = place.shadow(place.others, width)
                kept = others[rows]
                replaced = ~known & warp.knowledge.knows(warp.index, kept)
                if replaced.any():
                    others[rows] = np.where(replaced, before, kept)
        reads[rows] = event

    def write(self, warp: Warp, addresses: Values, width: int, event: int, line: int) -> None:
        """An asynchronous operation writes at any time until it has been waited for."""
        place, rows = self.locate(addresses, width, line)
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
        knowledge, events = warp.knowledge, warp.block.gpu.events
        writers = place.shadow(place.writes, width)[rows]
        if writers.any():
            known = knowledge.knows(warp.index, writers) | (writers == UNWRITTEN)
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
            known = warp.knowledge.knows(warp.index, readers)
            if atomic:
                known |= warp.block.gpu.events.atomic[readers]
            if not all_true(known):
                self.conflict(warp, place, rows, width, readers, known, line, "overwritten", "read")
            place.shadow(array, width)[rows] = GIVEN

    def _check_barriers(
        self, warp: Warp, place: Allocation, offsets: Values, width: int, line: int
    ) -> None:
        for address, barrier in place.barriers.items():
            if ((offsets <= address + 7) & (offsets + width > address)).any():
                message = f"overwrites the mbarrier of {warp.block.gpu.place_of(barrier.line)}"
                warp.block.gpu.fault("error", "overwritten mbarrier", line, message, warp)

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
    ) -> Any:
        """Return ``known``, and what is overwritten by the value that it has, or nearly that."""
        events, block = warp.block.gpu.events, warp.block.number
        held = place.data.reshape(-1, width)[rows]
        same = (held == values).reshape(*known.shape, -1).all(-1)
        foreign = ~known & (events.blocks[writers] != block)
        if (foreign & same).any():
            number = int(writers[foreign & same][0])
            other = warp.block.gpu.place_of(int(events.lines[number]))
            message = (
                f"two programs write {place.where(int(rows.flat[0]) * width)} without order, and "
                f"both the same value (the other one at {other})"
            )
            warp.block.gpu.fault("warning", "race between programs", line, message, warp)
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
        where = place.where(int(rows.reshape(-1)[row]) * width + column * place.unit)
        events = warp.block.gpu.events
        if number == UNWRITTEN:
            return Cause("uninitialised memory", f"{where} was not written before", line)
        is_mine = events.blocks[number] == warp.block.number
        name = "race" if is_mine else "race between programs"
        who = events.who(number) if is_mine else f"{events.who(number)} of another program"
        by = warp.block.gpu.place_of(int(events.lines[number]))
        message = f"{where} is written by {who} ({by}), not waited for"
        return Cause(name, message, line, bool(is_mine) and not events.atomic[number])

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
        here = f"{warp.name} "
        here += "reads" if what == "read" else "overwrites"
        where = place.where(place_of)
        gpu = warp.block.gpu
        if number == UNWRITTEN:
            gpu.fault(
                "error", "uninitialised memory", line, f"{where} was not written before", warp
            )
            return
        events = gpu.events
        is_mine = events.blocks[number] == warp.block.number
        name = "race" if is_mine else "race between programs"
        who = events.who(number) if is_mine else f"{events.who(number)} of another program"
        message = (
            f"{here} {where}, which {who} {'writes' if other == 'written' else 'reads'} "
            f"({gpu.place_of(int(events.lines[number]))}), without waiting for it"
        )
        # The value that was read may be one that nobody uses: Triton has copies in several warps.
        is_weak = self.is_deferred and other == "read" and is_mine
        gpu.fault("warning" if is_weak else "error", name, line, message, warp)


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
