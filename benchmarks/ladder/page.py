# SPDX-License-Identifier: MIT
"""Tables and pictures of the ladder's results."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchpar.errors import writing

from ..results import Result, duration, headers_of, markdown, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIMITS = "limits of this machine"
QUIET = 0.5  # load average; above it other programs disturb the times
# The rows of the README, by contestant; of parallel loops, the most threads that have a core each.
SUMMARY = {
    "pure Python": "pure Python",
    "njit": "njit: the same loops, compiled by Numba",
    "njit, parallel": "njit, the loops in {threads} threads",
    "njit, blocked": "njit, blocked for the caches",
    "njit, in registers": "njit, blocked in registers",
    "njit, triangular": "njit, in registers, one triangle and its mirror image",
    "njit, triangular, parallel": "njit, triangular, in {threads} threads",
    "NumPy": "NumPy",
    "torch eager": "PyTorch",
    "torchpar CPU": "torchpar",
    "2 ranks, joined": "two processes, result on one",
    "torchpar GPU": "torchpar on a GPU",
    "torchpar GPU, with copies": "torchpar on a GPU, with the copies there and back",
}
COLORS = {"1": "tab:blue", "2": "tab:orange", "4": "tab:green", "8": "tab:red"}
COLORS |= {"GPU": "tab:purple", "yours": "tab:pink"}


def label(result: Result) -> str:
    """The contestant with its note."""
    return ", ".join(filter(None, (result.contestant, result.columns["note"])))


def find(results: Sequence[Result], name: str) -> Result | None:
    """The row with this label, or else the first of this contestant."""
    by_label = (one for one in results if label(one) == name)
    return next(by_label, next((one for one in results if one.contestant == name), None))


# Tables


SPARE = ("switches", "GB/s", "GFLOP/s", "p20–p80")  # that a narrow terminal does without


def lines(results: Sequence[Result], head: str) -> Iterator[dict[str, str]]:
    """The cells of the measured rows of a case, by header; ``head`` is that of the contestants."""
    for one in results:
        cells = one.columns
        if one.ok and cells.get("least_us"):
            yield {head: label(one), "time": f"at least {seconds(cells['least_us'] / 1e3)} (H100)"}
        if cells.get("left_out") or not one.ok:
            continue
        speed = next((name for name in ("gb_per_s", "gflop_per_s") if cells.get(name)), None)
        faster = cells.get("faster") and f"{number(cells['faster'])} × {cells['than']}"
        yield {
            head: label(one),
            "time": seconds(one.p50_ms),
            "p20–p80": span(one.p20_ms, one.p80_ms),
            "× pure Python": number(cells.get("over_pure_python")),
            "times as fast as": faster or "",
            "GB/s" if speed == "gb_per_s" else "GFLOP/s": number(cells[speed]) if speed else "",
            "switches": number(cells.get("switches")),
        }


def seconds(milliseconds: float | None) -> str:
    return duration(milliseconds and milliseconds / 1e3)


def span(low: float | None, high: float | None) -> str:
    """Two milliseconds in the unit that suits the second."""
    if low is None or high is None:
        return ""
    value, unit = seconds(high).split()
    return f"{number(low * float(value.replace(',', '')) / high)}–{value} {unit}"


def notes(results: Sequence[Result]) -> Iterator[str]:
    """Say which rows were left out and why, and which are wrong or too slow."""
    left_out: dict[str, list[str]] = {}
    said = set[tuple[str, str]]()  # rows by cores have the mistake of their function, too
    for one in results:
        if not one.ok and (one.contestant, one.reason) in said:
            continue
        said.add((one.contestant, one.reason))
        if one.ok and (executed := one.columns.get("executed")):
            yield f"Without a GPU: {one.contestant} is {executed}."
        elif reason := one.columns.get("left_out"):
            left_out.setdefault(reason, []).append(label(one))
        elif one.reason.startswith("SlowCall: "):
            yield f"Too slow: {label(one)}: {one.reason.removeprefix('SlowCall: ')}"
        elif not one.ok:
            yield f"Not right: {label(one)}: {one.reason.removeprefix('Rejected: ')}"
    remarks = (
        f"Note on {one.contestant}: {text}."
        for one in results
        for text in str(one.columns.get("remarks") or "").splitlines()
    )
    yield from dict.fromkeys(remarks)  # which rows by cores share
    for reason, names in left_out.items():
        yield f"Left out ({reason}): {'; '.join(names)}."


ASKED = 40  # times the speed of loops in pure Python, which the exercise asks of a GPU's maximum


def over_loops(results: Sequence[Result]) -> Iterator[str]:
    """Say by how much a GPU beats the loops of pure Python; of the maximum, whether by `ASKED`."""
    for one in results:
        times = one.columns.get("over_pure_python")
        if "torchpar GPU" in one.contestant and one.ok and times:
            faster = f"{number(times)} times as fast as pure Python"
            yield f"{one.contestant}: {faster}{beside_asked(times, one.case['workload'])}."


def beside_asked(times: float, workload: str) -> str:
    """Whether a ratio is at least what is asked, as ", at least 40"; "" where nothing is."""
    if not workload.startswith("maximum"):
        return ""
    return f", {'at least' if times >= ASKED else 'less than'} {ASKED}"


def load_note(results: Sequence[Result]) -> str:
    """Say how busy the machine was before the measurement."""
    load = float(results[0].columns["load_before"])
    busy = (
        "other programs disturb the times, so that they are rough"
        if load > QUIET
        else "the machine was quiet"
    )
    return f"The load average before the measurement was {load:.2f}: {busy}."


def as_markdown(results: Sequence[Result]) -> str:
    """The table of one case, and its notes."""
    rows = list(lines(results, results[0].case["workload"]))
    headers = headers_of(rows)
    table = markdown([headers, *([row.get(header, "") for header in headers] for row in rows)])
    return "\n".join([table, *(f"{note}\n" for note in notes(results))])


def summary(measured: Mapping[str, Sequence[Result]], cases: Sequence[str]) -> str:
    """The README's table: the time and the speed-up over pure Python of two cases, by workload.

    A row that no case has is left out.
    """
    head = [""]
    for case in cases:
        head += [case, "× pure Python"]
    rows = [head]
    for contestant, text in SUMMARY.items():
        found = [chosen(measured[case], contestant) for case in cases]
        threads = next(
            (int(one.columns["threads"]) for one in found if one and one.columns["threads"]), 1
        )
        cells = [text.format(threads=threads)]
        for one in found:
            cells += (
                [seconds(one.p50_ms), number(one.columns["over_pure_python"])] if one else ["", ""]
            )
        if any(found):
            rows.append(cells)
    return markdown(rows)


def chosen(results: Sequence[Result], contestant: str) -> Result | None:
    """The measured row of a contestant with the most threads that have a core each."""
    rows = [
        one
        for one in results
        if one.contestant == contestant
        and one.p50_ms
        and (one.columns["threads"] or 1) <= one.columns["cores"]
        and (one.columns["threads"] != 1 or "parallel" not in contestant)
    ]
    return max(rows, key=lambda one: one.columns["threads"] or 1, default=None)


# Pictures


def draw(path: Path, results: Sequence[Result], limits: Sequence[Result]) -> None:
    """Draw the times of a case as bars, and of a product the roofline below them."""
    from matplotlib.figure import Figure

    rows = [one for one in results if one.p50_ms]
    points = [one for one in rows if one.columns.get("intensity")]
    height = 1.5 + 0.27 * len(rows)
    figure = Figure((9, height + 5.2 * bool(points)), layout="constrained")
    if points:
        top, bottom = figure.subplots(2, height_ratios=[height, 5.2])
        draw_roofline(bottom, points, limits)
    else:
        top = figure.subplots()
    draw_bars(top, rows)
    with writing(path, "--output"):
        figure.savefig(path, dpi=110)


def draw_bars(axes: "Axes", rows: Sequence[Result]) -> None:
    """Draw the median of each row, from the 20% to the 80% quantile a black line, colored by
    threads."""
    shown = set()
    for place, one in enumerate(rows):
        assert one.p20_ms is not None
        assert one.p50_ms is not None
        assert one.p80_ms is not None
        threads = one.columns["threads"]  # unknown of a student's function
        kind = f"{threads:.0f}" if threads else "yours" if ": " in one.contestant else "GPU"
        text = f"{kind} thread{'s' * (kind != '1')}" if threads else kind
        bar_label = None if kind in shown else text
        shown.add(kind)
        axes.barh(place, one.p50_ms, color=COLORS.get(kind, "tab:gray"), label=bar_label)
        axes.plot([one.p20_ms, one.p80_ms], [place, place], color="black", lw=1.5)
        axes.text(
            max(one.p50_ms, one.p80_ms) * 1.15, place, seconds(one.p50_ms), va="center", fontsize=8
        )
    axes.set_yticks(range(len(rows)), [label(one) for one in rows], fontsize=8)
    axes.invert_yaxis()
    least, most = (end(one.p50_ms or 1.0 for one in rows) for end in (min, max))
    axes.set(xscale="log", xlim=(least / 2, most * 6), xlabel="time (shorter is faster)")
    axes.xaxis.set_major_formatter(lambda milliseconds, _: seconds(milliseconds))
    axes.set_title(rows[0].case["workload"], loc="left")
    # In a row of its own at the top, for beside the title there is no room for five entries.
    axes.figure.legend(
        *axes.get_legend_handles_labels(), fontsize=8, ncols=len(shown), loc="outside upper right"
    )


def draw_roofline(axes: "Axes", points: Sequence[Result], limits: Sequence[Result]) -> None:
    """Draw the speed of loops by needed operations per byte loaded, under what the machine allows.

    Of parallel loops only the most threads that have a core each are drawn.
    """
    left = min(one.columns["intensity"] for one in points) / 3
    right = max(one.columns["intensity"] for one in points) * 8
    fastest = max(limits, key=lambda one: one.columns.get("gflop_per_s") or 0)
    top = fastest.columns["gflop_per_s"]
    # Gray, for the colors are numbers of threads.
    for name, style in (("copy in memory", "--"), ("loads from the nearest cache", "-")):
        if limit := chosen(limits, name):
            bandwidth = limit.columns["gb_per_s"]
            reach = [left, top / bandwidth, right]
            text = f"{label(limit)}: {bandwidth:.0f} GB/s"
            axes.plot(
                reach,
                [min(x * bandwidth, top) for x in reach],
                style,
                color="tab:gray",
                lw=1,
                label=text,
            )
    axes.plot([left, right], [top, top], "k:", lw=1, label=f"{label(fastest)}: {top:.0f} GFLOP/s")
    for name in dict.fromkeys(one.contestant for one in points):
        if (one := chosen(points, name)) is None:
            continue
        point = one.columns["intensity"], one.columns["gflop_per_s"]
        threaded = "parallel" in name  # to the left of the point; one thread to the right
        axes.plot(*point, "o", color=COLORS.get(f"{one.columns['threads']:.0f}", "tab:gray"), ms=5)
        axes.annotate(
            label(one).replace(", parallel", ""),
            point,
            xytext=(-7, 4) if threaded else (7, -8),
            textcoords="offset points",
            ha="right" if threaded else "left",
            fontsize=8,
        )
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    ticks = [2.0**power for power in range(-6, 7) if left < 2.0**power < right]
    axes.set_xticks(
        ticks, [f"1/{1 / tick:.0f}" if tick < 1 else f"{tick:.0f}" for tick in ticks], minor=False
    )
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.minorticks_off()
    axes.set_title("roofline: what loads and arithmetic allow", loc="left")
    axes.set(
        xlabel="needed operations per byte loaded into registers",
        ylabel="GFLOP/s of needed operations",
    )
    axes.legend(fontsize=8, loc="lower right")
