# SPDX-License-Identifier: MIT
"""The page that plays one or two recorded steps: lanes, messages and memory over one time axis.

A recording is a Chrome trace whose ``otherData`` says what the page shows beside the events. Here
each box, strip of memory and table is drawn once, as HTML and SVG, so that the page shows its first
picture without JavaScript, too. The script in ``replay_page.html`` moves a cursor over the same
boxes, and draws nothing but the arrows. Positions are percentages of a step: a browser zooms by
giving the lanes another width.

torchpar and nogpu have this file and its template each, letter for letter. It needs the standard
library alone.
"""

import html
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["page", "write"]

TEMPLATE = Path(__file__).with_suffix(".html")
GRAY = "#888888"
COLOR = re.compile(r"#([0-9a-fA-F]{3}|[0-9a-fA-F]{6})([0-9a-fA-F]{2})?")
# Kinds of time in which a lane does nothing. They are hatched, and so may be others that say so.
WAITS = {"bubble", "idle", "wait", "waiting"}
DEEPEST = 4  # boxes within boxes whose depth is visible
COVERED = 0.2  # of a box: if another box begins in this part of it, its name has no room
AXES = ((1, 5, 20), (0.5, 5, 25), (0.2, 4, 20))  # a distance, and its divisors
FINEST = 160  # lines of the axis at most, when it is zoomed
TINY = 0.2  # microseconds: boxes overlap by less where their times were rounded
MEMORY_WIDTH, MEMORY_HEIGHT = 2000, 100  # units of a strip's picture


@dataclass
class _Box:
    """An event on the page: a box, a message, or a mark, which has no duration."""

    lane: int
    row: int
    kind: str
    name: str
    begin: float
    duration: float
    args: Mapping[str, Any]
    is_mark: bool
    is_covered: bool = False  # where its name would stand, another box lies in it

    @property
    def end(self) -> float:
        return self.begin + self.duration

    @property
    def is_message(self) -> bool:
        return self.kind == "message"


@dataclass
class _Lane:
    """A rank, or a program: the rows in which its boxes lie."""

    pid: int
    name: str
    text: str = ""
    rows: dict[int, str] = field(default_factory=dict)
    memory: list[tuple[float, Mapping[str, float]]] = field(default_factory=list)


@dataclass
class _Part:
    """A recording, as the page shows it beside another."""

    facts: Mapping[str, Any]
    lanes: list[_Lane]
    boxes: list[_Box]
    steps: list[tuple[float, float]]

    def title(self) -> str:
        return str(self.facts.get("title", "recording"))

    def step(self, n: int) -> tuple[float, float]:
        """The step that is shown beside the n-th of another recording."""
        return self.steps[min(n, len(self.steps) - 1)]


class _Texts:
    """The texts of all boxes, each once: eight ranks say the same of a layer."""

    def __init__(self) -> None:
        self.all: dict[str, int] = {"": 0}

    def number(self, text: object) -> int:
        return self.all.setdefault("" if text is None else str(text), len(self.all))


