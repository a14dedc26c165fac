# SPDX-License-Identifier: MIT
"""What a training run shows: progress and metrics. Only rank 0's report shows anything."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from torchpar.collectives import Call
from torchpar.errors import ConfigError
from torchpar.parallel.cost import Expected, Link
from torchpar.parallel.world import World
from torchpar.phases import Phases
from torchpar.progress import EpochResult


class Report:
    """Progress of a run: a bar on a terminal, a line per epoch elsewhere, and its metrics file."""

    def __init__(self, epochs: int, samples: int, metrics: Path | None, progress: Progress | None):
        self.epochs = epochs
        self.metrics = metrics
        self.progress = progress
        self.samples = samples
        if progress is not None:
            self.task = progress.add_task("", total=epochs * samples)

    def step(self, epoch: int, trained: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=(epoch - 1) * self.samples + trained)

    def epoch(self, result: EpochResult) -> None:
        if self.progress is None:
            return
        self.progress.console.print(
            f"epoch {result.epoch}/{self.epochs} | train loss {result.train_loss:.4f} | "
            f"test loss {result.test_loss:.4f} | test accuracy {result.test_accuracy:.4f} | "
            f"{result.samples_per_s:,.0f} samples/s | {result.seconds:.1f} s",
            soft_wrap=True,
        )
        if self.metrics is not None:
            # The results of a resumed run's earlier epochs come again, from its checkpoint.
            with self.metrics.open("w" if result.epoch == 1 else "a") as file:
                file.write(json.dumps(asdict(result)) + "\n")


@contextmanager
def reporting(world: World, epochs: int, samples: int, metrics: Path | None) -> Iterator[Report]:
    """A `Report` of ``epochs`` passes over ``samples``; it shows something on rank 0 alone."""
    with ExitStack() as stack:
        progress = None
        if world.rank == 0:
            columns = (BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn())
            console = Console()
            progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
            stack.enter_context(progress)
        yield Report(epochs, samples, metrics, progress)


def write_metrics(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON object per line, in the place of what the file held.

    Raises:
        ConfigError: it cannot be written.
    """
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    try:
        path.write_text(text)
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e}") from e


def print_rows(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print a table of these columns; floating-point numbers with four digits."""
    table = Table(*(column.replace("_", " ") for column in columns))
    for row in rows:
        values = (row[column] for column in columns)
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    Console().print(table)


def summary(results: list[EpochResult]) -> str:
    """The run in one line: the last epoch's accuracy and loss, the time of all epochs, where it ran."""
    last = results[-1]
    seconds = sum(result.seconds for result in results)
    return last_line(last.test_accuracy, last.test_loss, seconds, last.ranks, last.device)


def last_line(accuracy: float, loss: float, seconds: float, ranks: int, device: str) -> str:
    """How every training script ends."""
    processes = f"{ranks} rank{'s' if ranks > 1 else ''}"
    return f"test accuracy {accuracy:.4f} | loss {loss:.4f} | {seconds:.1f} s | {processes} | {device}"


def print_phases(phases: Phases) -> None:
    """A table of the seconds and the share of each phase, on rank 0."""
    total = sum(phases.seconds.values())
    if not total:  # a run that its checkpoint had completed
        return
    table = Table("phase", "seconds", "share", title="time by phase, rank 0")
    for phase, seconds in phases.seconds.items():
        if seconds:
            table.add_row(phase, f"{seconds:.2f}", f"{seconds / total:.1%}")
    Console().print(table)


def print_collectives(
    calls: Sequence[Sequence[Call]], expected: Sequence[Expected], link: Link | None
) -> None:
    """A table of what rank 0 sent in a step: predicted, and the median of the steps that were recorded.

    Args:
        link: for the predicted times; None where nothing was sent to measure it by.
    """
    console = Console()
    if not calls:
        console.print("collectives per step: none was recorded, the run was too short")
        return
    table = Table(title="collectives of a step's gradient, rank 0: predicted | measured")
    table.add_column("dimension")
    table.add_column("operation")
    for column in ("count", "bytes", "ms"):
        table.add_column(column, justify="right")
    kinds = {(e.dimension, e.operation): None for e in expected} | {
        (c.dimension, c.operation): None for step in calls for c in step
    }
    for dimension, operation in kinds:
        predicted = [e for e in expected if (e.dimension, e.operation) == (dimension, operation)]
        measured = [
            [c for c in step if (c.dimension, c.operation) == (dimension, operation)] for step in calls
        ]
        counts = [len(step) for step in measured]
        if not predicted and not median(counts):
            continue  # at the start only
        nbytes = median(sum(c.bytes for c in step) for step in measured)
        ms = 1000 * median(sum(c.seconds for c in step) for step in measured)
        link_ms = 1000 * sum(link.seconds(operation, e.ranks, e.nbytes) for e in predicted) if link else 0.0
        table.add_row(
            dimension or "world",
            operation,
            f"{len(predicted)} | {median(counts):g}",
            f"{sum(e.nbytes for e in predicted):,} | {nbytes:,.0f}",
            # A receiver waits for its neighbour's work more than for the message.
            "-" if operation == "recv" else f"{link_ms:.2f} | {ms:.2f}",
        )
    if not kinds:
        console.print("collectives per step: none, one rank has the whole model and the whole batch")
        return
    console.print(table)
    if link:
        console.print(
            f"predicted with α {1e6 * link.alpha:.0f} µs and β {1e9 * link.beta:.2f} ns/B, measured before"
        )


def prepare_outputs(world: World, *, folders: Iterable[Path | None], files: Iterable[Path | None]) -> None:
    """Make sure that what a run will write can be written, before it starts.

    Raises:
        ConfigError: naming the folder or file that cannot; on every rank.
    """

    def prepare() -> None:
        try:
            for folder in filter(None, folders):
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            for file in filter(None, files):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.open("a").close()
        except OSError as e:
            raise ConfigError(f"a run's outputs cannot be written: {e}") from e

    world.on_rank_0(prepare)
