# SPDX-License-Identifier: MIT
"""The report as a page that needs no other file: faults, counters by line, and pictures.

matplotlib draws the pictures. Without it the page has its tables alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nogpu.data_sheets import DATA_SHEETS
from nogpu.machine.counters import Access, Line
from nogpu.machine.instruction_counts import BANKS, SECTOR, WORD
from nogpu.machine.kinds import kind_of, operation
from nogpu.machine.trace import Request, Span, Trace
from nogpu.record.faults import Fault
from nogpu.record.launch import CapturedGraph, Launch, counted
from nogpu.record.roofline import GPU_OF
from nogpu.record.source import line_of, moved, shown_path
from nogpu.report.drawing import Drawing
from nogpu.report.groups import Group, longest, shown_line
from nogpu.report.text import in_order, summary

TEMPLATE = Path(__file__).with_name("report.html")
# Colors of what a warp does, legible on light and dark pages.
COLORS = {
    "tensor cores": "#dd7733",
    "global memory": "#3f87c9",
    "shared memory": "#46a36b",
    "floating point": "#ad6cc2",
    "special functions": "#ad6cc2",
    "waiting": "#8883",
    "others": "#888c",
}
ROOFS = ("#b99316", "#3f87c9", "#46a36b", "#dd7733")
OPERATIONS = {"a copy": "#3f87c9", "a bulk load": "#3f87c9", "a bulk store": "#46a36b"}
OPERATIONS |= {"a product": "#dd7733", "a commit": "#888c"}
SECTIONS, PICTURES = 24, 8  # groups, and accesses of each that have a picture, at most
DRAWN = 8  # groups that have pictures, at most: a picture takes a tenth of a second
LISTED = 5000  # launches at most
GAP = 3  # lines between two that execute something; more are left out
COLUMNS, BARS = 1200, 60  # pixels and operations of a timeline, at most
THREADS, ROWS = 128, 600  # of a map of addresses, at most


class SourceLine(NamedTuple):
    """A line of the source and what it takes."""

    number: int
    code: str
    line: Line | None
    accesses: Sequence[Access]


@dataclass
class Section:
    """The first launch of a group on the page."""

    group: Group
    launch: Launch
    facts: list[str]
    rows: dict[str, list[SourceLine]]  # by file
    times: list[list[str]]  # of the bounds, the head first
    accesses: list[tuple[Access, str]]  # with their pictures
    roofline: str = ""
    timeline: str = ""
    legend: dict[str, str] = field(default_factory=dict)  # colors of the timeline


def as_html(
    groups: Sequence[Group],
    launches: Sequence[Launch],
    graphs: Sequence[CapturedGraph],
    faults: Sequence[Fault],
    title: str,
) -> str:
    """Return the page."""
    from jinja2 import Template  # PyTorch needs it, too

    draws = find_spec("matplotlib") is not None
    template = Template(TEMPLATE.read_text("utf-8"), autoescape=True)
    page: str = template.render(
        title=title,
        summary=summary(launches, faults),
        faults=in_order(faults),
        graphs=graphs,
        groups=groups,
        sections=[section(one, draws and n < DRAWN) for n, one in enumerate(groups[:SECTIONS])],
        left_out=len(groups) - SECTIONS,
        longest=longest(launches),
        launches=list(enumerate(launches, 1)),
        listed=LISTED,
        drawn=DRAWN,
        line=shown_line,
        code=lambda source: line_of(*source),
        path=shown_path,
        draws=draws,
    )
    return page


def section(group: Group, draws: bool) -> Section:
    """Return what the page shows of a group's first launch."""
    launch = group.first
    trace = launch.trace if draws else None
    accesses = worst(launch)
    pictures = [draw_access(launch, trace, one) if trace else "" for one in accesses[:PICTURES]]
    pictures += [""] * (len(accesses) - len(pictures))
    drawn = list(zip(accesses, pictures, strict=True))
    found = Section(group, launch, counted(launch), rows(launch), times(launch), drawn)
    if draws:
        found.roofline = draw_roofline(launch)
    if trace is not None and trace.executed:
        found.timeline, found.legend = draw_timeline(launch, trace)
    return found


def worst(launch: Launch) -> list[Access]:
    """Return the accesses; first those that take the most beyond the least."""
    return sorted(launch.counters.accesses, key=lambda one: (-one.conflicts, -one.transactions))