def page(recordings: Sequence[Mapping[str, Any]]) -> str:
    """Return the HTML of a page that plays one recording, or two over one time axis.

    Args:
        recordings: what `json.load` returns of one or two recordings. Of two, the same step is
            shown of both, aligned at its beginning.

    Returns:
        A page that needs no other file and no network. Texts of the recordings are escaped.

    Raises:
        ValueError: a recording has another format, there are not one or two, or their axes have
            different units.
    """
    if not 1 <= len(recordings) <= 2:
        raise ValueError(f"there are {len(recordings)} recordings, expected one or two")
    parts = [_read(one) for one in recordings]
    units = [str(one.facts.get("unit", "ms")) for one in parts]
    if len(set(units)) > 1:
        raise ValueError(
            f"one recording is in {units[0]} and the other in {units[1]}, expected one unit; "
            "make a page of each"
        )
    kinds, series = _legend(parts, "kinds"), _legend(parts, "memory")
    for part in parts:
        for box in part.boxes:
            kinds.setdefault(box.kind, {"name": box.kind, "color": GRAY})
        for lane in part.lanes:
            for _, sizes in lane.memory:
                for name in sizes:
                    series.setdefault(name, {"name": name, "color": GRAY})
    texts, most = _Texts(), _most_bytes(parts)
    count = max(len(one.steps) for one in parts)
    drawn = [_Figure(parts, n, [*kinds], [*series], texts, most, units[0]) for n in range(count)]
    data = {
        "unit": units[0],
        "texts": [*texts.all],
        "kinds": [str(one["name"]) for one in kinds.values()],
        "series": [str(one["name"]) for one in series.values()],
        "most": most,
        "steps": [one.data for one in drawn],
    }
    # A text of the data may hold "</script>", which would end the element that holds the data.
    as_json = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    pieces = {
        "title": _text(" beside ".join(one.title() for one in parts)),
        "colors": _colors(kinds, series),
        "heads": "".join(_head(one, len(parts) > 1) for one in parts),
        "legend": _legend_html(kinds, series, most),
        "figures": "\n".join(one.html for one in drawn),
        "tables": "".join(_tables(one, len(parts) > 1) for one in parts),
        "data": as_json,
    }
    # One pass, so that a text of the recordings that looks like a place of the template stays.
    template = TEMPLATE.read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: pieces[found[1]], template)


def write(path: str | Path, recordings: Sequence[Mapping[str, Any]]) -> None:
    """Write the page of one or two recordings to a file, as `page` returns it.

    Raises:
        ValueError: as `page` does.
        OSError: the file cannot be written.
    """
    Path(path).write_text(page(recordings), "utf-8")


def check(recording: Mapping[str, Any]) -> None:
    """Raise ValueError if a recording has another format, with what is wrong."""
    _read(recording)


# Reading a recording


def _read(recording: Mapping[str, Any]) -> _Part:
    facts = recording.get("otherData") if isinstance(recording, Mapping) else None
    events = recording.get("traceEvents") if isinstance(recording, Mapping) else None
    version = facts.get("replay") if isinstance(facts, Mapping) else None
    if not isinstance(facts, Mapping) or not isinstance(events, Sequence) or version is None:
        raise ValueError('it is no recording: expected a trace whose otherData has "replay"')
    if version != 1:
        raise ValueError(f"the recording's format is {version}, expected 1; record it once more")
    for n, event in enumerate(events):
        _check(event, n)
    lanes, known = _lanes(events), _known_lines(facts)
    places = {one.pid: n for n, one in enumerate(lanes)}
    boxes = []
    for n, event in enumerate(events):
        place, args = places.get(event.get("pid", 0), 0), event.get("args") or {}
        if args.get("line") in known and "url" not in args:
            args = {**args, "url": f"#{args['line']}"}
        if event.get("ph") in ("X", "i"):
            is_mark = event["ph"] == "i"
            kind = str(event.get("cat", "other"))
            begin = _number(event, "ts", n)
            duration = 0.0 if is_mark else max(_number(event, "dur", n), 0.0)
            name, row = str(event.get("name", kind)), event.get("tid", 0)
            boxes.append(_Box(place, row, kind, name, begin, duration, args, is_mark))
        elif event.get("ph") == "C":
            sizes = {str(name): _number(args, name, n) for name in args}
            lanes[place].memory.append((_number(event, "ts", n), sizes))
    for lane in lanes:
        lane.memory.sort(key=lambda one: one[0])
    if not boxes:
        raise ValueError("the recording has no boxes, expected one event at least")
    return _Part(facts, lanes, boxes, _steps(facts, boxes))


def _known_lines(facts: Mapping[str, Any]) -> set[str]:
    """The lines that the page shows, as boxes name them."""
    sources = facts.get("sources") or {}
    return {f"{file}:{number}" for file, lines in sources.items() for number, _ in lines}


def _check(event: object, n: int) -> None:
    if not isinstance(event, Mapping) or not isinstance(event.get("args") or {}, Mapping):
        raise ValueError(f"event {n} of the recording, or its args, is no object of JSON")
    for name in ("pid", "tid"):
        if not isinstance(event.get(name, 0), int):
            raise ValueError(
                f"event {n} of the recording has {name} {event[name]}, expected an integer"
            )


