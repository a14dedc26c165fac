# SPDX-License-Identifier: MIT
"""Every configuration of the three kernels, by Triton's own autotuner: ``python -m benchmarks.autotune``.

`python -m torchpar tune` writes the tables that the launchers read; this shows a whole search: what each
configuration takes of a multiprocessor, and its time at each size. On a GPU, `triton.autotune` times it.
Without one, or with ``--target``, it is compiled all the same, and its time is what
`benchmarks.cost_model` predicts.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cost_model import PEAKS, predict
from benchmarks.report import cell, provenance, write_csv
from torchpar.search import Problem, describe, in_a_line

MISSING = ""
try:
    import triton
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from triton.testing import do_bench

    from benchmarks.compiled import Wrap, fresh_cache, machine_code, target
    from torchpar.kernels import maximum, tuning
    from torchpar.measure import Case, check, fp32_precision, prepare
except ModuleNotFoundError as e:
    MISSING = str(e)

KERNELS = ("symmetric_product", "linear_sigmoid", "maximum")
DTYPES = ("bfloat16", "float16", "tf32", "float32", "float64")
REGISTERS = 65536  # of a multiprocessor
SIZES = (512, 2048, 8192)
QUICK = 2  # configurations of a kernel

Configuration = tuple[int, ...]  # `tuning.Tiles` or `tuning.Block`
Launch = Callable[..., None]  # ``launch(wrap, tiles=...)``
Bench = Callable[..., list[float]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A configuration at a size. None is what is not known; ``rejected`` says why it cannot be used."""

    kernel: str
    dtype: str
    configuration: str
    n: int
    registers: int | None = None
    spills: int | None = None  # bytes of a thread
    shared_memory: int | None = None  # bytes of a block
    compile_s: float | None = None
    predicted_ms: float | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    rejected: str = ""


def prepare_case(problem: Problem, device: torch.device) -> "Case":
    if problem.kernel != "maximum":
        return prepare(problem, device)
    x, y = (torch.randn(problem.n, problem.n, device=device).to(problem.torch_dtype) for _ in range(2))
    out = torch.empty_like(x)

    def launch(wrap: Wrap, tiles: Configuration) -> None:
        block, num_warps = tiles
        kernel = wrap(maximum.maximum_flat_kernel)
        kernel[(triton.cdiv(out.numel(), block),)](x, y, out, out.numel(), BLOCK=block, num_warps=num_warps)

    return Case(launch, partial(torch.maximum, x, y), out, torch.maximum(x, y).double())


def bench(
    problem: Problem, case: "Case", call: Callable[[], object], quantiles: Sequence[float]
) -> list[float]:
    """Time a call for the autotuner, once its result is right; what fails takes for ever."""
    try:
        check(case, call, problem)
        times: list[float] = do_bench(call, quantiles=quantiles)
        return times
    except Exception as e:
        print(f"{problem}: {in_a_line(e)}")
        return [math.inf] * len(quantiles)


def label(configuration: Configuration) -> str:
    return describe(configuration) if len(configuration) > 2 else "{} w{}".format(*configuration)


def compiled(launch: Launch, row: Row, configuration: Configuration, capability: int, folder: Path) -> Row:
    """``row`` with what its configuration compiles to, and why it cannot be used if so."""
    try:
        code = machine_code(partial(launch, tiles=configuration), folder)
    except Exception as e:
        return replace(row, rejected=in_a_line(e))
    rejected = ""
    if code.spills:
        rejected = f"spills {code.spills} bytes of a thread"
    elif code.shared_memory > (limit := tuning.SHARED_MEMORY.get(capability, code.shared_memory)):
        rejected = f"{code.shared_memory} bytes of shared memory, of {limit}"
    elif (registers := code.resources["REG"] * 32 * code.options["num_warps"]) > REGISTERS:
        rejected = f"{registers} registers of a block, of {REGISTERS}"
    return replace(
        row,
        registers=code.resources["REG"],
        spills=code.spills,
        shared_memory=code.shared_memory,
        compile_s=code.seconds,
        rejected=rejected,
    )


def autotune(
    launch: Launch, configurations: Sequence[Configuration], bench: Bench
) -> dict[Configuration, list[float]]:
    """p50, p20 and p80 milliseconds of each configuration by `triton.autotune`; infinite where it fails.

    The launcher is called with each configuration for the arguments and the grid that it comes to. In the
    last call, within what the launcher sets up for its kernel, the autotuner launches all of them.
    """
    found: dict[Configuration, Any] = {}  # triton.Config of each
    grids: dict[frozenset[tuple[str, Any]], tuple[int, ...]] = {}
    timings: dict[Any, list[float]] = {}

    class Record:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return partial(self.launch, grid)

        def launch(
            self, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 3, **options: Any
        ) -> None:
            self.names = options.keys()  # of what is known when compiling
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | options
            self.tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
            scalars = {name: value for name, value in arguments.items() if name not in self.tensors}
            grids[frozenset(options.items())] = grid
            found[current] = triton.Config(scalars, num_warps=num_warps, num_stages=num_stages)

    class Autotune(Record):
        def launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
            super().launch(grid, *args, **options)
            tuner = triton.autotune(list(found.values()), key=[], do_bench=bench)(self.kernel)
            try:
                tuner[lambda meta: grids[frozenset((name, meta[name]) for name in self.names)]](
                    **self.tensors
                )
            except Exception:  # it ends with a call of the best, which may have failed too
                p50s = [p50 for p50, *_ in getattr(tuner, "configs_timings", {}).values()]
                if not p50s or min(p50s) < math.inf:
                    raise
            timings.update(tuner.configs_timings)

    *others, last = sorted(configurations, key=lambda c: bool(c[5:6] and c[5]))  # TMA needs its set-up
    for current in others:
        launch(Record, tiles=current)
    current = last
    launch(Autotune, tiles=current)
    return {configuration: timings[config] for configuration, config in found.items()}


