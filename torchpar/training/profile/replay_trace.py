# SPDX-License-Identifier: MIT
"""Recordings of a few training steps on all ranks: a Chrome trace with sentences, for the player.

It imports no torch, so that programs without PyTorch make one, too.
"""

import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from torchpar.errors import writing
from torchpar.training.profile import replay_page
from torchpar.training.profile.record import RankRecord, Step

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
COMPUTING = ("data", "forward", "loss", "backward", "optimizer")
BY = ", by the fastest steps with it and without it"
COST = 0.05  # the share of a step above which the page says that recording slows it down


class Box(NamedTuple):
    """What a rank does for a while.

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
    """What was recorded on one rank.

    Attributes:
        cost: how much longer recording made a step, as a share of it.
        clock_error: by how much its clock may be off rank 0's, in seconds.
    """

    rank: int
    machine: Mapping[str, str]
    place: Mapping[str, int]
    layers: Sequence[str]
    steps: list[RecordedStep]
    explained: Mapping[Key, Explained]
    cost: float = 0.0
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


def from_records(records: Sequence[RankRecord], steps: int = 3) -> list[RankSteps]:
    """Return the last steps of what `Phases` recorded on one machine: a box for each phase.

    A collective takes the rank's time until it ends, so it is a message and the wait for it.
    """
    ranks = tuple(range(len(records)))

    def converted(step: Step) -> RecordedStep:
        messages = [
            Message(c.operation, c.dimension, ranks, i, c.bytes, c.start, c.start + c.seconds, "")
            for i, c in enumerate(step.calls)
        ]
        boxes = [Box(span.name, *span) for span in step.spans if span.name != "collectives"]
        boxes += [
            Box("wait", "", message.start, message.end or message.start, message=i)
            for i, message in enumerate(messages)
        ]
        return RecordedStep(min(b.start for b in boxes), max(b.end for b in boxes), boxes, messages)

    return [
        RankSteps(one.rank, one.machine, one.place, (), [*map(converted, one.steps[-steps:])], {})
        for one in records
    ]


def write(page: Path, *found: Mapping[str, Any]) -> Path:
    """Write the page that plays one recording, or two side by side, and return its path.

    Beside it each recording is written: as ``.json``, or of two as ``-1.json`` and ``-2.json``.
    """
    with writing(page, "--replay"):
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(replay_page.page(found), "utf-8")
        for i, one in enumerate(found, 1):
            number = f"-{i}" if len(found) > 1 else ""
            path = page.with_name(f"{page.stem}{number}.json")
            path.write_text(json.dumps(one, separators=(",", ":")), "utf-8")
    return page


def recording(ranks: Sequence[RankSteps], title: str = "") -> dict[str, Any]:
    """Return the recording of all ranks: a Chrome trace, whose "otherData" is for the player.

    Args:
        ranks: with at least one step each.
        title: by default the name of the program.
    """
    program = Path(sys.argv[0]).name
    count = min(len(one.steps) for one in ranks)
    steps = [[one.steps[i - count] for one in ranks] for i in range(count)]
    limits = [(min(s.start for s in step), max(s.end for s in step)) for step in steps]
    typical = median(end - start for start, end in limits)
    first = min(range(count), key=lambda i: abs(limits[i][1] - limits[i][0] - typical))
    zero = limits[0][0]
    events: list[dict[str, Any]] = []
    split = {name for one in ranks for name, n in one.place.items() if n}  # over several ranks
    for one in ranks:
        events += _lane(one, split if len(split) > 1 else set())
    waits = []
    for i, step in enumerate(steps):
        found = _Step(ranks, step, zero)
        events += found.events()
        if i == first:
            waits = found.waits
    shown = _Totals(ranks, steps[first], limits[first], waits)
    order = [first, *(i for i in range(count) if i != first)]
    return {
        "traceEvents": events,
        "otherData": {
            "replay": 1,
            "title": title or program,
            "command": shlex.join([program, *sys.argv[1:]]),
            "about": _about(ranks),
            "kinds": {kind: {"name": n, "color": color} for kind, (n, color) in KINDS.items()},
            "memory": MEMORY,
            "steps": [[_us(limits[i][0] - zero), _us(limits[i][1] - zero)] for i in order],
            "tables": shown.tables(),
            "remarks": shown.remarks(),
            "unit": "ms",
        },
    }


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 1)


def _lane(one: RankSteps, split: set[str]) -> list[dict[str, Any]]:
    place = ", ".join(f"{name} {n}" for name, n in one.place.items() if name in split)
    layers = f"{one.layers[0]} to {one.layers[-1]}" if len(one.layers) > 1 else "".join(one.layers)
    text = "; ".join(filter(None, [place, layers]))
    return [
        _meta("process_name", one.rank, name=f"rank {one.rank}", text=text),
        _meta("thread_name", one.rank, 0, name="computes"),
        _meta("thread_name", one.rank, 1, name="messages"),
    ]


def _meta(kind: str, pid: int, tid: int = 0, **args: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


class Wait(NamedTuple):
    """A wait of a rank for a message.

    Attributes:
        late: the rank that began the message last, None if this rank did.
        ready: when all ranks had begun it; from then on the message travels.
    """

    rank: int
    start: float
    end: float
    message: Message
    late: int | None
    ready: float


class _Step:
    """A step of all ranks: whose messages belong together, and who waits for whom."""

    def __init__(self, ranks: Sequence[RankSteps], steps: Sequence[RecordedStep], zero: float):
        self._ranks, self._steps, self._zero = ranks, steps, zero
        self._together: dict[object, dict[int, Message]] = defaultdict(dict)
        for one, step in zip(ranks, steps, strict=True):
            for message in step.messages:
                self._together[_id(message)][one.rank] = message
        self.waits: list[Wait] = []

    def events(self) -> list[dict[str, Any]]:
        found = []
        for one, step in zip(self._ranks, self._steps, strict=True):
            found += [self._box(one, step, box) for box in step.boxes]
            found += [e for message in step.messages for e in self._message(one.rank, message)]
            for (t, memory), after in pairwise([*step.memory, (step.end, {})]):
                if memory and memory != after[1]:
                    found.append(
                        {
                            "ph": "C",
                            "name": "memory",
                            "pid": one.rank,
                            "ts": _us(t - self._zero),
                            "args": memory,
                        }
                    )
        return found

    def _event(
        self, cat: str, name: str, rank: int, tid: int, start: float, end: float, **args: object
    ) -> dict[str, Any]:
        kept = {key: value for key, value in args.items() if value not in ("", None)}
        return {
            "ph": "X",
            "cat": cat,
            "name": name,
            "pid": rank,
            "tid": tid,
            "ts": _us(start - self._zero),
            "dur": round(_us(end - self._zero) - _us(start - self._zero), 1),
            "args": kept,
        }

    def _box(self, one: RankSteps, step: RecordedStep, box: Box) -> dict[str, Any]:
        line, text, name, identity = "", "", box.name, None
        if box.key is not None and box.key in one.explained:
            text, line = one.explained[box.key][:2]
        if box.kind == "backward" and box.key is not None and not text:
            text, line = self._of_backward(one, box)
        if box.kind == "loss":
            text = text or "The loss of the outputs, and what else lies before the backward pass."
        if box.kind == "wait":
            name = "waits"
            if box.message is not None:
                message = step.messages[box.message]
                text, identity = self._why(one, box, message), str(_id(message))
                name = f"waits: {message.operation}"
        return self._event(
            box.kind, name, one.rank, 0, box.start, box.end, text=text, line=line, id=identity
        )

    def _of_backward(self, one: RankSteps, box: Box) -> tuple[str, str]:
        assert box.key is not None
        _, layer, number = box.key
        forward = one.explained.get(("forward", layer, number))
        begun = one.explained.get(("backward begins", None, number)) or one.explained.get(
            ("backward begins", None, 0)
        )
        shapes = forward.text.partition("On this rank:")[2] if forward else ""
        text = f"The gradients of {box.name}"
        if "·W" in (forward.text if forward else ""):
            text += ": dL/dx = dL/dz·W, dL/dW = (dL/dz)ᵀ·x, dL/db = Σ dL/dz over the samples"
        text += f". On this rank:{shapes}" if shapes else "."
        return text, begun.line if begun else ""

    def _why(self, one: RankSteps, box: Box, message: Message) -> str:
        """A sentence on why a rank waits; the wait is kept for the totals."""
        theirs = self._together[_id(message)]
        others = {rank: m.start for rank, m in theirs.items() if rank != one.rank}
        late = max(others, key=lambda rank: others[rank]) if others else None
        ready = min(max(box.start, others[late] if late is not None else box.start), box.end)
        if late is not None and others[late] <= box.start:
            late = None
        self.waits.append(Wait(one.rank, box.start, box.end, message, late, ready))
        what = self._named(message)
        travels = f"{1e3 * (box.end - ready):.3f} ms"
        if late is None:
            return f"All of its ranks have begun this {message.operation} ({what}): {travels}."
        begins = {"send": "begins to receive it", "recv": "begins to send it"}.get(
            message.operation, f"begins this {message.operation}"
        )
        return (
            f"Rank {one.rank} waits for rank {late}, which {begins} ({what}) "
            f"{1e3 * (ready - box.start):.3f} ms later: it is still in "
            f"{self._doing(late, box.start)}. Then the message travels for {travels}."
        )

    def _doing(self, rank: int, when: float) -> str:
        (step,) = [s for o, s in zip(self._ranks, self._steps, strict=True) if o.rank == rank]
        over = [b for b in step.boxes if b.start <= when < b.end]
        if not over:
            return "its Python code between two layers"
        inner = max(over, key=lambda b: b.start)
        if inner.kind == "wait":
            return "a wait of its own"
        return f"{KINDS[inner.kind][0]} of {inner.name}"

    def _named(self, message: Message) -> str:
        """The tensor's name; of a receive, as its sender calls it."""
        names = [m.about for m in self._together[_id(message)].values() if m.about]
        return message.about or next(iter(names), "") or f"{message.bytes:,} bytes"

    def _message(self, rank: int, message: Message) -> list[dict[str, Any]]:
        end = message.end if message.end is not None else message.start
        role = message.operation if message.operation in ("send", "recv") else "all"
        ranks = message.ranks
        who = (
            f"rank {ranks[0]} to rank {ranks[1]}"
            if role != "all"
            else f"ranks {', '.join(map(str, ranks))}"
        )
        text = f"{message.operation} of {message.bytes:,} bytes, {who}: {self._named(message)}."
        identity = str(_id(message))
        event = self._event(
            "message",
            message.operation,
            rank,
            1,
            message.start,
            end,
            text=text,
            line=message.line,
            id=identity,
            role=role,
            bytes=message.bytes,
            tensor=self._named(message),
            operation=message.operation,
        )
        if role == "all":
            return [event]
        ts = _us((message.start if role == "send" else end) - self._zero)
        flow = {
            "ph": "s" if role == "send" else "f",
            "cat": "message",
            "name": "message",
            "id": f"{identity} {_us(self._steps[0].start - self._zero)}",
            "pid": rank,
            "tid": 1,
            "ts": ts,
        }
        return [event, flow | ({"bp": "e"} if role == "recv" else {})]


