# SPDX-License-Identifier: MIT
"""The ladder as a table, as bars, and on a roofline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from rich.table import Table

from benchmarks.ladder.measure import Row
from benchmarks.report import cell

COLORS = {
    "pure Python": "tab:gray",
    "njit": "tab:orange",
    "NumPy": "tab:green",
    "torch": "tab:red",
    "torchpar": "tab:blue",
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
        extrapolated = row.covered is not None and row.covered < 1
        shown.add_row(
            row.rung,
            row.note if row.ok else f"[red]{row.reason}",
            ("~ " if extrapolated else "") + duration(row.seconds),
            cell(row.over_pure_python, "{:,.4g}"),
            cell(row.over_row_above, "{:.2f}"),
            cell(row.rate, "{:,.3g}"),
            cell(row.ceiling, "{:.2%}" if (row.ceiling or 0) < 0.01 else "{:.0%}"),
            cell(row.first_call, "{:.1f} s"),
        )
    return shown


def duration(seconds: float | None) -> str:
    """With three digits, in the unit that suits."""
    if seconds is None:
        return ""
    for unit, least in (("s", 1), ("ms", 1e-3), ("µs", 0)):
        if seconds >= least:
            return f"{seconds / (least or 1e-6):.3g} {unit}"
    raise ValueError(f"a duration of {seconds} s")


def bars(ladder: Sequence[Sequence[Row]], path: Path, origin: Mapping[str, Any], cores: int) -> None:
    """Time of every rung of each workload, on a logarithmic scale."""
    matplotlib.use("Agg")
    figure, grid = plt.subplots(
        len(ladder),
        figsize=(10, 0.6 + sum(0.26 * len(rows) + 0.9 for rows in ladder)),
        height_ratios=[len(rows) + 2 for rows in ladder],
        layout="constrained",
        squeeze=False,
    )
    figure.suptitle(
        f"{origin['device']}, {cores} cores; torch {origin['torch']}, NumPy {origin['numpy']}, "
        f"{origin['date'][:10]}",
        fontsize=10,
    )
    for axes, rows in zip(grid.flat, ladder, strict=True):
        known = [row for row in rows if row.seconds]
        for at, row in enumerate(known):
            assert row.seconds
            (family,) = [name for name in sorted(COLORS, key=len) if row.rung.startswith(name)][-1:]
            extrapolated = row.covered is not None and row.covered < 1
            axes.barh(at, row.seconds, color=COLORS[family], hatch="//" if extrapolated else "", alpha=0.85)
            faster = "" if at == 0 or not row.over_pure_python else f"   {row.over_pure_python:,.3g}×"
            axes.text(row.seconds * 1.1, at, duration(row.seconds) + faster, va="center", fontsize=7)
        labels = [f"{row.rung}, {row.note}" if row.note else row.rung for row in known]
        axes.set_yticks(range(len(known)), labels, fontsize=7)
        axes.invert_yaxis()
        times = [row.seconds for row in known if row.seconds]
        axes.set(xscale="log", xlim=(min(times) / 3, max(times) * 12))
        axes.set_title(rows[0].workload, fontsize=9, loc="left")
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(axis="x", alpha=0.3)
    grid[-1, 0].set_xlabel("seconds; hatched: extrapolated from a part")
    figure.savefig(path, dpi=120)
    plt.close(figure)