def _number(values: Mapping[str, Any], name: str, n: int) -> float:
    value = values.get(name)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"event {n} of the recording has {name} {value}, expected a number")
    return float(value)


def _lanes(events: Iterable[Mapping[str, Any]]) -> list[_Lane]:
    """The lanes by their pids, with all rows that have a name or a box."""
    found: dict[int, _Lane] = {}
    for event in events:
        if event.get("ph") not in ("M", "X", "i", "C"):
            continue
        pid, args = event.get("pid", 0), event.get("args") or {}
        lane = found.setdefault(pid, _Lane(pid, f"lane {pid}"))
        tid = event.get("tid", 0)
        if event["ph"] in ("X", "i"):
            lane.rows.setdefault(tid, "")
        elif event.get("name") == "process_name":
            lane.name, lane.text = str(args.get("name", lane.name)), str(args.get("text", ""))
        elif event.get("name") == "thread_name":
            lane.rows[tid] = str(args.get("name", ""))
    for lane in found.values():
        lane.rows = dict(sorted(lane.rows.items()))
    return [lane for _, lane in sorted(found.items())]


def _steps(facts: Mapping[str, Any], boxes: Sequence[_Box]) -> list[tuple[float, float]]:
    try:
        found = [(float(begin), float(end)) for begin, end in facts.get("steps") or ()]
    except (TypeError, ValueError):
        raise ValueError(
            f"the recording's steps are {facts['steps']}, expected pairs of a beginning and an end"
        ) from None
    if not found:
        found = [(min(one.begin for one in boxes), max(one.end for one in boxes))]
    return [(begin, end if end > begin else begin + 1) for begin, end in found]


def _most_bytes(parts: Sequence[_Part]) -> float:
    """The most memory of a lane at any time, to which all strips and bars are drawn."""
    return max(
        (sum(sizes.values()) for part in parts for lane in part.lanes for _, sizes in lane.memory),
        default=0.0,
    )


