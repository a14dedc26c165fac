# SPDX-License-Identifier: MIT
"""Draw the pictures of the pages: ``python docs/pictures.py [LOSSES]``.

With the file that ``examples/train_transformer.py --metrics LOSSES`` wrote, it draws the picture of
its losses alone.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = Path(__file__).parent
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")  # of rank 0, 1, …
WHOLE = "0.75"  # the same on every rank
VERDICTS = {  # of docs/muon.md
    "same": "#7fbf7b",
    "equal": "#7fbf7b",
    "refuses": "#c9c9c9",
    "crashes": "#fdb863",
    "wrong": "#e66101",
}
Point = tuple[float, float]


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure without margins, whose axes show ``(0, 0)`` to ``(width, height)``."""
    figure = plt.figure(figsize=(0.62 * width, 0.62 * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    color: str,
    text: str,
    alpha: float = 0.75,
) -> None:
    axes.add_patch(
        Rectangle((x, y), width, height, facecolor=color, edgecolor="black", alpha=alpha)
    )
    label(axes, x + width / 2, y + height / 2, text)


def label(axes: Axes, x: float, y: float, text: str, align: str = "center") -> None:
    axes.text(x, y, text, ha=align, va="center", fontsize=11)


def arrow(axes: Axes, start: Point, end: Point, style: str = "-|>", color: str = "0.2") -> None:
    patch = FancyArrowPatch(
        start, end, arrowstyle=style, mutation_scale=12, shrinkA=1, shrinkB=1, color=color
    )
    axes.add_patch(patch)


def data() -> Figure:
    """Data parallelism on two ranks."""
    figure, axes = canvas(13.4, 4.2)
    for rank in range(2):
        y = 2.3 * (1 - rank) + 0.2
        box(axes, 0.2, y, 1.8, 1.5, COLORS[rank], f"samples\nof rank {rank}")
        box(axes, 3.2, y, 2.4, 1.5, WHOLE, "whole model")
        box(axes, 6.8, y, 2.4, 1.5, COLORS[rank], f"gradient of\nrank {rank}'s samples")
        box(axes, 11.2, y, 2, 1.5, WHOLE, "the same\nstep")
        for start, end in ((2, 3.2), (5.6, 6.8), (9.2, 11.2)):
            arrow(axes, (start, y + 0.75), (end, y + 0.75))
    arrow(axes, (8, 2.5), (8, 1.7), "<|-|>")
    label(axes, 8.3, 2.1, "mean, by all-reduce", "left")
    return figure


def tensor() -> Figure:
    """A column layer and a row layer on two ranks."""
    figure, axes = canvas(16.2, 4.8)
    box(axes, 0.2, 1.6, 1.4, 1.6, WHOLE, "x\n(n, in)")
    for rank in range(2):
        y = 2.6 * (1 - rank) + 0.2
        box(
            axes, 2.8, y, 2.4, 1.8, COLORS[rank], f"column layer\nrank {rank}: (h/2, in)\n+ bias, σ"
        )
        box(axes, 6.4, y + 0.4, 1.5, 1, COLORS[rank], "(n, h/2)")
        box(axes, 9.1, y, 2.4, 1.8, COLORS[rank], f"row layer\nrank {rank}: (out, h/2)")
        arrow(axes, (1.6, 2.4), (2.8, y + 0.9))
        arrow(axes, (5.2, y + 0.9), (6.4, y + 0.9))
        arrow(axes, (7.9, y + 0.9), (9.1, y + 0.9))
        arrow(axes, (11.5, y + 0.9), (12.5, 2.4))
    box(axes, 12.5, 1.9, 1, 1, "white", "Σ")
    label(axes, 13, 1.5, "one all-reduce")
    arrow(axes, (13.5, 2.4), (14.4, 2.4))
    box(axes, 14.4, 1.6, 1.6, 1.6, WHOLE, "+ bias\ny (n, out)")
    return figure


def pipeline() -> Figure:
    """Both schedules of a pipeline of two stages and four micro-batches; a pass takes one unit."""
    figure, axes = canvas(12.2, 7.4)
    gpipe = "F0 F1 F2 F3 -  -  B0 B1 B2 B3", "-  F0 F1 F2 F3 B0 B1 B2 B3 -"
    one_f_one_b = "F0 F1 -  B0 F2 B1 F3 B2 -  B3", "-  F0 B0 F1 B1 F2 B2 F3 B3 -"
    for title, stages, top in (
        ("gpipe: all forward passes, then all backward passes", gpipe, 7),
        ("1f1b: backward passes early", one_f_one_b, 3.8),
    ):
        label(axes, 1.8, top, title, "left")
        for stage, passes in enumerate(stages):
            y = top - 1.3 - stage
            label(axes, 1.6, y + 0.45, f"rank {stage}", "right")
            axes.add_patch(
                Rectangle((1.8, y), 10, 0.9, facecolor="none", edgecolor="0.8", hatch="//")
            )
            for start, name in enumerate(passes.split()):
                if name != "-":
                    color, alpha = COLORS[int(name[1])], 0.85 if name[0] == "F" else 0.4
                    axes.add_patch(Rectangle((1.8 + start, y), 1, 0.9, facecolor="white"))
                    box(axes, 1.8 + start, y, 1, 0.9, color, name, alpha)
    arrow(axes, (1.8, 1.2), (11.8, 1.2))
    label(axes, 6.8, 0.9, "time")
    label(
        axes,
        1.8,
        0.4,
        "F0: forward pass of micro-batch 0.  B0: its backward pass.  Hatched: idle.",
        "left",
    )
    return figure


def mesh() -> Figure:
    """Eight ranks in a mesh, and the messages of each dimension."""
    figure, axes = canvas(14.2, 6.4)
    tp, dp, pp = "tab:purple", "tab:brown", "black"
    for rank in range(8):
        stage, replica, part = rank // 4, rank // 2 % 2, rank % 2
        x, y = 0.3 + 3.2 * stage + 7.2 * replica, 2.4 * (1 - part) + 1.6
        box(
            axes,
            x,
            y,
            2,
            1.3,
            COLORS[part + 2 * stage],
            f"rank {rank}\nstage {stage}\nslice {part}",
        )
        if part == 0:
            arrow(axes, (x + 1, y), (x + 1, y - 1.1), "<|-|>", tp)
        if stage == 0:
            arrow(axes, (x + 2, y + 0.65), (x + 3.2, y + 0.65), "<|-|>", pp)
        if replica == 0:
            edge, side = (y + 1.3, 1) if part == 0 else (y, -1)
            far = edge + side * (0.25 + 0.25 * stage)
            axes.plot([x + 1, x + 1, x + 8.2, x + 8.2], [edge, far, far, edge], color=dp, lw=1.5)
    label(axes, 2.9, 6.2, "replica 0")
    label(axes, 10.1, 6.2, "replica 1")
    for x, color, text in (
        (0.3, tp, "tp: parts of a layer"),
        (4.8, dp, "dp: gradients, between replicas"),
        (10.2, pp, "pp: borders of stages"),
    ):
        axes.plot([x, x + 0.5], [0.35, 0.35], color=color, lw=2)
        label(axes, x + 0.7, 0.35, text, "left")
    return figure


def digits() -> Figure:
    """A row of numbers, scaled by one power of two, rounded, and cut into four digits."""
    figure, axes = canvas(15.6, 5.6)
    numbers = (
        ("0.8125", (104, 0, 0, 0)),
        ("-0.3", (-38, -102, -102, -128)),
        ("0.000001", (0, 0, 8, 99)),
    )
    label(axes, 1.6, 5.2, "a row of float32")
    label(axes, 9.2, 5.2, "times $2^{31-e}$ and rounded, in digits from -128 to 127")
    for row, (number, cut) in enumerate(numbers):
        y = 3.7 - 1.3 * row
        box(axes, 0.4, y, 2.4, 1, WHOLE, number)
        arrow(axes, (2.8, y + 0.5), (4.2, y + 0.5))
        for p, digit in enumerate(cut):
            box(axes, 4.2 + 2.5 * p, y, 2.5, 1, COLORS[p], str(digit))
    for p in range(4):
        label(axes, 5.45 + 2.5 * p, 0.75, f"$d_{p}$, times $2^{{{24 - 8 * p}}}$")
    label(
        axes,
        7.8,
        0.25,
        "The row's exponent e is 0: all its numbers are below 1. A digit is one byte.",
    )
    return figure


def orders() -> Figure:
    """The sixteen products of two numbers' digits: ten are kept, by order."""
    figure, axes = canvas(13.6, 6.4)
    for p in range(4):
        label(axes, 1.2, 4.7 - 1.2 * p, f"$d_{p}$ of A")
        label(axes, 3 + 1.9 * p, 5.8, f"$c_{p}$ of B")
        for q in range(4):
            kept = p + q < 4
            color = COLORS[p + q] if kept else "white"
            box(axes, 2.1 + 1.9 * q, 4.2 - 1.2 * p, 1.8, 1, color, f"$d_{p}c_{q}$" if kept else "")
    for order in range(4):
        y = 4.7 - 1.2 * order
        box(axes, 10.6, y - 0.4, 0.8, 0.8, COLORS[order], f"$S_{order}$")
        label(axes, 11.6, y, f"times $2^{{{24 - 8 * order}}}$", "left")
    label(
        axes,
        6.8,
        0.25,
        "Products of one color are of one order, and are added as int32. White ones are left out.",
    )
    return figure


def ranks() -> Figure:
    """An exact sum over two ranks, each of which holds half of the columns."""
    figure, axes = canvas(16.2, 4.6)
    for rank in range(2):
        y = 2.6 * (1 - rank) + 0.2
        color = COLORS[rank]
        box(axes, 0.2, y, 2, 1.5, color, f"columns\nof rank {rank}")
        box(axes, 3.2, y, 2, 1.5, color, "largest of\neach row")
        box(axes, 6.6, y, 1.8, 1.5, WHOLE, "exponents")
        box(axes, 9.2, y, 2, 1.5, color, "sums of\nits digits")
        box(axes, 12.6, y, 1.4, 1.5, WHOLE, "T")
        box(axes, 14.8, y, 1.2, 1.5, WHOLE, "float32")
        for start, end in ((2.2, 3.2), (5.2, 6.6), (8.4, 9.2), (11.2, 12.6), (14, 14.8)):
            arrow(axes, (start, y + 0.75), (end, y + 0.75))
    for x, text in ((5.9, "maximum,\nint32"), (11.9, "sum,\nint64")):
        arrow(axes, (x, 3.3), (x, 1.3), "<|-|>")
        label(axes, x + 0.25, 2.3, text, "left")
    return figure


def tiles(
    axes: Axes, x: float, y: float, rows: int, columns: int, colors: dict[Point, str]
) -> None:
    """Draw a matrix of square tiles whose lower left corner is ``(x, y)``; ``colors`` by row and
    column."""
    for i in range(rows):
        for j in range(columns):
            color = colors.get((i, j), "white")
            box(axes, x + 0.9 * j, y + 0.9 * (rows - 1 - i), 0.9, 0.9, color, "")


def maximum() -> Figure:
    """A tile of the maximum, which is loaded, compared and stored once."""
    figure, axes = canvas(13.2, 3.8)
    for x, text in ((0.3, "a"), (4.8, "b"), (9.3, "max(a, b)")):
        tiles(axes, x, 0.8, 3, 4, {(1, 1): COLORS[0]})
        label(axes, x + 1.8, 0.4, text)
    for x, text in ((4.35, ","), (8.85, "=")):
        label(axes, x, 2.15, text)
    return figure


def matmul_t() -> Figure:
    """X·Xᵀ: the tiles below the diagonal are computed, and stored twice."""
    figure, axes = canvas(14.4, 5.2)
    tiles(
        axes,
        0.3,
        1,
        4,
        3,
        {(3, k): COLORS[0] for k in range(3)} | {(1, k): COLORS[1] for k in range(3)},
    )
    tiles(axes, 4.2, 1.45, 3, 4, {(k, 1): COLORS[1] for k in range(3)})
    computed = {(i, j): WHOLE for i in range(4) for j in range(i + 1)}
    tiles(axes, 9.6, 1, 4, 4, computed | {(3, 1): COLORS[0], (1, 3): COLORS[1]})
    for x, y, text in ((1.65, 0.6, "X"), (6, 0.6, "Xᵀ"), (11.4, 0.6, "C")):
        label(axes, x, y, text)
    for x, text in ((3.6, "·"), (8.7, "=")):
        label(axes, x, 2.8, text)
    arrow(axes, (11.1, 1.6), (12.6, 3.1))
    label(
        axes,
        7.2,
        0.15,
        "Gray and blue tiles are computed. The orange one is the transpose of the blue one.",
    )
    return figure


def linear_sigmoid() -> Figure:
    """A tile of a linear layer, to which the sigmoid is applied before it is stored."""
    figure, axes = canvas(17.6, 4.8)
    tiles(axes, 0.3, 0.9, 4, 3, {(1, k): COLORS[0] for k in range(3)})
    tiles(axes, 4.2, 1.35, 3, 4, {(k, 2): COLORS[1] for k in range(3)})
    box(axes, 10.2, 2.7, 0.9, 0.9, WHOLE, "sum")
    box(axes, 12, 2.7, 1.2, 0.9, COLORS[2], "+ b, σ")
    tiles(axes, 13.8, 0.9, 4, 4, {(1, 2): COLORS[2]})
    for x, y, text in ((1.65, 0.5, "X"), (6, 0.5, "Wᵀ"), (15.6, 0.5, "Y")):
        label(axes, x, y, text)
    label(axes, 3.6, 2.7, "·")
    for start, end in ((8.4, 10.2), (11.1, 12), (13.2, 13.8)):
        arrow(axes, (start, 3.15), (end, 3.15))
    label(axes, 11.7, 2.2, "in registers")
    return figure


def same_bits() -> Figure:
    """A sum of integers, which has the same bits in any order."""
    figure, axes = canvas(5.3, 4.1)
    for row, order in enumerate(("a + b + c", "c + a + b", "b + c + a")):
        box(axes, 0.4, 2.8 - 1.25 * row, 2.2, 1, COLORS[2], order)
        label(axes, 3, 3.3 - 1.25 * row, "=")
        box(axes, 3.4, 2.8 - 1.25 * row, 1.5, 1, WHOLE, "1011")
    return figure


def who_is_right() -> Figure:
    """The table of muon.md, of libraries that were tried in most situations."""
    page = (FOLDER / "muon.md").read_text("utf-8")
    lines = page.partition("\n## Who is right where\n")[2].partition("\n\n- ")[0].splitlines()
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    )
    rows = [row for row in rows if sum(map(bool, row[2:])) > 4]
    situations = header[2:]  # without the library's name and its promise
    width, height, names = 1.75, 0.62, 5.2
    figure, axes = canvas(names + width * len(situations) + 0.2, height * len(rows) + 1.2)
    for column, situation in enumerate(situations):
        x = names + width * (column + 0.5)
        label(axes, x, height * len(rows) + 0.65, "\n".join(situation.split(" ", 1)))
    for number, (library, _, *cells) in enumerate(rows):
        y = height * (len(rows) - 1 - number) + 0.1
        label(axes, names - 0.2, y + height / 2, library.partition(",")[0], "right")
        for column, cell in enumerate(cells):
            if cell:
                x = names + width * column
                right = situations[column] == "mistakes" and cell == "refuses"
                box(axes, x, y, width, height, VERDICTS["same" if right else cell], cell)
    return figure


