# SPDX-License-Identifier: MIT
"""A launch as a recording: programs on multiprocessors, warps, barriers, copies and faults.

The recording is a Chrome trace, which Perfetto opens and `replay_page` plays. It is made of the
`Trace` of each recorded program. A lane is a multiprocessor. Its rows are the warps of a program,
and below them the asynchronous operations in flight. A box of a warp is a run of instructions of
one line of the source.

A cycle is an instruction that a warp executes. That is a model: it leaves out latencies, and how
warps share the units of a multiprocessor.
"""

import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from nogpu.machine.kinds import kind_of
from nogpu.machine.parse import Source
from nogpu.machine.trace import AT_BARRIER, FOR_OTHERS, LONGEST, Moment, Span, Trace
from nogpu.record.faults import Fault
from nogpu.record.launch import Launch, shown_grid
from nogpu.record.source import line_of, moved, shown_path
from nogpu.report.text import in_order

PROGRAMS = 8  # that are recorded
MOST_WARPS = 128  # that are shown, but at least one program
MOST_BYTES = 900_000  # of the recording, so that its page has at most a megabyte
LEAST_CYCLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)  # of a box
ROWS = 60  # of a table
MARKED = 8  # faults whose accesses are marked
NAME = 32  # characters of a box's name

# What a box says, in the order of the legend. The first kinds are the rarest ones: a box has the
# kind of its rarest instruction. The colors are legible on light and dark pages.
COMPUTES: dict[str, dict[str, object]] = {
    "tensor cores": {"name": "tensor cores", "color": "#dd7733"},
    "global memory": {"name": "global memory", "color": "#3f87c9"},
    "shared memory": {"name": "shared memory", "color": "#46a36b"},
    "floating point": {"name": "floating point", "color": "#ad6cc2"},
    "others": {"name": "integers, addresses and branches", "color": "#888888"},
}
WAITS: dict[str, dict[str, object]] = {
    "barrier": {"name": "at a barrier", "color": "#b99316", "waits": True},
    "wait": {"name": "waiting for other warps or copies", "color": "#888888", "waits": True},
}
FLIGHTS: dict[str, dict[str, object]] = {
    "copy": {"name": "copy in flight", "color": "#2a9d9d"},
    "product": {"name": "product in flight", "color": "#c9704f"},
    "commit": {"name": "commit in flight", "color": "#888888"},
}
ROW_NAMES = {"copy": "copies", "product": "products", "commit": "commits"}
FAULT: dict[str, object] = {"name": "access of a fault", "color": "#e03131"}
ALIKE = {"special functions": "floating point"}  # kinds of `kind_of` that are shown as another
SHARED = {"shared memory": "#46a36b"}

Event = dict[str, Any]


class NotRecorded(ValueError):
    """No launch was recorded."""


@dataclass
class Box:
    """A run of instructions of a warp, or a wait.

    Attributes:
        lines: instructions by line of the source.
        kinds: instructions by kind.
        text: of a wait.
    """

    begin: int
    end: int
    kind: str = ""
    lines: Counter[Source] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    text: str = ""

    def add(self, other: "Box") -> None:
        """Let this box end with another one behind it."""
        self.end = other.end
        self.lines += other.lines
        self.kinds += other.kinds


@dataclass
class Flight:
    """An asynchronous operation, of all warps of a program that issue it.

    Attributes:
        count: operations by warp.
        is_ended: whether each of them was waited for.
    """

    what: str
    source: Source
    begin: int
    end: int
    is_ended: bool
    bytes: int = 0
    count: Counter[int] = field(default_factory=Counter)
    spans: list[Span] = field(default_factory=list)
    row: int = 0

    @property
    def kind(self) -> str:
        """Its kind in the legend."""
        named = {"a product": "product", "a commit": "commit"}
        return named.get(self.what, "copy")


class Place(NamedTuple):
    """The place of a CTA's warps: their lane, its first row, and when the CTA begins."""

    lane: int
    row: int
    begin: int


