# SPDX-License-Identifier: MIT
"""Results of all benchmarks: their table, their CSV, and where they were measured."""

import csv
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from torchpar.console import say_progress
from torchpar.errors import writing
from torchpar.ops.environment import cpuinfo, num_cores, processor

T = TypeVar("T")
Cells = Mapping[str, Any]  # of a row, by column: texts, numbers, or None
CORES = num_cores()
WIDTH = 170  # columns of a table that is not printed to a terminal
WORD, SHORT = 24, 16  # letters of a word that the first column, and others, do not break
# The flags in /proc/cpuinfo that stand for each instruction set.
INSTRUCTION_SETS = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "AMX": {"amx_tile"},
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """A measurement, a row of the table. None stands for a value that was not measured, or is not
    believed.

    Attributes:
        case: what is done, by column, such as operator, shape and dtype.
        contestant: who does it.
        p20_ms, p50_ms, p80_ms: quantiles of the samples, in milliseconds of one call.
        mean_ms: their mean.
        samples: how many there are.
        speedup: the reference's time over this one's, the median over the rounds.
        columns: further columns.
        ok: whether the results were right.
        reason: why they were not, or "".
    """

    case: Cells
    contestant: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    mean_ms: float | None = None
    samples: int | None = None
    speedup: float | None = None
    columns: Cells = field(default_factory=dict)
    ok: bool = True
    reason: str = ""

    def plus(self, **columns: object) -> "Result":
        """The result with further columns."""
        return replace(self, columns={**self.columns, **columns})

    def row(self) -> dict[str, object]:
        """The cells by column, in the order of the CSV."""
        row: dict[str, object] = {}
        for name, value in vars(self).items():
            row |= value if name in ("case", "columns") else {name: value}
        return row


class Table:
    """All results of a benchmark.

    Args:
        path: the CSV that has them as soon as they are added; None writes nothing. ConfigError if
            it cannot be written.
        device: where they were measured.
        common: further columns of all results.
    """

    def __init__(self, path: Path | None, device: torch.device, **common: object):
        self.results: list[Result] = []
        self.path = path
        self.device = device
        self.common = common
        self._lines: list[dict[str, object]] = []

    def add(self, results: Iterable[Result]) -> list[Result]:
        """Add ``results``, with the place and the time of their measurement, and return them."""
        added = list(results)
        self.results += added
        origin = self.common | provenance(self.device)
        self._lines += [result.row() | origin for result in added]
        if self.path:
            self._write(self.path)
        return added

    def _write(self, path: Path) -> None:
        """Write the CSV; an earlier one stays as it is if that fails, or is interrupted."""
        names = dict.fromkeys(name for line in self._lines for name in line)
        written = path.with_name(f"{path.name}.{os.getpid()}")
        with writing(path, "--output"):
            try:
                with written.open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(names))
                    writer.writeheader()
                    writer.writerows(self._lines)
                written.replace(path)
            finally:
                written.unlink(missing_ok=True)

    @property
    def status(self) -> int:
        """The benchmark's exit status: 1 if a result is not ok."""
        return 0 if all(result.ok for result in self.results) else 1


# Headers and formats of columns; other columns have their names, and numbers three digits.
FORMATS: dict[str, tuple[str, Callable[[Any], str]]] = {
    **{
        f"{name}_ms": (name, lambda ms: duration(ms / 1e3))
        for name in ("p20", "p50", "p80", "mean", "host", "queued", "estimate")
    },
    "first_s": ("first call", lambda seconds: duration(seconds)),
    "speedup": ("speed-up", "{:.2f}".format),
    "queued_speedup": ("queued speed-up", "{:.2f}".format),
    "gb_per_s": ("GB/s", lambda x: number(x)),
    "gflop_per_s": ("GFLOP/s", lambda x: number(x)),
    "samples_per_s": ("samples/s", "{:,.0f}".format),
    **{
        name: (name.replace("_", " "), "{:.1e}".format)
        for name in ("max_error", "error", "distance")
    },
    "peak_memory_mb": ("MB", "{:,.1f}".format),
    "spilled_bytes": ("spilled", "{}".format),
    "shared_kb": ("KB", "{:.0f}".format),
    "blocks_per_multiprocessor": ("per SM", "{}".format),
    "waves": ("waves", "{:.2f}".format),
    "ok": ("ok", lambda ok: "yes" if ok else "NO"),
}
SPARE = ("samples", "GFLOP/s", "GB/s", "p20", "p80")  # that a narrow terminal does without
UNPRINTED = ("mean_ms", "rounds", "calls", "float32_precision", "reason")


