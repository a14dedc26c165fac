# SPDX-License-Identifier: MIT
"""Data races between two streams of a capture.

In a replay work without an order may run at the same time. Each access has the vector clock's
number of its work, as other work on streams does.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nogpu.cuda.graph_memory import Line, Memory, Slot
from nogpu.cuda.streams import Streams
from nogpu.record.source import program_line


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a memory.

    Attributes:
        key: equal for equal parts.
        mark: return for each byte whether it is in the part.
        is_assumed: the work may use less of the memory.
    """

    memory: Memory
    key: object
    mark: Callable[[], Tensor]
    is_assumed: bool = False


def part_of(slot: Slot, is_assumed: bool = False) -> Part:
    """Return the part that a tensor has."""

    def mark() -> Tensor:
        marks = torch.zeros(slot.memory.nbytes, dtype=torch.bool)
        offset, sizes, strides = slot.place
        # PyTorch fills no expanded tensor.
        sizes = tuple(n if step else min(n, 1) for n, step in zip(sizes, strides, strict=True))
        width = slot.dtype.itemsize
        steps = (*(step * width for step in strides), 1)
        marks.as_strided((*sizes, width), steps, offset * width).fill_(True)
        return marks

    return Part(slot.memory, (slot.place, slot.dtype, is_assumed), mark, is_assumed)


def part_at(memory: Memory, marks: Tensor) -> Part:
    """Return the part whose bytes are marked."""
    return Part(memory, marks.numpy().tobytes(), lambda: marks)


@dataclass
class Access:
    """The last access of a stream to a part of a memory.

    Attributes:
        work: the number of the stream, and that of its work.
    """

    part: Part
    is_write: bool
    work: tuple[int, int]
    line: Line

    def __str__(self) -> str:
        verb = "write" if self.is_write else "read"
        return f"may {verb}" if self.part.is_assumed else f"{verb}s"


class Accesses:
    """The accesses of one capture."""

    def __init__(self, streams: Streams):
        self.streams = streams
        self._of: dict[Memory, dict[object, Access]] = {}
        self._named: set[tuple[Line, bool]] = set()  # and whether the race is assumed

    def note(self, reads: Iterable[Part], writes: Iterable[Part]) -> tuple[Access, Access] | None:
        """Note work on the current stream; return an earlier access and its own without an order.

        Report each line of the program once; a race that is certain, also after an assumed one.
        """
        work, line = self.streams.work(), program_line()
        found: dict[bool, tuple[Access, Access]] = {}  # by whether they are assumed
        for is_write, parts in ((False, reads), (True, writes)):
            for part in parts:
                access = Access(part, is_write, work, line)
                before = self._of.setdefault(part.memory, {})
                for one in before.values():
                    is_assumed = one.part.is_assumed or part.is_assumed
                    if is_assumed not in found and self._is_race(one, access):
                        found[is_assumed] = one, access
                # The last access suffices: work ordered after it is ordered after all earlier
                # ones of the stream.
                before[work[0], is_write, part.key] = access
        for is_assumed in (False, True):
            if (line, False) in self._named or (line, is_assumed) in self._named:
                continue
            if is_assumed in found:
                self._named.add((line, is_assumed))
                return found[is_assumed]
        return None

    def _is_race(self, one: Access, other: Access) -> bool:
        if not (one.is_write or other.is_write) or self.streams.is_ordered(one.work):
            return False
        return bool((one.part.mark() & other.part.mark()).any())