def annotated() -> Figure:
    """A pull request with the files of nogpu-ci.md: the annotation of a line, and the log's end.

    The tests are executed, and the log is theirs.
    """
    page = (FOLDER / "nogpu-ci.md").read_text("utf-8")
    files = dict(re.findall(r"```py\n# (\S+\.py)\n(.*?)```", page, re.DOTALL))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ".git").mkdir()
        for name, text in files.items():
            (Path(folder) / name).write_text(f"# {name}\n{text}", "utf-8")
        flags = ["--nogpu", "--cuda-is-cpu", "--nogpu-annotate", "github", "-q"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *flags],
            cwd=folder,
            env={**os.environ, "COLUMNS": "80"},
            stdout=subprocess.PIPE,
            text=True,
        )
    file, number, title, message = re.findall(
        r"^::error file=(\S+),line=(\d+),title=(.*?)::(.*)", done.stdout, re.MULTILINE
    )[0]
    said = [part for line in message.split("%0A") for part in textwrap.wrap(line, 76)]
    log = done.stdout[done.stdout.index("faults by kernel") :].splitlines()
    log = [line for line in log if not line.startswith("::")]
    code = f"# {file}\n{files[file]}".splitlines()
    last = int(number)  # the lines up to the annotated one, and those behind it
    before, after = range(last - 5, last), range(last, last + 1)

    row = 0.45
    height = row * (len(before) + len(after) + len(said) + len(log) + 6)
    figure, axes = canvas(17.5, height)
    y = height - row
    mono = {"ha": "left", "va": "center", "fontsize": 11, "family": "monospace"}

    def write(x: float, text: str, color: str = "0.1", weight: str = "normal") -> None:
        nonlocal y
        axes.text(x, y, text, color=color, weight=weight, **mono)
        y -= row

    def show(n: int) -> None:
        axes.add_patch(Rectangle((0.3, y - row / 2), 16.9, row, facecolor="#e6ffec"))
        axes.text(1.1, y, f"{n + 1}", color="0.5", **mono | {"ha": "right"})
        write(1.5, f"+ {code[n]}")

    write(0.3, file, weight="bold")
    for n in before:
        show(n)
    top = y + row / 2
    y -= 0.15
    write(1.0, f"✗ {title}", "#d1242f", "bold")
    for line in said:
        write(1.0, line)
    axes.add_patch(Rectangle((0.6, y + 0.2), 16.4, top - y - 0.22, fill=False, edgecolor="#d1242f"))
    y -= 0.1
    for n in after:
        show(n)
    y -= 0.4
    write(0.3, "the end of the log", weight="bold")
    for line in log:
        write(0.3, line, "#d1242f" if line.startswith(("✗", "FAILED")) else "0.1")
    return figure


