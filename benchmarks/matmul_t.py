# SPDX-License-Identifier: MIT
# ruff: noqa: E402  # libraries read the environment when they are imported
"""Compare X·Xᵀ with PyTorch's and NumPy's, over shapes and dtypes: ``python -m benchmarks run matmul_t``.

The last tables show what the operator is for: how many times as fast as `torch.mm` it is, forward and
backward, and for small matrices on a CPU also in calls that find code and operands in the caches. The work
is what the symmetric product needs, n(n + 1)k operations, whoever computes it.
"""

from collections.abc import Iterator, Sequence

from benchmarks.idle_threads import shorten_spins

shorten_spins()

import torch

import torchpar
from benchmarks.command import Command, run
from benchmarks.compare import Case, Contestant, Mode
from benchmarks.operations import matmul_t_case, numpy_matmul_t
from benchmarks.operators import compare_all, parse
from benchmarks.results import Result, Table, number, print_cells, print_results

REFERENCE = "torch.mm"
MODES: tuple[Mode, ...] = ("forward", "backward")
QUICK = [(65, 65)]
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
            if not (slow and max(shape) > 1024):
                yield matmul_t_case(dtype, device, *shape)


def contestants(case: Case) -> dict[str, Contestant]:
    found: dict[str, Contestant] = {REFERENCE: lambda x: x @ x.mT, "torchpar": torchpar.matmul_t}
    if case.device.type == "cpu" and case.dtype.itemsize >= 4 and case.shape.count("x") == 1:
        found["numpy"] = numpy_matmul_t
    return found


def print_speedups(rows: Sequence[Result], calls: str) -> None:
    """A line per shape: the speed over `torch.mm`'s, and in brackets over NumPy's, in such calls."""
    speedups = {(tuple(row.case.values()), row.contestant): row.speedup for row in rows}
    lines: dict[str, dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: row.case["mode"] != "forward"):  # each mode's dtypes together
        if row.contestant != "torchpar":
            continue
        line = lines.setdefault(row.case["shape"], {"shape": row.case["shape"]})
        text = number(row.speedup) if row.ok else "wrong"
        other = speedups.get((tuple(row.case.values()), "numpy"))
        if row.speedup and other:
            text += f" ({number(row.speedup / other)})"
        line[f"{row.case['mode']}\n{row.case['dtype']}"] = text
    print_cells(f"torch.mm's time over torchpar.matmul_t's (NumPy's), {calls}", list(lines.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("matmul_t", "Compare X·Xᵀ with PyTorch's and NumPy's.")
    options = parse(command, arguments)
    table = Table(command.csv(options), options.device)
    listed = list(cases(options.device, options.quick))
    modes = [mode for mode in MODES if mode in options.modes]
    for rows in compare_all(listed, contestants, options, modes, REFERENCE):
        table.add(rows)
    print_results("matmul_t", table.results)
    print_speedups(table.results, "each call after a flush of the caches")
    if options.device.type == "cpu" and "forward" in modes:
        small = [one for one in listed if max(map(int, one.shape.split("x"))) <= WARM_ROWS]
        warm = []
        for rows in compare_all(small, contestants, options, ["forward"], REFERENCE, WARM_CALLS):
            warm += table.add(rows)
        print_speedups(warm, f"{WARM_CALLS} calls in a row")
    return table.status


if __name__ == "__main__":
    run(main)
