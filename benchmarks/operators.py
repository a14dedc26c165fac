# SPDX-License-Identifier: MIT
"""Compare the operators with PyTorch's own, eager and compiled:
``python -m benchmarks run operators``.

Operators, sizes and work are those of `benchmarks.records`.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from torchpar.errors import ConfigError, writing

from .compare import MODES, OperatorCase, Work, compare
from .flags import Command, run
from .records import workloads
from .records.matmul_t import MIRRORED
from .records.record import Implementation, Sizes, Workload
from .results import Result, Table, print_results

ROUNDS = 20
SECONDS = {"cpu": 0.25, "cuda": 2.0}  # of a contestant's turns in one mode
WARM = 2**22  # bytes of a case that is also called `WARM_CALLS` times in a row, on a CPU
WARM_CALLS = 100
# The operators are held to eager PyTorch's errors, and libraries to none: Inductor, for one, sums
# long columns on a CPU with eight times eager's error.
COMPILED = ("torch.compile", "torchpar + torch.compile")
DTYPES = ("float32", "bfloat16", "float64", "int8")
TICKS = (64, 128, 256, 512, 1024, 2048, 4096)  # of the picture


def draw(
    seed: int, dtype: torch.dtype, device: torch.device, shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Normally distributed; integers are uniform in [0, 255], those of 8 bits in [0, 126]."""
    generator = torch.Generator(device).manual_seed(seed)
    high = 127 if dtype.itemsize == 1 else 256
    draw_one = torch.randn if dtype.is_floating_point else partial(torch.randint, high)
    return [draw_one(one, dtype=dtype, device=device, generator=generator) for one in shapes]


def make_case(
    workload: Workload, sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> OperatorCase:
    """The case of a workload. One without work of a backward pass has a forward pass alone."""
    forward, *backward = (
        Work(dtype.itemsize * moved, flops) for moved, flops in workload.work(*sizes)
    )
    return OperatorCase(
        workload.name,
        workload.text(sizes),
        dtype,
        device,
        lambda seed: workload.operands(*draw(seed, dtype, device, workload.drawn(*sizes))),
        workload.native,
        forward=forward,
        backward=backward[0] if backward else Work(0, 0),
        modes=MODES if dtype.is_floating_point and backward else MODES[:1],
    )


def cases(device: torch.device, quick: bool) -> Iterator[tuple[Workload, Sizes, OperatorCase]]:
    """Every case, with its workload and its sizes."""
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else math.inf
    for one in workloads().values():
        dtypes = [*one.dtypes, *(one.gpu_dtypes if on_gpu else ())]
        for dtype in dtypes[:1] if quick else dtypes:
            for sizes in one.quick if quick else one.gpu if on_gpu else one.cpu:
                if one.element_bytes * math.prod(one.drawn(*sizes)[0]) < memory:
                    yield one, sizes, make_case(one, sizes, dtype, device)


def contestants(
    workload: Workload, sizes: Sizes, case: OperatorCase, quick: bool
) -> dict[str, Implementation]:
    """Eager and ours, of some shapes both compiled, and the workload's rivals."""
    both = workload.native, workload.ours
    compared: dict[str, Implementation] = dict(zip(("eager", "torchpar"), both, strict=True))
    if not quick and sizes in workload.compiled:
        torch.compiler.reset()  # every shape is compiled anew, and recompilations are limited
        for name, function in zip(COMPILED, both, strict=True):
            compared[name] = torch.compile(function, dynamic=False)
    return compared | {
        name: rival.function
        for name, rival in workload.rivals.items()
        if rival.suits(case.device.type, sizes, case.dtype)
    }


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("operators")
    flag = command.parser.add_argument
    command.choose("--operators", workloads())
    flag("--shapes", nargs="+", help="as in the tables; by default all")
    command.choose("--dtypes", DTYPES)
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="a GPU if there is one")
    meaning = "full: forward and backward; warm: operands in the cache; by default all"
    command.choose("--modes", (*MODES, "warm"), meaning)
    options = command.parse(arguments)
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    every = torch.get_num_threads()
    threads = [every] if on_gpu or options.quick else sorted({1, every})
    device = torch.device("cuda" if on_gpu else "cpu")
    asked = [one for one in cases(device, options.quick) if one[0].name in options.operators]
    shapes = list(dict.fromkeys(case.shape for *_, case in asked))
    if unknown := [shape for shape in options.shapes or () if shape not in shapes]:
        raise ConfigError(
            f"--shapes has {unknown[0]!r}, expected of {', '.join(map(repr, shapes))}"
        )
    listed = [
        one
        for one in asked
        if one[2].shape in (options.shapes or [one[2].shape])
        and str(one[2].dtype).removeprefix("torch.") in options.dtypes
    ]
    if not listed:
        raise ConfigError("no case has these --operators, --shapes and --dtypes here; name others")
    table = Table(command.csv(options), device)
    for count in threads:
        torch.set_num_threads(count)
        for one in listed:
            measure(*one, table, options)
    if not table.results:
        raise ConfigError("no case has these --operators and --modes on this device; name others")
    for operator in options.operators:
        print_results(
            operator, [result for result in table.results if result.case["operator"] == operator]
        )
    if options.output and not on_gpu and "matmul_t" in options.operators:
        draw_crossover(options.output / "crossover.png", table.results)
    return table.status