def measured(row: Row, timing: Sequence[float]) -> Row:
    p50, p20, p80 = timing
    if p50 == math.inf:
        return replace(row, rejected=row.rejected or "it could not be timed")
    return replace(row, p20_ms=p20, p50_ms=p50, p80_ms=p80)


def rows(
    kernel: str, dtype: str, options: argparse.Namespace, capability: int, device: torch.device
) -> Iterator[Row]:
    """A row for each configuration and size, compiled for the target and, on a GPU, timed."""
    problem = Problem(kernel, dtype, max(options.sizes))
    configurations = tuning.candidates(kernel, problem.torch_dtype, problem.precision, capability)
    configurations = configurations[: QUICK if options.quick else None]
    case = prepare_case(problem, torch.device("meta"))
    found: dict[Configuration, Row] = {}
    terminal = Console(stderr=True)
    with target(capability), fresh_cache() as folder:
        for configuration in track(
            configurations, str(problem), console=terminal, disable=not terminal.is_terminal
        ):
            row = Row(kernel=kernel, dtype=dtype, configuration=label(configuration), n=problem.n)
            found[configuration] = compiled(case.launch, row, configuration, capability, folder)
    usable = [configuration for configuration, row in found.items() if row.registers is not None]
    for n in options.sizes:
        problem = problem._replace(n=n)
        timings = {}
        if device.type == "cuda" and len(usable) > 1:  # of one the autotuner takes no time
            case = prepare_case(problem, device)
            with fp32_precision(problem.precision):
                timings = autotune(case.launch, usable, partial(bench, problem, case))
        for configuration, row in found.items():
            row = replace(row, n=n)
            if capability in PEAKS:
                row = replace(row, predicted_ms=predict(problem, configuration, PEAKS[capability]))
            yield measured(row, timings[configuration]) if configuration in timings else row


def print_table(found: Sequence[Row], title: str) -> None:
    """Configurations × sizes; the least time of a size is bold and ends in *, the runner-up's in +."""
    sizes = list(dict.fromkeys(row.n for row in found))
    table = Table(title=title, title_justify="left")
    table.add_column("configuration", no_wrap=True)
    for column in ("registers", "spills B", "shared B", "compile s", *map("{} µs".format, sizes)):
        table.add_column(column, justify="right")
    table.add_column("rejected")
    ranks = {
        n: sorted({ms for row in found if row.n == n and (ms := time_of(row)) is not None}) for n in sizes
    }
    for configuration in dict.fromkeys(row.configuration for row in found):
        own = [row for row in found if row.configuration == configuration]
        first = own[0]
        times = []
        for row in own:
            ms, rank = time_of(row), ranks[row.n]
            text = cell(ms, "{:,.1f}", 1e3)
            best, runner_up = ms in rank[:1], ms in rank[1:2]
            times.append(f"[bold]{text}*" if best else f"{text}+" if runner_up else f"{text} ")
        counts = (first.registers, first.spills, first.shared_memory)
        reasons = "; ".join(dict.fromkeys(row.rejected for row in own if row.rejected))
        table.add_row(
            configuration,
            *(cell(c, "{:,}") for c in counts),
            cell(first.compile_s, "{:.2f}"),
            *times,
            reasons,
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def time_of(row: Row) -> float | None:
    """Milliseconds, measured or else predicted; None of what cannot be used."""
    return None if row.rejected else row.predicted_ms if row.p50_ms is None else row.p50_ms


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.autotune", description="Show every configuration of the kernels."
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[:1])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="N", help="of N×N matrices")
    targets = [f"sm_{capability}" for capability in PEAKS]
    parser.add_argument("--target", choices=targets, help="compile for it, and predict; without a GPU: sm_90")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} configurations of each kernel")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows to FILE")
    options = parser.parse_args(arguments)
    if min(options.sizes) < 1:
        parser.error(f"--sizes {min(options.sizes)}: expected at least 1")
    if options.csv and not options.csv.parent.is_dir():
        parser.error(f"--csv {options.csv}: there is no folder {options.csv.parent}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if MISSING:
        sys.exit(f"python -m benchmarks.autotune needs triton and rich, pip install them: {MISSING}")
    timed = options.target is None and torch.cuda.is_available()
    device = torch.device("cuda" if timed else "cpu")
    if timed:
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    else:
        capability = int((options.target or "sm_90").removeprefix("sm_"))
    if options.csv:
        options.csv.unlink(missing_ok=True)
    for kernel in options.kernels:
        for dtype in options.dtypes:
            found = list(rows(kernel, dtype, options, capability, device))
            if options.csv:
                write_csv(options.csv, found, target=f"sm_{capability}", **provenance(device))
            how = "measured" if timed else "predicted, none was measured"
            print_table(found, f"{kernel} {dtype}, sm_{capability}; times are {how}; * least, + next")
    if not timed:
        print("No time was measured. The model knows the shapes of tiles alone: see benchmarks/cost_model.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
