# SPDX-License-Identifier: MIT
"""A record of the first program of a launch, for pictures: what it accesses, and when it does what.

Time is the number of instructions that a warp has executed, and of those for which it has waited at
barriers. An asynchronous operation lasts from its issue until a warp has waited for it; on a GPU it
may be complete earlier.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nogpu.machine.registers import Values

if TYPE_CHECKING:
    from nogpu.machine.block import Warp
    from nogpu.machine.operation import Operation

LONGEST = 100_000  # instructions of a warp that are recorded


class Request(NamedTuple):
    """A warp's first access by an instruction.

    Attributes:
        space: "global" or "shared".
        lanes: the threads that access it; None for a box, which one thread asks for.
        addresses: of these threads, or of the box's elements.
        width: bytes of each.
    """

    space: str
    lanes: Values | None
    addresses: Values
    width: int


@dataclass
class Span:
    """A bar of the timeline: when an asynchronous operation, or a wait at a barrier, took place."""

    warp: int
    what: str
    begin: int
    end: int | None = None


@dataclass
class Trace:
    """The record.

    Attributes:
        requests: by the instruction's position and the warp.
        executed: by warp the times and the positions of its instructions.
        spans: of operations and waits, in the order of their begins.
    """

    requests: dict[tuple[int, int], list[Request]] = field(default_factory=dict)
    executed: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    _begun: dict[int, Span] = field(default_factory=dict, repr=False)  # by events

    def access(
        self, warp: Warp, pc: int, space: str, addresses: Values, lanes: Values | None, width: int
    ) -> None:
        """Note an access, if it is the first one of the warp and the instruction."""
        found = self.requests.setdefault((pc, warp.index), [])
        if not any(one.space == space for one in found):
            kept = None if lanes is None else np.array(lanes)
            found.append(Request(space, kept, np.array(addresses), width))

    def execute(self, warp: Warp, pc: int) -> None:
        """Note an instruction."""
        times = self.executed.setdefault(warp.index, [])
        if len(times) < LONGEST:
            times.append((warp.count + warp.waited, pc))

    def operate(self, warp: Warp, operation: Operation) -> None:
        """Begin the bar of an operation, or end it if the operation has one."""
        now = warp.count + warp.waited
        span = self._begun.get(operation.read)
        if span is None:
            self._begun[operation.read] = Span(warp.index, operation.what, now)
            self.spans.append(self._begun[operation.read])
        elif span.end is None:
            span.end = now

    def wait(self, warp: Warp, until: int) -> None:
        """A warp waits at a barrier."""
        begin = warp.count + warp.waited
        if until > begin:
            self.spans.append(Span(warp.index, "a wait at a barrier", begin, until))