def _legend(parts: Sequence[_Part], name: str) -> dict[str, dict[str, Any]]:
    """The kinds of all recordings with their colors, or the series of memory."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        for key, value in (part.facts.get(name) or {}).items():
            entry = dict(value) if isinstance(value, Mapping) else {"color": value}
            found.setdefault(str(key), {"name": str(key), "color": GRAY} | entry)
    return found


# Drawing a step


class _Figure:
    """The picture of a step, and what the script knows of its boxes.

    The names of lanes and rows stand in a column of their own, so that they stay in sight where
    the lanes are zoomed. So each line of the picture has one height, which both columns share.
    """

    def __init__(
        self,
        parts: Sequence[_Part],
        n: int,
        kinds: list[str],
        series: list[str],
        texts: _Texts,
        most: float,
        unit: str,
    ) -> None:
        self.kinds, self.series, self.texts, self.most = kinds, series, texts, most
        self.length = max(end - begin for begin, end in (one.step(n) for one in parts))
        self.names: list[str] = []  # the column on the left
        self.lines: list[str] = []  # the lines of the lanes, beside it
        self.events: list[list[float]] = []  # in the order of their boxes on the page
        self.lanes: list[list[Any]] = []
        self.memory: list[list[list[float]]] = []
        for number, part in enumerate(parts):
            if len(parts) > 1:
                self._line("part", _text(part.title()), "")
            for place, lane in enumerate(part.lanes):
                # Two rows are what a lane does, and its messages; of more, each is named.
                rows = lane.rows if len(lane.rows) > 2 else {}
                self.lanes.append([number, lane.name, rows])
                self._lane(part, place, lane, part.step(n))
        self.html = (
            f'<figure class="step"{" hidden" if n else ""} aria-label="step {n + 1}">'
            f'<div class="names"><div class="axis">{_text(unit)}</div>{"".join(self.names)}</div>'
            '<div class="scroll"><div class="track">'
            f'<div class="axis">{"".join(_ticks(self.length, unit))}</div>{"".join(self.lines)}'
            "</div></div></figure>"
        )
        self.data = {
            "length": _short(self.length),
            "parts": [[one.title(), *map(_short, one.step(n))] for one in parts],
            "lanes": self.lanes,
            "events": self.events,
            "memory": self.memory,
        }

    def _line(self, name: str, left: str, right: str) -> None:
        self.names.append(f'<div class="{name}">{left}</div>')
        self.lines.append(f'<div class="{name}">{right}</div>')

    def _lane(self, part: _Part, place: int, lane: _Lane, step: tuple[float, float]) -> None:
        begin, end = step
        text = f" <small>{_text(lane.text)}</small>" if lane.text else ""
        self._line("head", f"<strong>{_text(lane.name)}</strong>{text}", "")
        shown = [
            one
            for one in part.boxes
            if one.lane == place
            and (one.begin < end or (one.begin == end and not one.duration))
            and (one.end > begin or one.begin >= begin)
        ]
        for row, name in lane.rows.items():
            mine = [one for one in shown if one.row == row]
            line = "row thin" if mine and all(one.is_message for one in mine) else "row"
            for n, boxes in enumerate(_without_overlap(mine)):
                drawn = [self._box(len(self.lanes) - 1, *one, begin) for one in boxes]
                self._line(line, "" if n else _text(name), "".join(drawn))
        if lane.memory:
            self._line("memory", "memory", self._strip(lane, begin, end))
        self.memory.append(_changes(lane, begin, end, self.series))

    def _box(self, lane: int, box: _Box, depth: int, zero: float) -> str:
        args, begin = box.args, box.begin - zero
        text = self.texts.number
        event = [
            lane,
            self.kinds.index(box.kind),
            text(box.name),
            _short(begin),
            _short(box.duration),
            box.row,
            text(args.get("text")),
            text(args.get("line")),
            text(args.get("url") if _is_link(args.get("url")) else ""),
            text(args.get("id")),
            text(args.get("role")),
            args.get("bytes") or 0,
            text(args.get("tensor")),
            text(args.get("operation")),
        ]
        while not event[-1]:
            event.pop()
        self.events.append(event)
        # What reaches beyond the step is drawn within it.
        left = min(max(begin, 0.0), self.length)
        width = min(max(begin + box.duration, 0.0), self.length) - left
        classes = f"k{self.kinds.index(box.kind)}" + (f" d{min(depth, DEEPEST)}" if depth else "")
        classes += " mark" if box.is_mark else " outer" if box.is_covered else ""
        style = f"left:{self._percent(left)}%"
        style += "" if box.is_mark else f";width:{self._percent(width)}%"
        return f'<b class="{classes}" style="{style}">{_text(box.name)}</b>'

    def _percent(self, time: float) -> str:
        return f"{100 * time / self.length:.3f}".rstrip("0").rstrip(".")

    def _strip(self, lane: _Lane, begin: float, end: float) -> str:
        """The memory of a lane over time: areas that lie one on the other."""
        steps = [(max(time, begin) - begin, sizes) for time, sizes in _within(lane, begin, end)]
        paths = []
        # Each area reaches down to 0, and the next one covers its lower part.
        for top in range(len(self.series), 0, -1):
            path, before = "", -1
            for time, sizes in steps:
                held = sum(sizes.get(one, 0.0) for one in self.series[:top])
                y = MEMORY_HEIGHT - round(MEMORY_HEIGHT * held / (self.most or 1))
                x = round(MEMORY_WIDTH * time / self.length)
                if y != before:
                    path += f"H{x}V{y}" if path else f"M{x} {MEMORY_HEIGHT}V{y}"
                before = y
            if path:
                x = round(MEMORY_WIDTH * (end - begin) / self.length)
                paths.append(f'<path class="m{top - 1}" d="{path}H{x}V{MEMORY_HEIGHT}Z"/>')
        box = f"0 0 {MEMORY_WIDTH} {MEMORY_HEIGHT}"
        return (
            f'<svg viewBox="{box}" preserveAspectRatio="none" aria-hidden="true">'
            f"{''.join(paths)}</svg>"
        )


def _within(lane: _Lane, begin: float, end: float) -> list[tuple[float, Mapping[str, float]]]:
    """The sizes of a lane that hold in a step: those that hold at its beginning come first."""
    before = [one for one in lane.memory if one[0] <= begin]
    return before[-1:] + [one for one in lane.memory if begin < one[0] < end]


def _changes(lane: _Lane, begin: float, end: float, series: Sequence[str]) -> list[list[float]]:
    """The sizes of a lane in a step, as [time, series, bytes, series, bytes, …] of what changes."""
    found: list[list[float]] = []
    held: dict[str, float] = {}
    for time, sizes in _within(lane, begin, end):
        line = [_short(max(time - begin, 0.0))]
        for n, name in enumerate(series):
            if sizes.get(name, 0.0) != held.get(name, 0.0):
                line += [n, _short(sizes.get(name, 0.0))]
        held = dict(sizes)
        if len(line) > 1:
            found.append(line)
    return found


def _without_overlap(boxes: Sequence[_Box]) -> list[list[tuple[_Box, int]]]:
    """Divide the boxes of a row into lines, such that boxes of a line lie apart or one in another.

    Two messages never lie one in another: that one ends before the other says nothing of them.

    Returns:
        The boxes of each line, in the order in which they are drawn, with their depth.
    """
    lines: list[list[tuple[_Box, int]]] = [[]]
    open_boxes: list[list[_Box]] = [[]]
    for box in sorted(boxes, key=lambda one: (one.begin, -one.duration)):
        for around in open_boxes:
            while around and around[-1].end <= box.begin + TINY:
                around.pop()
        n = next((k for k, around in enumerate(open_boxes) if _fits(box, around)), len(lines))
        if n == len(lines):
            lines.append([])
            open_boxes.append([])
        around = open_boxes[n]
        lines[n].append((box, len(around)))
        if box.is_mark:
            continue
        if around and box.begin < around[-1].begin + COVERED * around[-1].duration:
            around[-1].is_covered = True
        around.append(box)
    return lines


def _fits(box: _Box, around: Sequence[_Box]) -> bool:
    """Whether a box has room on a line, where it would begin in boxes that lie one in another."""
    is_inside = bool(around) and box.end <= around[-1].end + TINY
    return not around or box.is_mark or (is_inside and not box.is_message)


def _ticks(length: float, unit: str) -> Iterator[str]:
    """The lines of the axis, of which a browser shows more where it is zoomed."""
    scale = 1000 if unit == "ms" else 1
    length /= scale
    power = 10.0 ** math.floor(math.log10(length))
    # The coarsest lines of which there are four at least, and finer ones between them.
    first, *divisors = next(one for one in AXES if length / (power * one[0]) >= 3.5)
    steps = [power * first] + [power * first / one for one in divisors]
    steps = [one for one in steps if length / one <= FINEST]
    if unit not in ("ms", "µs"):  # of whole numbers
        steps = [one for one in steps if one >= 1] or [1]
    finest = steps[-1]
    digits = max(0, -math.floor(math.log10(finest)))
    for n in range(int(length / finest) + 1):
        time = n * finest
        level = next(k for k, one in enumerate(steps) if abs(time / one - round(time / one)) < 1e-6)
        place = f"{100 * time / length:.3f}".rstrip("0").rstrip(".")
        text = f"{time:,.{digits}f}"
        text = text.rstrip("0").rstrip(".") if digits else text
        yield f'<i class="t{level}" style="left:{place}%">{text}</i>'


# What stands around the lanes


def _head(part: _Part, is_one_of_two: bool) -> str:
    """The command of a recording, and its remarks."""
    command = _text(part.facts.get("command", ""))
    lines = [f"<h2>{_text(part.title())}</h2>"] if is_one_of_two else []
    lines += [f'<p class="command"><code>{command}</code></p>'] if command else []
    lines += [f'<p class="remark">{_text(one)}</p>' for one in part.facts.get("remarks") or ()]
    return f"<section>{''.join(lines)}</section>\n"


def _tables(part: _Part, is_one_of_two: bool) -> str:
    level = 3 if is_one_of_two else 2
    lines = [f"<h2>{_text(part.title())}</h2>"] if is_one_of_two else []
    for table in part.facts.get("tables") or ():
        columns = "".join(f"<th>{_text(one)}</th>" for one in table.get("columns", ()))
        rows = "".join(
            f"<tr>{''.join(f'<td>{_text(one)}</td>' for one in row)}</tr>\n"
            for row in table.get("rows", ())
        )
        lines.append(
            f"<h{level}>{_text(table.get('title', ''))}</h{level}>\n"
            f'<div class="table"><table>\n<tr>{columns}</tr>\n{rows}</table></div>\n'
        )
    if about := part.facts.get("about"):
        items = "".join(f"<li>{_text(one)}</li>" for one in about)
        lines.append(f'<h{level}>Where it was recorded</h{level}>\n<ul class="about">{items}</ul>')
    for file, source in (part.facts.get("sources") or {}).items():
        numbers = {number for number, _ in source}
        shown = "\n".join(
            f'<span id="{_text(f"{file}:{number}")}">{number:>4}  {_text(code)}</span>'
            + ("" if number + 1 in numbers else "\n   …")
            for number, code in source
        )
        lines.append(
            f'<h{level}>{_text(file)}</h{level}>\n<pre class="source" tabindex="0">{shown}</pre>'
        )
    return f"<section>{''.join(lines)}</section>\n"


def _legend_html(
    kinds: Mapping[str, Mapping[str, Any]], series: Mapping[str, Mapping[str, Any]], most: float
) -> str:
    keys = "".join(
        f'<span><i class="k{n}"></i>{_text(one["name"])}</span>'
        for n, one in enumerate(kinds.values())
    )
    lines = f'<p class="legend">{keys}</p>'
    if most:
        keys = "".join(
            f'<span><i class="m{n}"></i>{_text(one["name"])}</span>'
            for n, one in enumerate(series.values())
        )
        lines += (
            f'<p class="legend"><span>memory, a full strip is {_bytes(most)}:</span> {keys}</p>'
        )
    return lines


def _colors(kinds: Mapping[str, Mapping[str, Any]], series: Mapping[str, Mapping[str, Any]]) -> str:
    """The style of each kind. A color that is none is gray, so that nothing else enters here."""
    lines = []
    for n, (key, kind) in enumerate(kinds.items()):
        color = _color(kind["color"])
        style = f"background: {color}; color: {_ink(color)}"
        if key in WAITS or kind.get("waits"):
            stripes = f"135deg, {color} 0 2px, transparent 2px 7px"
            style = (
                f"background: repeating-linear-gradient({stripes}); color: inherit; "
                f"box-shadow: inset 0 0 0 1px {color}; "
                "text-shadow: 0 0 3px Canvas, 0 0 3px Canvas"
            )
        lines.append(f".k{n} {{ --kind: {color}; {style}; }}")
    lines += [
        f".m{n} {{ background: {color}; fill: {color}; }}"
        for n, color in enumerate(_color(one["color"]) for one in series.values())
    ]
    return "\n  ".join(lines)


def _color(value: object) -> str:
    return str(value) if COLOR.fullmatch(str(value)) else GRAY


def _ink(color: str) -> str:
    """The color of text on a color: black, white, or the page's where the color is see-through."""
    digits = color[1:]
    if len(digits) in (3, 4):
        digits = "".join(2 * one for one in digits)
    red, green, blue, *alpha = (int(digits[n : n + 2], 16) / 255 for n in range(0, len(digits), 2))
    if alpha and alpha[0] < 0.6:
        return "inherit"
    # The relative luminance of WCAG 2; black and white contrast alike at 0.18.
    linear = [
        (one / 12.92 if one <= 0.04 else ((one + 0.055) / 1.055) ** 2.4)
        for one in (red, green, blue)
    ]
    return "#000" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 else "#fff"


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"


def _short(number: float) -> float:
    """Nanoseconds suffice, and a whole number is shorter without its point."""
    rounded = round(number, 3)
    return int(rounded) if rounded == int(rounded) else rounded


def _is_link(value: object) -> bool:
    return isinstance(value, str) and value.startswith(("https://", "http://", "#"))


def _text(value: object) -> str:
    return html.escape(str(value))
