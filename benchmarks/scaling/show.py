# SPDX-License-Identifier: MIT
"""The scaling benchmark's rows as tables, and as a picture."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.results import Result, duration, picture, print_cells
from torchpar.profile import amdahl
from torchpar.training.cost import Link

SPEEDUPS = (0.125, 0.25, 0.5, 1, 2, 4)  # on the axes of the picture
MARKERS = {"1 rank × 2 threads": "s", "dp 2": "o", "tp 2": "^", "dp 4": "x", "tp 4": "+"}


def chosen(rows: Sequence[Result], table: str) -> list[Result]:
    """The steps that a table shows."""
    return [row for row in rows if table in str(row.found.get("tables", "")).split()]


def width(row: Result) -> int:
    """Of the model's first hidden layer."""
    return int(row.case["sizes"].split("-")[1])


def print_all(rows: Sequence[Result]) -> None:
    """Steps by batch and by width, weak scaling, Amdahl's law, exact arithmetic, all-reduces."""
    by_batch, by_width = chosen(rows, "batch"), chosen(rows, "width")
    model = by_batch[0].case["sizes"]
    print_cells(
        f"a training step, {model}: the time of one rank with one thread, and speed-ups over it",
        pivot(by_batch, "batch", lambda row: row.case["batch"]),
    )
    print_cells(
        f"784-w-w-10, batch {by_width[0].case['batch']}: the same by width", pivot(by_width, "w", width)
    )
    print_cells("weak scaling: the speed that a rank keeps, with so many samples each", weak(by_batch))
    print_cells("data parallelism by Amdahl's law", by_law(by_batch))
    print_cells("the price of arithmetic='exact'", arithmetics(chosen(rows, "arithmetic")))
    print_cells("an all-reduce between 2 ranks", all_reduces(rows))
    if link := fit_link(rows):
        print(f"fitted to the medians: α {1e6 * link.alpha:.0f} µs, β {1e9 * link.beta:.2f} ns/B")
    for name in ("dp 2", "tp 2"):
        speedups = {
            row.case["batch"]: row.speedup for row in by_batch if row.contestant == name and row.speedup
        }
        if speedups:
            at = crossover(speedups)
            found = "at no batch measured" if at is None else f"from batch {at:.0f} on"
            print(f"{name} is faster than one rank with one thread {found}")
    for row in rows:
        if not row.ok:
            print("not ok:", row.contestant, *row.case.values(), row.reason)
    if any(row.found.get("oversubscribed") for row in rows):
        print("* more threads than cores: this shows that the step is right, not how fast it is")