def print_results(title: str, results: Sequence[Result], columns: Sequence[str] = ()) -> None:
    """Print results under a title, then why some are not ok.

    Args:
        columns: the ones to print; by default all that were measured, and those of the case that
            differ.
    """
    cases = [result.case for result in results]
    shared = {
        name for case in cases for name in case if len({str(one.get(name)) for one in cases}) == 1
    }
    lines = []
    for result in results:
        cells = result.row()
        names = columns or [name for name in cells if name not in UNPRINTED and name not in shared]
        line = {}
        for name in names:
            header, text = FORMATS.get(
                name, (name, lambda x: number(x) if isinstance(x, float) else str(x))
            )
            value = cells.get(name)
            line[header] = "" if value is None else text(value)
        lines.append(line)
    print_cells(title, lines, SPARE)
    print_failures(results)


def print_bounds(table: Table) -> int:
    """Say which ratios and extra times miss their bounds; return 1 if any does."""
    load = f"load average {os.getloadavg()[0]:.2f}"
    bounded = [(one, one.columns) for one in table.results if one.columns.get("bound") is not None]
    missed = []
    for one, columns in bounded:
        value, bound = columns["ratio"], columns["bound"]
        if value is not None and value < bound:
            missed.append((one, f"{value:.3f}, expected at least {bound}"))
    over = [(one, one.columns) for one in table.results if one.columns.get("bound_us") is not None]
    for one, columns in over:
        value, bound = columns["over_us"], columns["bound_us"]
        if value is not None and value > bound:
            missed.append((one, f"{value:.2f} µs more, expected at most {bound}"))
    for one, text in missed:
        print("missed:", one.contestant, *one.case.values(), text)
    print(f"{len(missed)} of {len(bounded) + len(over)} bounds are missed ({load})")
    return 1 if missed else 0


def print_failures(results: Sequence[Result]) -> None:
    """Say why results are not ok."""
    for result in results:
        if not result.ok:
            print("not ok:", result.contestant, *result.case.values(), result.reason)


class Column:
    """A column of a printed table: numbers with their units, or text that may be wrapped.

    Attributes:
        longest: letters of its longest cell or header.
        least: letters that it needs, where a header is wrapped between words.
    """

    def __init__(self, header: str, cells: Sequence[str], unbroken: int):
        """No word of text is broken that has up to ``unbroken`` letters."""
        self.header = header
        self.numbers = all(
            cell.lstrip("-")[:1].isdigit() and len(cell.split()) <= 2 for cell in cells
        )
        self.longest = max(map(len, (header, *cells)))
        words = header.split() if self.numbers else " ".join((header, *cells)).split()
        word = max(map(len, words))
        self.least = (
            max(word, *map(len, cells))
            if self.numbers
            else min(self.longest, max(SHORT, min(word, unbroken)))
        )


