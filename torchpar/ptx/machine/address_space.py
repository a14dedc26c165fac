# SPDX-License-Identifier: MIT
"""Address spaces: which allocation has an address, and faults of accesses that have none."""

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator

import numpy as np

from torchpar.ptx.machine.allocation import POISON, Allocation
from torchpar.ptx.machine.counts import Counts
from torchpar.ptx.machine.parse import PtxError
from torchpar.ptx.machine.protocols import SpaceView, Warp
from torchpar.ptx.machine.registers import Values, all_true

Rows = Values  # positions in an allocation, in units of an access
# An allocation of an access, the rows there, and which of its addresses these are.
Part = tuple[Allocation, Rows, Rows | slice]
OUTSIDE = "out of bounds"  # the name of a fault
NOWHERE = 1, 0  # a gap that has no address


class AddressSpace:
    """Allocations at their addresses."""

    def __init__(self, name: str):
        self.name = name
        self.allocations: list[Allocation] = []  # in the order of their addresses
        self.last: Allocation | None = None
        self.find: Callable[[int], Allocation | None] | None = (
            None  # of an address in no allocation: another allocation, or None
        )
        # Of an address in no allocation: the addresses around it that are in none of `find` either.
        self.between: Callable[[int], tuple[int, int]] | None = None
        self.gap = NOWHERE  # the first and the last address of one that has no allocation
        self.counts: Counts | None = None  # of the launch
        self.view: SpaceView | None = None  # for the core in C

    def add(self, allocation: Allocation) -> Allocation:
        insort(self.allocations, allocation, key=lambda one: one.start)
        self.gap = NOWHERE
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
        if self.gap[0] <= address <= self.gap[1]:
            return None
        found = self.known(address)
        if found is None and self.find is not None:
            found = self.find(address)
        if found is None:
            self.gap = self._gap(address)
        return found

    def _gap(self, address: int) -> tuple[int, int]:
        """Return the first and the last address around one in no allocation that are in none."""
        after = bisect_right(self.allocations, address, key=lambda one: one.start)
        first = self.allocations[after - 1].end if after else 0
        last = self.allocations[after].start - 1 if after < len(self.allocations) else 2**64 - 1
        if self.between is None:
            return first, last
        others = self.between(address)
        return max(first, others[0]), min(last, others[1])

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
            raise PtxError(line, f"an access to {self.outside(first, width)}", OUTSIDE)
        if width < last.unit:
            last.refine(width)
        offsets = addresses - last.base
        fits = (offsets >= last.start - last.base) & (offsets <= last.size - width)
        if not all_true(fits):
            wrong = int(addresses[~fits].flat[0])
            raise PtxError(line, f"an access to {self._strayed(wrong, width, last)}", OUTSIDE)
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

    def _strayed(self, address: int, width: int, expected: Allocation) -> str:
        """Say where an address lies that is not as a whole in the allocation of the others."""
        place = self.at(address)
        if place is None:
            return self.outside(address, width)
        if address + width > place.end:
            return f"{width} bytes that begin in {place.name} and end outside of it"
        return f"{place.where(address - place.base)}, expected addresses in {expected.name}"

    def pieces(
        self,
        warp: Warp,
        addresses: Values,
        width: int,
        line: int,
        what: str,
        lanes: Values | None = None,
    ) -> Iterator[Part]:
        """Yield the allocations of the addresses, the positions there, and the threads.

        Threads outside of all allocations, or misaligned, are faults, and left out.

        Args:
            what: the threads do, as "load".
            lanes: the threads of the addresses, by default those that execute the instruction.
        """
        lanes = warp.lanes() if lanes is None else lanes

        def tell(n: int) -> None:
            who = warp.name  # where its threads access other addresses together
            if len(lanes) in (1, addresses.size):
                thread = warp.first_thread + int(lanes[n % len(lanes)])
                who = f"thread {thread}{warp.block.suffix}"
            address = int(addresses.flat[n])
            self.tell(warp, self.at(address), address, width, line, f"{who} {what}s")

        return self.parts(addresses, width, line, tell)

    def parts(
        self,
        addresses: Values,
        width: int,
        line: int,
        tell: Callable[[int], None] = lambda n: None,
    ) -> Iterator[Part]:
        """Yield the allocations of the addresses, the positions there, and of which addresses.

        Args:
            tell: is called with the first one that is in no allocation, or misaligned. Those are
                left out.
        """
        error = None
        try:
            place, rows = self.locate(addresses, width, line)
        except PtxError as e:
            error = e
        if error is None:
            yield place, rows, slice(None)
            return
        found, wrong = self._by_place(addresses.reshape(-1), width)
        if wrong.any():
            tell(int(wrong.argmax()))
        elif len(found) < 2:
            raise error
        yield from found

    def _by_place(self, addresses: Values, width: int) -> tuple[list[Part], Values]:
        """Return the parts of addresses, and which of them are in no allocation or misaligned."""
        found: list[Part] = []
        wrong, left = np.zeros(len(addresses), np.bool_), np.arange(len(addresses))
        while len(left):
            place = self.at(int(addresses[left[0]]))
            first, last = self.gap if place is None else (place.start, place.end - 1)
            is_here = (addresses[left] >= first) & (addresses[left] <= last)
            here, left = left[is_here], left[~is_here]
            if place is None:
                wrong[here] = True
                continue
            offsets = addresses[here] - place.base
            fits = (offsets <= place.size - width) & (offsets % width == 0)
            wrong[here[~fits]] = True
            here, offsets = here[fits], offsets[fits]
            if len(here):
                if width < place.unit:
                    place.refine(width)
                place.touch(offsets, width)
                found.append((place, offsets // width, here))
        return found, wrong

    def tell(
        self, warp: Warp, place: Allocation | None, address: int, width: int, line: int, does: str
    ) -> None:
        """Report an access that is in no allocation, or misaligned.

        Args:
            place: where it begins.
            does: who does what, as "thread 3 loads".
        """
        if place is not None and (address - place.base) % width:
            message = f"an address in {place.name} is not a multiple of {width}"
            warp.block.gpu.fault("error", "misaligned access", line, message, warp)
            return
        if place is not None:
            message = f"{width} bytes that begin in {place.name} and end outside of it"
        else:
            message = self.outside(address, width)
        warp.block.gpu.fault("error", OUTSIDE, line, f"{does} {message}", warp)

    def peek(self, addresses: Values, width: int, line: int) -> Values:
        """Return the bytes ``(…, width)`` at addresses; those in no allocation are undefined."""
        found = np.full((addresses.size, width), POISON, np.uint8)
        for place, rows, at in self.parts(addresses, width, line):
            raw = place.data.reshape(-1, width)[rows]
            if isinstance(at, slice):
                return raw
            found[at] = raw
        return found.reshape(*addresses.shape, width)

    def poke(self, addresses: Values, values: Values, line: int) -> None:
        """Set the bytes at addresses, but for those in no allocation."""
        width = values.shape[-1]
        for place, rows, at in self.parts(addresses, width, line):
            place.data.reshape(-1, width)[rows] = values[at]
