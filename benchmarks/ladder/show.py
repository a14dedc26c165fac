# SPDX-License-Identifier: MIT
"""The ladder as the README's table, as bars, and on a roofline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Result, duration, markdown, number, picture

COLORS = {
    "pure Python": "tab:gray",
    "njit": "tab:orange",
    "NumPy": "tab:green",
    "torch": "tab:red",
    "torchpar": "tab:blue",
    "Triton": "tab:cyan",
    "2 ranks": "tab:purple",
}


def label(row: Result) -> str:
    return ", ".join(filter(None, (row.contestant, row.found["note"])))


def seconds(row: Result) -> float | None:
    return row.p50_ms and row.p50_ms / 1e3


def table(rows: Sequence[Result]) -> str:
    """The table of one workload in Markdown."""
    lines = [[rows[0].case["workload"], "time", "× pure Python", "× rung before"]]
    for row in rows:
        ratios = [number(row.found.get(name)) for name in ("over_pure_python", "over_rung_before")]
        lines.append([label(row), duration(seconds(row)), *ratios])
    return markdown(lines)


def bars(ladder: Sequence[list[Result]], path: Path, title: str) -> None:
    """Time of every rung, on a logarithmic scale."""
    with picture(path, 8, 9) as figure:
        figure.suptitle(f"{title}. Hatched: extrapolated from a part", fontsize=10)
        heights = [len(rows) + 2 for rows in ladder]
        panels = figure.subplots(len(ladder), height_ratios=heights, squeeze=False)[:, 0]
        for axes, rows in zip(panels, ladder, strict=True):
            draw_bars(axes, rows)
        panels[-1].set_xlabel("seconds")


def draw_bars(axes: Any, rows: Sequence[Result]) -> None:
    known = [(row, row.p50_ms / 1e3) for row in rows if row.p50_ms]
    for at, (row, time) in enumerate(known):
        hatch = "//" if row.found["covered"] < 1 else ""
        axes.barh(at, time, color=color(row), hatch=hatch, alpha=0.85)
        faster = f"   {number(row.found['over_pure_python'])}×" if row.found.get("over_pure_python") else ""
        axes.text(time * 1.1, at, duration(time) + faster * (at > 0), va="center", fontsize=7)
    axes.set_yticks(range(len(known)), [label(row) for row, _ in known], fontsize=7)
    axes.invert_yaxis()
    times = [time for _, time in known] or [1.0]
    axes.set(xscale="log", xlim=(min(times) / 3, max(times) * 12))
    axes.set_title(rows[0].case["workload"], fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", alpha=0.3)


def color(row: Result) -> str:
    """The color of the longest name that the rung's begins with."""
    return COLORS[max((name for name in COLORS if row.contestant.startswith(name)), key=len)]


def intensity(
    rows: Sequence[Result], path: Path, title: str, roofs: dict[str, float], arithmetic: float
) -> None:
    """Speed of X·Xᵀ by needed operations per byte loaded, under what loads and arithmetic allow.

    Args:
        rows: with an intensity, those of loops on the CPU.
        roofs: bytes/s that are loaded from the memory, or from a cache, by name.
        arithmetic: flop/s of a product.
    """
    known = [row for row in rows if row.found.get("intensity") and row.found.get("gflop_per_s")]
    points = [(row, row.found["intensity"], row.found["gflop_per_s"]) for row in known]
    span = [x for _, x, _ in points] or [1.0]
    left, right = min(span) / 3, max(span) * 8
    with picture(path, 9, 5.5) as figure:
        axes = figure.subplots()
        for name, bandwidth in roofs.items():
            reach = [left, arithmetic / bandwidth, right]
            heights = [min(x * bandwidth, arithmetic) / 1e9 for x in reach]
            text = f"{name}, {bandwidth / 1e9:.0f} GB/s; torch.mm, {arithmetic / 1e9:.0f} GFLOP/s"
            axes.plot(reach, heights, lw=1, label=text, zorder=1)
        for row, x, y in points:
            axes.plot(x, y, "o", color=color(row), zorder=3)
            parallel = "parallel" in row.contestant
            axes.annotate(  # threads to the left of the point, above the roofs; one thread to the right
                label(row).replace(", parallel", ""),
                (x, y),
                xytext=(-7, 5) if parallel else (7, -9),
                ha="right" if parallel else "left",
                textcoords="offset points",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
                zorder=2,
            )
        axes.set(xscale="log", yscale="log", xlim=(left, right))
        axes.set(xlabel="needed operations per byte loaded", ylabel="GFLOP/s of needed operations")
        axes.set_title(f"{rows[0].case['workload']}\n{title}", fontsize=10)
        axes.legend(fontsize=8, loc="lower right")
        axes.grid(alpha=0.3)