def rows(launch: Launch) -> dict[str, list[SourceLine]]:
    """Return the lines of each file that execute something, and few ones between them."""
    lines = {line.source: line for line in launch.counters.lines if line.source is not None}
    files: dict[str, list[int]] = {}
    for file, number in lines:
        files.setdefault(file, []).append(number)
    found = {}
    for file, numbers in files.items():
        shown: list[SourceLine] = []
        before = min(numbers) - 1
        for number in sorted(numbers):
            if number - before > GAP:
                shown.append(SourceLine(0, "⋮", None, ()))
                before = number - 1
            for one in range(before + 1, number + 1):
                source = file, one
                mine = [access for access in launch.counters.accesses if access.source == source]
                code = line_of(*source, strip=False)
                shown.append(SourceLine(one, code, lines.get(source), mine))
            before = number
        found[file] = shown
    return found


def times(launch: Launch) -> list[list[str]]:
    """Return the bound on each GPU by its units, as a table."""
    units = list(launch.bounds[0].microseconds)
    head = ["GPU", "at least, µs", "by", *units]
    table = [head]
    for one in launch.bounds:
        each = (one.microseconds.get(unit) for unit in units)
        cells = ["" if value is None else f"{value:.3g}" for value in each]
        table.append([one.gpu, f"{one.least:.3g}", one.unit, *cells])
    return table


# Pictures


def draw_access(launch: Launch, trace: Trace, access: Access) -> str:
    """Return the first request of each warp of the first program as an SVG."""
    found = first_requests(launch, trace, access)
    if not found:
        return ""
    draw = draw_sectors if access.space == "global" else draw_banks
    return draw(found)


def first_requests(launch: Launch, trace: Trace, access: Access) -> dict[int, Request]:
    """Return the requests by warp, of the first instruction of an access."""
    for pc, i in enumerate(launch.counts.kernel.instructions):
        source = moved(i.source, launch.counts.kernel.file, launch.file)
        key = source, operation(i)
        if key != (access.source, access.what):
            continue
        found = {
            warp: one
            for (position, warp), requests in trace.requests.items()
            for one in requests
            if position == pc and one.space == access.space and one.lanes is not None
        }
        found = {warp: one for warp, one in found.items() if one.addresses.size}
        if found:
            return dict(sorted(found.items()))
    return {}


