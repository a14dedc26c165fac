# SPDX-License-Identifier: MIT
"""Results as tables, in words and as a picture."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from rich.table import Table

from benchmarks.report import cell
from benchmarks.scaling.plan import CORES, Configuration
from benchmarks.scaling.results import Results, crossover

BAR = (8192, 1.8)  # the batch at which two ranks on two cores must be so much faster than one
SPEEDUPS = (0.125, 0.25, 0.5, 1, 2, 4)  # on the axes of the pictures
POLLING = {"batch": "", "default": ", as gloo comes"}
TIME = ("{:,.2f}", 1e3)


def tables(results: Results) -> list[Table]:
    """Steps by batch and width, weak scaling, reductions, all-reduces."""
    plan = results.plan
    model, wide = Configuration(plan.sizes, 1).model, f"{plan.sizes[0]}-w-w-{plan.sizes[-1]}"
    step = ["spread", "median", "mean", "speed-up", "of means", "predicted", "measured/pred.", ""]
    weak = ["batch per rank", "spread", "1 rank ms", "ms", "efficiency", "of means", ""]
    price = ["spread", "reduction", "ms", "mean", "× fast", "calls", "predicted", "bytes", "predicted", ""]
    pollings = dict.fromkeys(polling for polling, _ in results.all_reduces)
    centres = [f"{centre}{POLLING[polling]}" for polling in pollings for centre in ("median", "mean")]
    return [
        _table(
            f"strong scaling of a training step, {model}: ms, speed-up over 1 rank × 1 thread",
            ["batch", *step],
            _steps(results, plan.by_batch),
        ),
        _table(f"the same of {wide}, batch {plan.width_batch}", ["w", *step], _steps(results, plan.by_width)),
        _table(
            "weak scaling, data parallel: efficiency = time of one rank × one thread over that of dp ranks "
            "with as much each",
            weak,
            _weak(results),
        ),
        _table(
            f"the price of reduction='invariant', {model}, batch {plan.reduction_batch}: a step of rank 0 "
            "(an all-reduce counts once, an exchange as the message sent)",
            price,
            _reductions(results),
        ),
        _table("an all-reduce between 2 ranks, µs", ["bytes", *centres, "predicted"], _all_reduces(results)),
    ]


def _table(title: str, headers: Sequence[str], rows: Iterator[list[str]]) -> Table:
    """``rows`` under ``headers``, and a rule where several begin alike and the next does not."""
    table = Table(title=title, title_justify="left")
    for header in headers:
        left = header in ("spread", "reduction", "")
        table.add_column(header, justify="left" if left else "right", no_wrap=True)
    found = list(rows)
    firsts = [cells[0] for cells in found]
    grouped = len(set(firsts)) < len(found)
    for cells, following in zip(found, [*firsts[1:], ""], strict=True):
        table.add_row(*cells, end_section=grouped and cells[0] != following)
    return table


def _steps(results: Results, varied: Mapping[int, Configuration]) -> Iterator[list[str]]:
    for value, alone in varied.items():
        for one in results.plan.ways(alone):
            steps, predicted = results.steps[one], results.predicted(one)
            ratio = steps.median / predicted if steps.median and predicted else None
            yield [
                f"{value:,}",
                one.spread,
                cell(steps.median, *TIME),
                cell(steps.mean, *TIME),
                cell(results.speedup(one), "{:.2f}"),
                cell(results.mean_speedup(one), "{:.2f}"),
                cell(predicted, *TIME),
                cell(ratio, "{:.2f}"),
                steps.reason or one.note,
            ]


def _weak(results: Results) -> Iterator[list[str]]:
    """Batch per rank fixed: what a rank keeps of its speed."""
    for batch, alone in results.plan.by_batch.items():
        for dp in sorted(dp for dp, tp in results.plan.spreads if tp == 1):
            one = replace(alone, batch=batch * dp, dp=dp)
            if one not in results.steps:
                continue
            mine, theirs = results.steps[one].times, results.steps[alone].times
            if mine and theirs:
                efficiencies = [f"{centre(theirs) / centre(mine):.0%}" for centre in (median, mean)]
                times = [cell(median(times), *TIME) for times in (theirs, mine)]
                yield [f"{batch:,}", one.spread, *times, *efficiencies, one.note]


def _reductions(results: Results) -> Iterator[list[str]]:
    for pair in results.plan.reductions:
        fast = results.steps[pair[0]].median
        for one in pair:
            steps, first = results.steps[one], results.steps[one].prepared[0]
            sent = [e.nbytes for e in first.expected if e.operation != "recv"]
            yield [
                one.spread,
                one.reduction,
                cell(steps.median, *TIME),
                cell(steps.mean, *TIME),
                cell(steps.median / fast if steps.median and fast else None, "{:.2f}"),
                f"{first.calls}",
                f"{len(sent)}",
                f"{first.call_bytes:,}",
                f"{sum(sent):,}",
                steps.reason or one.note,
            ]


def _all_reduces(results: Results) -> Iterator[list[str]]:
    for nbytes in results.plan.all_reduces:
        times = [t for (_, n), t in results.all_reduces.items() if n == nbytes]
        found = [centre(t) for t in times for centre in (median, mean)]
        found.append(results.link.seconds("all_reduce", 2, nbytes))
        yield [f"{nbytes:,}", *(f"{1e6 * seconds:,.0f}" for seconds in found)]


def lines(results: Results) -> Iterator[str]:
    """The link, the crossovers, and the bar."""
    plan = results.plan
    links = {"link by medians": results.link, "by means": results.fit_link(mean)}
    yield "; ".join(
        f"{name}: α {1e6 * link.alpha:.0f} µs, β {1e9 * link.beta:.2f} ns/B" for name, link in links.items()
    )
    for dp, tp in plan.spreads:
        one = Configuration(plan.sizes, plan.batches[-1], dp, tp)
        if not one.oversubscribed:
            predicted = _crossover(_known(results.predicted_speedup, plan.between, one))
            measured = _crossover(_known(results.speedup, plan.by_batch, one))
            yield (
                f"{one.spread} overtakes one rank × one thread at batch: predicted {predicted}, "
                f"measured {measured}"
            )
    one = Configuration(plan.sizes, plan.batches[-1], dp=2)
    speedup = results.speedup(one)
    if speedup is not None:
        at, bar = BAR
        verdict = "" if one.batch != at else ": met" if speedup >= bar else ": NOT met"
        yield (
            f"2 ranks on {CORES} cores at batch {one.batch}, {one.model}: {speedup:.2f}× one rank × one "
            f"thread (at {at} at least {bar}× on 2 quiet cores{verdict})"
        )


def _crossover(speedups: Mapping[int, float]) -> str:
    if not speedups:
        return "not measured"
    found, least = crossover(speedups), min(speedups)
    if found is None:
        return "none"
    return f"{least} or less" if found == least else f"{found:.0f}"


def _known(
    speedup: Callable[[Configuration], float | None], varied: Mapping[int, Configuration], way: Configuration
) -> dict[int, float]:
    """The speed-ups that there are of ``varied``, spread as ``way`` is."""
    spread = {x: replace(one, dp=way.dp, tp=way.tp, threads=way.threads) for x, one in varied.items()}
    return {x: found for x, one in spread.items() if (found := speedup(one)) is not None}


def plot(results: Results, path: Path, origin: Mapping[str, Any]) -> None:
    """Speed-up by batch for each kind of split, by width, and the all-reduces under their fit."""
    matplotlib.use("Agg")
    plan = results.plan
    figure, ((data, tensor), (widths, all_reduces)) = plt.subplots(
        2, 2, figsize=(12, 9), layout="constrained"
    )
    figure.suptitle(
        f"A training step on {CORES} cores, gloo: measured (points), predicted by α–β (lines)\n"
        f"{origin['device']}, torch {origin['torch']}, {origin['date'][:10]}",
        fontsize=11,
    )
    alone = Configuration(plan.sizes, 1)
    rival = (replace(alone, threads=2), "s--", "tab:gray")
    dp, tp = (replace(alone, dp=2), "o", "tab:blue"), (replace(alone, tp=2), "^", "tab:orange")
    dp4, tp4 = (replace(alone, dp=4), "o", "tab:red"), (replace(alone, tp=4), "^", "tab:red")
    shown = {batch: one for batch, one in plan.between.items() if batch >= plan.batches[0] / 2}
    for axes, kind, ways in ((data, "Data", [rival, dp, dp4]), (tensor, "Tensor", [rival, tp, tp4])):
        _plot_speedups(axes, results, plan.by_batch, shown, ways)
        axes.set(xlabel="global batch", title=f"{kind} parallel, {alone.model}")
    _plot_speedups(widths, results, plan.by_width, plan.by_width, [rival, dp, tp])
    title = f"{plan.sizes[0]}-w-w-{plan.sizes[-1]}, batch {plan.width_batch}"
    widths.set(xlabel="width w", title=title)
    _plot_all_reduces(all_reduces, results)
    for axes in (data, tensor, widths, all_reduces):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_speedups(
    axes: Any,
    results: Results,
    measured: Mapping[int, Configuration],
    predicted: Mapping[int, Configuration],
    ways: Sequence[tuple[Configuration, str, str]],
) -> None:
    """Of steps spread in ``ways``, each with its style and color."""
    axes.axhline(1, color="black", lw=1)
    for way, style, color in ways:
        points = _known(results.speedup, measured, way)
        line = _known(results.predicted_speedup, predicted, way)
        if points:
            style, label = ("x:", ", oversubscribed") if way.oversubscribed else (style, "")
            label = f"{way.spread}, measured{label}"
            axes.plot([*points], [*points.values()], style, color=color, lw=1, ms=5, label=label)
        if line:
            axes.plot([*line], [*line.values()], color=color, label=f"{way.spread}, predicted")
    axes.set(xscale="log", yscale="log", ylim=(0.1, 5), ylabel="speed-up over 1 rank × 1 thread")
    axes.set_yticks(SPEEDUPS, [f"{speedup:g}" for speedup in SPEEDUPS])
    axes.set_xticks([*measured], [f"{x:,}" for x in measured])
    axes.minorticks_off()


def _plot_all_reduces(axes: Any, results: Results) -> None:
    link, sizes = results.link, results.plan.all_reduces
    for polling in dict.fromkeys(polling for polling, _ in results.all_reduces):
        color = "tab:blue" if polling == "batch" else "tab:red"
        for centre, marker in ((median, "o"), (mean, "x")):
            times = [1e6 * centre(results.all_reduces[polling, n]) for n in sizes]
            axes.plot(sizes, times, marker, color=color, label=f"{centre.__name__}{POLLING[polling]}")
    dense = [2 ** (i / 4) for i in range(8, round(4 * math.log2(sizes[-1])) + 1)]
    predicted = [1e6 * link.seconds("all_reduce", 2, round(n)) for n in dense]
    label = f"2α + nβ: α {1e6 * link.alpha:.0f} µs, β {1e9 * link.beta:.2f} ns/B"
    axes.plot(dense, predicted, color="tab:blue", label=label)
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="µs", title="All-reduce between 2 ranks")