def print_cells(title: str, lines: Sequence[Mapping[str, str]], spare: Sequence[str] = ()) -> None:
    """Print lines of cells by header, without empty columns; nothing if there are no lines.

    A table that a terminal has no room for is as wide as it must be.

    Args:
        spare: headers of the columns that a narrow terminal does without, the first to go first.
    """
    if not lines:
        return
    import rich.table
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False)
    columns = [
        Column(header, [line[header] for line in lines if line.get(header)], SHORT if i else WORD)
        for i, header in enumerate(headers_of(lines))
    ]
    whole = least_width(columns)
    left_out: list[str] = []
    for header in spare:
        if least_width(columns) > console.width and header in [one.header for one in columns]:
            columns = [one for one in columns if one.header != header]
            left_out.append(header)
    console.width = max(console.width, least_width(columns))
    room = console.width - least_width(columns)
    is_narrow = room < sum(one.longest - one.least for one in columns)
    table = rich.table.Table()
    for i, column in enumerate(columns):
        width = column.least if is_narrow and column.numbers else None
        if is_narrow and i == 0:  # rich shrinks all text alike, and this names the row
            width = min(column.longest, column.least + room // 2)
        justify: Literal["left", "right"] = "right" if column.numbers else "left"
        table.add_column(column.header, justify=justify, width=width, overflow="fold")
    for line in lines:
        table.add_row(*(line.get(column.header, "") for column in columns))
    console.print(title, style="italic", soft_wrap=True, highlight=False)
    console.print(table)
    if left_out:
        names = ", ".join(left_out)
        print(f"Columns left out: {names}; a terminal {whole} letters wide shows them.")


def least_width(columns: Sequence[Column]) -> int:
    """The width of a table, with its lines and a space on either side of a cell."""
    return sum(one.least + 3 for one in columns) + 1


def headers_of(lines: Sequence[Mapping[str, str]]) -> list[str]:
    """The headers of lines of cells, without those of empty columns."""
    filled = {header for line in lines for header, cell in line.items() if cell}
    return [one for one in dict.fromkeys(one for line in lines for one in line) if one in filled]


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    head, *others = rows
    lines = [f"| {' | '.join(cells)} |\n" for cells in (head, *others)]
    return "".join([lines[0], "|---" * len(head) + "|\n", *lines[1:]])


def duration(seconds: float | None) -> str:
    """With three digits, in the unit that suits; "" for None."""
    if seconds is None:
        return ""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{number(seconds * scale)} {unit}"


def number(x: float | None) -> str:
    """With three digits, or whole; "" for None."""
    return "" if x is None else f"{x:,.0f}" if 999 <= abs(x) < 1e9 else f"{x:.3g}"


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
    """The items. On stderr a terminal has a progress bar, a pipe lines that say how far they are.

    Args:
        label: the items, as "rounds of maximum".
    """
    if not sys.stderr.isatty():
        return say_progress(items, label, total)
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(items, label, total, console=Console(stderr=True), transient=True)


def instruction_sets() -> list[str]:
    """The names in INSTRUCTION_SETS that the processor supports."""
    flags = set(cpuinfo("flags").split())
    return [name for name, either in INSTRUCTION_SETS.items() if flags & either]


@cache
def environment(device: torch.device) -> dict[str, str | bool | None]:
    """Versions, device, the processor with its instruction sets, and commit.

    ``TORCHPAR_COMMIT`` names the commit where there is no repository; ``-dirty`` at its end marks
    changes.
    """
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    describe = "git describe --always --dirty --abbrev=40 --exclude=*"
    commit = os.environ.get("TORCHPAR_COMMIT") or _output(describe, cwd=Path(__file__).parent)
    return {
        "torch": torch.__version__,
        "triton": triton,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "processor": processor(),
        "instruction_sets": ",".join(instruction_sets()),
        "commit": commit.removesuffix("-dirty"),
        "dirty": commit.endswith("-dirty") if commit else None,
    }


def machine(device: torch.device) -> str:
    """The folder of this machine's results, such as cpu-2-cores-amd-epyc-family-26-model-2 or
    nvidia-h100."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu {CORES} cores {processor()}"
    )
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def provenance(device: torch.device) -> dict[str, object]:
    """The `environment`, the clocks, the load average of the last minute and the date at this
    moment."""
    clocks = f"{cpuinfo('cpu MHz') or '?'} MHz"
    if device.type == "cuda":
        uuid = torch.cuda.get_device_properties(device).uuid
        query = f"nvidia-smi -i GPU-{uuid} --query-gpu=clocks.sm,clocks.mem --format=csv,noheader"
        clocks = _output(query)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    load = round(os.getloadavg()[0], 2)
    return {**environment(device), "clocks": clocks, "load": load, "date": date}


def _output(command: str, cwd: Path | None = None) -> str:
    """The output of ``command``; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command.split(), cwd=cwd, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
