# SPDX-License-Identifier: MIT
"""Steps as ranks have recorded them: what they computed, sent, waited for and kept."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

Key = tuple[str, Any, int]  # kind of a mark, what it is of, and its number in a step

# Kinds of boxes: their names, and colors that are legible on light and dark pages.
KINDS = {
    "data": ("making the batch", "#b99316"),
    "forward": ("forward pass", "#3f87c9"),
    "loss": ("loss", "#2aa198"),
    "backward": ("backward pass", "#dd7733"),
    "wait": ("waiting for a message", "#8e8b88"),
    "message": ("message", "#ad6cc2"),
    "optimizer": ("optimizer", "#46a36b"),
}
MEMORY = {
    "weights": "#3f87c9",
    "buffers": "#2aa198",
    "gradients": "#dd7733",
    "optimizer": "#46a36b",
    "activations": "#b99316",
}


class Box(NamedTuple):
    """A stretch of a rank's time, in which it does one thing.

    Attributes:
        kind: one of `KINDS`.
        name: of the layer.
        start, end: in seconds, by the clock of rank 0's machine.
        key: of its explanation.
        message: of a wait, the message's place among the step's messages.
    """

    kind: str
    name: str
    start: float
    end: float
    key: Key | None = None
    message: int | None = None


class Message(NamedTuple):
    """A message of one rank.

    Attributes:
        operation, dimension, ranks, number: which message it is, as
            `torchpar.training.profile.messages.Sent` says.
        bytes: of this rank's tensors.
        start, end: in seconds; ``end`` is None if nothing noticed it.
        about: the tensor's name.
        line: of the program.
    """

    operation: str
    dimension: str
    ranks: tuple[int, ...]
    number: int
    bytes: int
    start: float
    end: float | None
    about: str
    line: str = ""


class Explained(NamedTuple):
    """A sentence on a box, its line in the program, and the bytes on this rank at its time."""

    text: str
    line: str
    memory: Mapping[str, int]


@dataclass
class RecordedStep:
    """A step of one rank; boxes may lie within others."""

    start: float
    end: float
    boxes: list[Box]
    messages: list[Message]
    memory: list[tuple[float, Mapping[str, int]]] = field(default_factory=list)


@dataclass
class RankSteps:
    """The recorded steps of one rank, and their explanations.

    Attributes:
        recorded, plain: seconds of the steps with records and without them, in turn.
        sources: lines of the program, with their numbers, by file.
        clock_error: by how much its clock may be off rank 0's, in seconds.
    """

    rank: int
    machine: Mapping[str, str]
    place: Mapping[str, int]
    layers: Sequence[str]
    steps: list[RecordedStep]
    explained: Mapping[Key, Explained]
    recorded: Sequence[float] = ()
    plain: Sequence[float] = ()
    sources: Mapping[str, Sequence[tuple[int, str]]] = field(default_factory=dict)
    clock_error: float = 0.0

    def shift(self, seconds: float) -> None:
        """Add ``seconds`` to all times."""
        if not seconds:
            return
        for i, step in enumerate(self.steps):
            self.steps[i] = RecordedStep(
                step.start + seconds,
                step.end + seconds,
                [b._replace(start=b.start + seconds, end=b.end + seconds) for b in step.boxes],
                [
                    m._replace(start=m.start + seconds, end=m.end and m.end + seconds)
                    for m in step.messages
                ],
                [(t + seconds, memory) for t, memory in step.memory],
            )


class Wait(NamedTuple):
    """A wait of a rank for a message.

    Attributes:
        what: the message, as `named` names it.
        late: the rank that began the message last, None if this rank did.
        ready: when all ranks had begun it; from then on the message travels.
    """

    rank: int
    start: float
    end: float
    message: Message
    what: str
    late: int | None
    ready: float

    @property
    def begins(self) -> str:
        """The verb for the late rank: it begins the other end of a message between two ranks."""
        verbs = {"send": "begins to receive it", "recv": "begins to send it"}
        return verbs.get(self.message.operation, "begins it")


def identity(message: Message) -> str:
    """The same on all ranks of a message, and no other message's."""
    operation = "p2p" if message.operation in ("send", "recv") else message.operation
    return f"{operation} {'-'.join(map(str, message.ranks))} {message.number}"


def innermost(
    step: RecordedStep, limits: tuple[float, float]
) -> Iterator[tuple[Box | None, float, float]]:
    """Between two times, the innermost box, None outside of boxes, from when to when."""
    boxes = sorted(step.boxes, key=lambda b: b.start)
    ends = (t for b in boxes for t in (b.start, b.end) if limits[0] <= t <= limits[1])
    began, running = 0, list[Box]()
    for start, end in pairwise(sorted({*limits, *ends})):
        while began < len(boxes) and boxes[began].start <= start:
            running.append(boxes[began])
            began += 1
        running = [b for b in running if b.end >= end]
        # It has begun last, and ends first.
        yield max(running, key=lambda b: (b.start, -b.end), default=None), start, end
