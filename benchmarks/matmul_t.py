# SPDX-License-Identifier: MIT
# ruff: noqa: E402  # libraries read the environment when they are imported
"""X·Xᵀ beside PyTorch's and NumPy's, over shapes and dtypes: ``python -m benchmarks.matmul_t``.

The last tables are what the operator is for: how many times as fast as `torch.mm` it is, forward and
backward, and for small matrices on a CPU also in calls that find code and operands in the caches. Work is
what the symmetric product needs, n(n + 1)k operations, whoever computes it.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence

from benchmarks.idle_threads import shorten_spins

shorten_spins()

import torch

import torchpar
from benchmarks.harness import Case
from benchmarks.operators import matmul_t_case, measurements, numpy_matmul_t, parse, recorded
from benchmarks.report import Row, cell, print_table
from benchmarks.timing import Mode, Provider

REFERENCE = "torch.mm"
MODES: tuple[Mode, ...] = ("forward", "backward")
QUICK = [(256, 256)]
WARM_ROWS = 512  # up to which a call's overhead matters
WARM_CALLS = 100
CPU = [
    *((n, n) for n in (64, 128, 256, 384, 512, 768, 1000, 1024, 1500, 2048, 4096)),
    *((256, 4096), (1024, 4096), (2048, 256), (2048, 64)),
    *((64, 64, 256), (8, 512, 512)),
]
GPU = [
    *((n, n) for n in (64, 128, 256, 512, 1000, 1024, 2048, 4096, 8192, 16384)),
    *((64, 16384), (1024, 4096), (4096, 1024), (16384, 64)),
    *((64, 128, 128), (256, 256, 256), (32, 1024, 1024)),
]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    shapes = QUICK if quick else GPU if device.type == "cuda" else CPU
    dtypes = [torch.float32] if quick else [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    for dtype in dtypes:
        slow = dtype == torch.float16 and device.type == "cpu"  # PyTorch's products take seconds
        for shape in shapes:
            if slow and max(shape) > 1024:
                continue
            yield matmul_t_case(dtype, device, *shape)


def providers(case: Case) -> dict[str, Provider]:
    found: dict[str, Provider] = {REFERENCE: lambda x: x @ x.mT, "torchpar": torchpar.matmul_t}
    if case.device.type == "cpu" and case.dtype.itemsize >= 4 and case.shape.count("x") == 1:
        found["numpy"] = numpy_matmul_t
    return found


def print_speedups(rows: Sequence[Row], calls: str) -> None:
    """A line per shape: the speed over `torch.mm`'s, and in brackets over NumPy's, in such calls."""
    from rich.console import Console
    from rich.table import Table

    found_in_order = dict.fromkeys((row.mode, row.dtype) for row in rows)
    columns = sorted(found_in_order, key=lambda column: column[0] != "forward")  # each mode's dtypes together
    cells: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    numpy = {(row.shape, row.mode, row.dtype): row.speedup for row in rows if row.provider == "numpy"}
    for row in rows:
        if row.provider == "torchpar":
            text = cell(row.speedup, "{:.2f}")
            other = numpy.get((row.shape, row.mode, row.dtype))
            if row.speedup and other:
                text += f" ({row.speedup / other:.2f})"
            cells[row.shape][row.mode, row.dtype] = text if row.ok else "wrong"
    title = f"torch.mm's time over torchpar.matmul_t's (NumPy's), {calls}"
    table = Table("shape", title=title, title_justify="left")
    for mode, dtype in columns:
        table.add_column(f"{mode}\n{dtype}", justify="right", no_wrap=True)
    for shape, found in cells.items():
        table.add_row(shape, *(found.get(column, "") for column in columns))
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments, "matmul_t", "Measure X·Xᵀ.")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.csv:
        options.csv.unlink(missing_ok=True)
    jobs = list(cases(device, options.quick))
    modes = [mode for mode in MODES if mode in options.modes]
    cold = recorded(measurements(jobs, providers, device, modes, REFERENCE), options.csv)
    print_table(cold, "matmul_t")
    print_speedups(cold, "each call after a flush of the caches")
    warm: list[Row] = []
    if device.type == "cpu" and "forward" in modes:
        small = [case for case in jobs if max(map(int, case.shape.split("x"))) <= WARM_ROWS]
        measured = measurements(small, providers, device, ["forward"], REFERENCE, WARM_CALLS)
        warm = recorded(measured, options.csv)
        print_speedups(warm, f"{WARM_CALLS} calls in a row")
    return 0 if all(row.ok for row in (*cold, *warm)) else 1


if __name__ == "__main__":
    sys.exit(main())
