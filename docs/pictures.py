# SPDX-License-Identifier: MIT
"""The pictures of docs/parallel.md, by matplotlib: ``python docs/pictures.py``."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = Path(__file__).parent / "parallel"
RANKS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
WHOLE = "0.75"  # what every rank has


def canvas(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set(title=title, aspect="equal")
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, w: float, h: float, color: str, text: str = "") -> None:
    axes.add_patch(Rectangle((x, y), w, h, facecolor=color, edgecolor="black", alpha=0.75))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=9)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-|>", bend: float = 0
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle=style, mutation_scale=12, connectionstyle=f"arc3,rad={bend}", color="0.2"
        )
    )


def data() -> Figure:
    figure, axes = canvas(8, 3.4, "Data parallelism: shares of the batch, gradients travel")
    for rank in range(2):
        y = 2.2 * (1 - rank)
        box(axes, 0, y, 1.6, 1.6, RANKS[rank], f"samples\nof rank {rank}")
        box(axes, 3, y, 2.6, 1.6, WHOLE, "whole model")
        box(axes, 7, y, 2.2, 1.6, RANKS[rank], f"gradient of\nrank {rank}'s samples")
        box(axes, 11, y, 2, 1.6, WHOLE, "the same\nstep")
        for a, b in ((1.6, 3), (5.6, 7), (9.2, 11)):
            arrow(axes, (a, y + 0.8), (b, y + 0.8))
    arrow(axes, (8.1, 2.2), (8.1, 1.6), "<|-|>")
    axes.text(8.3, 1.9, "mean (all-reduce)", fontsize=9, va="center")
    axes.set(xlim=(-0.2, 13.2), ylim=(-0.2, 4))
    return figure


def tensor() -> Figure:
    figure, axes = canvas(9, 4, "Tensor parallelism: a column layer, then a row layer")
    box(axes, 0, 1.4, 1.2, 1.6, WHOLE, "x\n(b, in)")
    for rank in range(2):
        y = 2.6 * (1 - rank)
        box(axes, 2.6, y, 2.2, 1.8, RANKS[rank], "column slice\n(h/2, in)\n+ b, σ")
        box(axes, 6, y + 0.4, 1.4, 1, RANKS[rank], "(b, h/2)")
        box(axes, 8.6, y, 2.2, 1.8, RANKS[rank], "row slice\n(out, h/2)")
        arrow(axes, (1.2, 2.2), (2.6, y + 0.9))
        arrow(axes, (4.8, y + 0.9), (6, y + 0.9))
        arrow(axes, (7.4, y + 0.9), (8.6, y + 0.9))
        arrow(axes, (10.8, y + 0.9), (12, 2.2))
    box(axes, 12, 1.7, 1, 1, "white", "Σ")
    arrow(axes, (13, 2.2), (14, 2.2))
    box(axes, 14, 1.4, 1.6, 1.6, WHOLE, "+ b\ny (b, out)")
    axes.text(12.5, 1.4, "one all-reduce", ha="center", va="top", fontsize=9)
    axes.set(xlim=(-0.2, 15.8), ylim=(-0.2, 4.6))
    return figure


def timeline(axes: Axes, title: str, stages: int, micro_batches: int, late: bool) -> None:
    """A pipeline whose forward and backward passes take one unit each.

    Args:
        late: backward passes after all forward ones.
    """
    done: dict[tuple[str, int, int], int] = {}
    queues = {}
    for stage in range(stages):
        ahead = micro_batches if late else min(micro_batches, stages - stage)
        order = [("F", m) for m in range(ahead)]
        for m in range(micro_batches):
            order.append(("B", m))
            if m + ahead < micro_batches:
                order.append(("F", m + ahead))
        queues[stage] = order
    clock = dict.fromkeys(range(stages), 0)
    while any(queues.values()):
        for stage, queue in queues.items():
            if not queue:
                continue
            kind, m = queue[0]
            before = (kind, stage - 1, m) if kind == "F" else (kind, stage + 1, m)
            if 0 <= before[1] < stages and before not in done:
                continue
            start = max(clock[stage], done.get(before, 0))
            clock[stage] = done[kind, stage, m] = start + 1
            queue.pop(0)
            color = RANKS[m % len(RANKS)]
            axes.barh(
                stage, 1, left=start, color=color, alpha=0.85 if kind == "F" else 0.4, edgecolor="black"
            )
            axes.text(start + 0.5, stage, f"{kind}{m}", ha="center", va="center", fontsize=8)
    axes.set(title=title, yticks=range(stages), yticklabels=[f"rank {s}" for s in range(stages)])
    axes.set(xlim=(0, 2 * (micro_batches + stages - 1)), xlabel="time")
    axes.invert_yaxis()


def pipeline() -> Figure:
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 4), layout="constrained")
    timeline(above, "gpipe: all forward passes, then all backward", 2, 4, late=True)
    timeline(below, "1f1b: a backward pass as soon as there is one", 2, 4, late=False)
    return figure


def mesh() -> Figure:
    figure, axes = canvas(7, 4, "A mesh of pp 2 × dp 2 × tp 2: eight ranks")
    for rank in range(8):
        pp, dp, tp = rank // 4, rank // 2 % 2, rank % 2
        x, y = 6 * pp + 2.2 * tp, 2.4 * (1 - dp)
        box(axes, x, y, 1.8, 1.4, RANKS[tp + 2 * pp], f"rank {rank}\nstage {pp}\nslice {tp}")
        if tp == 0:
            arrow(axes, (x + 1.8, y + 0.7), (x + 2.2, y + 0.7), "<|-|>")
        if dp == 0:
            arrow(axes, (x + 0.9, y), (x + 0.9, y - 1), "<|-|>")
        if pp == 0:
            arrow(axes, (x + 0.9, y + 1.4), (x + 6.9, y + 1.4), "<|-|>", bend=-0.12)
    axes.text(-0.3, 3.1, "replica 0", ha="right", va="center", fontsize=9)
    axes.text(-0.3, 0.7, "replica 1", ha="right", va="center", fontsize=9)
    axes.set(xlim=(-2.2, 10.4), ylim=(-0.2, 4.9))
    return figure


def tree() -> Figure:
    figure, axes = canvas(8, 3.6, "An invariant sum: one tree, whoever holds its leaves")
    for column, ranks in enumerate((1, 2, 4)):
        left = 5.2 * column
        for leaf in range(4):
            box(axes, left + 1.1 * leaf, 0, 0.9, 0.8, RANKS[leaf * ranks // 4], f"$g_{leaf}$")
        for level, nodes in ((1, 2), (2, 1)):
            span = 4 // nodes
            for node in range(nodes):
                x = left + 1.1 * (span * node + (span - 1) / 2)
                owners = {leaf * ranks // 4 for leaf in range(span * node, span * (node + 1))}
                color = RANKS[owners.pop()] if len(owners) == 1 else WHOLE
                for half in (0, 1):
                    child = left + 1.1 * (span * node + span / 2 * half + (span / 2 - 1) / 2)
                    arrow(axes, (child + 0.45, 1.4 * (level - 1) + 0.8), (x + 0.45, 1.4 * level))
                box(axes, x, 1.4 * level, 0.9, 0.8, color, "+")
        axes.text(
            left + 2.1, -0.3, f"{ranks} rank{'s' if ranks > 1 else ''}", ha="center", va="top", fontsize=9
        )
    axes.text(7.3, -1.0, "grey: ranks exchange their sums and both add", ha="center", va="top", fontsize=9)
    axes.set(xlim=(-0.2, 15), ylim=(-1.5, 3.8))
    return figure


def main() -> None:
    matplotlib.use("Agg")
    FOLDER.mkdir(exist_ok=True)
    for draw in (data, tensor, pipeline, mesh, tree):
        figure = draw()
        figure.savefig(FOLDER / f"{draw.__name__}.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main()