def draw_sectors(found: dict[int, Request]) -> str:
    """Return a map of the sectors that threads touch."""
    picked: list[tuple[int, Request]] = []
    touched = np.zeros(0, np.int64)
    for warp, one in list(found.items())[: THREADS // 32]:
        more = np.union1d(touched, one.addresses // SECTOR)
        if picked and len(more) > ROWS:
            break
        picked.append((warp, one))
        touched = more
    threads = 32 * len(picked)
    image = np.full((len(touched), threads), np.nan)
    for column, (_, one) in enumerate(picked):
        assert one.lanes is not None
        at = np.searchsorted(touched, one.addresses // SECTOR)
        np.add.at(image, (at, 32 * column + one.lanes), 0)
        image[at, 32 * column + one.lanes] = one.width
    height = min(4.0, 0.9 + 0.03 * len(touched))
    with Drawing(4.6, height) as drawing:
        (axes,) = drawing.axes
        axes.imshow(image, aspect="auto", cmap="Blues", vmin=-SECTOR / 2, vmax=SECTOR / 2)
        for column in range(1, len(picked)):
            axes.axvline(32 * column - 0.5, color="#8888", linewidth=0.5)
        axes.set(xlabel=f"thread, from warp {picked[0][0]} on", ylabel="sector")
        axes.set_xticks(range(0, threads, 32))
    return drawing.svg


def draw_banks(found: dict[int, Request]) -> str:
    """Return a map of the banks that a warp's threads access, and of their turns."""
    warp, one = next(iter(found.items()))
    image = np.full((BANKS, 32), np.nan)
    together = 32 * WORD // max(one.width, WORD)  # threads
    turns: dict[tuple[int, int], list[int]] = {}
    assert one.lanes is not None
    for lane, address in zip(one.lanes.tolist(), one.addresses.tolist(), strict=True):
        for k in range(max(one.width // WORD, 1)):
            word = address // WORD + k
            words = turns.setdefault((lane // together, word % BANKS), [])
            if word not in words:
                words.append(word)
            image[word % BANKS, lane] = words.index(word) + 1
    most = int(np.nanmax(image))
    with Drawing(4.6, 3.2) as drawing:
        (axes,) = drawing.axes
        drawn = axes.imshow(image, aspect="auto", cmap="viridis", vmin=-most, vmax=most)
        axes.set(xlabel=f"thread of warp {warp}", ylabel="bank")
        if most > 1:
            bar = axes.figure.colorbar(drawn, ax=axes, label="turn")
            bar.ax.set_ylim(1, most)
    return drawing.svg


def draw_roofline(launch: Launch) -> str:
    """Return the roofs of the GPUs, and where the launch lies; "" if it computes nothing."""
    total = launch.counters.total
    flops = sum(total.tensor_flops.values()) + sum(total.flops.values())
    moved_bytes = launch.counters.sums("global").distinct * SECTOR
    if not flops or not moved_bytes:
        return ""
    kind = max(total.tensor_flops, key=lambda k: total.tensor_flops[k], default="")
    other = max(total.flops, key=lambda k: total.flops[k], default="f32")
    intensity = flops / moved_bytes
    x = np.geomspace(min(0.1, intensity / 3), max(2000.0, intensity * 3), 100)
    with Drawing(4.6, 3.0) as drawing:
        (axes,) = drawing.axes
        for (name, sheet), color in zip(DATA_SHEETS.items(), ROOFS, strict=True):
            peak = sheet.tensor.get(kind, sheet.tensor["f16"]) if kind else sheet.flops[other]
            is_mine = name in GPU_OF[launch.arch]
            roof = np.minimum(x * sheet.memory, peak)
            width = 2.5 if is_mine else 1
            axes.plot(x, roof, linewidth=width, label=name, color=color)
            most = min(intensity * sheet.memory, peak)
            axes.plot([intensity], [most], "o", color=color, markersize=5)
        axes.axvline(intensity, color="#888", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", yscale="log")
        axes.set_xlabel("FLOPs by byte of global memory")
        axes.set_ylabel("TFLOP/s at most")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return drawing.svg


def draw_timeline(launch: Launch, trace: Trace) -> tuple[str, dict[str, str]]:
    """Return a timeline of the first program's warps and operations, and the colors' meanings."""
    from matplotlib.colors import to_rgba

    instructions = launch.counts.kernel.instructions
    warps, end = sorted(trace.executed), 1
    for times_of in trace.executed.values():
        end = max(end, times_of[-1][0] + 1)
    scale = max(1, -(-end // COLUMNS))
    image = np.zeros((len(warps), -(-end // scale), 4))
    used = set()
    rank = {name: n for n, name in enumerate(COLORS)}
    for y, warp in enumerate(warps):
        held = np.full(image.shape[1], len(rank))
        for span in trace.spans:
            if span.warp == warp and span.what == "a wait at a barrier" and span.end:
                held[span.begin // scale : span.end // scale] = rank["waiting"]
        for time, pc in trace.executed[warp]:
            kind = kind_of(instructions[pc])
            # Where a pixel stands for several instructions, it shows the rarest kind.
            held[time // scale] = min(held[time // scale], rank.get(kind, rank["others"]))
        for name, n in rank.items():
            if (held == n).any():
                used.add(name)
                image[y, held == n] = to_rgba(COLORS[name])
    bars = operations(trace, warps[0])
    lanes = max((lane for *_, lane in bars), default=-1) + 1
    with Drawing(4.6, 0.7 + 0.22 * (len(warps) + lanes)) as drawing:
        (axes,) = drawing.axes
        extent = (0, image.shape[1] * scale, len(warps) - 0.5, -0.5)
        axes.imshow(image, aspect="auto", interpolation="nearest", extent=extent)
        labels = [f"warp {warp}" for warp in warps]
        for span, lane in bars:
            color = OPERATIONS.get(span.what, COLORS["others"])
            until = span.end if span.end is not None else end
            width = max(until - span.begin, end / 200)
            axes.barh(len(warps) + lane, width, left=span.begin, height=0.7, color=color)
        labels += [f"in flight, {lane + 1}" for lane in range(lanes)]
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, end)
        axes.set_xlabel("instructions of a warp")
        axes.spines[["top", "right"]].set_visible(False)
    return drawing.svg, {name: COLORS[name] for name in COLORS if name in used}


def operations(trace: Trace, first: int) -> list[tuple[Span, int]]:
    """Return asynchronous operations, and of each one a row in which it overlaps with none.

    Those that all warps issue are shown of the first warp.
    """
    spans = [one for one in trace.spans if one.what in OPERATIONS]
    issuers = {one.warp for one in spans}
    if first in issuers and len(issuers) > 1:
        spans = [one for one in spans if one.warp == first or one.what.startswith("a bulk")]
    ends: list[int] = []
    found = []
    for span in sorted(spans, key=lambda one: one.begin)[:BARS]:
        free = [lane for lane, end in enumerate(ends) if end <= span.begin]
        lane = free[0] if free else len(ends)
        until = span.end if span.end is not None else span.begin
        if lane == len(ends):
            ends.append(until)
        ends[lane] = until
        found.append((span, lane))
    return found
