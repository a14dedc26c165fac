# SPDX-License-Identifier: MIT
"""A run on one page: ``run.html``, which needs no other file and no network.

It shows how the model learned, what it takes for what, and where the time, the messages and the
memory of each rank went.
"""

import base64
import io
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from support import console, plots
from support.drawing import Drawing

import numpy as np

from torchpar.errors import writing
from torchpar.training.outcome import EpochResult
from torchpar.training.profile.record import RankRecord, Timeline, timeline

if TYPE_CHECKING:
    from torch import Tensor

    from torchpar.data import Samples
    from torchpar.data.files import Images

TEMPLATE = Path(__file__).with_suffix(".html")
WORST = 24  # number of worst-classified samples to show
# Colors of the phases of a step, legible on light and dark pages, and their names on the page.
PHASES = {
    "data": ("#b99316", "data"),
    "forward": ("#3f87c9", "forward"),
    "backward": ("#dd7733", "backward"),
    "collectives": ("#ad6cc2", "messages"),
    "optimizer": ("#46a36b", "optimizer"),
    "idle": ("#8885", "idle"),
}
Row = console.Row


class Run(NamedTuple):
    """A training on the page.

    Attributes:
        figures: of each epoch: "epoch" or "step", and those whose names end with "_loss" or
            "_accuracy".
        summary: the run's last line.
        records: of all ranks.
    """

    figures: Sequence[Row]
    summary: str
    records: Sequence[RankRecord]


def as_run(results: Sequence[EpochResult], records: Sequence[RankRecord]) -> Run:
    """Return a run with the figures of ``results``."""
    return Run([asdict(result) for result in results], console.summary(list(results)), records)


class Picture(NamedTuple):
    """A sample as a PNG, and what it is read as."""

    source: str
    label: str
    predicted: str


def write(
    folder: Path,
    runs: Mapping[str, Run],
    outputs: "Tensor | plots.Array | None" = None,
    test: "Samples | Images | None" = None,
) -> None:
    """Write ``run.html``.

    Args:
        runs: by name, which is shown if there are several.
        outputs: of all test samples ``(n, classes)``, of the last run.
        test: the samples; those that are images of shape ``(n, rows, columns)`` are shown.

    Raises:
        ConfigError: the file cannot be written.
    """
    from jinja2 import Template

    confusion, pictures = "", list[Picture]()
    if outputs is not None and test is not None:
        z, labels = plots.as_array(outputs), plots.as_array(test.labels)
        confusion = draw_confusion(labels, z.argmax(1), test.classes)
        pictures = worst(z, labels, plots.as_array(test.features), test.classes)
    *_, last = runs.values()
    page = Template(TEMPLATE.read_text("utf-8"), autoescape=True).render(
        title=Path(sys.argv[0]).name,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
        runs=runs,
        curves=draw_curves(runs),
        steps={name: step_parts(run.records) for name, run in runs.items() if run.records},
        records=last.records,
        phases=PHASES,
        confusion=confusion,
        worst=pictures,
    )
    path, new = folder / "run.html", folder / "run.html.new"
    with writing(path, "--report"):
        folder.mkdir(parents=True, exist_ok=True)
        try:  # an earlier page stays as it is if this fails
            new.write_text(page, "utf-8")
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)


def draw_curves(runs: Mapping[str, Run]) -> str:
    """Return the losses, and the accuracies where there are any, of each epoch as an SVG."""
    rows = [{"run": name, **row} for name, run in runs.items() for row in run.figures]
    x = "epoch" if "epoch" in rows[0] else "step"
    by = ["run"] if len(runs) > 1 else []
    panels = []
    for kind in ("_loss", "_accuracy"):
        ys = [y for y in rows[0] if y.endswith(kind) and all(row[y] is not None for row in rows)]
        ys.sort(key=lambda y: not y.startswith("train"))
        if ys:
            panels.append(plots.Panel(rows, x, ys, by))
    with Drawing(4.6, 2.4 * len(panels), rows=len(panels)) as drawing:
        plots.draw_panels(drawing.axes, panels)
    return drawing.svg


def draw_confusion(labels: plots.Array, predicted: plots.Array, classes: Sequence[str]) -> str:
    """Return the numbers of test samples by label and prediction as an SVG."""
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (labels, predicted), 1)
    shares = confusion / confusion.sum(1, keepdims=True).clip(min=1)
    with Drawing(4.6, 4.0) as drawing:
        (axes,) = drawing.axes
        axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)  # the root shows small shares
        for label, row in enumerate(confusion.tolist()):
            for read_as, count in enumerate(row):
                color = "white" if shares[label, read_as] > 0.25 else "black"
                axes.text(read_as, label, str(count), ha="center", va="center", color=color)
        axes.set(xlabel="predicted", ylabel="label")
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
    return drawing.svg


def worst(
    outputs: plots.Array, labels: plots.Array, samples: plots.Array, classes: Sequence[str]
) -> list[Picture]:
    """Return the images whose label's output is the farthest below another output."""
    if samples.ndim != 3:  # points, which are no pictures
        return []
    from matplotlib.image import imsave

    rows = np.arange(len(labels))
    others = outputs.copy()
    others[rows, labels] = -np.inf
    chosen = (outputs[rows, labels] - others.max(1)).argsort()[:WORST]
    pictures = []
    for sample in chosen:
        file = io.BytesIO()
        imsave(file, samples[sample], cmap="gray_r", format="png")
        source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        predicted = classes[outputs[sample].argmax()]
        pictures.append(Picture(source, classes[labels[sample]], predicted))
    return pictures


def step_parts(records: Sequence[RankRecord]) -> dict[str, object]:
    """Return the timeline of a step as an SVG, and tables of its phases, messages and memory."""
    found = timeline(records)
    return {
        "timeline": found,
        "drawing": draw_timeline(found) if found else "",
        "times": times(found) if found else [],
        "messages": [{"rank": one.rank, **row} for one in records for row in one.message_rows()],
        "memory": [
            {"rank": one.rank, **{name: f"{nbytes:,}" for name, nbytes in one.memory.items()}}
            for one in records
            if one.memory
        ],
    }


def draw_timeline(found: Timeline) -> str:
    """Return an SVG with a line for each rank, in which each phase has its color."""
    with Drawing(4.6, 0.7 + 0.4 * len(found.ranks)) as drawing:
        (axes,) = drawing.axes
        for rank, spans in enumerate(found.ranks):
            for name, (color, _) in PHASES.items():
                bars = [(1e3 * s.start, 1e3 * (s.end - s.start)) for s in spans if s.name == name]
                axes.broken_barh(bars, (rank - 0.4, 0.8), facecolors=color)
        axes.set_yticks(range(len(found.ranks)), [f"rank {r}" for r in range(len(found.ranks))])
        axes.invert_yaxis()
        axes.set_xlim(0, 1e3 * found.seconds)
        axes.set_xlabel("ms")
        axes.spines[["top", "right"]].set_visible(False)
    return drawing.svg


def times(found: Timeline) -> list[Row]:
    """Return the milliseconds of each phase of the step, a row for each rank."""
    rows: list[Row] = []
    for rank, spans in enumerate(found.ranks):
        ms = {
            phase: 1e3 * sum(s.end - s.start for s in spans if s.name == phase) for phase in PHASES
        }
        rows.append({"rank": rank} | {PHASES[phase][1]: f"{t:.3f}" for phase, t in ms.items()})
    return rows