@dataclass
class Program:
    """A recorded program: its boxes by warp, and its operations in flight by CTA."""

    trace: Trace
    boxes: dict[int, list[Box]]
    flights: dict[int, list[Flight]]

    @property
    def end(self) -> int:
        ends = [boxes[-1].end for boxes in self.boxes.values() if boxes]
        return max(ends, default=1)


def recording(
    launches: Sequence[Launch], faults: Sequence[Fault], title: str, command: str = ""
) -> dict[str, object]:
    """Return the recording of a launch: of the first one with an error, or else of the first one.

    Args:
        launches: all of them. Those that have a trace can be shown.
        faults: of all launches.
        title: of the page, such as the name of the script.
        command: that repeats the recording.

    Raises:
        NotRecorded: no launch has a trace.
    """
    numbers = [n for n, one in enumerate(launches, 1) if one.trace and one.trace.executed]
    if not numbers:
        raise NotRecorded("no launch was recorded; launch a kernel within emulate(traces=8)")
    wrong = [one.launch for kind in ("error", "warning") for one in faults if one.kind == kind]
    number = next((one for one in wrong if one in numbers), numbers[0])
    mine = [one for one in faults if one.launch == number and one.launched is not None]
    shown = _Shown(launches[number - 1], mine)
    remarks = [*shown.remarks, *_of_others(launches, faults, number)]
    made: dict[str, object] = {}
    for least in LEAST_CYCLES:
        if least > 1:
            shown.merge(least)
        events, tables = shown.events(), shown.tables()
        about = shown.about(least)
        made = {
            "traceEvents": events,
            "otherData": {
                "replay": 1,
                "title": f"{title}: {shown.launch.kernel}[{shown_grid(shown.launch.grid)}]",
                "command": command,
                "about": about,
                "kinds": shown.kinds(events),
                "memory": SHARED if shown.launch.shared else {},
                "steps": [[0, shown.end]],
                "tables": tables,
                "remarks": remarks,
                "unit": "cycles",
            },
        }
        if len(as_json(made)) <= MOST_BYTES:
            break
    return made


def as_json(made: dict[str, object]) -> str:
    """Return a recording as a file's text."""
    return json.dumps(made, ensure_ascii=False, separators=(",", ":")) + "\n"


def _of_others(launches: Sequence[Launch], faults: Sequence[Fault], number: int) -> list[str]:
    """Return sentences on the launches that are not shown."""
    if len(launches) == 1:
        return []
    names = dict.fromkeys(one.kernel for one in launches)
    said = [f"This is launch {number:,} of {len(launches):,}."]
    if len(names) > 1:
        said.append(f"The kernels are {', '.join(list(names)[:9])}{', …' * (len(names) > 9)}.")
    errors = {one.launch for one in faults if one.kind == "error" and one.launched} - {number}
    if errors:
        listed = ", ".join(f"{one:,}" for one in sorted(errors)[:9])
        said.append(f"Other launches with errors: {listed}.")
    return [" ".join(said)]


