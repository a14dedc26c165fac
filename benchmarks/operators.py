# SPDX-License-Identifier: MIT
"""Compare the operators with PyTorch's own, eager and compiled: ``python -m benchmarks run operators``.

One case is the maximum of two 1000×1000 matrices of integers, a common exercise for Numba, whose loops
run on one CPU core. On a GPU their time is without transfers.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from benchmarks.command import Command, run
from benchmarks.compare import Case, Contestant, Mode, compare
from benchmarks.operations import (
    BACKWARDS,
    MODES,
    NATIVE,
    OPERATORS,
    OURS,
    exact_matmul_case,
    linear_sigmoid_backward_case,
    linear_sigmoid_case,
    matmul_t_case,
    maximum_case,
    njit_maximum,
    numpy_matmul_t,
    symmetric_matmul_case,
)
from benchmarks.results import Result, Table, duration, number, print_results
from benchmarks.timing import measure_ceiling
from torchpar.errors import ConfigError

ROUNDS = 20
QUICK_ROUNDS = 2
CPU_SECONDS = 0.25  # of a contestant's turns in one mode
GPU_SECONDS = 2.0
BYTES_PER_ELEMENT = 160  # of device memory for a measurement of maximum in float64, oracle included
SMALL = (64, 128, 10)  # rows, in_features, out_features
SMALL_CALLS = 200
EXERCISE = (1000, 1000)


class Sizes(NamedTuple):
    maximum: list[int]
    maximum_broadcast: list[tuple[int, int]]  # with one row, and with one column
    products: list[int]  # n = k, of matmul_t and symmetric_matmul
    linear_sigmoid: list[tuple[int, int, int]]  # rows, in_features, out_features
    linear_sigmoid_backward: list[tuple[int, int]]  # rows, out_features
    exact: list[int]  # m = k = n, of the exact products


QUICK = Sizes([2**12], [(16, 256)], [65], [(8, 33, 5)], [(8, 5)], [65])
CPU = Sizes([2**21], [(1024, 2048)], [256, 1024], [(64, 784, 128), (256, 768, 1024)], [], [256, 1024, 2048])
GPU = Sizes(
    [2**20, 2**26, 2**28],
    [(16384, 16384)],
    [256, 512, 1024, 2048, 4096, 8192],
    [
        *[(rows, 784, width) for rows in (64, 512) for width in (128, 512)],  # the first layer of an MLP
        *[(128, 784, 1000), (256, 784, 1001), (256, 784, 2056), (512, 784, 4096)],
        (64, 8192, 1024),  # few rows and long sums
        (512, 3072, 12288),
        (8192, 4096, 4096),
    ],
    [(64, 4096), (512, 12288), (8192, 4096)],
    [1024, 2048, 4096, 8192],
)

# Compiling takes seconds. On a GPU, where some operators have many shapes, these are compiled.
COMPILED = {
    "maximum": ("268435456 268435456",),
    "linear_sigmoid": ("64x784->128", "512x784->512", "8192x4096->4096"),
}


AUTOTUNED = ("8192x4096->4096",)  # which takes a minute


# The operators are held to eager PyTorch's errors, and libraries to none: Inductor, for one, sums long
# columns on a CPU with eight times eager's error.
LIBRARIES = ("torch.compile", "max-autotune", "torchpar + torch.compile", "torch.mm", "numpy")
# Of linear_sigmoid, the product and the bias alone.
FINISH = {"addmm": torch.sigmoid}
FORWARD_ONLY = ("numpy", "njit", *FINISH)
ON_CPU = ("njit",)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    sizes = QUICK if quick else GPU if on_gpu else CPU
    dtypes = [torch.float32] if quick else [torch.float32, torch.bfloat16]
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else math.inf
    yield maximum_case(torch.int64, device, EXERCISE, EXERCISE)
    for dtype in [torch.int8, *dtypes, torch.float64] if on_gpu and not quick else dtypes:
        shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((n,), (n,)) for n in sizes.maximum]
        for rows, columns in sizes.maximum_broadcast:
            shapes += [((rows, columns), (columns,)), ((rows, columns), (rows, 1))]
        for a_shape, b_shape in shapes:
            if BYTES_PER_ELEMENT * math.prod(a_shape) < memory:
                yield maximum_case(dtype, device, a_shape, b_shape)
    for make in (matmul_t_case, symmetric_matmul_case):
        for dtype in dtypes if on_gpu or quick else [*dtypes, torch.float64]:
            yield from (make(dtype, device, n, n) for n in sizes.products)
    for n in sizes.exact:
        yield exact_matmul_case(device, n, n, n)
        yield matmul_t_case(torch.float32, device, n, n, operator="exact_matmul_t")
    for dtype in dtypes:
        for shape in sizes.linear_sigmoid:
            yield linear_sigmoid_case(dtype, device, *shape)
        for rows, columns in sizes.linear_sigmoid_backward:
            yield linear_sigmoid_backward_case(dtype, device, rows, columns)


def contestants(case: Case, quick: bool) -> dict[str, Contestant]:
    """Eager, ours, and unless ``quick`` both compiled; the library's bare products, and njit's loops."""
    if case.operator in BACKWARDS:  # a compiler would not compute the sum that is dropped
        return dict(zip(("eager", "torchpar"), BACKWARDS[case.operator], strict=True))
    native, ours = NATIVE[case.operator], OURS[case.operator]
    found: dict[str, Contestant] = {"eager": native, "torchpar": ours}
    on_cpu = case.device.type == "cpu"
    if not quick and (on_cpu or case.shape in COMPILED.get(case.operator, (case.shape,))):
        torch.compiler.reset()  # every shape is compiled anew, and recompilations are limited
        found["torch.compile"] = torch.compile(native, dynamic=False)
        found["torchpar + torch.compile"] = torch.compile(ours, dynamic=False)
    if not quick and not on_cpu and case.shape in AUTOTUNED:
        # CUDA graphs would write every result to the same memory, which is poisoned here.
        found["max-autotune"] = torch.compile(native, dynamic=False, mode="max-autotune-no-cudagraphs")
    if case.operator == "matmul_t":
        found["torch.mm"] = lambda x: torch.mm(x, x.T)
        if on_cpu and case.dtype != torch.bfloat16:
            found["numpy"] = numpy_matmul_t
    if case.operator == "linear_sigmoid":
        found["addmm"] = linear
    if case.dtype == torch.int64:  # the exercise
        if importlib.util.find_spec("numba"):
            found["njit"] = njit_maximum
        else:
            print("njit is left out: Numba is missing; pip install -e '.[baselines]'")
    return found


def small_call(device: torch.device, rounds: int) -> list[Result]:
    """The cost of a call whose arithmetic costs next to nothing, on one thread."""
    case = linear_sigmoid_case(torch.float32, device, *SMALL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compared = {"eager": NATIVE["linear_sigmoid"], "torchpar": OURS["linear_sigmoid"]}
        return compare(case, compared, reference="eager", mode="full", rounds=rounds, calls=SMALL_CALLS)
    finally:
        torch.set_num_threads(threads)


def print_exercise(rows: Mapping[str, Result]) -> None:
    """Print the times by contestant, on the device and of the host apart, and the speed over njit's."""
    njit = rows["njit"].p50_ms if "njit" in rows else None
    shown = []
    for name, row in rows.items():
        if row.p50_ms is None:
            continue
        text = f"{name} {duration(row.p50_ms / 1e3)}"
        if row.found["host_ms"]:
            text += f" (host {duration(row.found['host_ms'] / 1e3)})"
        shown.append(text + (f", {number(njit / row.p50_ms)}× njit" if njit and name != "njit" else ""))
    print(f"maximum of two {EXERCISE[0]}×{EXERCISE[1]} int64: {'; '.join(shown)}")