def _id(message: Message) -> str:
    operation = "p2p" if message.operation in ("send", "recv") else message.operation
    return f"{operation} {'-'.join(map(str, message.ranks))} {message.number}"


class _Totals:
    """Tables and sentences on one step."""

    def __init__(
        self,
        ranks: Sequence[RankSteps],
        steps: Sequence[RecordedStep],
        limits: tuple[float, float],
        waits: Sequence[Wait],
    ):
        self._ranks, self._steps, self._waits = ranks, steps, waits
        self._seconds = limits[1] - limits[0]
        self._by_kind = [_in_turn(step, limits) for step in steps]

    def tables(self) -> list[dict[str, Any]]:
        kinds = [kind for kind in KINDS if kind != "message"]
        rows = [
            [
                str(one.rank),
                *(f"{1e3 * times[k]:.3f}" for k in kinds),
                f"{1e3 * times['']:.3f}",
                f"{1e3 * self._seconds:.3f}",
            ]
            for one, times in zip(self._ranks, self._by_kind, strict=True)
        ]
        columns = ["rank", *(KINDS[k][0] for k in kinds), "other code", "sum"]
        tables = [
            {
                "title": "Milliseconds of the step of median duration",
                "columns": columns,
                "rows": rows,
            }
        ]
        messages = self._messages()
        if messages:
            columns = [
                "rank",
                "dimension",
                "operation",
                "count",
                "bytes",
                "ms",
                "while it computes",
            ]
            tables.append({"title": "Messages of this step", "columns": columns, "rows": messages})
        memory = self._memory()
        if memory:
            columns = ["rank", *MEMORY, "most at a time"]
            tables.append(
                {
                    "title": "Bytes, the most of each kind in a step",
                    "columns": columns,
                    "rows": memory,
                }
            )
        return tables

    def _messages(self) -> list[list[str]]:
        rows = []
        for one, step in zip(self._ranks, self._steps, strict=True):
            kinds = dict.fromkeys((m.dimension, m.operation) for m in step.messages)
            for kind in kinds:
                found = [m for m in step.messages if (m.dimension, m.operation) == kind]
                ms = 1e3 * sum((m.end or m.start) - m.start for m in found)
                hidden = self._hidden(step, found)
                rows.append(
                    [
                        str(one.rank),
                        kind[0] or "several",
                        kind[1],
                        str(len(found)),
                        f"{sum(m.bytes for m in found):,}",
                        f"{ms:.3f}",
                        f"{hidden:.0%}",
                    ]
                )
        return rows

    def _hidden(self, step: RecordedStep, messages: Sequence[Message]) -> float:
        """The share of the messages' time in which the rank does not wait."""
        total = sum((m.end or m.start) - m.start for m in messages)
        waiting = sum(
            max(0.0, min(box.end, m.end or m.start) - max(box.start, m.start))
            for m in messages
            for box in step.boxes
            if box.kind == "wait"
        )
        return max(0.0, 1 - waiting / total) if total else 1.0

    def _memory(self) -> list[list[str]]:
        rows = []
        for one, step in zip(self._ranks, self._steps, strict=True):
            if step.memory:
                most = [max(m[name] for _, m in step.memory) for name in MEMORY]
                at_once = max(sum(m.values()) for _, m in step.memory)
                rows.append([str(one.rank), *(f"{n:,}" for n in most), f"{at_once:,}"])
        return rows

    def remarks(self) -> list[str]:
        ms = 1e3 * self._seconds
        found = [f"The step of median duration takes {ms:.3f} ms. {self._cost()}"]
        found += self._bubble()
        if self._waits:
            found.append(self._bound())
        else:
            longest = max(COMPUTING, key=lambda k: max(times[k] for times in self._by_kind))
            share = max(times[longest] for times in self._by_kind) / self._seconds
            found.append(f"No rank waits. The {KINDS[longest][0]} takes most, {share:.0%}.")
        return found

    def _cost(self) -> str:
        cost = max(one.cost for one in self._ranks)
        if cost <= COST:
            known = any(one.cost for one in self._ranks)
            return f"Recording made it {max(cost, 0):.1%} longer{BY}." if known else ""
        return (
            f"Recording made it {cost:.0%} longer, more than {COST:.0%}{BY}: shares of the time "
            "are less sure than in longer steps."
        )

    def _bubble(self) -> list[str]:
        stages = max((one.place.get("pp", 0) for one in self._ranks), default=0) + 1
        if stages == 1:
            return []
        shares = [
            f"rank {one.rank} for {(times['wait'] + times['']) / self._seconds:.0%} "
            f"({times['wait'] / self._seconds:.0%} waiting)"
            for one, times in zip(self._ranks, self._by_kind, strict=True)
        ]
        forward = [
            sum(1 for b in step.boxes if b.kind == "forward" and b.key and b.key[1] == first)
            for step in self._steps
            for first in [
                next((b.key[1] for b in step.boxes if b.kind == "forward" and b.key), None)
            ]
        ]
        m = max(forward)
        ideal = (stages - 1) / (m + stages - 1)
        kept = [
            f"rank {one.rank} up to {max(mem['activations'] for _, mem in step.memory):,} bytes"
            for one, step in zip(self._ranks, self._steps, strict=True)
            if step.memory
        ]
        sentences = [
            "The bubble is the time in which a rank computes nothing. It takes of the step: "
            f"{', '.join(shares)}; the rest is Python between the passes. With {stages} stages of "
            f"equal work, {m} micro-batches, and messages that take no time, it would be "
            f"(p − 1)/(m + p − 1) = {ideal:.0%}."
        ]
        if kept:
            sentences.append(
                f"Activations are kept from a forward pass to its backward pass: {', '.join(kept)}."
            )
        return sentences

    def _bound(self) -> str:
        of: dict[str, list[Wait]] = defaultdict(list)
        for wait in self._waits:
            of[_id(wait.message)].append(wait)
        total = {key: max(w.end - w.start for w in waits) for key, waits in of.items()}
        key = max(total, key=lambda k: total[k])
        worst = max(of[key], key=lambda w: w.end - w.start)
        names = [
            m.about for step in self._steps for m in step.messages if _id(m) == key and m.about
        ]
        what = names[0] if names else f"{worst.message.bytes:,} bytes"
        waiting = sum(times["wait"] for times in self._by_kind) / len(self._by_kind)
        late = worst.ready - worst.start
        reason = (
            f"{late / (worst.end - worst.start):.0%} of it because rank {worst.late} begins later"
            if worst.late is not None
            else "all of it while the message travels"
        )
        return (
            f"The ranks wait for {waiting / self._seconds:.0%} of the step on average. The longest "
            f"wait is rank {worst.rank}'s, {1e3 * total[key]:.3f} ms "
            f"({total[key] / self._seconds:.0%}), for the {worst.message.operation} of {what}: "
            f"{reason}."
        )


