# SPDX-License-Identifier: MIT
"""Memory that knows, for each byte, who wrote it and who has read it, and that reports races.

Each access of a warp or of an asynchronous operation is an event with a number. A warp knows its
own events. It learns those of other warps at a barrier, and those of asynchronous operations when
it waits for them. There are two rules for each byte:

- Who reads or writes it must know its last write.
- Who writes it must know all reads since.

So a missing barrier or wait is noticed in whatever order the warps run. Race detectors for threads
work in this way, with clocks in the place of sets (Flanagan and Freund, "FastTrack", PLDI 2009).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from torchpar.ptx.parse import PtxError

GIVEN, FOREIGN, UNWRITTEN = range(3)  # numbers of events: before the launch; of another block; none
POISON = 0xFF  # NaN in each format, and −1
UNITS = {2**n: (np.uint64(2**n - 1), np.uint64(n)) for n in range(8)}

Rows = Any  # positions in an allocation, in units of an access


def all_true(mask: Any) -> bool:
    return b"\0" not in mask.tobytes()  # for short arrays several times as fast as their method


@dataclass
class Event:
    """An access, and the line of its instruction.

    ``own``: it is the warp's own, and not asynchronous. ``generic``: not by the asynchronous proxy.
    """

    line: int
    what: str
    own: bool = True
    generic: bool = True
    number: int = -1


class Events:
    """The events of a block of threads, and what its warps know of them.

    ``seen`` has the events that each warp knows, and ``fenced`` those of them before its last proxy
    fence; by their numbers.
    """

    def __init__(self, warps: int) -> None:
        self.all = [Event(0, "the host"), Event(0, "another block"), Event(0, "nobody")]
        self.seen = np.zeros((warps, 2**12), np.bool_)
        self.seen[:, GIVEN] = True
        self.fenced = self.seen.copy()
        self.floor = 0  # what the warps themselves did before this number, all know

    def add(self, event: Event) -> Event:
        event.number = len(self.all)
        self.all.append(event)
        if event.number == self.seen.shape[1]:
            self.seen, self.fenced = (
                np.hstack([a, np.zeros_like(a)]) for a in (self.seen, self.fenced)
            )
        self.fenced[:, event.number] = not event.generic
        return event

    def share(self) -> None:
        """At a barrier, each warp learns what one of them knows."""
        self.seen[:], self.fenced[:] = self.seen.any(0), self.fenced.any(0)
        self.floor = len(self.all)


class Allocation:
    """Bytes from address ``base``, with the event that wrote each and those that read it.

    ``reads`` has an array for each warp, and one for each warp's asynchronous operations.
    """

    def __init__(self, name: str, base: int, size: int):
        self.name, self.base, self.size = name, base, size
        padded = -(-size // 128) * 128
        self.data = np.full(padded, POISON, np.uint8)
        self.writes = np.full(padded, UNWRITTEN, np.int32)
        self.reads: dict[Any, Any] = {}
        self.last_read: dict[Any, int] = {}
        self.barriers: dict[int, Any] = {}  # the mbarriers in it, by their offsets
        self.published: set[int] = set()  # the tensormaps in it, by their places
        self.acquired: dict[int, Event] = {}  # the last fence for each of these

    def end_block(self) -> bool:
        """To the next block, the events of this one are another block's. Return whether it
        wrote."""
        written = self.writes > UNWRITTEN
        self.writes[written] = FOREIGN
        for read in self.reads.values():
            read[read > UNWRITTEN] = FOREIGN
        self.last_read = dict.fromkeys(self.last_read, 2**31)
        return bool(written.any())

    def end_launch(self) -> None:
        self.writes[self.writes != UNWRITTEN] = GIVEN
        self.reads.clear()
        self.last_read.clear()


class Space:
    """An address space: its allocations, and accesses of ``width`` bytes at each of several
    addresses."""

    def __init__(self, name: str):
        self.name = name
        self.allocations: list[Allocation] = []
        self.last: Allocation | None = None

    def add(self, allocation: Allocation) -> Allocation:
        self.allocations.append(allocation)
        return allocation

    def locate(self, addresses: Any, width: int, line: int) -> tuple[Allocation, Rows]:
        """The allocation of the addresses, and their positions in it in units of ``width``."""
        if addresses.size == 0:
            return self.allocations[0], addresses
        first = int(addresses.flat[0])
        if self.last is None or not self.last.base <= first < self.last.base + self.last.size:
            self.last = next(
                (a for a in self.allocations if a.base <= first < a.base + a.size), None
            )
        if self.last is None:
            raise PtxError(line, f"address {first:#x} is outside each allocation of {self.name}")
        offsets = (addresses - self.last.base).view(np.uint64)
        rest, shift = UNITS[width]
        if not all_true((offsets & rest) == 0):
            raise PtxError(line, f"an address in {self.last.name} is not a multiple of {width}")
        if not all_true(offsets < self.last.size - width + 1):
            raise PtxError(line, f"an access that begins in {self.last.name} ends outside of it")
        return self.last, (offsets >> shift).view(np.int64)

    # Accesses of a warp, and the bytes without an access

    def load(self, warp: Any, addresses: Any, width: int, line: int) -> Any:
        """The bytes ``(len(addresses), width)`` that a warp loads."""
        self.read(warp, addresses, width, warp.event(line, "a load"))
        return self.peek(addresses, width, line)

    def store(self, warp: Any, addresses: Any, values: Any, line: int) -> None:
        event = warp.event(line, "a store")
        self.write(warp, addresses, values.shape[1], event, values)
        self.poke(addresses, values, line)
        if not all_true(self.peek(addresses, values.shape[1], line) == values):
            raise PtxError(
                line, f"threads of warp {warp.index} store different values to the same bytes"
            )

    def peek(self, addresses: Any, width: int, line: int) -> Any:
        place, rows = self.locate(addresses, width, line)
        return place.data.reshape(-1, width)[rows]

    def poke(self, addresses: Any, values: Any, line: int) -> None:
        place, rows = self.locate(addresses, values.shape[1], line)
        place.data.reshape(-1, values.shape[1])[rows] = values

    # The rules, of the accesses of a warp and of its asynchronous operations: `event`

    def read(
        self, warp: Any, addresses: Any, width: int, event: Event, fence: bool = False
    ) -> None:
        """An asynchronous operation reads at any time until it has been waited for."""
        place, rows = self.check_read(warp, addresses, width, event.line, fence)
        reader = warp.index, event.own
        if reader not in place.reads:
            place.reads[reader] = np.zeros(len(place.data), np.int32)
        place.reads[reader].reshape(-1, width)[rows] = event.number
        place.last_read[reader] = event.number

    def check_read(
        self, warp: Any, addresses: Any, width: int, line: int, fence: bool = False
    ) -> tuple[Allocation, Rows]:
        """``fence``: the bytes are read by the asynchronous proxy, for which generic writes need a
        fence."""
        place, rows = self.locate(addresses, width, line)
        writers = place.writes.reshape(-1, width)[rows]
        if not all_true(warp.seen[writers]):
            raise self.conflict(warp, place, rows, writers, line, "read", "written")
        if fence and not all_true(warp.fenced[writers]):
            one = warp.block.events.all[int(writers[~warp.fenced[writers]][0])]
            what = f"reads what {one.what} wrote (line {one.line})"
            raise PtxError(line, f"{what}, which needs a fence between the proxies")
        return place, rows

    def write(
        self, warp: Any, addresses: Any, width: int, event: Event, values: Any = None
    ) -> None:
        """Warps may store the same ``values`` unordered: Triton's layouts have copies in several
        warps.

        An asynchronous operation has no ``values`` yet, and writes at any time until it has been
        waited for.
        """
        place, rows = self.locate(addresses, width, event.line)
        seen, line = warp.seen, event.line
        writers = place.writes.reshape(-1, width)[rows]
        if not all_true(seen[writers]):
            allowed = writers == UNWRITTEN
            if values is not None:
                allowed |= (writers > UNWRITTEN) & (place.data.reshape(-1, width)[rows] == values)
            writers = np.where(allowed, GIVEN, writers)
            if not all_true(seen[writers]):
                raise self.conflict(warp, place, rows, writers, line, "overwritten", "written")
        for (reader, own), read in place.reads.items():
            if own and place.last_read[reader, own] < warp.block.events.floor:
                continue  # all warps know after a barrier
            readers = read.reshape(-1, width)[rows]
            if not all_true(seen[readers]):
                raise self.conflict(warp, place, rows, readers, line, "overwritten", "read")
        for address, barrier in place.barriers.items():
            if ((rows * width <= address + 7) & (rows * width + width > address)).any():
                raise PtxError(line, f"overwrites the mbarrier of line {barrier.line}")
        place.writes.reshape(-1, width)[rows] = event.number
        if values is None:
            place.data.reshape(-1, width)[rows] = POISON

    def conflict(
        self,
        warp: Any,
        place: Allocation,
        rows: Rows,
        events: Any,
        line: int,
        what: str,
        other: str,
    ) -> PtxError:
        """The error of an access that does not know one of the ``events``."""
        events = events.reshape(-1, events.shape[-1])
        row, byte = (int(i[0]) for i in np.nonzero(~warp.seen[events]))
        address = int(rows.reshape(-1)[row]) * events.shape[-1] + byte
        event = warp.block.events.all[int(events[row, byte])]
        where = f"byte {address} of {place.name}, {what} by warp {warp.index},"
        if event.what == "nobody":
            return PtxError(line, f"{where} was not written before")
        return PtxError(
            line, f"race: {where} is {other} by {event.what} (line {event.line}), not waited for"
        )
