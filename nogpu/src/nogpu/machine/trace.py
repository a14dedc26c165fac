# SPDX-License-Identifier: MIT
"""A record of the first programs of a launch, for pictures: what they access and do, and when.

Time is the number of instructions that a warp has executed, and of those for which it has waited
at barriers, or for what other warps do. An asynchronous operation lasts from its issue until a warp
has waited for it; on a GPU it may be complete earlier.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nogpu.machine.registers import Values

if TYPE_CHECKING:
    from nogpu.machine.block import Warp
    from nogpu.machine.operation import Operation

LONGEST = 100_000  # instructions of a warp that are recorded
# Instructions of the programs before, above which another program is not recorded: Python executes
# what is recorded.
MOST_BEFORE = 300_000
AT_BARRIER = "a wait at a barrier"
FOR_OTHERS = "a wait for others"


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
    """A bar of the timeline: when an asynchronous operation, or a wait at a barrier, took place.

    Attributes:
        line: of the PTX, that of the operation; 0 of a wait.
        bytes: that an operation copies.
        last: of a barrier the warp that has arrived last, by its index, and -1 of others.
        warps: that meet at the barrier.
    """

    warp: int
    what: str
    begin: int
    end: int | None = None
    line: int = 0
    bytes: int = 0
    last: int = -1
    warps: int = 0


class Moment(NamedTuple):
    """The place and the time of an access that a fault names.

    Attributes:
        program: the number of the program in the launch.
        warp: its index in the program's cluster.
        line: of the PTX.
        time: of the warp.
        span: of the asynchronous operation that accesses memory; None: the warp does.
    """

    program: int
    warp: int
    line: int
    time: int
    span: Span | None = None


@dataclass
class Trace:
    """The record of a program.

    Attributes:
        requests: by the instruction's position and the warp.
        executed: by warp the times and the positions of its instructions.
        spans: of operations and waits, in the order of their begins.
        others: the records of the programs that begin after this one.
        program: the position of the program in the grid; None: it has not begun.
        number: of the program in the launch.
        multiprocessors: of the GPU.
        events: of all of these programs, the moment of each access by the number of its event.
        faults: by their messages, the moments of the accesses that they name, this program's first.
    """

    requests: dict[tuple[int, int], list[Request]] = field(default_factory=dict)
    executed: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    others: list[Trace] = field(default_factory=list)
    program: tuple[int, ...] | None = None
    number: int = 0
    multiprocessors: int = 0
    events: dict[int, Moment] = field(default_factory=dict, repr=False)
    faults: dict[str, tuple[Moment, ...]] = field(default_factory=dict, repr=False)
    _begun: dict[int, Span] = field(default_factory=dict, repr=False)  # by events
    _released: dict[int, int] = field(default_factory=dict, repr=False)  # times by addresses
    _delays: dict[int, int] = field(default_factory=dict, repr=False)  # of warps, by `delay`

    @classmethod
    def of_programs(cls, count: int) -> Trace:
        """Return the record of the first program, with those of others: of ``count`` together."""
        first = cls()
        first.others = [
            cls(number=number, events=first.events, _released=first._released)
            for number in range(1, count)
        ]
        return first

    def of(self, number: int) -> Trace | None:
        """Return the record of a program that begins, by its number; None: it is not recorded."""
        if number == 0:
            return self
        if number > len(self.others):
            return None
        before = (self, *self.others[: number - 1])
        count = sum(len(one) for trace in before for one in trace.executed.values())
        return self.others[number - 1] if count < MOST_BEFORE else None

    def now(self, warp: Warp) -> int:
        """Return the time of a warp."""
        return warp.count + warp.waited + self._delays.get(warp.index, 0)

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
            times.append((self.now(warp), pc))

    def event(self, warp: Warp, number: int, line: int) -> None:
        """Note an access of a warp by the number of its event."""
        self.events[number] = Moment(self.number, warp.index, line, self.now(warp))

    def operate(self, warp: Warp, operation: Operation) -> None:
        """Begin the bar of an operation, or end it if the operation has one."""
        span = self._begun.get(operation.read)
        if span is None:
            span = Span(warp.index, operation.what, self.now(warp), line=operation.line)
            self._begun[operation.read] = span
            self.spans.append(span)
            self.follow(warp, operation, (operation.read, operation.written), operation.line)
        elif span.end is None:
            self.delay(warp, span.begin + 1)
            span.end = self.now(warp)

    def follow(
        self, warp: Warp, operation: Operation, events: Iterable[int], line: int, count: int = 0
    ) -> None:
        """Note accesses of an operation by their events, and the bytes that it copies."""
        span = self._begun[operation.read]
        span.bytes += count
        for number in events:
            self.events[number] = Moment(self.number, warp.index, line, self.now(warp), span)

    def meet(self, arrived: Sequence[tuple[Warp, bool]], latest: int) -> None:
        """Warps meet at a barrier.

        Args:
            arrived: the warps, and whether they wait; the one that has come last is the last one.
            latest: the time without delays at which they go on.
        """
        until = max(self.now(one) for one, _ in arrived)
        last = next(one.index for one, _ in arrived if self.now(one) == until)
        for one, waits in arrived:
            if waits:
                begin = self.now(one)
                span = Span(one.index, AT_BARRIER, begin, until, last=last, warps=len(arrived))
                self.spans.append(span)
                self._delays[one.index] = until - latest

    def delay(self, warp: Warp, until: int) -> None:
        """A warp has waited for something that was done at a time of another warp."""
        begin = self.now(warp)
        if until > begin:
            self.spans.append(Span(warp.index, FOR_OTHERS, begin, until))
            self._delays[warp.index] = self._delays.get(warp.index, 0) + until - begin

    def release(self, warp: Warp, address: int) -> None:
        """A warp has released what it knows at an address."""
        self._released[address] = max(self._released.get(address, 0), self.now(warp))

    def acquire(self, warp: Warp, address: int) -> None:
        """A warp has acquired what was released at an address."""
        self.delay(warp, self._released.get(address, 0))

    def moment(self, warp: Warp, line: int) -> Moment:
        """Return the present moment of a warp."""
        return Moment(self.number, warp.index, line, self.now(warp))

    def stop(self, message: str, waiting: Iterable[tuple[Warp, int]]) -> None:
        """Note where warps wait that nothing lets go on, by lines of the PTX."""
        self.faults[message] = tuple(self.moment(warp, line) for warp, line in waiting)

    def fault(self, message: str, here: Moment, other: int = 0) -> None:
        """Note where and when a fault was found.

        Args:
            message: of the fault.
            here: the moment of the access.
            other: the event that it conflicts with; 0: there is none.
        """
        found = (here, self.events[other]) if other in self.events else (here,)
        self.faults.setdefault(message, found)
