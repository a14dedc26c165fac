# SPDX-License-Identifier: MIT
"""Compile, and on a GPU time, every configuration of the kernels: ``python -m benchmarks run autotune``.

It shows what a configuration takes of a multiprocessor, and on a GPU its time at each size beside the
library's, the result checked. `python -m torchpar tune` writes the tables that the launchers read. Without a
GPU, or with ``--target``, the kernels are compiled, and nothing is timed.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.command import Command, run
from benchmarks.results import Result, Table, print_results, track
from benchmarks.timing import Times
from torchpar.errors import ConfigError
from torchpar.tune.command import DTYPES, KERNELS, VARIANTS
from torchpar.tune.measure import LIBRARY, PRODUCT, Problem, Tiles, describe, error_line, measure, prepare

TARGETS = ("sm_80", "sm_90", "sm_100")
SIZES = (4096, 8192, 2048, 1024)
QUICK = 2  # configurations of a kernel


def compile_tiles(launch: Callable[..., object], tiles: Tiles, capability: int) -> tuple[dict[str, Any], str]:
    """The resources of a configuration on a GPU of ``capability``, and why it cannot be used, or "".

    ``registers`` and ``spills`` (bytes) are of a thread, ``shared_memory`` (bytes) of a block.
    """
    from benchmarks.compiled import machine_codes, target
    from torchpar.kernels import candidates

    try:
        with target(capability), TemporaryDirectory() as folder:
            code, *_second_of_split_k = machine_codes(partial(launch, tiles=tiles), Path(folder))
    except Exception as e:
        return {}, error_line(e)
    found: dict[str, Any] = {"registers": code.resources["REG"], "spills": code.spills}
    found |= {"shared_memory": code.shared_memory, "compile_s": code.seconds}
    if code.spills:
        return found, f"spills {code.spills} bytes of a thread"
    if code.shared_memory > (limit := candidates.SHARED_MEMORY.get(capability, code.shared_memory)):
        return found, f"{code.shared_memory} bytes of shared memory, of {limit}"
    return found, ""


def search(
    kernel: str, dtype: str, options: argparse.Namespace, capability: int, device: torch.device
) -> Iterator[list[Result]]:
    """The rows of each size: every configuration, compiled and on a GPU timed, and there the library."""
    from torchpar.kernels import candidates

    kind, largest = candidates.KINDS[dtype], max(options.sizes)
    configurations = candidates.configurations(kernel, kind.dtype, kind.precision, capability)
    configurations = [tiles for tiles in configurations if tiles.variant in options.variants]
    configurations = configurations[: QUICK if options.quick else None]
    launch = prepare(Problem(kernel, dtype, largest, largest, largest), torch.device("meta")).launch
    compiled: dict[Tiles | str, tuple[dict[str, Any], str]] = {
        tiles: compile_tiles(launch, tiles, capability)
        for tiles in track(configurations, f"compile {kernel} {dtype}")
    }
    usable = [tiles for tiles in configurations if compiled[tiles][0]]
    rows: list[Tiles | str] = [*([PRODUCT, LIBRARY] if device.type == "cuda" else []), *configurations]
    for n in options.sizes:
        problem, work = Problem(kernel, dtype, n, n, n), {"kernel": kernel, "dtype": dtype, "n": n}
        measured, errors = measure(problem, usable, device) if device.type == "cuda" else ({}, {})
        times = {tiles: Times([[ms / 1e3 for ms in one] for one in own]) for tiles, own in measured.items()}
        shown = []
        for tiles in rows:
            found, reason = compiled.get(tiles, ({}, ""))
            row = times.get(tiles, Times()).row(work, describe(tiles), times.get(PRODUCT), **found)
            reason = reason or ("" if isinstance(tiles, str) else errors.get(tiles, ""))
            shown.append(replace(row, ok=not reason, reason=reason))
        yield shown


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("autotune", "Show every configuration of the kernels.", needs=["triton"])
    parser = command.parser
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[:1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="of the kernels")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="N", help="of N×N matrices")
    parser.add_argument("--target", choices=TARGETS, help="compile for it alone; without a GPU: sm_90")
    options = command.parse(arguments)
    if min(options.sizes) < 1:
        raise ConfigError(f"--sizes is {min(options.sizes)}, expected at least 1")
    timed = options.target is None and torch.cuda.is_available()
    device = torch.device("cuda" if timed else "cpu")
    if timed:
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    else:
        capability = int((options.target or "sm_90").removeprefix("sm_"))
    table = Table(command.csv(options), device, target=f"sm_{capability}")
    for kernel in options.kernels:
        for dtype in options.dtypes:
            sizes = search(kernel, dtype, options, capability, device)
            rows = [row for own in sizes for row in table.add(own)]
            print_results(f"{kernel} {dtype}, sm_{capability}", rows)
    if not timed:
        print("the kernels were compiled; nothing was timed")
    return table.status


if __name__ == "__main__":
    run(main)
