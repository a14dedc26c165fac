# SPDX-License-Identifier: MIT
"""Predictions as tables and as a picture, with what was measured beside them."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
from rich.table import Table

from benchmarks.scale_model.predicted import INFINIBAND, MEMORY, NVLINK, PEAK, Row


def table(rows: Sequence[Row], title: str, utilisation: float) -> Table:
    found = Table(
        title=f"PREDICTED, not measured: {title}; MLP of {rows[0].layers} layers width × width, bfloat16; "
        "ms per step",
        caption=f"H100: {PEAK / 1e12:.0f} Tflop/s × {utilisation:.0%} assumed; tp by NVLink 4: "
        f"{1e6 * NVLINK.alpha:.1f} µs, {1e-9 / NVLINK.beta:.0f} GB/s; dp and pp by NDR InfiniBand: "
        f"{1e6 * INFINIBAND.alpha:.1f} µs, {1e-9 / INFINIBAND.beta:.0f} GB/s "
        "(sources: benchmarks/scale_model/predicted.py). calls and bytes: of the rank that sends most, "
        "counted in the fake process group, = or ≠ as predicted. "
        f"GB: weights and gradients of a rank; * exceeds an H100's {MEMORY / 1e9:.0f}.",
        title_justify="left",
        caption_justify="left",
    )
    headers = ["ranks", "dp×tp×pp", "width", "GB", "calls", "bytes", "", "compute", "tp", "pp, idle", "dp"]
    for header in [*headers, "dp left", "step", "overlapped", "efficiency", "overlapped"]:
        found.add_column(header, justify="right", no_wrap=True)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    for (none, full), after in zip(pairs, [*pairs[1:], None], strict=True):
        assert (none.overlap, full.overlap) == ("none", "full")
        times = (
            *(none.PREDICTED_compute_ms, none.PREDICTED_tp_ms, none.PREDICTED_pp_ms),
            *(none.PREDICTED_dp_exposed_ms, full.PREDICTED_dp_exposed_ms),
            *(none.PREDICTED_step_ms, full.PREDICTED_step_ms),
        )
        found.add_row(
            f"{none.ranks:,}",
            none.mesh,
            f"{none.width:,}",
            f"{none.rank_gb:.1f}{'*' * (none.rank_gb * 1e9 > MEMORY)}",
            f"{none.calls:,}",
            f"{none.call_bytes:.2e}",
            "=" if none.counted_equals_predicted else "[red]≠",
            *(f"{ms:,.1f}" for ms in times),
            f"{none.PREDICTED_efficiency:.0%}",
            f"{full.PREDICTED_efficiency:.0%}",
            end_section=after is None or after[0].ranks != none.ranks,
        )
    return found


class Point(NamedTuple):
    """A step that `benchmarks.scaling` measured, and what it predicted with its machine's α and β."""

    name: str
    measured_ms: float
    predicted_ms: float

    @property
    def ratio(self) -> float:
        return self.measured_ms / self.predicted_ms


class Measured(NamedTuple):
    points: list[Point]
    link: str


def read_measured(path: Path) -> Measured:
    """The steps of more than one rank in ``scaling.csv``, and their machine's link in words."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    points = []
    for line in lines:
        if line["kind"] == "step" and int(line["ranks"]) > 1 and line["p50_ms"] and line["predicted_ms"]:
            name = " × ".join(f"{d} {line[d]}" for d in ("dp", "tp") if line[d] != "1")
            points.append(Point(name, float(line["p50_ms"]), float(line["predicted_ms"])))
    alpha, beta = float(lines[0]["alpha_s"]), float(lines[0]["beta_s_per_byte"])
    link = f"{lines[0]['device']}, gloo: α {1e6 * alpha:.0f} µs, β {1e9 * beta:.2f} ns/B"
    return Measured(points, link)


def plot(
    rows: Sequence[Row], path: Path, titles: dict[str, str], utilisation: float, measured: Measured | None
) -> None:
    """Efficiency by ranks for each width, weak and strong; measured over predicted where it was measured."""
    matplotlib.use("Agg")
    panels = 3 if measured else 2
    figure, grid = plt.subplots(1, panels, figsize=(6 * panels, 5.5), layout="constrained")
    for axes, (scaling, title) in zip(grid, titles.items(), strict=False):
        _plot_efficiency(axes, [row for row in rows if row.scaling == scaling])
        axes.set_title(f"PREDICTED {title}")
    if measured:
        _plot_measured(grid[2], measured)
    for axes in grid:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(
        f"PREDICTED, not measured: MLP of {rows[0].layers} layers, H100 at {utilisation:.0%} of its "
        "bfloat16 peak (assumed), NVLink 4 within 8, NDR InfiniBand between",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_efficiency(axes: Any, rows: Sequence[Row]) -> None:
    widths = sorted({row.width for row in rows})
    for i, width in enumerate(widths):
        color = plt.get_cmap("viridis")(i / max(len(widths) - 1, 1) * 0.9)
        for overlap, style, label in (("none", "--", None), ("full", "-", f"width {width:,}")):
            mine = [row for row in rows if (row.width, row.overlap) == (width, overlap)]
            efficiencies = [row.PREDICTED_efficiency for row in mine]
            axes.plot([row.ranks for row in mine], efficiencies, style, marker=".", color=color, label=label)
    axes.set(xscale="log", ylim=(0, 1), xlabel="GPUs (dp×tp×pp)", ylabel="PREDICTED efficiency")
    meshes = {row.ranks: row.mesh for row in rows}
    axes.set_xticks([*meshes], [f"{ranks:,}\n{mesh}" for ranks, mesh in meshes.items()])
    axes.minorticks_off()
    axes.plot([], [], "-", color="gray", label="dp all-reduce overlapped")
    axes.plot([], [], "--", color="gray", label="not overlapped")


def _plot_measured(axes: Any, measured: Measured) -> None:
    for name, marker in zip(sorted({point.name for point in measured.points}), "o^sD", strict=False):
        mine = [point for point in measured.points if point.name == name]
        axes.plot([p.predicted_ms for p in mine], [p.ratio for p in mine], marker, label=name)
    axes.axhline(1, color="black", lw=1)
    axes.set(xscale="log", yscale="log", ylim=(0.2, 5))
    axes.set(xlabel="predicted ms per step", ylabel="MEASURED / predicted")
    axes.set_title(f"The same model where it can be measured\n{measured.link}", fontsize=9)
    axes.set_yticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
    axes.yaxis.minorticks_off()
