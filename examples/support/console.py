# SPDX-License-Identifier: MIT
"""Console output of the examples: progress, tables, errors and the last line; and metrics files."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.parallel.launch.world import World
from torchpar.profile.phases import Phases
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
        console = Console()
        hidden = not (self.speaks and console.is_terminal)
        self.bar = Progress(console=console, transient=True, disable=hidden)
        self.task = self.bar.add_task("samples", total=epochs * samples)
        self.updated = 0.0

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def update(self, epoch: int, samples: int) -> None:
        """Show ``samples`` of this epoch as done."""
        if not self.bar.disable and (now := time.monotonic()) > self.updated + REFRESH:
            self.updated = now
            self.bar.update(self.task, completed=(epoch - 1) * self.samples + samples)

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
    """Write a JSON object per line, unless ``path`` is None; overwrite the file."""
    if path is not None:
        path.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


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


def print_rows(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], title: str = "") -> None:
    """Print a table of these columns; floating-point numbers with four digits."""
    table = Table(*(column.replace("_", " ") for column in columns), title=title or None)
    for row in rows:
        values = (row[column] for column in columns)
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    Console().print(table)


def compare(part: str, result: Tensor, reference: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Any]:
    """Print the errors of ``result`` and of PyTorch's ``reference(*inputs)``, and return them.

    An error is the largest distance from ``reference`` in float64.

    Raises:
        ConfigError: the error is more than twice PyTorch's plus a rounding of the largest number.
    """
    exact = reference(*(t.double() for t in inputs))
    error, native = ((t - exact).abs().max().item() for t in (result, reference(*inputs)))
    most = 2 * native + torch.finfo(result.dtype).eps * exact.abs().max().item()
    print(f"{part}: error {error:.1e}, PyTorch's {native:.1e}")
    if not error <= most:
        raise ConfigError(
            f"{part} has an error of {error:.1e}, expected {most:.1e} at most; mend its formula"
        )
    return {"part": part, "error": error, "pytorch_error": native}


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
    seconds = {phase: s for phase, s in phases.seconds.items() if s}
    rows = [{"phase": p, "seconds": f"{s:.2f}", "share": f"{s / total:.1%}"} for p, s in seconds.items()]
    print_rows(rows, ("phase", "seconds", "share"), "time by phase, rank 0")
