# SPDX-License-Identifier: MIT
"""The three operators beside PyTorch's own, eager and compiled: ``python -m benchmarks.operators``.

Work is what the operator needs, whoever computes it: x·xᵀ is n(n + 1)k operations, so that a provider
which computes all of the symmetric product reaches half the roofline at most.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

import torchpar
from benchmarks.harness import Case, Work, measure
from benchmarks.report import Row, print_table, write_csv
from benchmarks.timing import Mode, Provider, measure_ceiling

try:
    from rich.console import Console
    from rich.progress import track
except ModuleNotFoundError:
    sys.exit("python -m benchmarks.operators prints with rich, which is not installed: pip install rich")

MODES: tuple[Mode, ...] = ("forward", "backward", "full")
CPU_SECONDS = 0.5  # for the rounds of one measurement
GPU_SECONDS = 5.0
BYTES_PER_ELEMENT = 128  # of device memory for a measurement of maximum, oracle included
SMALL = (64, 128, 10)  # rows, in_features, out_features
SMALL_REPEAT = 200


class Sizes(NamedTuple):
    maximum: list[int]
    maximum_broadcast: list[tuple[int, int]]  # with one row
    matmul_t: list[int]  # n = k
    linear_sigmoid: list[tuple[int, int, int]]  # rows, in_features, out_features


QUICK = Sizes([2**16], [(256, 256)], [256], [(64, 784, 128)])
CPU = Sizes([2**21], [(1024, 2048)], [256, 1024], [(64, 784, 128), (256, 768, 1024)])
GPU = Sizes(
    [2**20, 2**24, 2**28],
    [(16384, 16384)],
    [256, 512, 1024, 2048, 4096, 8192],
    [(64, 784, 128), (512, 3072, 12288), (8192, 4096, 4096)],
)


def matmul_t(x: Tensor) -> Tensor:
    return x @ x.mT


def linear_sigmoid(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(x, weight, bias).sigmoid()


NATIVE: dict[str, Provider] = {
    "maximum": torch.maximum,
    "matmul_t": matmul_t,
    "linear_sigmoid": linear_sigmoid,
}


# The operators are held to PyTorch's errors. What PyTorch and NumPy reach themselves is as it is: Inductor,
# for one, sums long columns on a CPU with eight times eager's error.
YARDSTICKS = {
    "torch.compile": "torch.compile",
    "torchpar + torch.compile": "torch.compile",
    "torch.mm": "torch.mm",
    "numpy": "numpy",
}


def numpy_matmul_t(x: Tensor) -> Tensor:
    array = x.detach().numpy()
    return torch.from_numpy(np.dot(array, array.T))


def normal(seed: int, dtype: torch.dtype, device: torch.device, *shapes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, dtype=dtype, device=device, generator=generator) for shape in shapes]


def maximum_case(
    dtype: torch.dtype, device: torch.device, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> Case:
    a, b = math.prod(a_shape), math.prod(b_shape)
    return Case(
        "maximum",
        " ".join("x".join(map(str, shape)) for shape in (a_shape, b_shape)),
        dtype,
        device,
        lambda seed: normal(seed, dtype, device, a_shape, b_shape, a_shape),
        NATIVE["maximum"],
        forward=Work((2 * a + b) * dtype.itemsize, a),
        backward=Work((3 * a + 2 * b) * dtype.itemsize, a),
    )


def matmul_t_case(dtype: torch.dtype, device: torch.device, *shape: int) -> Case:
    *batch, n, k = shape
    b = math.prod(batch)
    return Case(
        "matmul_t",
        "x".join(map(str, shape)),
        dtype,
        device,
        lambda seed: normal(seed, dtype, device, shape, (*batch, n, n)),
        NATIVE["matmul_t"],
        forward=Work(b * (n * k + n * n) * dtype.itemsize, b * n * (n + 1) * k),
        backward=Work(b * (n * n + 2 * n * k) * dtype.itemsize, b * 2 * n * n * k),
    )


def linear_sigmoid_case(dtype: torch.dtype, device: torch.device, m: int, k: int, n: int) -> Case:
    def inputs(seed: int) -> list[Tensor]:
        x, weight, bias, gradient = normal(seed, dtype, device, (m, k), (n, k), (n,), (m, n))
        return [x, weight / math.sqrt(k), bias, gradient]  # so scaled, the sigmoid does not saturate

    return Case(
        "linear_sigmoid",
        f"{m}x{k}->{n}",
        dtype,
        device,
        inputs,
        NATIVE["linear_sigmoid"],
        forward=Work((m * k + n * k + n + m * n) * dtype.itemsize, 2 * m * n * k),
        backward=Work((2 * m * n + 2 * m * k + 2 * n * k + n) * dtype.itemsize, 4 * m * n * k),
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    sizes = QUICK if quick else GPU if on_gpu else CPU
    dtypes = [torch.float32] if quick else [torch.float32, torch.bfloat16]
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else math.inf
    for dtype in dtypes:
        shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((n,), (n,)) for n in sizes.maximum]
        shapes += [((rows, columns), (columns,)) for rows, columns in sizes.maximum_broadcast]
        for a_shape, b_shape in shapes:
            if BYTES_PER_ELEMENT * math.prod(a_shape) < memory:
                yield maximum_case(dtype, device, a_shape, b_shape)
    for dtype in dtypes if on_gpu else [*dtypes, torch.float64]:
        for n in sizes.matmul_t:
            yield matmul_t_case(dtype, device, n, n)
    for dtype in dtypes:
        for shape in sizes.linear_sigmoid:
            yield linear_sigmoid_case(dtype, device, *shape)


def providers(case: Case, compiled: bool) -> dict[str, Provider]:
    native, ours = NATIVE[case.operator], getattr(torchpar, case.operator)
    found: dict[str, Provider] = {"eager": native, "torchpar": ours}
    if compiled:
        torch.compiler.reset()  # every shape is compiled anew, and recompilations are limited
        found["torch.compile"] = torch.compile(native, dynamic=False)
        found["torchpar + torch.compile"] = torch.compile(ours, dynamic=False)
    if case.operator == "matmul_t":
        found["torch.mm"] = lambda x: torch.mm(x, x.T)
        if case.device.type == "cpu" and case.dtype != torch.bfloat16:
            found["numpy"] = numpy_matmul_t
    return found


def small_call(device: torch.device) -> list[Row]:
    """What a call costs where the arithmetic costs next to nothing, on one thread."""
    case = linear_sigmoid_case(torch.float32, device, *SMALL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compared = providers(case, compiled=False)
        return measure(case, compared, reference="eager", mode="full", repeat=SMALL_REPEAT)
    finally:
        torch.set_num_threads(threads)


def parse(
    arguments: Sequence[str] | None, name: str = "operators", description: str = "Measure the operators."
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="a small size in float32, nothing compiled")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the rows to FILE as they are measured"
    )
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: there must be one")
    if options.csv and not options.csv.parent.is_dir():
        parser.error(f"--csv {options.csv}: there is no folder {options.csv.parent}")
    return options


def measurements(
    jobs: Sequence[Case],
    providers: Callable[[Case], dict[str, Provider]],
    device: torch.device,
    modes: Sequence[Mode],
    reference: str = "eager",
    repeat: int = 1,
) -> Iterator[list[Row]]:
    """The rows of each case and mode in turn; on a terminal with a progress bar."""
    seconds = GPU_SECONDS if device.type == "cuda" else CPU_SECONDS
    ceiling = measure_ceiling(device, sorted({case.dtype for case in jobs}, key=str))
    terminal = Console(stderr=True)
    for case in track(jobs, "operators", console=terminal, disable=not terminal.is_terminal):
        compared = providers(case)
        for mode in modes:
            if mode != "forward":
                compared.pop("numpy", None)  # has no gradients
            yield measure(
                case,
                compared,
                reference=reference,
                yardsticks=YARDSTICKS,
                mode=mode,
                seconds=seconds,
                repeat=repeat,
                ceiling=ceiling,
            )


def recorded(measured: Iterable[Sequence[Row]], csv: Path | None) -> list[Row]:
    """All rows, written to ``csv`` as they are measured."""
    rows: list[Row] = []
    for some in measured:
        rows += some
        if csv:
            write_csv(csv, some)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.csv:
        options.csv.unlink(missing_ok=True)
    small = small_call(device)
    jobs = list(cases(device, options.quick))
    compared = partial(providers, compiled=not options.quick)
    rows = recorded(chain([small], measurements(jobs, compared, device, options.modes)), options.csv)
    for operator in NATIVE:
        print_table([row for row in rows if row.operator == operator], operator)
    costs = {row.provider: 1e3 * (row.host_ms or row.p50_ms or math.nan) for row in small}
    print(
        f"a small call, {small[0].operator} {small[0].shape} forward and backward on one thread: "
        f"eager {costs['eager']:.1f} µs, torchpar {costs['torchpar']:.1f} µs"
    )
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