def measure(
    workload: Workload, sizes: Sizes, case: OperatorCase, table: Table, options: argparse.Namespace
) -> None:
    """Add the results of a case in all its modes, with the present number of threads."""
    on_gpu, rivals = table.device.type == "cuda", workload.rivals
    compared = contestants(workload, sizes, case, options.quick)
    chosen = [(mode, 1) for mode in case.modes if mode in options.modes]
    if "warm" in options.modes and not on_gpu and case.forward.bytes <= WARM:
        chosen.append(("forward", WARM_CALLS))
    for mode, calls in chosen:
        names = [name for name in compared if mode == "forward" or name not in rivals]
        results = compare(
            case,
            {name: compared[name] for name in names},
            reference="eager",
            libraries={*COMPILED, *(name for name in rivals if rivals[name].is_library)},
            finish={name: rival.finish for name, rival in rivals.items() if rival.finish},
            mode=mode,
            rounds=2 if options.quick else ROUNDS,
            seconds=SECONDS[table.device.type],
            calls=calls,
        )
        table.add(results)


def draw_crossover(path: Path, results: Sequence[Result]) -> None:
    """Draw the speed-up of matmul_t of square matrices over torch.mm with a mirror, and alone, by
    rows."""
    from matplotlib.figure import Figure

    # Rows and both speed-ups, by threads and dtype.
    curves = defaultdict[tuple[int, str], list[tuple[int, float, float]]](list)
    speedups = {(*one.case.values(), one.contestant): one.speedup for one in results}
    for one in results:
        rows, *columns = one.case["shape"].split("x")
        mirrored = speedups.get((*one.case.values(), MIRRORED))
        is_drawn = (one.contestant, one.case["mode"], columns) == ("torchpar", "forward", [rows])
        if is_drawn and one.speedup and mirrored:
            line = curves[one.case["threads"], one.case["dtype"]]
            line.append((int(rows), one.speedup / mirrored, one.speedup))
    counts = sorted({threads for threads, _ in curves})
    figure = Figure(figsize=(4.2 * max(len(counts), 1), 3.8), layout="constrained")
    for place, count in enumerate(counts, 1):
        axes = figure.add_subplot(1, len(counts), place, title=f"threads: {count}")
        dtypes = sorted(dtype for threads, dtype in curves if threads == count)
        for color, dtype in enumerate(dtypes):
            ns, over_mirrored, over_mm = zip(*sorted(curves[count, dtype]), strict=True)
            axes.plot(ns, over_mirrored, f"C{color}-", label=dtype)
            axes.plot(ns, over_mm, f"C{color}:")
        axes.axhline(1, color="gray", lw=1)
        axes.set(xscale="log", yscale="log", xlabel="rows and columns", ylabel="speed-up")
        axes.set_xticks(TICKS, map(str, TICKS), minor=False)
        axes.set_yticks((0.5, 1, 2, 4), ("0.5", "1", "2", "4"))
        axes.minorticks_off()
        axes.legend()
    with writing(path, "--output"):
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)
