# SPDX-License-Identifier: MIT
"""Compile, and on a GPU time, every configuration of the kernels: ``python -m benchmarks run autotune``.

It shows what a configuration takes of a multiprocessor, and on a GPU its time at each size beside the
library's, the result checked. `python -m torchpar tune` writes the tables that the launchers read. Without a
GPU the kernels are compiled for sm_90, and nothing is timed.
"""

import argparse
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.command import Command, run
from benchmarks.results import Result, Table, print_results, track
from benchmarks.timing import Times
from torchpar.errors import ConfigError
from torchpar.tune.command import DTYPES, KERNELS, VARIANTS
from torchpar.tune.measure import LIBRARY, PRODUCT, Problem, Tiles, describe, error_line, measure, prepare

Wrap = Callable[[Any], Any]  # of a kernel, as the launchers take it

SIZES = (4096, 8192, 2048, 1024)
QUICK = 2  # configurations of a kernel
# Bytes of shared memory per block, by capability (CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability"); sm_86, sm_89 and sm_120 have LEAST_SHARED_MEMORY.
SHARED_MEMORY = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}
LEAST_SHARED_MEMORY = 101376


class Driver:
    """A stand-in for a GPU's driver. Kernels are compiled for its architecture and cannot be launched.

    Args:
        architecture: a compute capability, such as 90 for sm_90, or the name of one of AMD's.
    """

    def __init__(self, architecture: int | str):
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        nvidia = isinstance(self.architecture, int)
        return GPUTarget("cuda" if nvidia else "hip", self.architecture, 32 if nvidia else 64)

    def get_current_device(self) -> int:
        return int(str(self.architecture).removeprefix("gfx"))  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def target(architecture: int | str) -> Iterator[None]:
    """Compile the kernels of the block, whose tensors may be on "meta", for ``architecture``."""
    import triton

    with (
        patch.object(triton.runtime.driver, "_active", Driver(architecture)),
        # Triton 3.9 warns if this is unset, because the default changes in 3.10.
        patch.dict(os.environ, TRITON_DEFAULT_FP_FUSION="1"),
    ):
        yield


class Compiled(NamedTuple):
    """A kernel, and the launch for which it was compiled in so many seconds."""

    kernel: Any
    grid: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    seconds: float  # if the kernel is in Triton's cache, the time to read it


def compile_launches(launch: Callable[[Wrap], object]) -> list[Compiled]:
    """Compile the kernels that ``launch(wrap)`` launches, inside `target`."""
    compiled: list[Compiled] = []

    @dataclass
    class Compile:
        kernel: Any

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return partial(self.compile, grid)

        def compile(self, grid: Any, *args: Any, **options: Any) -> None:
            start = time.perf_counter()
            kernel = self.kernel.warmup(*args, grid=grid, **options)
            compiled.append(Compiled(kernel, grid, args, options, time.perf_counter() - start))

    launch(Compile)
    return compiled


def cuda_tool(name: str, flag: str, cubin: Path) -> str:
    """What a tool that Triton brings, such as cuobjdump, prints of a compiled kernel."""
    import triton

    tool = Path(str(triton.__file__)).parent / "backends/nvidia/bin" / name
    return subprocess.run([str(tool), flag, str(cubin)], check=True, capture_output=True, text=True).stdout


def resources(cubin: Path) -> dict[str, int]:
    """What a thread takes: REG, its registers; STACK and LOCAL, bytes that did not fit into them."""
    usage = re.findall(r"(REG|STACK|LOCAL):(\d+)", cuda_tool("cuobjdump", "-res-usage", cubin))
    return {name: int(count) for name, count in usage}


def compile_tiles(launch: Callable[..., object], tiles: Tiles, capability: int) -> tuple[dict[str, Any], str]:
    """The resources of a configuration on a GPU of ``capability``, and why it cannot be used, or "".

    ``registers`` and ``spills`` (bytes) are of a thread, ``shared_memory`` (bytes) of a block.
    """
    try:
        with target(capability):
            first, *_second_of_split_k = compile_launches(partial(launch, tiles=tiles))
        with TemporaryDirectory() as folder:
            cubin = Path(folder) / "cubin"
            cubin.write_bytes(first.kernel.asm["cubin"])
            used = resources(cubin)
    except Exception as e:
        return {}, error_line(e)
    spills, shared = used["STACK"] + used["LOCAL"], first.kernel.metadata.shared
    columns: dict[str, Any] = {"registers": used["REG"], "spills": spills}
    columns |= {"shared_memory": shared, "compile_s": first.seconds}
    if spills:
        return columns, f"spills {spills} bytes of a thread"
    if shared > (limit := SHARED_MEMORY.get(capability, LEAST_SHARED_MEMORY)):
        return columns, f"{shared} bytes of shared memory, of {limit}"
    return columns, ""


def search(
    kernel: str, dtype: str, options: argparse.Namespace, capability: int, device: torch.device
) -> Iterator[list[Result]]:
    """The results of each size: every configuration, compiled and on a GPU timed, and there the library."""
    from torchpar.kernels.tiles import KINDS, configurations

    kind, largest, on_gpu = KINDS[dtype], max(options.sizes), device.type == "cuda"
    possible = configurations(kernel, kind.dtype, kind.precision, capability)
    possible = [tiles for tiles in possible if tiles.variant in options.variants]
    possible = possible[: QUICK if options.quick else None]
    launch = prepare(Problem(kernel, dtype, largest, largest, largest), torch.device("meta")).launch
    compiled: dict[Tiles | str, tuple[dict[str, Any], str]] = {
        tiles: compile_tiles(launch, tiles, capability)
        for tiles in track(possible, f"compile {kernel} {dtype}")
    }
    usable = [tiles for tiles in possible if compiled[tiles][0]]
    tried: list[Tiles | str] = [*([PRODUCT, LIBRARY] if on_gpu else []), *possible]
    for n in options.sizes:
        measured, errors = measure(Problem(kernel, dtype, n, n, n), usable, device) if on_gpu else ({}, {})
        times = {tiles: Times([[ms / 1e3 for ms in one] for one in own]) for tiles, own in measured.items()}
        results = []
        for tiles in tried:
            columns, reason = compiled.get(tiles, ({}, ""))
            reason = reason or ("" if isinstance(tiles, str) else errors.get(tiles, ""))
            case = {"kernel": kernel, "dtype": dtype, "n": n}
            result = times.get(tiles, Times()).result(case, describe(tiles), times.get(PRODUCT), **columns)
            results.append(replace(result, ok=not reason, reason=reason))
        yield results


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("autotune", "Show every configuration of the kernels.", needs=["triton"])
    parser = command.parser
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[:1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="of the kernels")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="N", help="of N×N matrices")
    options = command.parse(arguments)
    if min(options.sizes) < 1:
        raise ConfigError(f"--sizes is {min(options.sizes)}, expected at least 1")
    timed = torch.cuda.is_available()
    device = torch.device("cuda" if timed else "cpu")
    major, minor = torch.cuda.get_device_capability() if timed else (9, 0)
    capability = 10 * major + minor
    table = Table(command.csv(options), device, target=f"sm_{capability}")
    for kernel in options.kernels:
        for dtype in options.dtypes:
            sizes = search(kernel, dtype, options, capability, device)
            results = [result for own in sizes for result in table.add(own)]
            print_results(f"{kernel} {dtype}, sm_{capability}", results)
    if not timed:
        print("the kernels were compiled; nothing was timed")
    return table.status


if __name__ == "__main__":
    run(main)
