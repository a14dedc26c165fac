# SPDX-License-Identifier: MIT
"""Plots of the examples, by matplotlib."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchpar.errors import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from torchpar.data import Samples

Array = NDArray[Any]
SHOWN = 500  # points of a set


def as_array(t: "Tensor | Array") -> Array:
    """Return a NumPy array, of a tensor on any device too."""
    return t if isinstance(t, np.ndarray) else t.detach().cpu().numpy()


@contextmanager
def picture(
    path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1
) -> "Iterator[list[Axes]]":
    """Yield the axes of a picture of ``size`` inches, row by row; at the end write it, and say
    where.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=120)
    yield list(figure.subplots(rows, columns, squeeze=False).flat)
    with writing(path, "--plots"):
        figure.savefig(path)
    print(f"picture: {path}")


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


def save_neurons(path: Path, layers: "Mapping[str, Callable[[Tensor], Tensor]]") -> None:
    """Draw over [−1, 1]² what each neuron of a network computes, a column for each layer.

    Args:
        layers: by title, a function of points ``(n, 2)`` → ``(n, neurons)``.
    """
    import torch

    side = torch.linspace(-1, 1, 61)
    ys, xs = torch.meshgrid(side, side, indexing="ij")
    plane = torch.stack([xs, ys], -1).flatten(0, 1)
    values = {name: function(plane).T.view(-1, *xs.shape) for name, function in layers.items()}
    rows, columns = max(map(len, values.values())), len(values)
    with picture(path, (1.5 * columns + 0.6, 1.2 * rows + 0.7), rows, columns) as grid:
        for axes in grid:
            axes.axis("off")
        for column, (name, neurons) in enumerate(values.items()):
            grid[column].set_title(name, fontsize=7)
            for axes, z in zip(grid[column::columns], as_array(neurons), strict=False):
                most = float(abs(z).max()) or 1.0
                axes.imshow(z, cmap="RdBu_r", vmin=-most, vmax=most, origin="lower")
                if z.min() < 0 < z.max():
                    axes.contour(z, levels=[0.0], colors="black", linewidths=0.7)
        grid[0].figure.suptitle("Each neuron over the plane: red above 0, blue below", fontsize=8)


def save_curves(path: Path, curves: Mapping[str, Sequence[float]], x: str, y: str) -> None:
    """Draw ``curves`` by name, on logarithmic axes; their x is 1, 2, 3, …"""
    with picture(path, (6.2, 3.7)) as (axes,):
        for label, values in curves.items():
            axes.loglog(range(1, 1 + len(values)), values, ".-", label=label, zorder=-len(values))
        axes.set(xlabel=x, ylabel=y)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)


def on_grid(function: "Callable[[Tensor], Tensor]", x: "Tensor", y: "Tensor") -> list[Array]:
    """Return x, y and a function ``(n, 2)`` → ``(n)`` of them, each on a grid for contours."""
    import torch

    ys, xs = torch.meshgrid(y, x, indexing="ij")
    z = function(torch.stack([xs, ys], -1).flatten(0, 1)).view(xs.shape)
    return [as_array(t) for t in (xs, ys, z)]


def save_matrices(
    path: Path, matrices: "Tensor | Array", title: str, texts: Sequence[str] = ()
) -> None:
    """Draw ``matrices (n, rows, columns)`` side by side, each in its own range. Dark is large.

    Args:
        texts: above each matrix.
    """
    columns = math.ceil(math.sqrt(len(matrices)))
    rows = math.ceil(len(matrices) / columns)
    with picture(path, (8, 8 * rows / columns + 0.4), rows, columns) as grid:
        for axes in grid:
            axes.axis("off")
        for axes, matrix in zip(grid, as_array(matrices), strict=False):
            axes.imshow(matrix, cmap="gray_r")
        for axes, text in zip(grid, texts, strict=False):
            axes.set_title(text, fontsize=7)
        grid[0].figure.suptitle(f"{title} (dark is large)")


def save_boundaries(
    path: Path, panels: "Mapping[str, tuple[Samples, Callable[[Tensor], Tensor]]]"
) -> None:
    """Draw points of [−1, 1]² by label, the probability of label 1, and the decision boundary,
    where it is ½.

    Args:
        panels: by title, the points, of which the first `SHOWN` are drawn, and a function
            ``(n, 2)`` → ``(n)``.
    """
    import torch

    side = torch.linspace(-1, 1, 201)
    levels = torch.linspace(0, 1, 11).tolist()
    with picture(path, (4.2 * len(panels), 5), columns=len(panels)) as grid:
        for axes, (title, (points, probability)) in zip(grid, panels.items(), strict=True):
            plane = on_grid(probability, side, side)
            axes.contourf(*plane, levels=levels, cmap="RdBu_r", vmin=-0.6, vmax=1.6)
            axes.contour(*plane, levels=[0.5], colors="black")
            for label, color in enumerate(("tab:blue", "tab:red")):
                mine = points.features[:SHOWN][points.labels[:SHOWN] == label]
                meaning = points.classes[label]
                name = f"label {label}" + f": {meaning}" * (meaning != str(label))
                axes.plot(*as_array(mine.T), ".", markersize=5, color=color, label=name)
            ticks = {"xticks": (-1, 0, 1), "yticks": (-1, 0, 1), "aspect": "equal"}
            axes.set(title=title, xlabel="x", ylabel="y", **ticks)
        labels = grid[0].get_legend_handles_labels()
        shade = "shade: probability of label 1; line: ½"
        grid[0].figure.legend(*labels, loc="outside lower center", ncols=2, title=shade)
