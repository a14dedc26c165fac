# SPDX-License-Identifier: MIT
"""The ladder as a table, as bars, and on a roofline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from rich.markup import escape
from rich.table import Table

from benchmarks.ladder.measure import Row
from benchmarks.ladder.whole import LIGHTNING, PLAIN
from benchmarks.report import cell
from benchmarks.timing import Ceiling

COLORS = {
    "pure Python": "tab:gray",
    "njit": "tab:orange",
    "NumPy": "tab:green",
    "torch": "tab:red",
    "torchpar": "tab:blue",
    "Lightning": "tab:pink",
    "Triton": "tab:cyan",
    "2 ranks": "tab:purple",
}


def table(rows: Sequence[Row]) -> Table:
    """The rows of one workload."""
    shown = Table(title=rows[0].workload, title_justify="left")
    shown.add_column("rung")
    shown.add_column("")
    for header in ("time", "× pure Python", "× row above", rows[0].unit, "of ceiling", "first call"):
        shown.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row.rung,
            note(row) if row.ok else f"[red]{escape(row.reason)}",
            ("~ " if extrapolated(row) else "") + duration(row.seconds),
            number(row.over_pure_python),
            cell(row.over_row_above, "{:.2f}"),
            number(row.rate),
            cell(row.ceiling, "{:.2%}" if (row.ceiling or 0) < 0.01 else "{:.0%}"),
            cell(row.first_call, "{:.1f} s"),
        )
    return shown


def number(x: float | None) -> str:
    """With three digits, or whole."""
    return cell(x, "{:.3g}" if (x or 0) < 999 else "{:,.0f}")


def extrapolated(row: Row) -> bool:
    return row.covered is not None and row.covered < 1


def note(row: Row) -> str:
    """What is said beside the name; of a time that is extrapolated, from what."""
    part = f"from {row.covered:.0%}" if extrapolated(row) and "from" not in row.note else ""
    return ", ".join(filter(None, (row.note, part)))


def duration(seconds: float | None) -> str:
    """With three digits, in the unit that suits."""
    if seconds is None:
        return ""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * scale:.3g} {unit}" if seconds * scale < 999 else f"{seconds * scale:,.0f} {unit}"


def overhead(rows: Sequence[Row], steps: int) -> str:
    """What Lightning's loop costs, in a line; nothing where one of the two was not measured."""
    seconds = {row.rung: row.seconds for row in rows}
    plain, lightning = seconds.get(PLAIN), seconds.get(LIGHTNING)
    if plain is None or lightning is None:
        return ""
    return (
        f"{rows[0].workload}: a step takes {1e6 * plain / steps:.0f} µs in {PLAIN}, "
        f"{1e6 * (lightning - plain) / steps:.0f} µs more in {LIGHTNING}"
    )


def against_gpu(rows: Sequence[Row], bar: float = 40) -> str:
    """How much faster the GPU is than the loops, in a line."""
    seconds = {row.rung: row.seconds for row in rows}
    gpu = seconds.get("torchpar GPU")
    loops = [(name, seconds.get(name)) for name in ("pure Python", "njit")]
    if gpu is None or any(loop is None for _, loop in loops):
        return f"{rows[0].workload}: not measured on the GPU"
    ratios = {name: loop / gpu for name, loop in loops if loop is not None}
    verdict = "met" if min(ratios.values()) >= bar else "NOT met"
    told = ", ".join(f"{ratio:,.0f}× {name}" for name, ratio in ratios.items())
    return f"{rows[0].workload}: the GPU is {told} (at least {bar:g}×: {verdict})"


def intensity(
    rows: Sequence[Row], path: Path, origin: Mapping[str, Any], ceiling: Ceiling, cache: float
) -> None:
    """Speed of X·Xᵀ by needed operations per byte loaded, under what loads and arithmetic allow.

    Args:
        rows: with an intensity, those of the CPU.
        ceiling: of the CPU.
        cache: bytes/s that one core of the CPU loads from its first-level cache.
    """
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    known = [(row, row.intensity, row.rate) for row in rows if row.intensity and row.rate]
    span = [x for _, x, _ in known] or [1.0]
    left, right = min(span) / 2, max(span) * 8
    arithmetic = ceiling.matmul[torch.float32]
    for name, bandwidth, style in (("memory", ceiling.bandwidth, "-"), ("a core's cache", cache, "--")):
        reach = [left, arithmetic / bandwidth, right]
        heights = [min(x * bandwidth, arithmetic) / 1e9 for x in reach]
        label = f"cpu: {name}, {bandwidth / 1e9:.0f} GB/s; torch.mm, {arithmetic / 1e9:.0f} GFLOP/s"
        axes.plot(reach, heights, style, lw=1, label=label)
    for row, *at in known:
        axes.plot(*at, "o", color=_color(row.rung))
        label = ", ".join(filter(None, (row.rung, note(row))))
        axes.annotate(label, (at[0], at[1]), xytext=(6, -3), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set(xlabel="needed operations per byte loaded", ylabel="GFLOP/s of needed operations")
    axes.set_title(f"{rows[0].workload}\n{origin['device']}, {origin['date'][:10]}", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _color(rung: str) -> str:
    """Of the longest name that the rung's begins with."""
    return COLORS[max((name for name in COLORS if rung.startswith(name)), key=len)]


def bars(ladder: Sequence[Sequence[Row]], path: Path, origin: Mapping[str, Any]) -> None:
    """Time of every rung, on a logarithmic scale: operations on the left, epochs on the right."""
    matplotlib.use("Agg")
    epochs = ["epoch" in rows[0].workload for rows in ladder]
    figure = plt.figure(figsize=(14, 9), layout="constrained")
    machine = ", ".join(filter(None, (origin["device"], f"{origin['cores']} cores", origin["gpu"])))
    versions = f"torch {origin['torch']}, NumPy {origin['numpy']}, {origin['date'][:10]}"
    figure.suptitle(f"{machine}; {versions}. Hatched: extrapolated from a part", fontsize=10)
    halves = figure.subfigures(1, 2, squeeze=False)[0]
    for side, half in zip((False, True), halves, strict=True):
        workloads = [rows for rows, epoch in zip(ladder, epochs, strict=True) if epoch is side]
        heights = [len(rows) + 2 for rows in workloads]
        grid = half.subplots(len(workloads), height_ratios=heights, squeeze=False)
        for axes, rows in zip(grid.flat, workloads, strict=True):
            _bars(axes, rows)
        grid[-1, 0].set_xlabel("seconds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    known = [(row, row.seconds) for row in rows if row.seconds]
    for at, (row, seconds) in enumerate(known):
        hatch = "//" if extrapolated(row) else ""
        axes.barh(at, seconds, color=_color(row.rung), hatch=hatch, alpha=0.85)
        faster = f"   {number(row.over_pure_python)}×" if at and row.over_pure_python else ""
        axes.text(seconds * 1.1, at, duration(seconds) + faster, va="center", fontsize=7)
    labels = [", ".join(filter(None, (row.rung, note(row)))) for row, _ in known]
    axes.set_yticks(range(len(known)), labels, fontsize=7)
    axes.invert_yaxis()
    times = [seconds for _, seconds in known] or [1.0]
    axes.set(xscale="log", xlim=(min(times) / 3, max(times) * 12))
    axes.set_title(rows[0].workload, fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", alpha=0.3)
