# SPDX-License-Identifier: MIT
"""Plots of the examples, by matplotlib."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from torchpar.data import Samples
from torchpar.training.state import EpochResult

WORST = (4, 8)  # rows and columns of the picture of worst-classified samples


def save(folder: Path, results: list[EpochResult], outputs: Tensor, test: Samples) -> None:
    """Write ``curves.png``, ``confusion.png`` and ``worst.png``.

    Args:
        outputs: of all test samples, as `torchpar.training.evaluate` returns them.
    """
    epochs = [asdict(result) for result in results]
    curves = (["train_loss", "test_loss"], ["test_accuracy"])
    save_panels(folder / "curves.png", [Panel(epochs, "epoch", ys) for ys in curves])
    for name, figure in (("confusion", _confusion(outputs, test)), ("worst", _worst(outputs, test))):
        figure.savefig(folder / f"{name}.png", dpi=120)


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


class Panel(NamedTuple):
    """Lines of ``ys`` over ``x``, one for each value of ``by``. ``rows`` with the same value are adjacent.

    With ``log`` the x axis is logarithmic with a tick at each value. Otherwise its ticks are integers.
    """

    rows: Sequence[Mapping[str, Any]]
    x: str
    ys: Sequence[str]
    by: Sequence[str] = ()
    log: bool = False


def save_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Draw ``panels``, two in a row. Each y has its own style, and each value of ``by`` its own color."""
    height = math.ceil(len(panels) / 2)
    figure, grid = _subplots(height, 2, (12, 4.5 * height))
    for axes, panel in zip(grid, panels, strict=False):

        def key(row: Mapping[str, Any], names: Sequence[str] = panel.by) -> list[Any]:
            return [row[name] for name in names]

        for y, style in zip(panel.ys, ("o-", "s--"), strict=False):
            axes.set_prop_cycle(None)
            for _, line in groupby(panel.rows, key):
                rows = list(line)
                names = [y] * (len(panel.ys) > 1 or not panel.by)
                names += [_label(name, rows[0][name]) for name in panel.by]
                points = ([row[name] for row in rows] for name in (panel.x, y))
                axes.plot(*points, style, label=", ".join(names).replace("_", " "))
        axes.set(xlabel=panel.x.replace("_", " "), ylabel=", ".join(panel.ys).replace("_", " "))
        if panel.log:
            ticks = sorted({row[panel.x] for row in panel.rows})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _label(name: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{name} {value:g}"


def save_curves(path: Path, curves: Mapping[str, Sequence[float]], x: str, y: str) -> None:
    """Draw ``curves`` by name, on logarithmic axes; their x is 1, 2, 3, …"""
    figure, (axes,) = _subplots(1, 1, (7, 4))
    for name, values in curves.items():
        marker = "o" if len(values) == 1 else None
        axes.plot(range(1, 1 + len(values)), values, marker=marker, label=name)
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def save_matrices(path: Path, matrices: Tensor, title: str) -> None:
    """Draw ``matrices (n, rows, columns)`` side by side, each in its own range. Dark is large."""
    columns = math.ceil(math.sqrt(len(matrices)))
    rows = math.ceil(len(matrices) / columns)
    figure, grid = _subplots(rows, columns, (6, 6 * rows / columns + 0.4))
    for axes in grid:
        axes.axis("off")
    for axes, matrix in zip(grid, matrices.detach().cpu().numpy(), strict=False):
        axes.imshow(matrix, cmap="gray_r")
    figure.suptitle(f"{title} (dark is large)")
    figure.savefig(path, dpi=120)


def _confusion(outputs: Tensor, test: Samples) -> Figure:
    classes = test.classes
    pairs = test.labels * len(classes) + outputs.argmax(1)
    confusion = pairs.bincount(minlength=len(classes) ** 2).view(len(classes), -1).cpu()
    figure, (axes,) = _subplots(1, 1, (7, 6))
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)  # the root shows small shares
    for label, row in enumerate(confusion.tolist()):
        for predicted, count in enumerate(row):
            color = "white" if shares[label, predicted] > 0.25 else "black"
            axes.text(predicted, label, str(count), ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="predicted", ylabel="label", title="Test samples by label and prediction")
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    return figure


def _worst(outputs: Tensor, test: Samples) -> Figure:
    rows, columns = WORST
    of_label = outputs.gather(1, test.labels[:, None]).squeeze(1)
    margin = of_label - outputs.scatter(1, test.labels[:, None], -torch.inf).amax(1)
    figure, grid = _subplots(rows, columns, (1.5 * columns, 1.8 * rows))
    for axes in grid:
        axes.axis("off")
    for axes, index in zip(grid, margin.argsort().tolist(), strict=False):
        axes.imshow(test.features[index].cpu().numpy(), cmap="gray_r")
        label, predicted = (test.classes[i] for i in (test.labels[index], outputs[index].argmax()))
        axes.set_title(f"{label}\nread as {predicted}", fontsize=7)
    figure.suptitle("Worst-classified test samples")
    return figure