def pivot(rows: Sequence[Result], name: str, key: Callable[[Result], int]) -> list[dict[str, str]]:
    """A line for each batch or width: the time of one rank with one thread, the speed-ups of the others."""
    lines: dict[int, dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(key(row), {name: f"{key(row):,}"})
        if row.contestant == "1 rank × 1 thread":
            line[row.contestant] = duration(row.p50_ms and row.p50_ms / 1e3)
        elif row.speedup:
            line[row.contestant] = f"{row.speedup:.2f}×{'*' * bool(row.found['oversubscribed'])}"
    return list(lines.values())


def weak(rows: Sequence[Result]) -> list[dict[str, str]]:
    """The time of one rank over that of dp ranks that have as many samples each."""
    times = {(row.case["dp"], row.case["batch"]): row.p50_ms for row in rows if is_data_parallel(row)}
    lines: dict[int, dict[str, str]] = {}
    for (dp, batch), ms in times.items():
        alone = times.get((1, batch // dp))
        if dp > 1 and ms and alone:
            line = lines.setdefault(batch // dp, {"samples a rank": f"{batch // dp:,}"})
            line[f"dp {dp}"] = f"{alone / ms:.0%}"
    return [lines[size] for size in sorted(lines)]


def is_data_parallel(row: Result) -> bool:
    return bool(row.case["tp"] == 1 and row.case["threads"] == 1 and row.case["arithmetic"] == "fast")


def by_law(rows: Sequence[Result]) -> list[dict[str, str]]:
    """For each batch the share p of the time that is divided among ranks, and the limit 1/(1 − p)."""
    lines = []
    for batch in dict.fromkeys(row.case["batch"] for row in rows):
        speedups = {
            row.case["dp"]: row.speedup
            for row in rows
            if row.case["batch"] == batch
            and is_data_parallel(row)
            and row.speedup
            and not row.found["oversubscribed"]
        }
        if max(speedups, default=1) > 1:
            p = amdahl.fit(speedups)
            limit = amdahl.speedup(p, math.inf)
            achieved = speedups[max(speedups)]
            line = {"batch": f"{batch:,}", "p": f"{p:.3f}", "limit": f"{limit:.2f}"}
            lines.append(line | {f"achieved on {max(speedups)}": f"{achieved:.2f}"})
    return lines


def arithmetics(rows: Sequence[Result]) -> list[dict[str, str]]:
    """For each mesh the step in fast and in exact arithmetic: time, messages, bytes."""
    lines = []
    by_kind = {(row.contestant, row.case["arithmetic"]): row for row in rows}
    for contestant in dict.fromkeys(row.contestant for row in rows):
        fast, exact = by_kind[contestant, "fast"], by_kind[contestant, "exact"]
        line = {"mesh": fast.contestant + "*" * bool(fast.found["oversubscribed"])}
        for row in (fast, exact):
            if row.p50_ms and fast.p50_ms:
                line[row.case["arithmetic"]] = f"{row.p50_ms:.2f} ms ({row.p50_ms / fast.p50_ms:.2f}×)"
        for header, name in (("messages", "calls"), ("bytes", "call_bytes")):
            if fast.ok and exact.ok:
                line[header] = f"{fast.found[name]:,} → {exact.found[name]:,}"
                predicted = f"predicted_{name.removeprefix('call_')}"
                line[f"{header}, predicted"] = f"{fast.found[predicted]:,} → {exact.found[predicted]:,}"
        lines.append(line)
    return lines


def all_reduces(rows: Sequence[Result]) -> list[dict[str, str]]:
    lines: dict[int, dict[str, str]] = {}
    for row in rows:
        if row.case["kind"] == "all_reduce" and row.p50_ms and row.mean_ms:
            line = lines.setdefault(row.case["nbytes"], {"bytes": f"{row.case['nbytes']:,}"})
            suffix = "" if row.case["way"] == "gloo" else f", {row.case['way']}"
            line[f"median{suffix}"] = f"{1e3 * row.p50_ms:,.0f} µs"
            line[f"mean{suffix}"] = f"{1e3 * row.mean_ms:,.0f} µs"
    return list(lines.values())


def fit_link(rows: Sequence[Result]) -> Link | None:
    """The α–β model of the all-reduces; None if they failed."""
    points = [
        (2, row.case["nbytes"], row.p50_ms / 1e3)
        for row in rows
        if row.case["kind"] == "all_reduce" and row.case["way"] == "gloo" and row.p50_ms
    ]
    return Link.fit(points) if points else None


def crossover(speedups: Mapping[int, float]) -> float | None:
    """The batch from which on the speed-up is at least 1, interpolated on log-log axes.

    Returns:
        The least batch, if that is from the start; None, if the largest is not as fast.
    """
    points = sorted(speedups.items())
    if points[-1][1] < 1:
        return None
    for (b0, s0), (b1, s1) in reversed(list(pairwise(points))):
        if s0 < 1:
            return math.exp(math.log(b0) + math.log(b1 / b0) * -math.log(s0) / math.log(s1 / s0))
    return float(points[0][0])


def draw(path: Path, rows: Sequence[Result]) -> None:
    """Speed-ups by batch and by width, and the all-reduces under their fit."""
    with picture(path, 15, 4.5) as figure:
        batches, widths, messages = figure.subplots(1, 3)
        figure.suptitle("A training step on more ranks, measured")
        by_batch, by_width = chosen(rows, "batch"), chosen(rows, "width")
        draw_speedups(batches, by_batch, lambda row: row.case["batch"])
        batches.set(xlabel="batch over all ranks", title=by_batch[0].case["sizes"])
        draw_speedups(widths, by_width, width)
        widths.set(xlabel="width w", title=f"784-w-w-10, batch {by_width[0].case['batch']}")
        draw_all_reduces(messages, rows)
        for axes in (batches, widths, messages):
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)


def draw_speedups(axes: Any, rows: Sequence[Result], key: Callable[[Result], int]) -> None:
    axes.axhline(1, color="black", lw=1)
    for name, marker in MARKERS.items():
        points = [(key(row), row.speedup) for row in rows if row.contestant == name and row.speedup]
        over = any(row.found["oversubscribed"] for row in rows if row.contestant == name)
        if points:
            label = name + ", more threads than cores" * over
            axes.plot(*zip(*points, strict=True), f":{marker}" if over else f"-{marker}", label=label)
    axes.set(xscale="log", yscale="log", ylim=(0.1, 5), ylabel="speed-up over 1 rank × 1 thread")
    axes.set_yticks(SPEEDUPS, [f"{speedup:g}" for speedup in SPEEDUPS])
    ticks = sorted({key(row) for row in rows})
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks], rotation=30)
    axes.minorticks_off()


def draw_all_reduces(axes: Any, rows: Sequence[Result]) -> None:
    mine = [row for row in rows if row.case["kind"] == "all_reduce" and row.p50_ms]
    for way, color in (("gloo", "C0"), ("gloo's default", "C3"), ("shared memory", "C2")):
        of = [row for row in mine if row.case["way"] == way]
        suffix = f", {way}"
        for name, marker in (("p50_ms", "o"), ("mean_ms", "x")):
            points = [(row.case["nbytes"], 1e3 * getattr(row, name)) for row in of]
            if points:
                label = {"p50_ms": "median", "mean_ms": "mean"}[name] + suffix
                axes.plot(*zip(*points, strict=True), marker, color=color, label=label)
    if link := fit_link(rows):
        sizes = sorted({row.case["nbytes"] for row in mine})
        fitted = [1e6 * link.seconds("all_reduce", 2, n) for n in sizes]
        label = f"2α + nβ: α {1e6 * link.alpha:.0f} µs, β {1e9 * link.beta:.2f} ns/B"
        axes.plot(sizes, fitted, color="C0", label=label)
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="µs", title="All-reduce between 2 ranks")
    axes.set_ylim(top=50 * axes.get_ylim()[1])  # room for the legend