def compare_all(
    cases: Iterable[Case],
    contestants: Callable[[Case], dict[str, Contestant]],
    options: argparse.Namespace,
    modes: Sequence[Mode],
    reference: str = "eager",
    calls: int = 1,
) -> Iterator[list[Result]]:
    """The rows of each case and mode in turn."""
    listed = list(cases)
    device = options.device
    dtypes = sorted({one.dtype for one in listed}, key=str)
    ceiling = measure_ceiling(device, dtypes, options.quick)
    for dtype in dtypes:
        print(f"{dtype}: {ceiling.describe(dtype)}")
    for case in listed:
        compared = contestants(case)
        for mode in modes:
            forward = mode == "forward"
            if mode not in case.modes:
                continue
            yield compare(
                case,
                {name: one for name, one in compared.items() if forward or name not in FORWARD_ONLY},
                reference=reference,
                libraries=LIBRARIES,
                finish=FINISH,
                on_cpu=ON_CPU,
                mode=mode,
                rounds=QUICK_ROUNDS if options.quick else ROUNDS,
                seconds=GPU_SECONDS if device.type == "cuda" else CPU_SECONDS,
                calls=calls,
                ceiling=ceiling,
            )


def parse(command: Command, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags of the benchmarks that compare operators; ``device`` is a `torch.device`."""
    parser = command.parser
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    options = command.parse(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but PyTorch finds no GPU")
    if options.threads < 1:
        raise ConfigError(f"--threads is {options.threads}, expected at least 1")
    options.device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("operators", "Compare the operators with PyTorch's own.")
    command.parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
    options = parse(command, arguments)
    table = Table(command.csv(options), options.device)
    small = table.add(small_call(options.device, QUICK_ROUNDS if options.quick else ROUNDS))
    listed = [one for one in cases(options.device, options.quick) if one.operator in options.operators]
    for rows in compare_all(listed, lambda one: contestants(one, options.quick), options, options.modes):
        table.add(rows)
    for operator in OPERATORS:
        shown = [row for row in table.results if row.case["operator"] == operator]
        print_results(operator, shown)
    if exercise := {row.contestant: row for row in table.results if row.case["dtype"] == "int64"}:
        print_exercise(exercise)
    costs = {row.contestant: (row.found["host_ms"] or row.p50_ms or math.nan) / 1e3 for row in small}
    print(
        f"a small call, linear_sigmoid {small[0].case['shape']} forward and backward on one thread: "
        f"eager {duration(costs['eager'])}, torchpar {duration(costs['torchpar'])}"
    )
    return table.status


if __name__ == "__main__":
    run(main)