class _Shown:
    """The programs of a launch that are shown, and what is said of them."""

    def __init__(self, launch: Launch, faults: Sequence[Fault]):
        self.launch, self.faults = launch, in_order(faults)
        self.kernel = launch.counts.kernel
        instructions = self.kernel.instructions
        self.sources = [moved(one.source, self.kernel.file, launch.file) for one in instructions]
        self.by_line = {
            one.line: source for one, source in zip(instructions, self.sources, strict=True)
        }
        self.instruction_kinds = [kind_of(one) for one in instructions]
        of_program = launch.warps * launch.ctas
        assert launch.trace is not None
        traces = [one for one in (launch.trace, *launch.trace.others) if one.executed]
        self.recorded = len(traces)
        traces = traces[: max(1, MOST_WARPS // of_program)]
        self.programs = [self._program(one) for one in traces]
        self.places = self._places()
        self.end = max(place.begin + self.programs[n].end for (n, _), place in self.places.items())
        self.marks = self._marks()
        self.remarks = self._remarks()

    # Programs

    def _program(self, trace: Trace) -> Program:
        warps = sorted(trace.executed)[:MOST_WARPS]
        boxes = {warp: list(self._boxes(trace, warp)) for warp in warps}
        program = Program(trace, boxes, {})
        flights = defaultdict[int, list[Flight]](list)
        for one in self._flights(trace, program.end):
            flights[min(one.count) // self.launch.warps].append(one)
        program.flights = {rank: _in_rows(found) for rank, found in flights.items()}
        return program

    def _boxes(self, trace: Trace, warp: int) -> Iterator[Box]:
        """Yield the runs of instructions and the waits of a warp, in their order."""
        waits = sorted(self._waits(trace, warp), key=lambda one: one.begin)
        left = iter([*waits, None])
        wait = next(left)
        run: Box | None = None
        for time, pc in trace.executed[warp]:
            while wait is not None and wait.end <= time - 1 + (wait.kind == "barrier"):
                if run is not None:
                    yield run
                run = None
                yield wait
                wait = next(left)
            if self._is_barrier(pc):
                continue
            source, kind = self.sources[pc], self.instruction_kinds[pc]
            if run is not None and source not in run.lines:
                yield run
                run = None
            if run is None:
                run = Box(time - 1, time)
            run.end = time
            run.lines[source] += 1
            run.kinds[kind] += 1
        if run is not None:
            yield run
        while wait is not None:
            yield wait
            wait = next(left)

    def _is_barrier(self, pc: int) -> bool:
        i = self.kernel.instructions[pc]
        return i.parts[0] in ("bar", "barrier") and i.parts[1] in ("sync", "red", "cta")

    def _waits(self, trace: Trace, warp: int) -> Iterator[Box]:
        pcs = {time: pc for time, pc in trace.executed[warp] if self._is_barrier(pc)}
        for span in trace.spans:
            if span.warp != warp or span.what not in (AT_BARRIER, FOR_OTHERS):
                continue
            assert span.end is not None
            if span.what == FOR_OTHERS:
                cycles = _cycles(span.end - span.begin)
                text = f"Warp {warp} waits {cycles} for what another warp or program has done."
                yield Box(span.begin - 1, span.end - 1, "wait", text=text)
                continue
            # The instruction counts as executed before the wait, or behind it by the last warp.
            pc = pcs.get(span.begin, pcs.get(span.end))
            who = f"All {span.warps} warps meet here" if span.warps > 1 else "The warp goes on"
            text = f"{who}. Warp {warp} waits {_cycles(span.end - span.begin)}"
            late = span.last != warp and span.end > span.begin
            text += f", for warp {span.last}, which comes last." if late else "."
            lines = Counter({None if pc is None else self.sources[pc]: 1})
            yield Box(span.begin - 1, span.end, "barrier", lines, text=text)

    def merge(self, least: int) -> None:
        """Merge runs between two waits, so that each has so many cycles, if there are so many."""
        for program in self.programs:
            for warp, boxes in program.boxes.items():
                found: list[Box] = []
                for box in boxes:
                    before = found[-1] if found else None
                    if least >= 64 and box.kind and box.end - box.begin < least // 8:
                        box = Box(box.begin, box.end)  # a wait too short to be seen
                    is_short = before is not None and before.end - before.begin < least
                    if before is None or before.kind or box.kind or not is_short:
                        found.append(replace(box))
                    else:
                        before.add(box)
                program.boxes[warp] = found

    def _flights(self, trace: Trace, end: int) -> list[Flight]:
        """Return the operations; those that several warps issue alike are one."""
        by_warp = defaultdict[tuple[int, str, Source], list[Flight]](list)
        for span in trace.spans:
            if span.what in (AT_BARRIER, FOR_OTHERS):
                continue
            source = self.by_line.get(span.line)
            mine = by_warp[span.warp, span.what, source]
            until = end if span.end is None else max(span.end, span.begin + 1)
            one = Flight(span.what, source, span.begin - 1, until, span.end is not None)
            one.count[span.warp], one.bytes, one.spans = 1, span.bytes, [span]
            # Those that are waited for at once are one box, such as the products of a group.
            if mine and mine[-1].is_ended and (mine[-1].end, True) == (until, one.is_ended):
                _join(mine[-1], one)
            else:
                mine.append(one)
        together: dict[tuple[str, Source, int, int], Flight] = {}
        for (warp, what, source), mine in by_warp.items():
            for n, one in enumerate(mine):
                key = what, source, n, warp // self.launch.warps
                if key in together:
                    _join(together[key], one)
                else:
                    together[key] = one
        return sorted(together.values(), key=lambda one: (one.begin, one.end))

    def _places(self) -> dict[tuple[int, int], Place]:
        """Return where each CTA of each program is shown, by their numbers.

        A program begins on its multiprocessor when there is a place.
        """
        room = max(1, self.launch.most_resident(1))
        ends = defaultdict[int, list[int]](list)
        rows: Counter[int] = Counter()
        places = {}
        for n, program in enumerate(self.programs):
            trace, ctas = program.trace, self.launch.ctas
            lanes = [(trace.number * ctas + r) % max(trace.multiprocessors, 1) for r in range(ctas)]
            free = [sorted(ends[one])[-room] if len(ends[one]) >= room else 0 for one in lanes]
            begin = max(free)
            for rank, lane in enumerate(lanes):
                mine = program.flights.get(rank, [])
                flight_rows = 1 + max((one.row for one in mine), default=-1)
                places[n, rank] = Place(lane, rows[lane], begin)
                rows[lane] += self.launch.warps + flight_rows
                ends[lane].append(begin + program.end)
        return places

    # Events

    def events(self) -> list[Event]:
        """Return the lanes, boxes, marks and sizes of shared memory, in the order of time."""
        found: list[Event] = []
        for (n, rank), place in self.places.items():
            program, warps = self.programs[n], self.launch.warps
            for warp in range(rank * warps, (rank + 1) * warps):
                where = {"pid": place.lane, "tid": place.row + warp % warps}
                boxes = program.boxes.get(warp, [])
                found += [self._box(box, place.begin) | where for box in boxes]
            for one in program.flights.get(rank, []):
                where = {"pid": place.lane, "tid": place.row + warps + one.row}
                found.append(self._flight(one, place.begin) | where)
        found += self.marks
        found += self._memory()
        return [*self._lanes(), *sorted(found, key=lambda one: one["ts"])]

    def _lanes(self) -> list[Event]:
        lanes = defaultdict[int, list[str]](list)
        rows: list[Event] = []
        shares = Counter(place.lane for place in self.places.values())
        for (n, rank), place in self.places.items():
            program = self.programs[n]
            name = f"{self._what} {_position(program.trace)}"
            lanes[place.lane].append(f"CTA {rank} of {name}" if self.launch.ctas > 1 else name)
            prefix = f"{_position(program.trace)} " if shares[place.lane] > 1 else ""
            flights = program.flights.get(rank, [])
            names = [f"{prefix}warp {warp}" for warp in range(self.launch.warps)]
            kinds = {one.row: ROW_NAMES[one.kind] for one in flights}
            names += [f"{prefix}{kinds[row]}" for row in sorted(kinds)]
            for row, text in enumerate(names, place.row):
                args = {"name": text}
                where = {"pid": place.lane, "tid": row}
                rows.append({"ph": "M", "name": "thread_name", **where, "args": args})
        return [
            {
                "ph": "M",
                "name": "process_name",
                "pid": lane,
                "args": {"name": f"multiprocessor {lane}", "text": ", then ".join(names)},
            }
            for lane, names in sorted(lanes.items())
        ] + rows

    def _box(self, box: Box, zero: int) -> Event:
        source = max(box.lines, key=lambda one: box.lines[one], default=None)
        kind, text, name = box.kind, box.text, box.kind
        if not kind:
            kinds = {ALIKE.get(one, one) for one in box.kinds}
            kind = next((one for one in COMPUTES if one in kinds), "others")
            counts = (f"{count:,}× {one}" for one, count in box.kinds.most_common())
            total = sum(box.kinds.values())
            text = f"{total:,} instruction{'s' * (total != 1)} of a warp: {', '.join(counts)}."
            if len(box.lines) > 1:
                text += f" Of them {box.lines[source]:,} are of this line."
            name = _code(source) or "no line of the source"
        return self._x(kind, name, zero + box.begin, box.end - box.begin, text, source)

    def _flight(self, one: Flight, zero: int) -> Event:
        warps = _warps(one.count)
        what = one.what.removeprefix("a ")
        count = max(one.count.values())
        many = f"{count} {what}s of each of {warps}" if count > 1 else f"{one.what} of {warps}"
        size = f", {one.bytes:,} bytes" if one.bytes else ""
        text = f"{many[0].upper()}{many[1:]}{size}, from the issue until a warp has waited for it."
        if not one.is_ended:
            text = f"{many[0].upper()}{many[1:]}{size}. No warp waits for it."
        event = self._x(
            one.kind,
            f"{what}: {_code(one.source)}",
            zero + one.begin,
            one.end - one.begin,
            text,
            one.source,
        )
        if one.bytes:
            event["args"]["bytes"] = one.bytes
        return event

    def _x(self, kind: str, name: str, begin: int, cycles: int, text: str, source: Source) -> Event:
        args: dict[str, object] = {"text": text}
        if source is not None:
            args["line"] = _line(source)
        return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": cycles, "args": args}

    def _memory(self) -> Iterator[Event]:
        """Yield the bytes of shared memory that programs hold, by multiprocessor."""
        if not self.launch.shared:
            return
        changes = defaultdict[int, Counter[int]](Counter)
        for (n, _), place in self.places.items():
            changes[place.lane][place.begin] += self.launch.shared
            changes[place.lane][place.begin + self.programs[n].end] -= self.launch.shared
        for lane, mine in changes.items():
            held = 0
            for time, size in sorted(mine.items()):
                held += size
                where = {"ph": "C", "name": "memory", "pid": lane, "tid": 0, "ts": time}
                yield where | {"args": {"shared memory": held}}

    def kinds(self, events: Iterable[Event]) -> dict[str, dict[str, object]]:
        """Return those kinds that the events have, in the order of the legend."""
        used = {one.get("cat") for one in events}
        known = COMPUTES | WAITS | FLIGHTS | {"fault": FAULT}
        return {name: kind for name, kind in known.items() if name in used}

    # Faults

    def _marks(self) -> list[Event]:
        """Return two marks for each fault that names two accesses, and one for others."""
        found: list[Event] = []
        numbers = {one.trace.program: n for n, one in enumerate(self.programs)}
        for number, fault in enumerate(self.marked()):
            trace = self.programs[numbers[fault.program]].trace
            moments = trace.faults[fault.message]
            texts = _texts(fault.message, len(moments))
            for moment, text in zip(moments, texts, strict=False):
                mark = self._mark(moment, f"fault {number}", fault.name, text)
                found += [mark] if mark is not None else []
        return found

    def marked(self) -> list[Fault]:
        """Return the faults whose accesses are shown."""
        traces = {one.trace.program: one.trace for one in self.programs}
        found = [
            one
            for one in self.faults
            if one.program in traces and one.message in traces[one.program].faults
        ]
        return found[:MARKED]

    def _mark(self, moment: Moment, fault: str, name: str, text: str) -> Event | None:
        """Return the mark of an access, in the row of its warp, or of the operation."""
        found = [n for n, one in enumerate(self.programs) if one.trace.number == moment.program]
        if not found:
            return None
        rank = moment.warp // self.launch.warps
        place = self.places[found[0], rank]
        # Of a warp only the first instructions are recorded.
        boxes = self.programs[found[0]].boxes.get(moment.warp, [])
        last = boxes[-1].end if boxes else 0
        row, time = place.row + moment.warp % self.launch.warps, min(moment.time - 1, last)
        if moment.time > last:
            text += f" It happens at {_cycles(moment.time)}, behind what is recorded."
        for one in self.programs[found[0]].flights.get(rank, []):
            if moment.span is not None and any(span is moment.span for span in one.spans):
                row = place.row + self.launch.warps + one.row
        source = self.by_line.get(moment.line)
        args: dict[str, object] = {"text": text, "id": fault}
        if source is not None:
            args["line"] = _line(source)
        where = {"pid": place.lane, "tid": row, "ts": place.begin + time, "s": "t"}
        return {"ph": "i", "cat": "fault", "name": name, **where, "args": args}

    # Sentences

    @property
    def _what(self) -> str:
        return "block" if self.launch.block is not None else "program"

    def _remarks(self) -> list[str]:
        found, launch = [], self.launch
        for fault in self.faults[:3]:
            found += [line.strip() for line in str(fault).splitlines()]
        if len(self.faults) > 3:
            found.append(f"And {len(self.faults) - 3:,} more faults of this launch.")
        if not self.faults:
            found.append("nogpu finds no fault in this launch.")
        marked = [one.message for one in self.marked()]
        hidden = [one for one in self.faults[:3] if one.message not in marked]
        if hidden:
            found.append(
                f"The accesses of {len(hidden)} of these faults are not marked: they are of a "
                f"{self._what} or of an order of warps that is not shown, or the fault is no "
                "access."
            )
        programs = launch.programs
        if len(self.programs) < programs:
            first = "the first one is" if len(self.programs) == 1 else "the first ones are"
            found.append(
                f"The launch has {programs:,} {self._what}s, of which {len(self.programs)} "
                f"{'is' if len(self.programs) == 1 else 'are'} shown: {first} recorded."
            )
        executed = [times for one in self.programs for times in one.trace.executed.values()]
        if any(len(times) >= LONGEST for times in executed):
            found.append(f"Of a warp the first {LONGEST:,} instructions are recorded.")
        found += self._overlap()
        return found

    def _overlap(self) -> list[str]:
        """Say how much the warps execute while copies are in flight."""
        during = total = 0
        for program in self.programs:
            spans = [
                (one.begin, one.end)
                for flights in program.flights.values()
                for one in flights
                if one.kind == "copy" and one.is_ended
            ]
            if not spans:
                continue
            covered = _union(spans)
            for warp in program.boxes:
                for time, _ in program.trace.executed[warp]:
                    total += 1
                    during += _is_within(covered, time - 1)
        if not total:
            return []
        return [f"{during / total:.0%} of the instructions run while a copy is in flight."]

    def about(self, least: int) -> list[str]:
        """Return lines on how the recording was made, and what it leaves out."""
        launch = self.launch
        lines = [
            f"{launch.kernel}[{shown_grid(launch.grid)}] for {launch.arch}: {launch.warps} warps "
            f"and {launch.shared:,} bytes of shared memory for each "
            f"{'CTA' if launch.ctas > 1 else self._what}; executed by nogpu on a CPU.",
            "A cycle is an instruction of the PTX that a warp executes. Cycles are modelled, not "
            "measured: latencies are left out, and so is how warps share a multiprocessor.",
            "A copy or a product is in flight from its issue until a warp has waited for it. On "
            "a GPU it may be complete earlier.",
            "The warps have run in one of many possible orders. Nothing orders the two accesses of "
            "a race, so that either may come first.",
        ]
        room = launch.programs_of_multiprocessor
        if room is not None:
            each = "CTAs" if launch.ctas > 1 else f"{self._what}s"
            lines.append(
                f"The place of a {self._what} is modelled: {self._what} n is on multiprocessor n, "
                f"as %smid says, and a GPU may choose another. By {launch.resources}, the warps "
                f"and the shared memory, a multiprocessor has room for {room} {each} at once."
            )
        gpu = next(iter(launch.time), "")
        if gpu:
            lines.append(f"The estimate for the launch is {launch.time[gpu]}.")
        if least > 1:
            lines.append(
                f"Runs of instructions were merged so that a box has {least:,} cycles at least "
                "where no wait lies between."
            )
        return lines

    def tables(self) -> list[dict[str, object]]:
        """Return the cycles of the warps, and the operations in flight."""
        warps, flights = [], []
        for (n, rank), place in self.places.items():
            program, size = self.programs[n], self.launch.warps
            name = _position(program.trace)
            for warp in range(rank * size, (rank + 1) * size):
                if warp not in program.boxes:
                    continue
                boxes, count = program.boxes[warp], len(program.trace.executed[warp])
                cycles = {kind: _sum_of(boxes, kind) for kind in WAITS}
                end = place.begin + (boxes[-1].end if boxes else 0)
                cells = (count, cycles["barrier"], cycles["wait"], end)
                warps.append([name, f"{warp}", *(f"{one:,}" for one in cells)])
            for one in program.flights.get(rank, []):
                waited = f"{place.begin + one.end:,}" if one.is_ended else "never"
                times = f"{place.begin + one.begin:,}", waited, f"{one.end - one.begin:,}"
                where = "" if one.source is None else _line(one.source)
                size_of = f"{one.bytes:,}" if one.bytes else ""
                what = one.what.removeprefix("a ")
                flights.append([name, what, where, _warps(one.count), size_of, *times])
        found = [
            _table(
                "Cycles of the warps",
                [self._what, "warp", "instructions", "at barriers", "other waits", "end"],
                warps,
            )
        ]
        if flights:
            columns = ["operation", "line", "warps", "bytes", "issued", "waited for", "cycles"]
            found.append(_table("In flight", [self._what, *columns], flights))
        return found


def _table(title: str, columns: list[str], rows: list[list[str]]) -> dict[str, object]:
    left_out = len(rows) - ROWS
    shown = f", the first {ROWS} of {len(rows)}" if left_out > 0 else ""
    return {"title": f"{title}{shown}", "columns": columns, "rows": rows[:ROWS]}


def _join(one: Flight, other: Flight) -> None:
    one.begin, one.end = min(one.begin, other.begin), max(one.end, other.end)
    one.is_ended &= other.is_ended
    one.bytes += other.bytes
    one.count += other.count
    one.spans += other.spans


def _in_rows(flights: list[Flight]) -> list[Flight]:
    """Give each operation a row in which it overlaps with none. Each kind has rows of its own."""
    ends: list[tuple[str, int]] = []  # of the rows
    for one in sorted(flights, key=lambda one: [*FLIGHTS].index(one.kind)):
        free = [n for n, (kind, end) in enumerate(ends) if kind == one.kind and end <= one.begin]
        one.row = free[0] if free else len(ends)
        ends[one.row : one.row + 1] = [(one.kind, one.end)]
    return flights


def _texts(message: str, count: int) -> list[str]:
    """Return a sentence for each access that a message names.

    The first one is the whole message, which may say "…, which warp 1 writes (…), without …".
    """
    whole = f"{message[0].upper()}{message[1:]}."
    _, separator, there = message.partition(", which ")
    if count != 2 or not separator:
        return [whole] * count
    there = re.sub(r" (writes|reads)\b", r" \1 it", there.partition(", without ")[0], count=1)
    return [whole, f"{there[0].upper()}{there[1:]}."]


def _position(trace: Trace) -> str:
    return str(trace.program)


def _warps(count: Counter[int]) -> str:
    """Name the warps of an operation."""
    names = sorted(count)
    if len(names) == 1:
        return f"warp {names[0]}"
    if names == list(range(names[0], names[-1] + 1)):
        return f"warps {names[0]} to {names[-1]}"
    return f"warps {', '.join(map(str, names))}"


def _cycles(count: int) -> str:
    return f"{count:,} cycle{'s' * (count != 1)}"


def _sum_of(boxes: Iterable[Box], kind: str) -> int:
    return sum(one.end - one.begin - (kind == "barrier") for one in boxes if one.kind == kind)


def _code(source: Source) -> str:
    """Return the beginning of a line of the source."""
    if source is None:
        return ""
    code = line_of(*source) or f"{Path(source[0]).name}:{source[1]}"
    return code if len(code) <= NAME else f"{code[: NAME - 1]}…"


def _line(source: tuple[str, int]) -> str:
    return f"{shown_path(source[0])}:{source[1]}"


def _union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def _is_within(spans: Sequence[tuple[int, int]], time: int) -> bool:
    n = bisect_right(spans, time, key=lambda one: one[0]) - 1
    return n >= 0 and time < spans[n][1]