def _in_turn(step: RecordedStep, limits: tuple[float, float]) -> dict[str, float]:
    """Seconds of each kind, of the innermost box at each time; "" is for the time outside boxes."""
    totals = dict.fromkeys([*KINDS, ""], 0.0)
    cuts = sorted(
        {*limits, *(t for b in step.boxes for t in (b.start, b.end) if limits[0] <= t <= limits[1])}
    )
    for start, end in pairwise(cuts):
        over = [b for b in step.boxes if b.start <= start and end <= b.end]
        kind = max(over, key=lambda b: (b.start, -b.end)).kind if over else ""
        totals[kind] += end - start
    return totals


def _about(ranks: Sequence[RankSteps]) -> list[str]:
    machine = ranks[0].machine
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "numpy", "Python") if name in machine
    )
    lines = [machine.get("processor", ""), machine.get("GPU", ""), versions]
    hosts = {one.machine.get("host") for one in ranks}
    if len(hosts) == 1:
        lines.append("All ranks run on one machine and read its one clock.")
    else:
        error = max(one.clock_error for one in ranks)
        lines.append(
            f"The ranks run on {len(hosts)} machines. Their clocks were compared by messages there "
            f"and back, of which the fastest counts; they may differ by {1e6 * error:.0f} µs."
        )
    if any(step.memory for one in ranks for step in one.steps):
        lines.append("Bytes were counted in another step of the same run, at the same places.")
    return [line for line in lines if line]
