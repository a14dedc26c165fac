# SPDX-License-Identifier: MIT
"""Console output of the examples: progress, tables and the last line, by rich; and metrics files."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from torchpar.errors import ConfigError
from torchpar.parallel.launch.world import World
from torchpar.profile.collectives import Call
from torchpar.profile.phases import Phases
from torchpar.profile.trace import SKIP, Trace, bottleneck
from torchpar.training.state import EpochResult

REFRESH = 0.1  # seconds between two updates of a bar; one takes as long as a small step


class EpochProgress:
    """Progress of a run, on rank 0: a bar on a terminal, a line per epoch, and the figures of each epoch.

    Args:
        metrics: a file of JSON lines.
        log_dir: a folder for TensorBoard.
    """

    def __init__(
        self, world: World, epochs: int, samples: int, metrics: Path | None, log_dir: Path | None = None
    ):
        self.speaks = world.rank == 0
        self.epochs = epochs
        self.samples = samples
        self.metrics = metrics
        self.writer: Any = None
        if log_dir is not None and self.speaks:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step: a resumed run writes its earlier epochs again.
            self.writer = SummaryWriter(log_dir, purge_step=1)
        percentage = TextColumn("{task.percentage:.0f}%")
        columns = (BarColumn(), percentage, TimeRemainingColumn(), TextColumn("{task.description}"))
        console = Console()
        self.bar = Progress(
            *columns, console=console, transient=True, disable=not (self.speaks and console.is_terminal)
        )
        self.task = self.bar.add_task("", total=epochs * samples)
        self.updated = 0.0

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def update(self, epoch: int, samples: int, loss: Callable[[], float] | None = None) -> None:
        """Show ``samples`` of this epoch as done, and ``loss()``, which is called only if it is shown."""
        if self.bar.disable or (now := time.monotonic()) <= self.updated + REFRESH:
            return
        self.updated = now
        speed = self.bar.tasks[0].speed
        shown = [f"{speed:,.0f} samples/s"] if speed else []
        shown += [f"loss {loss():.4f}"] if loss else []
        done = (epoch - 1) * self.samples + samples
        self.bar.update(self.task, completed=done, description=" | ".join(shown))

    def print_epoch(self, result: EpochResult) -> None:
        self._print(
            f"epoch {result.epoch}/{self.epochs} | train loss {result.train_loss:.4f} | "
            f"test loss {result.test_loss:.4f} | test accuracy {result.test_accuracy:.4f} | "
            f"{result.samples_per_s:,.0f} samples/s | {result.seconds:.1f} s"
        )
        self._write(result)

    def print_resumed(self, results: Sequence[EpochResult], steps: int, complete: bool) -> None:
        """Print where a run resumes, and write the metrics of its earlier epochs again."""
        self._print(f"complete already, at step {steps}" if complete else f"resumed from step {steps}")
        for result in results:
            self._write(result)

    def _print(self, line: str) -> None:
        if self.speaks:
            self.bar.console.print(line, soft_wrap=True)

    def _write(self, result: EpochResult) -> None:
        if self.speaks and self.metrics is not None:
            with self.metrics.open("w" if result.epoch == 1 else "a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
        if self.writer is not None:
            _add_scalars(self.writer, asdict(result), result.epoch)


def write_metrics(path: Path | None, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON object per line, unless ``path`` is None; overwrite the file.

    Raises:
        ConfigError: it cannot be written.
    """
    if path is None:
        return
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    try:
        path.write_text(text)
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e}") from e


def write_log(log_dir: Path | None, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the figures of each row, at its ``step``, for TensorBoard, unless ``log_dir`` is None."""
    if log_dir is None:
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir / name) as writer:
        for row in rows:
            _add_scalars(writer, row, row["step"])


def _add_scalars(writer: Any, row: Mapping[str, Any], step: int) -> None:
    for name, value in row.items():
        if isinstance(value, float):
            writer.add_scalar(name, value, step)


def print_rows(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print a table of these columns; floating-point numbers with four digits."""
    table = Table(*(column.replace("_", " ") for column in columns))
    for row in rows:
        values = (row[column] for column in columns)
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    Console().print(table)


def summary(results: list[EpochResult]) -> str:
    """Return the run's last line: the last epoch's accuracy and loss, and the seconds of all epochs."""
    last = results[-1]
    seconds = sum(result.seconds for result in results)
    return last_line(last.test_accuracy, last.test_loss, seconds, last.ranks, last.device)


def last_line(accuracy: float, loss: float, seconds: float, ranks: int, device: str) -> str:
    """Return the last line of every training script."""
    processes = f"{ranks} rank{'s' if ranks > 1 else ''}"
    return f"test accuracy {accuracy:.4f} | loss {loss:.4f} | {seconds:.1f} s | {processes} | {device}"


def print_phases(phases: Phases) -> None:
    """Print a table of the seconds and the share of each phase, on rank 0."""
    total = sum(phases.seconds.values())
    if not total:  # the run was complete already
        return
    table = Table("phase", "seconds", "share", title="time by phase, rank 0")
    for phase, seconds in phases.seconds.items():
        if seconds:
            table.add_row(phase, f"{seconds:.2f}", f"{seconds / total:.1%}")
    Console().print(table)


def print_collectives(calls: Sequence[Sequence[Call]]) -> None:
    """Print a table of rank 0's collectives in a step, the median of the recorded steps."""
    console = Console()
    if not calls:  # complete already, or a short run
        console.print("collectives per step: none was recorded, no more than two steps were trained")
        return
    kinds = dict.fromkeys((c.dimension, c.operation) for step in calls for c in step)
    if not kinds:
        console.print("collectives per step: none, one rank has the whole model and the whole batch")
        return
    table = Table("dimension", "operation", title="collectives of a step, rank 0")
    for column in ("count", "bytes", "ms"):
        table.add_column(column, justify="right")
    for dimension, operation in kinds:
        counted = [
            [c for c in step if (c.dimension, c.operation) == (dimension, operation)] for step in calls
        ]
        table.add_row(
            dimension or "several",
            operation,
            f"{median(len(step) for step in counted):g}",
            f"{median(sum(c.bytes for c in step) for step in counted):,.0f}",
            # A receiver waits for its neighbour's work more than for the message.
            "-"
            if operation == "recv"
            else f"{1000 * median(sum(c.seconds for c in s) for s in counted):.2f}",
        )
    console.print(table)


def print_profile(trace: Trace, ranks: Sequence[dict[str, float]]) -> None:
    """Print a table of rank 0's costliest operators, and the bottleneck of all ranks."""
    if all(ranks):
        print(trace, bottleneck(ranks), sep="\n")
    else:  # complete already, or a short run
        print(f"profile: nothing was recorded, no more than {SKIP} steps were trained")


def check_outputs(world: World, *, folders: Iterable[Path | None], files: Iterable[Path | None]) -> None:
    """Call `create_outputs` on rank 0 before a run starts.

    Raises:
        ConfigError: the one of `create_outputs`, on every rank.
    """
    world.on_rank_0(lambda: create_outputs(folders=folders, files=files))


def create_outputs(*, folders: Iterable[Path | None], files: Iterable[Path | None]) -> None:
    """Create the folders of a run's outputs and check that they can be written to.

    Raises:
        ConfigError: naming the folder or file that cannot.
    """
    try:
        for folder in filter(None, folders):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        for file in filter(None, files):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("a").close()
    except OSError as e:
        raise ConfigError(f"a run's outputs cannot be written: {e}") from e
