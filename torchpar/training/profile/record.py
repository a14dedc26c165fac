# SPDX-License-Identifier: MIT
"""Record of a rank's training steps: when each phase ran, what was sent, how much memory it took.

It imports no torch, so that programs without PyTorch fill a `RankRecord`, too.
"""

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import NamedTuple

STEPS = 100  # number of the latest steps to keep
# First steps, which are not kept: DistributedDataParallel and PyTorch's libraries set up there.
WARM_UP = 2
# Collectives that end once all ranks of their group have begun.
COLLECTIVES = ("all_reduce", "all_gather", "all_to_all", "Allreduce")


class Span(NamedTuple):
    """A phase of a step on one rank, by the clock of its machine.

    Attributes:
        start, end: in seconds.
    """

    name: str
    start: float
    end: float


class Call(NamedTuple):
    """One collective operation, or one message to or from a neighbor.

    Attributes:
        dimension: of the mesh, "" for a group that is none of its dimensions.
        operation: "all_reduce", "all_gather", "all_to_all", "send", "recv" or another of
            `torch.distributed`'s.
        bytes: of this rank's tensors; of an all-to-all those that it receives.
        start: in seconds, by the clock of the machine.
        seconds: until a collective ends; until a send or a receive is started.
    """

    dimension: str
    operation: str
    bytes: int
    start: float
    seconds: float


class Messages(NamedTuple):
    """The calls of one operation in a step: medians over the steps.

    Attributes:
        dimension, operation: as of `Call`.
        calls: their number.
        bytes, seconds: of all of them together.
    """

    dimension: str
    operation: str
    calls: float
    bytes: float
    seconds: float


@dataclass
class Step:
    """A training step on one rank."""

    spans: list[Span] = field(default_factory=list)  # inner ones lie within outer ones
    calls: list[Call] = field(default_factory=list)


@dataclass(frozen=True)
class RankRecord:
    """What a rank's steps took.

    Attributes:
        rank: its number.
        machine: what `torchpar.ops.environment.describe` returns there.
        seconds: of each phase, over all steps.
        steps: the latest steps, without the first `WARM_UP` ones.
        place: its number in each dimension of the mesh.
        memory: bytes by name, such as "weights".
    """

    rank: int
    machine: Mapping[str, str]
    seconds: Mapping[str, float]
    steps: Sequence[Step]
    place: Mapping[str, int] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)

    def messages(self) -> list[Messages]:
        """Return the messages of a step by their dimension and operation."""
        kinds = dict.fromkeys((c.dimension, c.operation) for step in self.steps for c in step.calls)
        found = []
        for kind in kinds:
            steps = [[c for c in s.calls if (c.dimension, c.operation) == kind] for s in self.steps]
            nbytes = median(sum(c.bytes for c in calls) for calls in steps)
            seconds = median(sum(c.seconds for c in calls) for calls in steps)
            found.append(Messages(*kind, median(map(len, steps)), nbytes, seconds))
        return found

    def message_rows(self) -> list[dict[str, str]]:
        """Return `messages` as a table: names and figures by column."""
        return [
            {
                "dimension": sent.dimension or "several",
                "operation": sent.operation,
                "count": f"{sent.calls:g}",
                "bytes": f"{sent.bytes:,.0f}",
                # A receiver waits for its neighbor's work more than for the message.
                "ms": "-" if sent.operation == "recv" else f"{1e3 * sent.seconds:.3f}",
            }
            for sent in self.messages()
        ]


def peak_resident_bytes() -> int:
    """Return the most memory that this process has had at a time."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@dataclass(frozen=True)
class Timeline:
    """The step of median duration.

    Attributes:
        number: among the recorded steps, from 1.
        steps: how many there are.
        seconds: from its first rank's beginning to its last rank's end.
        ranks: for each rank the spans of the step in turn, from 0 to ``seconds``. The gaps, and
            the time in which a rank waits for another, are spans "idle".
    """

    number: int
    steps: int
    seconds: float
    ranks: list[list[Span]]


def timeline(records: Sequence[RankRecord]) -> Timeline | None:
    """Return the timeline of the median step, or None if no step was recorded on all ranks.

    Ranks of one machine are compared by its clock. Where ranks run on several machines, whose
    clocks differ, each rank's step begins at 0.

    A rank waits in a pipeline while no pass runs, and in a collective until the last rank of its
    group begins this collective.
    """
    count = min(len(record.steps) for record in records)
    if not count:
        return None
    one_machine = len({record.machine["host"] for record in records}) == 1
    steps = list(zip(*(record.steps[-count:] for record in records), strict=True))

    def limits(step: Step) -> tuple[float, float]:
        return min(s.start for s in step.spans), max(s.end for s in step.spans)

    def seconds(ranks: Sequence[Step]) -> float:
        found = [limits(step) for step in ranks]
        if one_machine:
            return max(end for _, end in found) - min(start for start, _ in found)
        return max(end - start for start, end in found)

    durations = [seconds(ranks) for ranks in steps]
    number = min(range(count), key=lambda i: abs(durations[i] - median(durations)))
    chosen = steps[number]
    first = min(limits(step)[0] for step in chosen)
    zeros = [first if one_machine else limits(step)[0] for step in chosen]
    rows = [
        _in_turn(
            [*step.spans, *(_waits(rank, records, chosen) if one_machine else ())],
            zero,
            durations[number],
        )
        for rank, (step, zero) in enumerate(zip(chosen, zeros, strict=True))
    ]
    return Timeline(number + 1, count, durations[number], rows)


def _in_turn(spans: Sequence[Span], zero: float, seconds: float) -> list[Span]:
    """Cut inner spans out of outer ones, and fill the gaps; times count from ``zero``."""
    moved = [Span(s.name, s.start - zero, s.end - zero) for s in spans]
    cuts = sorted({0.0, seconds, *(t for s in moved for t in s[1:] if 0 <= t <= seconds)})
    pieces: list[Span] = []
    for start, end in pairwise(cuts):
        over = [s for s in moved if s.start <= start and end <= s.end]
        # The innermost span is the one that has begun last, and ends first.
        name = max(over, key=lambda s: (s.start, -s.end)).name if over else "idle"
        name = "idle" if name == "pipeline" else name
        if pieces and pieces[-1].name == name:
            start = pieces.pop().start
        pieces.append(Span(name, start, end))
    return pieces


def _waits(rank: int, records: Sequence[RankRecord], steps: Sequence[Step]) -> list[Span]:
    """Return the spans in which a rank waits in collectives for the last rank of its group."""

    def group(dimension: str) -> list[int]:
        def others(record: RankRecord) -> dict[str, int]:
            return {name: n for name, n in record.place.items() if name != dimension}

        place = others(records[rank])
        return [i for i, record in enumerate(records) if others(record) == place]

    def collectives(of_rank: int, dimension: str) -> list[Call]:
        calls = steps[of_rank].calls
        return [c for c in calls if c.dimension == dimension and c.operation in COLLECTIVES]

    waits = []
    for dimension in {call.dimension for call in steps[rank].calls}:
        mine = collectives(rank, dimension)
        of_group = [collectives(other, dimension) for other in group(dimension)]
        if any(len(calls) != len(mine) for calls in of_group):
            continue  # a group of another kind, such as several dimensions at once
        for i, call in enumerate(mine):
            last = max(calls[i].start for calls in of_group)
            if last > call.start:
                waits.append(Span("idle", call.start, min(last, call.start + call.seconds)))
    return waits
