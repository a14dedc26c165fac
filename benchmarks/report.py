# SPDX-License-Identifier: MIT
"""What a measurement is reported as: a row of a CSV, and a table."""

import csv
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the CSV. None is what was not measured, or is not believed."""

    operator: str
    provider: str
    mode: str
    shape: str
    dtype: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    host_ms: float | None = None  # to issue the call to a GPU, median
    speedup: float | None = None  # the reference's time over this provider's, median over the rounds
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    roofline: float | None = None  # the least time that the machine's measured rates allow, over p50
    max_error: float | None = None
    peak_memory_mb: float | None = None  # of a GPU, above what was allocated before the call
    configuration: str
    torch: str
    triton: str
    numpy: str
    python: str
    device: str
    clocks: str
    commit: str
    dirty: bool | None
    ok: bool
    reason: str


def write_csv(path: Path, rows: Sequence[Any], **common: object) -> None:
    """Append ``rows``, dataclasses of one kind, after a header where the file is new.

    Args:
        common: columns that all rows have alike.
    """
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(rows[0])), *common])
        if new:
            writer.writeheader()
        writer.writerows({**asdict(row), **common} for row in rows)


def print_table(rows: Sequence[Row], title: str) -> None:
    """Print ``rows`` with times in microseconds, less the columns that are empty, and why rows failed."""
    from rich.console import Console  # an extra, and nothing but the table needs it
    from rich.table import Table

    columns: dict[str, list[str]] = {
        "mode": [row.mode for row in rows],
        "shape": [row.shape for row in rows],
        "dtype": [row.dtype for row in rows],
        "provider": [row.provider for row in rows],
        "p20 µs": [cell(row.p20_ms, "{:,.1f}", 1e3) for row in rows],
        "p50 µs": [cell(row.p50_ms, "{:,.1f}", 1e3) for row in rows],
        "p80 µs": [cell(row.p80_ms, "{:,.1f}", 1e3) for row in rows],
        "host µs": [cell(row.host_ms, "{:,.1f}", 1e3) for row in rows],
        "speedup": [cell(row.speedup, "{:.2f}") for row in rows],
        "GB/s": [cell(row.gb_per_s, "{:,.1f}") for row in rows],
        "TFLOP/s": [cell(row.tflop_per_s, "{:,.3f}") for row in rows],
        "roofline": [cell(row.roofline, "{:.0%}") for row in rows],
        "max error": [cell(row.max_error, "{:.1e}") for row in rows],
        "MB": [cell(row.peak_memory_mb, "{:,.1f}") for row in rows],
        "ok": ["yes" if row.ok else "[red]no" for row in rows],
    }
    columns = {header: cells for header, cells in columns.items() if any(cells)}
    table = Table(title=title, title_justify="left")
    for header in columns:
        left = header in ("mode", "shape", "dtype", "provider", "ok")
        table.add_column(header, justify="left" if left else "right", no_wrap=True)
    groups = [(row.mode, row.shape, row.dtype) for row in rows]
    for cells, group, following in zip(
        zip(*columns.values(), strict=True), groups, [*groups[1:], None], strict=True
    ):
        table.add_row(*cells, end_section=group != following)
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(table)
    for row in rows:
        if not row.ok:
            console.print(f"{row.provider}, {row.mode} {row.shape} {row.dtype}: {row.reason}", markup=False)


def cell(value: float | None, form: str, unit: float = 1) -> str:
    """``value`` times ``unit``; nothing for None."""
    return "" if value is None else form.format(value * unit)


@cache
def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and commit, as a `Row` has them.

    ``TORCHPAR_COMMIT`` names the commit where there is no repository; ``-dirty`` at its end marks changes.
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
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpuinfo("model name"),
        "commit": commit.removesuffix("-dirty"),
        "dirty": commit.endswith("-dirty") if commit else None,
    }


def clocks(device: torch.device) -> str:
    """The clocks at this moment."""
    if device.type != "cuda":
        return f"{_cpuinfo('cpu MHz')} MHz"
    uuid = torch.cuda.get_device_properties(device).uuid
    return _output(f"nvidia-smi -i GPU-{uuid} --query-gpu=clocks.sm,clocks.mem --format=csv,noheader")


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and when rows come from."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {**environment(device), "clocks": clocks(device), "date": now}


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    values = (
        value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == key
    )
    return next(values, platform.machine())


def _output(command: str, cwd: Path | None = None) -> str:
    """What ``command`` prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command.split(), cwd=cwd, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
