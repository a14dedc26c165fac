# SPDX-License-Identifier: MIT
"""Recordings of a few training steps on all ranks: a Chrome trace with sentences, for the player.

It imports no torch, so that programs without PyTorch make one, too.
"""

import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torchpar.errors import ConfigError, writing
from torchpar.training.profile import replay_page
from torchpar.training.profile.record import RankRecord, Step
from torchpar.training.profile.recorded_ranks import (
    KINDS,
    MEMORY,
    Box,
    Message,
    RankSteps,
    RecordedStep,
    Wait,
    identity,
    innermost,
)
from torchpar.training.profile.replay_totals import Totals


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


def check_name(page: Path, what: str) -> None:
    """Raise ConfigError unless the name is a page's, beside which a ``.json`` can lie."""
    if page.suffix != ".html":
        raise ConfigError(f"{what} is {page}, expected a name that ends with .html")


def write(page: Path, *found: Mapping[str, Any], given_by: str = "--replay") -> Path:
    """Write the page that plays one recording, or two side by side, and return its path.

    Beside it each recording is written: as ``.json``, or of two as ``-1.json`` and ``-2.json``.

    Raises:
        ConfigError: a file cannot be written; another page is to be named by ``given_by``.
    """
    with writing(page, given_by):
        page.parent.mkdir(parents=True, exist_ok=True)
        replay_page.write(page, found)
        for i, one in enumerate(found, 1):
            number = f"-{i}" if len(found) > 1 else ""
            path = page.with_name(f"{page.stem}{number}.json")
            path.write_text(json.dumps(one, separators=(",", ":")), "utf-8")
    return page


def recording(
    ranks: Sequence[RankSteps],
    title: str = "",
    remark: str = "",
    launcher: str = "torchrun --nproc_per_node={}",
) -> dict[str, Any]:
    """Return the recording of all ranks: a Chrome trace, whose "otherData" is for the player.

    Args:
        ranks: with at least one step each.
        title: by default the name of the program; the number of ranks follows.
        remark: a sentence on what is shown, which the first line of the program precedes.
        launcher: of several processes, with their number for {}.
    """
    program = Path(sys.argv[0])
    start = launcher.format(len(ranks)) if len(ranks) > 1 else "python"
    name = program.name if program.is_absolute() else str(program)
    count = min(len(one.steps) for one in ranks)
    steps = [[one.steps[i] for one in ranks] for i in range(count)]
    limits = [(min(s.start for s in step), max(s.end for s in step)) for step in steps]
    typical = median(end - start for start, end in limits)
    first = min(range(count), key=lambda i: abs(limits[i][1] - limits[i][0] - typical))
    zero = limits[0][0]
    events: list[dict[str, Any]] = []
    split = {name for one in ranks for name, n in one.place.items() if n}  # over several ranks
    for rank in ranks:
        events += _lane(rank, split if len(split) > 1 else set())
    joined = [_Step(ranks, step, zero) for step in steps]
    for one in joined:
        events += one.events()
    shown = Totals(ranks, steps[first], limits[first], joined[first].waits())
    order = [first, *(i for i in range(count) if i != first)]
    return {
        "traceEvents": events,
        "otherData": {
            "replay": 1,
            "title": f"{title or program.name}, {len(ranks)} rank{'s' * (len(ranks) > 1)}",
            "command": f"{start} {shlex.join([name, *sys.argv[1:]])}",
            "about": _about(ranks),
            "kinds": {kind: {"name": n, "color": color} for kind, (n, color) in KINDS.items()},
            "memory": MEMORY,
            "steps": [[_us(limits[i][0] - zero), _us(limits[i][1] - zero)] for i in order],
            "tables": shown.tables(),
            "remarks": [*_first_sentence(program), *([remark] if remark else []), *shown.remarks()],
            "sources": ranks[0].sources,
            "unit": "ms",
        },
    }


def _first_sentence(program: Path) -> list[str]:
    """The program's own first line, which says what it shows."""
    main = sys.modules["__main__"]
    if main.__doc__ and Path(getattr(main, "__file__", None) or "").name == program.name:
        return [main.__doc__.strip().splitlines()[0]]
    return []


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


