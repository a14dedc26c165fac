# SPDX-License-Identifier: MIT
"""Address spaces: which allocation has an address, and faults of accesses that have none."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

from nogpu.console import plural
from nogpu.machine.allocation import POISON, Allocation
from nogpu.machine.instruction_counts import Counts
from nogpu.machine.origins import origins
from nogpu.machine.overflow import NOT_FOLLOWED, Lost, lost
from nogpu.machine.parse import SHARED_BASE, STATIC_BASE, PtxError
from nogpu.machine.registers import Values, all_true

if TYPE_CHECKING:
    from nogpu.machine.block import Warp
    from nogpu.native.warps import SpaceView

Rows = Values  # positions in an allocation, in units of an access
# An allocation of an access, the rows there, and which of its addresses these are.
Part = tuple[Allocation, Rows, Rows | slice]
# An address is near an allocation if it lies within so many times its size, or so many bytes.
NEAR_SIZES, NEAR_BYTES = 16, 4096
MOST_WRAPPED = 2**24  # bytes that an index which has wrapped is taken to lie before an array
MOST_DYNAMIC = STATIC_BASE // 2  # bytes behind the beginning of shared memory, none of a variable
OUT_OF_BOUNDS, MISALIGNED = "out of bounds", "misaligned access"
NOWHERE = 1, 0  # a gap that has no address
# All addresses: of registers of 64 bits, signed or not.
START = attrgetter("start")
LOWEST, HIGHEST = -(2**63), 2**64 - 1


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
        # Called with an allocation that is added.
        self.mark: Callable[[Allocation], None] | None = None
        self.counts: Counts | None = None  # of the launch
        self.view: SpaceView | None = None  # for the core in C

    def add(self, allocation: Allocation) -> Allocation:
        insort(self.allocations, allocation, key=START)
        if self.mark is not None:
            self.mark(allocation)
        self.gap = NOWHERE
        if self.counts is not None:
            self.counts.watch(allocation)
        if self.view is not None:
            self.view.update()
        return allocation

    def known(self, address: int) -> Allocation | None:
        """Return the allocation that has the address."""
        after = bisect_right(self.allocations, address, key=START)
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
        after = bisect_right(self.allocations, address, key=START)
        first = self.allocations[after - 1].end if after else LOWEST
        last = self.allocations[after].start - 1 if after < len(self.allocations) else HIGHEST
        if self.between is None:
            return first, last
        others = self.between(address)
        return max(first, others[0]), min(last, others[1])

    def locate(self, addresses: Values, width: int, line: int) -> tuple[Allocation, Rows]:
        """Return the allocation of all addresses, and their positions in units of ``width``.

        Raises:
            PtxError: an address outside of it, or one that is not aligned.
        """
        found = self._located(addresses, width)
        if found is None:
            raise self._refusal(addresses, width, line)
        return found

    def _located(self, addresses: Values, width: int) -> tuple[Allocation, Rows] | None:
        """Return what `locate` does, or None where it raises an error."""
        if addresses.size == 0:
            return self.allocations[0], addresses
        first = int(addresses.flat[0])
        last = self.last
        if last is None or not last.start <= first < last.end:
            self.last = last = self.at(first)
        if last is None:
            return None
        if width < last.unit:
            last.refine(width)
        offsets = addresses - last.base
        if not all_true((offsets >= last.start - last.base) & (offsets <= last.size - width)):
            return None
        rows = offsets // width
        if not all_true(rows * width == offsets):
            return None
        last.touch(offsets, width)
        return last, rows

    def _refusal(self, addresses: Values, width: int, line: int) -> PtxError:
        """Return the error of addresses that are not in one allocation, or misaligned."""
        found, wrong = self._by_place(addresses.reshape(-1), width)
        if not wrong.any():
            names = " and ".join(place.name for place, _, _ in found)
            message = f"an access to {names} at once, expected one of them"
            return PtxError(line, message, OUT_OF_BOUNDS)
        address = int(addresses.flat[int(wrong.argmax())])
        return self._error(self.at(address), address, width, line, "an access to ")

    def _error(
        self,
        place: Allocation | None,
        address: int,
        width: int,
        line: int,
        does: str,
        meant: Allocation | None = None,
        overflow: Lost = NOT_FOLLOWED,
    ) -> PtxError:
        """Return the error of an access that begins in ``place``, and is not in it or misaligned.

        Args:
            does: who does what, before the place.
            meant, overflow: as in `outside`.
        """
        name = _name_of(place, address, width)
        if place is not None and name == MISALIGNED:
            at = place.where(address - place.base)
            message = f"{does}{at}, whose address is not a multiple of {width}"
            return PtxError(line, message, name)
        where = (
            self.outside(address, width, meant, overflow)
            if place is None
            else f"{width} bytes that begin in {place.name} and end outside of it"
        )
        return PtxError(line, f"{does}{where}", name)

    def outside(
        self,
        address: int,
        width: int,
        meant: Allocation | None = None,
        overflow: Lost = NOT_FOLLOWED,
    ) -> str:
        """Say where an address lies that is in no allocation.

        Args:
            meant: the tensor whose address an offset was added to; None: it is not known.
            overflow: what the address has lost by overflows.
        """
        wrapped: Allocation | None = None
        if overflow.bytes:
            meant = meant or self.known(address + overflow.bytes)
        elif not overflow.is_known:
            tensors = self.allocations if meant is None else [meant]
            wrapped = next((one for one in tensors if _has_wrapped(one, address, width)), None)
        at = f"address {address % 2**64:#x}"
        if not self.allocations:
            return f"{at}, and {self.name} has no allocation"
        near = meant or wrapped or min(self.allocations, key=lambda one: _distance(one, address))
        if near.index is not None:
            limit = max(NEAR_SIZES * near.size, NEAR_BYTES)
            if meant is None and wrapped is None and _distance(near, address) > limit:
                is_global = self.name == "global memory"
                far = "is far from every tensor of the launch"
                beside = f"is outside of each allocation of {self.name}{_beside(near, address)}"
                return f"{at}, which {far if is_global else beside}"
            text = f"{near.where(address - near.base)}, which is outside of {near.name}"
            if overflow.bytes:
                return f"{text}; {_meant_by(near, address + overflow.bytes, width)}"
            return text if wrapped is None else f"{text}; {_perhaps_meant_by(near, address)}"
        return f"{at}, which is outside of each allocation of {self.name}{_beside(near, address)}"

    def pieces(
        self,
        warp: Warp,
        addresses: Values,
        width: int,
        line: int,
        what: str,
        lanes: Values | None = None,
    ) -> list[Part]:
        """Return the allocations of the addresses, the positions there, and the threads.

        Threads outside of all allocations, or misaligned, are faults, and left out.

        Args:
            what: the threads do, as "load".
            lanes: the threads of the addresses, by default those that execute the instruction.
        """
        found, wrong = self.split(addresses, width)
        if wrong is not None and wrong.any():
            n, lanes = int(wrong.argmax()), warp.lanes() if lanes is None else lanes
            who = warp.name  # where its threads access other addresses together
            if len(lanes) in (1, addresses.size):
                lane = int(lanes[n % len(lanes)])
                who = f"thread {warp.first_thread + lane}{warp.block.suffix}"
                if warp.block.gpu.kernel.block is not None:
                    who = warp.thread(lane)
            address = int(addresses.flat[n])
            self.tell(warp, self.at(address), address, width, line, f"{who} {what}s")
        return found

    def parts(self, addresses: Values, width: int) -> list[Part]:
        """Return the allocations of the addresses, the positions there, and of which addresses.

        Those that are in no allocation, or misaligned, are left out.
        """
        return self.split(addresses, width)[0]

    def split(self, addresses: Values, width: int) -> tuple[list[Part], Values | None]:
        """Return the parts of addresses, and which of them are in no allocation or misaligned.

        The latter is None where all addresses are in one allocation.
        """
        if (whole := self._located(addresses, width)) is not None:
            return [(*whole, slice(None))], None
        return self._by_place(addresses.reshape(-1), width)

    def _by_place(self, addresses: Values, width: int) -> tuple[list[Part], Values]:
        """Return what `split` does for addresses in several allocations, or in none."""
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
        gpu = warp.block.gpu
        name = _name_of(place, address, width)
        if gpu.is_counted_only("error", name, line):
            warp.fault("error", name, line, "")
            return
        is_of_threads = place is None and gpu.kernel.block is not None
        if is_of_threads and (reason := self._missing(warp, address, line)):
            warp.fault("error", name, line, f"{does} {reason}")
            return
        overflow = lost(warp, address) if self is gpu.space else NOT_FOLLOWED
        meant = self._meant(warp, line)
        error = self._error(place, address, width, line, f"{does} ", meant, overflow)
        warp.fault("error", error.name, line, error.reason)

    def _missing(self, warp: Warp, address: int, line: int) -> str:
        """Say what a launch of CUDA C++ has not passed: an array, or dynamic shared memory.

        Returns:
            "" if the access is wrong for another reason.
        """
        block, gpu = warp.block, warp.block.gpu
        kernel, parts = gpu.kernel, gpu.kernel.instructions[warp.pc - 1].parts
        of_numba = kernel.file.endswith(".py")  # whose arrays are several parameters
        names = set() if of_numba else origins(kernel).get(line, set())
        if names and all(gpu.parameters.get(name) == 0 for name in names):
            numbers = [n for n, name in enumerate(kernel.parameters, 1) if name in names]
            which = " or ".join(map(str, numbers))
            return f"through a null pointer: argument {which} is None or 0; pass an array"
        if 0 <= address < SHARED_BASE and "shared" not in parts and "local" not in parts:
            return (
                f"through a null pointer, at the address {address:#x}; let the pointer have an "
                "array's address first"
            )
        offset = address - block.window - SHARED_BASE
        if self is block.shared and kernel.dynamic_shared and 0 <= offset < MOST_DYNAMIC:
            what = "dynamic shared memory" if of_numba else "extern __shared__ memory"
            third = "fourth of [grid, block, stream" if of_numba else "third of [grid, block"
            return (
                f"byte {offset:,} of {what}, and the launch gives it "
                f"{plural(gpu.shared_bytes, 'byte')}; pass enough bytes as the {third}, bytes], or "
                "a smaller index"
            )
        return ""

    def _meant(self, warp: Warp, line: int) -> Allocation | None:
        """Return the tensor at which the addresses of an instruction begin, if there is one."""
        gpu = warp.block.gpu
        if self is not gpu.space:
            return None
        names = origins(gpu.kernel).get(line, ())
        found = (self.known(gpu.parameters[name]) for name in names if name in gpu.parameters)
        tensors = {place.base: place for place in found if place and place.index is not None}
        return tensors.popitem()[1] if len(tensors) == 1 else None

    def peek(self, addresses: Values, width: int) -> Values:
        """Return the bytes ``(…, width)`` at addresses; those in no allocation are undefined."""
        found = np.full((addresses.size, width), POISON, np.uint8)
        for place, rows, at in self.parts(addresses, width):
            raw = place.data.reshape(-1, width)[rows]
            if isinstance(at, slice):
                return raw
            found[at] = raw
        return found.reshape(*addresses.shape, width)

    def poke(self, addresses: Values, values: Values) -> None:
        """Set the bytes at addresses, but for those in no allocation."""
        width = values.shape[-1]
        for place, rows, at in self.parts(addresses, width):
            place.data.reshape(-1, width)[rows] = values[at]


def _beside(near: Allocation, address: int) -> str:
    """Say where an address lies that is outside of an array in shared or local memory."""
    if address < near.start:
        return f": {plural(near.start - address, 'byte')} before {near.name}"
    offset = address - near.base
    if offset >= 2**31 and (short := -offset % 2**32) <= MOST_WRAPPED:
        # An index without a sign has become smaller than 0.
        return f"; an index of 32 bits has wrapped, {plural(short, 'byte')} before {near.name}"
    after = f"{plural(offset, 'byte')} after the beginning of {near.name}"
    return f": {after}, which has {plural(near.size, 'byte')}"


def _name_of(place: Allocation | None, address: int, width: int) -> str:
    """Name the fault of an access that begins in a place, and is not in it or misaligned."""
    is_misaligned = place is not None and (address - place.base) % width
    return MISALIGNED if is_misaligned else OUT_OF_BOUNDS


def _distance(place: Allocation, address: int) -> int:
    """Return the bytes between an allocation and an address that is not in it."""
    return max(place.start - address, address - place.end)


def _meant_by(place: Allocation, address: int, width: int) -> str:
    """Say which element was meant where an offset has overflowed."""
    is_inside = place.start <= address and address + width <= place.end
    where = "" if is_inside else ", which is outside, too"
    return (
        f"an offset of 32 bits has overflowed, and {place.where(address - place.base)} was meant"
        f"{where}; compute it in int64"
    )


def _perhaps_meant_by(place: Allocation, address: int) -> str:
    """Say which element may have been meant where it is not known how the offset was computed."""
    where = place.where(address + place.itemsize * 2**32 - place.base)
    return (
        f"{where} is 2**32 elements further, as if an offset of 32 bits had overflowed; compute it "
        "in int64"
    )


def _has_wrapped(place: Allocation, address: int, width: int) -> bool:
    """Whether an offset of 32 bits may have overflowed, by which an element was meant.

    Such an offset is too small by 2**32, and at least -2**31. Only a tensor of more than 2**31
    elements has the element that was meant.
    """
    meant = address + place.itemsize * 2**32
    is_negative = place.start - place.itemsize * 2**31 <= address < place.start
    return place.index is not None and is_negative and meant + width <= place.end
