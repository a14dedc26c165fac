# SPDX-License-Identifier: MIT
"""Console output of the examples: progress, tables and the last line; and files of metrics.

It imports torch only to write for TensorBoard.
"""

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from torchpar.console import say_progress
from torchpar.errors import writing
from torchpar.training.outcome import EpochResult
from torchpar.training.profile.record import RankRecord

T = TypeVar("T")
QUIET = 0.5  # load average; above it other programs disturb the times
Row = Mapping[str, object]  # cells by column

# By phase, what usually bounds it, and how to lift that.
LIFTED_BY = {
    "data": "bound by reading and copying; keep the samples on the device, or take larger batches",
    "forward": "bound by products, in small batches by memory; larger batches, or fewer bytes each",
    "backward": "bound as forward, with two products for each of its; what lifts forward lifts it",
    "pipeline": "bound by waiting for neighbours; more micro-batches, or stages that take alike",
    "collectives": "bound by bytes, if they are few by latency; larger batches, or another split",
    "optimizer": "bound by the memory of each weight, Muon by its products; larger batches",
}


def progress(
    items: Iterable[T], what: str, speaks: bool = True, total: int | None = None
) -> Iterable[T]:
    """Yield ``items``, and show a progress bar on a terminal.

    Elsewhere, as in a file or a pipe, lines on stderr say how many are done, at least every ten
    seconds.

    Args:
        speaks: whether this process says anything.
        total: their number; by default that of a sequence.
    """
    if not speaks:
        return items
    if Console().is_terminal:
        return track(items, what, total, transient=True)
    return say_progress(items, what, total)


def progress_bar(hidden: bool) -> Progress:
    """Return a progress bar that is hidden, or shows on a terminal, where print writes above it."""
    return Progress(transient=True, disable=hidden or not Console().is_terminal)


def epoch_line(result: EpochResult, epochs: int) -> str:
    """Return the line that a lesson prints after an epoch of ``epochs``."""
    accuracy = result.test_accuracy
    return (
        f"epoch {result.epoch}/{epochs} | train loss {result.train_loss:.4f} | "
        f"test loss {result.test_loss:.4f} | "
        + ("" if accuracy is None else f"test accuracy {accuracy:.4f} | ")
        + f"{result.samples_per_s:,.0f} samples/s | {result.seconds:.1f} s"
    )


def write_metrics(path: Path | None, lines: Iterable[Row]) -> None:
    """Write a JSON object per line, unless ``path`` is None; overwrite the file.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        return
    with writing(path, "--metrics"):
        path.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def write_log(log_dir: Path | None, rows: Sequence[Row], x: str) -> None:
    """Write the figures of each row for TensorBoard, at its ``x``, unless ``log_dir`` is None."""
    if log_dir is None or not rows:
        return
    from torch.utils.tensorboard import SummaryWriter

    hook = threading.excepthook
    threading.excepthook = lambda args: None  # the writer raises the errors of its thread again
    try:
        # purge_step: a resumed run writes its earlier epochs again.
        with writing(log_dir, "--log-dir"), SummaryWriter(log_dir, purge_step=rows[0][x]) as writer:
            for row in rows:
                for name, value in row.items():
                    if isinstance(value, float):
                        writer.add_scalar(name, value, row[x])
    finally:
        threading.excepthook = hook


def print_rows(rows: Sequence[Row], title: str = "", columns: Sequence[str] | None = None) -> None:
    """Print a table of these columns, by default all; floating-point numbers with four digits."""
    columns = columns or list(rows[0])
    table = Table(*(column.replace("_", " ") for column in columns), title=title or None)
    for row in rows:
        values = (row[column] for column in columns)
        table.add_row(
            *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
        )
    Console().print(table)


def print_load() -> None:
    """Say that the machine is busy, before a comparison of times."""
    if (load := os.getloadavg()[0]) > QUIET:
        print(f"The load average is {load:.1f}: other programs may disturb the timings.")


def summary(results: list[EpochResult]) -> str:
    """Return the run's last line: the last epoch's accuracy and loss, and the seconds of all
    epochs."""
    last = results[-1]
    seconds = sum(result.seconds for result in results)
    return last_line(last.test_accuracy, last.test_loss, seconds, last.ranks, last.device)


def last_line(accuracy: float | None, loss: float, seconds: float, ranks: int, device: str) -> str:
    """Return the last line of every training script."""
    start = "" if accuracy is None else f"test accuracy {accuracy:.4f} | "
    processes = f"{ranks} rank{'s' if ranks > 1 else ''}"
    return f"{start}loss {loss:.4f} | {seconds:.1f} s | {processes} | {device}"


def print_phases(seconds: Mapping[str, float]) -> None:
    """Print a table of the seconds and the share of each phase of rank 0."""
    total = sum(seconds.values())
    rows = [
        {"phase": phase, "seconds": f"{s:.2f}", "share": f"{s / total:.1%}"}
        for phase, s in seconds.items()
        if s
    ]
    if rows:  # the run was not complete already
        print_rows(rows, "time by phase, rank 0")
    for row in rows:
        if row["phase"] in LIFTED_BY:
            print(f"{row['phase']}: {LIFTED_BY[row['phase']]}")


def print_messages(record: RankRecord) -> None:
    """Print a table of the messages of a step on rank 0."""
    if rows := record.message_rows():
        print_rows(rows, "collectives of a step, rank 0")
    else:
        why = "there is one rank, or no more than two steps"
        print(f"collectives per step: none was recorded, as {why}")


def print_memory(records: Sequence[RankRecord]) -> None:
    """Print a table of the bytes of each rank."""
    rows = []
    for record in records:
        place = " ".join(map(str, record.place.values()))
        rank = {f"rank: {' '.join(record.place)}": f"{record.rank}: {place}"}
        rows.append(rank | {name: f"{nbytes:,}" for name, nbytes in record.memory.items()})
    print_rows(rows, "bytes of each rank")