class _Step:
    """A step of all ranks: whose messages belong together, and who waits for whom."""

    def __init__(self, ranks: Sequence[RankSteps], steps: Sequence[RecordedStep], zero: float):
        self._ranks, self._steps, self._zero = ranks, steps, zero
        self._start = min(step.start for step in steps)
        self._together: dict[object, dict[int, Message]] = defaultdict(dict)
        for one, step in zip(ranks, steps, strict=True):
            for message in step.messages:
                self._together[identity(message)][one.rank] = message

    def waits(self) -> list[Wait]:
        """Return the waits of all ranks whose message is known."""
        return [
            self._wait(one, box, step.messages[box.message])
            for one, step in zip(self._ranks, self._steps, strict=True)
            for box in step.boxes
            if box.message is not None
        ]

    def events(self) -> list[dict[str, Any]]:
        found = []
        for one, step in zip(self._ranks, self._steps, strict=True):
            found += [self._box(one, step, box) for box in step.boxes]
            found += [e for message in step.messages for e in self._message(one.rank, message)]
            before: Mapping[str, int] = {}
            # Before a rank begins its step, as much is there as at its beginning.
            for t, memory in [(self._start, m) for _, m in step.memory[:1]] + step.memory:
                if memory != before:  # it holds until the next one
                    facts = {"ph": "C", "name": "memory", "pid": one.rank, "args": memory}
                    found.append({**facts, "ts": _us(t - self._zero)})
                before = memory
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
        text, line = "", ""
        if box.key is not None and box.key in one.explained:
            text, line = one.explained[box.key][:2]
        if box.kind == "loss":
            text = text or "The loss of the outputs."
        name, known_as = "waits" if box.kind == "wait" else box.name, ""
        if box.message is not None:
            message = step.messages[box.message]
            text, known_as = self._why(self._wait(one, box, message)), identity(message)
            name = f"waits: {message.operation}"
        return self._event(
            box.kind, name, one.rank, 0, box.start, box.end, text=text, line=line, id=known_as
        )

    def _wait(self, one: RankSteps, box: Box, message: Message) -> Wait:
        theirs = self._together[identity(message)]
        others = {m.start: rank for rank, m in theirs.items() if rank != one.rank}
        last = max(others, default=box.start)
        late = others[last] if last > box.start else None
        ready = min(max(box.start, last), box.end)
        return Wait(one.rank, box.start, box.end, message, self._named(message), late, ready)

    def _why(self, wait: Wait) -> str:
        what = f"{wait.message.operation} ({wait.what})"
        travels = f"{1e3 * (wait.end - wait.ready):.3f} ms"
        if wait.late is None:
            return f"All of its ranks had begun this {what}; from then on it took {travels}."
        return (
            f"Rank {wait.rank} waits in this {what} until rank {wait.late} {wait.begins}, "
            f"{1e3 * (wait.ready - wait.start):.3f} ms later. Until then rank {wait.late} is "
            f"mostly in {self._doing(wait.late, wait.start, wait.ready)}. From then on the message "
            f"takes {travels}."
        )

    def _doing(self, rank: int, start: float, end: float) -> str:
        """The three things that took a rank longest between two times, in their order."""
        (step,) = [s for o, s in zip(self._ranks, self._steps, strict=True) if o.rank == rank]
        seconds: dict[str, float] = defaultdict(float)
        for box, begins, ends in innermost(step, (start, end)):
            seconds[_words(box)] += ends - begins
        longest = sorted(seconds, key=lambda name: -seconds[name])[:3]
        return ", ".join(
            f"{name} ({1e3 * seconds[name]:.3f} ms)" for name in seconds if name in longest
        )

    def _named(self, message: Message) -> str:
        """The tensor's name; of a receive, as its sender calls it."""
        names = [m.about for m in self._together[identity(message)].values() if m.about]
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
        known_as = identity(message)
        event = self._event(
            "message",
            message.operation,
            rank,
            1,
            message.start,
            end,
            text=text,
            line=message.line,
            id=known_as,
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
            "id": f"{known_as} {_us(self._steps[0].start - self._zero)}",
            "pid": rank,
            "tid": 1,
            "ts": ts,
        }
        return [event, flow | ({"bp": "e"} if role == "recv" else {})]


def _words(box: Box | None) -> str:
    """A box within a sentence, after "is mostly in"."""
    if box is None:
        return "other code"
    if box.kind == "wait":
        return "a wait of its own"
    of_layer = f" of {box.name}" if box.kind in ("forward", "backward") and box.key else ""
    the = "" if box.kind == "data" else "the "
    return f"{the}{KINDS[box.kind][0]}{of_layer}"


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
    lines.append(
        "Where no box is within a rank's part of the step, other code runs, such as Python."
    )
    if any(step.memory for one in ranks for step in one.steps):
        lines.append("Bytes were counted in another step of the same run, at the same places.")
    return [line for line in lines if line]
