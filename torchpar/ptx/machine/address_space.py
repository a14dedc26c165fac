# SPDX-License-Identifier: MIT
"""Address spaces: which allocation has an address, and faults of accesses that have none."""

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator

import numpy as np

from torchpar.ptx.machine.allocation import Allocation
from torchpar.ptx.machine.counts import Counts
from torchpar.ptx.machine.parse import PtxError
from torchpar.ptx.machine.protocols import SpaceView, Warp
from torchpar.ptx.machine.registers import Values, all_true

Rows = Values  # positions in an allocation, in units of an access


class AddressSpace:
    """Allocations at their addresses."""

    def __init__(self, name: str):
        self.name = name
        self.allocations: list[Allocation] = []  # in the order of their addresses
        self.last: Allocation | None = None
        self.find: Callable[[int], Allocation | None] | None = (
            None  # of an address in no allocation: another allocation, or None
        )
        self.counts: Counts | None = None  # of the launch
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
            raise PtxError(line, f"an access to {self.outside(first, width)}", "out of bounds")
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
        wrapped = self._wrapped(address, width)
        near = min(
            self.allocations,
            key=lambda one: max(one.start - address, address - (one.base + one.size)),
            default=None,
        )
        text = f"address {address:#x}, which is outside of each allocation of {self.name}"
        if near is None:
            return text
        if near.index is not None:
            place = f"{near.where(address - near.base)}, which is outside of {near.name}"
            return place if wrapped is None else f"{place}; {wrapped}"
        if address < near.start:
            return f"{text}: {near.start - address} bytes before {near.name}"
        return f"{text}: {address + width - near.base - near.size} bytes after {near.name}"

    def _wrapped(self, address: int, width: int) -> str | None:
        """Name the element that was meant where an offset of 32 bits has overflowed.

        Such an offset is too small by 2**32, and at least -2**31. Only a tensor of more than 2**31
        elements has the element that was meant.
        """
        for one in self.allocations:
            meant = address + one.itemsize * 2**32
            is_negative = one.start - one.itemsize * 2**31 <= address < one.start
            if one.index is not None and is_negative and meant + width <= one.end:
                return (
                    f"{one.where(meant - one.base)} is 2**32 elements further, as if an offset of "
                    "32 bits had overflowed; compute it in int64"
                )
        return None

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

    def peek(self, addresses: Values, width: int, line: int) -> Values:
        place, rows = self.locate(addresses, width, line)
        return place.data.reshape(-1, width)[rows]

    def poke(self, addresses: Values, values: Values, line: int) -> None:
        place, rows = self.locate(addresses, values.shape[1], line)
        place.data.reshape(-1, values.shape[1])[rows] = values
