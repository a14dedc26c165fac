# SPDX-License-Identifier: MIT
"""Accesses of captured work to memory, and those of two streams that have no order.

In a replay such work may run at the same time. Each access has the vector clock's number of its
work, as other work on streams does.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchpar.ptx.cuda.graph_memory import Line, Memory, Slot
from torchpar.ptx.cuda.streams import Streams
from torchpar.ptx.report.source import program_line


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a memory.

    Attributes:
        key: equal for equal parts.
        mark: return for each byte whether it is in the part.
    """

    memory: Memory
    key: object
    mark: Callable[[], Tensor]


def part_of(slot: Slot) -> Part:
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

    return Part(slot.memory, (slot.place, slot.dtype), mark)


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
        return "writes" if self.is_write else "reads"


class Accesses:
    """The accesses of one capture."""

    def __init__(self, streams: Streams):
        self.streams = streams
        self._of: dict[Memory, dict[object, Access]] = {}
        self._named: set[Line] = set()

    def note(self, reads: Iterable[Part], writes: Iterable[Part]) -> tuple[Access, Access] | None:
        """Note work on the current stream; return an earlier access and its own without an order.

        One line of the program has them once.
        """
        work, line = self.streams.work(), program_line()
        found = None
        for is_write, parts in ((False, reads), (True, writes)):
            for part in parts:
                access = Access(part, is_write, work, line)
                before = self._of.setdefault(part.memory, {})
                races = (one for one in before.values() if self._is_race(one, access))
                first = next(races, None)
                if first is not None and found is None and line not in self._named:
                    found = first, access
                # What comes after this stream's last access there comes after those before it.
                before[work[0], is_write, part.key] = access
        if found is not None:
            self._named.add(line)
        return found

    def _is_race(self, one: Access, other: Access) -> bool:
        if not (one.is_write or other.is_write) or self.streams.is_ordered(one.work):
            return False
        return bool((one.part.mark() & other.part.mark()).any())
