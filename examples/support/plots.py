# SPDX-License-Identifier: MIT
"""Plots of the examples, by matplotlib."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from support.console import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from torchpar.data import Samples

Array = NDArray[Any]


def as_array(t: "Tensor | Array") -> Array:
    """Return a NumPy array, of a tensor on any device too."""
    return t if isinstance(t, np.ndarray) else t.detach().cpu().numpy()


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=120)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


class Panel(NamedTuple):
    """Lines of ``ys`` over ``x``, one for each value of ``by``. ``rows`` with the same value are
    adjacent.

    With ``log`` the x axis is logarithmic with a tick at each value. Otherwise its ticks are
    integers.
    """

    rows: Sequence[Mapping[str, Any]]
    x: str
    ys: Sequence[str]
    by: Sequence[str] = ()
    log: bool = False


def _write(figure: "Figure", path: Path) -> None:
    """Write a picture.

    Raises:
        ConfigError: the file cannot be written.
    """
    with writing(path, "--plots"):
        figure.savefig(path)


def save_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Draw ``panels``, two in a row."""
    height = math.ceil(len(panels) / 2)
    figure, grid = _subplots(height, 2, (12, 4.5 * height))
    draw_panels(grid, panels)
    _write(figure, path)


def draw_panels(grid: "Sequence[Axes]", panels: Sequence[Panel]) -> None:
    """Draw each panel on its axes; each y has a style, and each value of ``by`` a color."""
    for axes, panel in zip(grid, panels, strict=False):
        for y, style in zip(panel.ys, ("o-", "s--"), strict=False):
            axes.set_prop_cycle(None)
            key = itemgetter(*panel.by) if panel.by else lambda row: ()
            for _, line in groupby(panel.rows, key):
                rows = list(line)
                names = [y] * (len(panel.ys) > 1 or not panel.by)
                names += [f"{name} {rows[0][name]}" for name in panel.by]
                points = ([row[name] for row in rows] for name in (panel.x, y))
                axes.plot(*points, style, label=", ".join(names).replace("_", " "))
        axes.set(xlabel=panel.x.replace("_", " "), ylabel=", ".join(panel.ys).replace("_", " "))
        if panel.log:
            ticks = sorted({row[panel.x] for row in panel.rows})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        elif len({row[panel.x] for row in panel.rows}) == 1:
            axes.set_xticks([panel.rows[0][panel.x]])
        else:
            axes.locator_params(axis="x", integer=True)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)


def save_curves(path: Path, curves: Mapping[str, Sequence[float]], x: str, y: str) -> None:
    """Draw ``curves`` by name, on logarithmic axes; their x is 1, 2, 3, …"""
    figure, (axes,) = _subplots(1, 1, (6.2, 3.7))
    for label, values in curves.items():
        axes.loglog(range(1, 1 + len(values)), values, ".-", label=label, zorder=-len(values))
    axes.set(xlabel=x, ylabel=y)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _write(figure, path)


def save_paths(
    path: Path, paths: "Mapping[str, Tensor]", cost: "Callable[[Tensor], Tensor]", title: str
) -> None:
    """Draw paths ``(steps, 2)`` by name over lines of equal ``cost``, a function ``(n, 2)`` →
    ``(n)``."""
    import torch

    figure, (axes,) = _subplots(1, 1, (4.3, 4.3))
    points = torch.cat(list(paths.values())).cpu()
    low, high = points.amin(0), points.amax(0)
    margin = 0.3 * (high - low).max()
    w, b = (torch.linspace(*ends, 101) for ends in zip(low - margin, high + margin, strict=True))
    b_grid, w_grid = torch.meshgrid(b, w, indexing="ij")
    costs = cost(torch.stack([w_grid, b_grid], -1).flatten(0, 1)).view(w_grid.shape).cpu()
    axes.contour(w.numpy(), b.numpy(), costs.sqrt().numpy(), levels=8, colors="0.8")
    for name, one in paths.items():
        axes.plot(*one.T.cpu().numpy(), ".-", markersize=4, label=name, zorder=-len(one))
    axes.set(xlabel="w", ylabel="b", title=title)
    axes.legend()
    _write(figure, path)


def save_matrices(
    path: Path, matrices: "Tensor | Array", title: str, texts: Sequence[str] = ()
) -> None:
    """Draw ``matrices (n, rows, columns)`` side by side, each in its own range. Dark is large.

    Args:
        texts: above each matrix.
    """
    columns = math.ceil(math.sqrt(len(matrices)))
    rows = math.ceil(len(matrices) / columns)
    figure, grid = _subplots(rows, columns, (8, 8 * rows / columns + 0.4))
    for axes in grid:
        axes.axis("off")
    for axes, matrix in zip(grid, as_array(matrices), strict=False):
        axes.imshow(matrix, cmap="gray_r")
    for axes, text in zip(grid, texts, strict=False):
        axes.set_title(text, fontsize=7)
    figure.suptitle(f"{title} (dark is large)")
    _write(figure, path)


def save_boundaries(
    path: Path, panels: "Mapping[str, tuple[Samples, Callable[[Tensor], Tensor]]]", shown: int = 500
) -> None:
    """Draw points of [−1, 1]² by label, the probability of label 1, and the decision boundary,
    where it is ½.

    Args:
        panels: by title, the points, of which the first ``shown`` are drawn, and a function
            ``(n, 2)`` → ``(n)``.
    """
    import torch

    figure, grid = _subplots(1, len(panels), (4.2 * len(panels), 5))
    side = torch.linspace(-1, 1, 201)
    y, x = torch.meshgrid(side, side, indexing="ij")
    for axes, (title, (points, probability)) in zip(grid, panels.items(), strict=True):
        p = probability(torch.stack([x, y], -1).flatten(0, 1)).view(x.shape).numpy()
        levels = torch.linspace(0, 1, 11).tolist()
        axes.contourf(x.numpy(), y.numpy(), p, levels=levels, cmap="RdBu_r", vmin=-0.6, vmax=1.6)
        axes.contour(x.numpy(), y.numpy(), p, levels=[0.5], colors="black")
        for label, (name, color) in enumerate(
            zip(points.classes, ("tab:blue", "tab:red"), strict=True)
        ):
            mine = points.features[:shown][points.labels[:shown] == label].cpu()
            axes.plot(
                *mine.T.numpy(), ".", markersize=5, color=color, label=f"label {label}: {name}"
            )
        axes.set(
            title=title,
            xlabel="x",
            ylabel="y",
            xticks=(-1, 0, 1),
            yticks=(-1, 0, 1),
            aspect="equal",
        )
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    _write(figure, path)