def losses(path: Path) -> Figure:
    """The losses of Muon and of AdamW on the training text and on the validation text."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    figure, grid = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axes, name in zip(grid, ("train_loss", "validation_loss"), strict=True):
        for optimizer, group in groupby(rows, itemgetter("optimizer")):
            points = [(row["step"], row[name]) for row in group]
            axes.plot(*zip(*points, strict=True), "o-", label=optimizer)
        axes.set(xlabel="step", ylabel=name.replace("_", " "))
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    matplotlib.use("Agg")
    if len(sys.argv) > 1:
        losses(Path(sys.argv[1])).savefig(FOLDER / "muon" / "transformer.png", dpi=120)
        return
    for page, pictures, dpi in (
        ("start", (same_bits,), 220),  # shown at half its size, as a phone's screen has it
        ("operators", (maximum, matmul_t, linear_sigmoid), 110),
        ("parallel", (data, tensor, pipeline, mesh), 110),
        ("exact", (digits, orders, ranks), 110),
        ("muon", (who_is_right,), 110),
        ("nogpu-ci", (annotated,), 110),
    ):
        folder = FOLDER / page
        folder.mkdir(exist_ok=True)
        for draw in pictures:
            figure = draw()
            figure.savefig(folder / f"{draw.__name__}.png", dpi=dpi)
            plt.close(figure)


if __name__ == "__main__":
    main()
