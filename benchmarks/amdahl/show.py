# SPDX-License-Identifier: MIT
"""The times, what they say by Amdahl's law, and a picture of both."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.amdahl.law import PHASES, Scaling, speedup
from benchmarks.amdahl.measure import Job, measure
from benchmarks.scaling.plan import CORES
from torchpar.errors import ConfigError

ALIKE = 1e-4  # of a loss: rounding is some 1e-7, a batch that is shared otherwise or samples left out 1e-2


def report(
    job: Job, processes: Sequence[int], sizes: Sequence[int], plots: Path | None = None
) -> list[dict[str, Any]]:
    """`measure`, and print the times by phase, each `Scaling.finding` and what these are worth.

    Args:
        plots: an existing folder for ``amdahl.png``.

    Returns:
        The `Scaling.rows` of all sizes.
    """
    scalings = measure(job, processes, sizes)
    off = max(abs(loss / s.losses[1] - 1) for s in scalings for loss in s.losses.values())
    if not off <= ALIKE:
        raise ConfigError(
            f"several processes come to another loss than one, by {off:.0e} of it; mend the step"
        )
    rows = [row for scaling in scalings for row in scaling.rows()]
    table = Table(title="an epoch by phase, rank 0, in ms", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("batch", "N", *PHASES, "all", "S"):
        table.add_column(column, justify="right")
    for row in rows:
        ms = [f"{row[f'{column}_ms']:.1f}" for column in (*PHASES, "epoch")]
        table.add_row(str(row["batch_size"]), str(row["processes"]), *ms, f"{row['speedup']:.2f}")
    Console().print(table)
    law = Table(title="by Amdahl's law", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in (
        "batch",
        "p",
        "by profile",
        "limit 1/(1 − p)",
        f"achieved on {processes[-1]}",
        "limited by",
    ):
        law.add_column(column, justify="right")
    for s in scalings:
        limit = f"{speedup(s.p, math.inf):.2f}" if s.p < 1 else "none"
        shown = (f"{s.p:.3f}", f"{s.p_of_profile:.3f}", limit, f"{s.speedups[processes[-1]]:.2f}")
        law.add_row(str(s.batch_size), *shown, s.limiting[0])
    Console().print(law)
    for scaling in scalings:
        print(scaling.finding())
    print(f"any number of processes comes to the loss of one, but for {off:.0e} of it")
    print("while phases are timed a collective overlaps with nothing: a plain run is faster than this")
    most = processes[-1]
    if len(processes) == 2:
        print(f"p is of N = {most} alone: whether the law holds, only more processes would tell")
    if most > CORES:
        print(f"{most} processes on {CORES} cores are oversubscribed: the machine limits them, not the law")
    if plots:
        _save_picture(plots / "amdahl.png", scalings, rows)
    return rows


def _save_picture(path: Path, scalings: Sequence[Scaling], rows: Sequence[dict[str, Any]]) -> None:
    """Speed-ups on the law's curves, with their limits, and the phases stacked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = [2 ** (i / 4) for i in range(4 * (3 + math.ceil(math.log2(rows[-1]["processes"]))) + 1)]
    for i, s in enumerate(scalings):
        limit = f"limit {speedup(s.p, math.inf):.1f}" if s.p < 1 else "no limit"
        label = f"batch {s.batch_size}, p {s.p:.3f}, {limit}"
        left.plot(numbers, [speedup(s.p, n) for n in numbers], f"C{i}", label=label)
        left.plot(list(s.speedups), list(s.speedups.values()), f"oC{i}")
        if s.p < 1:
            left.axhline(speedup(s.p, math.inf), color=f"C{i}", linestyle=":")
    left.plot(numbers, numbers, "k--", label="S = N")
    left.set(xlabel="processes N", ylabel="speed-up S", title="Measured (dots), Amdahl's law, limit (dotted)")
    left.set_xscale("log", base=2)
    left.set_yscale("log", base=2)
    left.legend()
    names = [f"{row['batch_size']}\nN = {row['processes']}" for row in rows]
    below = [0.0] * len(rows)
    for phase in PHASES:
        heights = [row[f"{phase}_ms"] for row in rows]
        right.bar(names, heights, bottom=below, label=phase)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    right.set(xlabel="batch size, processes", ylabel="time of an epoch (ms)", title="Time by phase, rank 0")
    right.legend()
    figure.savefig(path, dpi=110)
