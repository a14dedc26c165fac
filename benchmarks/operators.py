# SPDX-License-Identifier: MIT
"""Compare the operators with PyTorch's own, eager and compiled: ``python -m benchmarks.operators``.

The work is what the operator needs, whoever computes it: a symmetric product is n(n + 1)k operations, so
that a provider which computes all of it reaches half the roofline at most.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

import torchpar
from benchmarks.command import Command, run
from benchmarks.compare import Mode, Operation, Provider, Work, compare
from benchmarks.report import Results, Row, duration, print_rows
from benchmarks.timing import measure_ceiling
from torchpar.errors import ConfigError

MODES: tuple[Mode, ...] = ("forward", "backward", "full")
ROUNDS = 20
QUICK_ROUNDS = 2
CPU_SECONDS = 0.25  # of a provider's turns in one mode
GPU_SECONDS = 2.0
BYTES_PER_ELEMENT = 128  # of device memory for a measurement of maximum, oracle included
SMALL = (64, 128, 10)  # rows, in_features, out_features
SMALL_CALLS = 200
ALPHA, BETA = 0.5, 2.0  # of symmetric_matmul


class Sizes(NamedTuple):
    maximum: list[int]
    maximum_broadcast: list[tuple[int, int]]  # with one row
    products: list[int]  # n = k, of matmul_t and symmetric_matmul
    linear_sigmoid: list[tuple[int, int, int]]  # rows, in_features, out_features


QUICK = Sizes([2**12], [(16, 256)], [65], [(8, 33, 5)])
CPU = Sizes([2**21], [(1024, 2048)], [256, 1024], [(64, 784, 128), (256, 768, 1024)])
GPU = Sizes(
    [2**20, 2**24, 2**28],
    [(16384, 16384)],
    [256, 512, 1024, 2048, 4096, 8192],
    [
        *[(rows, 784, width) for rows in (64, 512) for width in (128, 512)],  # the first layer of an MLP
        (512, 3072, 12288),
        (8192, 4096, 4096),
    ],
)


def matmul_t(x: Tensor) -> Tensor:
    return x @ x.mT


def symmetric_matmul(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return ALPHA * (a @ b.mT) + BETA * c


def linear_sigmoid(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(x, weight, bias).sigmoid()


NATIVE: dict[str, Provider] = {
    "maximum": torch.maximum,
    "matmul_t": matmul_t,
    "symmetric_matmul": symmetric_matmul,
    "linear_sigmoid": linear_sigmoid,
}
OURS: dict[str, Provider] = {name: getattr(torchpar, name) for name in NATIVE} | {
    "symmetric_matmul": lambda a, b, c: torchpar.symmetric_matmul(a, b, c, alpha=ALPHA, beta=BETA)
}

# The operators are held to PyTorch's errors. The errors of PyTorch and NumPy themselves are as they are:
# Inductor, for one, sums long columns on a CPU with eight times eager's error.
YARDSTICKS = {
    "torch.compile": "torch.compile",
    "torchpar + torch.compile": "torch.compile",
    "torch.mm": "torch.mm",
    "numpy": "numpy",
}
# Of linear_sigmoid, the product and the bias alone.
FINISH = {"addmm": torch.sigmoid}
FORWARD_ONLY = ("numpy", *FINISH)


def numpy_matmul_t(x: Tensor) -> Tensor:
    array = x.detach().numpy()
    return torch.from_numpy(np.dot(array, array.T))


def normal(seed: int, dtype: torch.dtype, device: torch.device, *shapes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, dtype=dtype, device=device, generator=generator) for shape in shapes]


def maximum_operation(
    dtype: torch.dtype, device: torch.device, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> Operation:
    a, b = math.prod(a_shape), math.prod(b_shape)
    return Operation(
        "maximum",
        " ".join("x".join(map(str, shape)) for shape in (a_shape, b_shape)),
        dtype,
        device,
        lambda seed: normal(seed, dtype, device, a_shape, b_shape, a_shape),
        NATIVE["maximum"],
        forward=Work((2 * a + b) * dtype.itemsize, a),
        backward=Work((3 * a + 2 * b) * dtype.itemsize, a),
    )


def matmul_t_operation(dtype: torch.dtype, device: torch.device, *shape: int) -> Operation:
    *batch, n, k = shape
    b = math.prod(batch)
    return Operation(
        "matmul_t",
        "x".join(map(str, shape)),
        dtype,
        device,
        lambda seed: normal(seed, dtype, device, shape, (*batch, n, n)),
        NATIVE["matmul_t"],
        forward=Work(b * (n * k + n * n) * dtype.itemsize, b * n * (n + 1) * k),
        backward=Work(b * (n * n + 2 * n * k) * dtype.itemsize, b * 2 * n * n * k),
    )


def symmetric_matmul_operation(dtype: torch.dtype, device: torch.device, n: int, k: int) -> Operation:
    """α·A·Bᵀ + β·C with B equal to A, which the operator is not told, and a symmetric C."""

    def inputs(seed: int) -> list[Tensor]:
        a, c, gradient = normal(seed, dtype, device, (n, k), (n, n), (n, n))
        return [a, a.clone(), (c + c.mT) / 2, gradient]

    return Operation(
        "symmetric_matmul",
        f"{n}x{k}",
        dtype,
        device,
        inputs,
        NATIVE["symmetric_matmul"],
        forward=Work((2 * n * k + 2 * n * n) * dtype.itemsize, n * (n + 1) * k),
        backward=Work((2 * n * n + 4 * n * k) * dtype.itemsize, 4 * n * n * k),
    )


def linear_sigmoid_operation(dtype: torch.dtype, device: torch.device, m: int, k: int, n: int) -> Operation:
    def inputs(seed: int) -> list[Tensor]:
        x, weight, bias, gradient = normal(seed, dtype, device, (m, k), (n, k), (n,), (m, n))
        return [x, weight / math.sqrt(k), bias, gradient]  # so scaled, the sigmoid does not saturate

    return Operation(
        "linear_sigmoid",
        f"{m}x{k}->{n}",
        dtype,
        device,
        inputs,
        NATIVE["linear_sigmoid"],
        forward=Work((m * k + n * k + n + m * n) * dtype.itemsize, 2 * m * n * k),
        backward=Work((2 * m * n + 2 * m * k + 2 * n * k + n) * dtype.itemsize, 4 * m * n * k),
    )


def operations(device: torch.device, quick: bool) -> Iterator[Operation]:
    on_gpu = device.type == "cuda"
    sizes = QUICK if quick else GPU if on_gpu else CPU
    dtypes = [torch.float32] if quick else [torch.float32, torch.bfloat16]
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else math.inf
    for dtype in dtypes:
        shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((n,), (n,)) for n in sizes.maximum]
        shapes += [((rows, columns), (columns,)) for rows, columns in sizes.maximum_broadcast]
        for a_shape, b_shape in shapes:
            if BYTES_PER_ELEMENT * math.prod(a_shape) < memory:
                yield maximum_operation(dtype, device, a_shape, b_shape)
    for operation in (matmul_t_operation, symmetric_matmul_operation):
        for dtype in dtypes if on_gpu or quick else [*dtypes, torch.float64]:
            yield from (operation(dtype, device, n, n) for n in sizes.products)
    for dtype in dtypes:
        for shape in sizes.linear_sigmoid:
            yield linear_sigmoid_operation(dtype, device, *shape)


def providers(operation: Operation, quick: bool) -> dict[str, Provider]:
    """Eager, ours, and unless ``quick`` both compiled; the library's bare products."""
    native, ours = NATIVE[operation.operator], OURS[operation.operator]
    found: dict[str, Provider] = {"eager": native, "torchpar": ours}
    if not quick:
        torch.compiler.reset()  # every shape is compiled anew, and recompilations are limited
        found["torch.compile"] = torch.compile(native, dynamic=False)
        found["torchpar + torch.compile"] = torch.compile(ours, dynamic=False)
    if operation.operator == "matmul_t":
        found["torch.mm"] = lambda x: torch.mm(x, x.T)
        if operation.device.type == "cpu" and operation.dtype != torch.bfloat16:
            found["numpy"] = numpy_matmul_t
    if operation.operator == "linear_sigmoid":
        found["addmm"] = linear
    return found


def small_call(device: torch.device, rounds: int) -> list[Row]:
    """The cost of a call whose arithmetic costs next to nothing, on one thread."""
    operation = linear_sigmoid_operation(torch.float32, device, *SMALL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compared = {"eager": NATIVE["linear_sigmoid"], "torchpar": OURS["linear_sigmoid"]}
        return compare(operation, compared, reference="eager", mode="full", rounds=rounds, calls=SMALL_CALLS)
    finally:
        torch.set_num_threads(threads)


def compare_all(
    operations: Iterable[Operation],
    providers: Callable[[Operation], dict[str, Provider]],
    options: argparse.Namespace,
    modes: Sequence[Mode],
    reference: str = "eager",
    calls: int = 1,
) -> Iterator[list[Row]]:
    """The rows of each operation and mode in turn."""
    listed = list(operations)
    device = options.device
    ceiling = measure_ceiling(device, sorted({one.dtype for one in listed}, key=str), options.quick)
    for operation in listed:
        compared = providers(operation)
        for mode in modes:
            forward = mode == "forward"
            yield compare(
                operation,
                {name: one for name, one in compared.items() if forward or name not in FORWARD_ONLY},
                reference=reference,
                yardsticks=YARDSTICKS,
                finish=FINISH,
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
    command.parser.add_argument("--operators", nargs="+", choices=NATIVE, default=list(NATIVE))
    options = parse(command, arguments)
    results = Results(command.csv(options), options.device)
    small = results.add(small_call(options.device, QUICK_ROUNDS if options.quick else ROUNDS))
    listed = [one for one in operations(options.device, options.quick) if one.operator in options.operators]
    for rows in compare_all(listed, lambda one: providers(one, options.quick), options, options.modes):
        results.add(rows)
    for operator in NATIVE:
        shown = [row for row in results.rows if row.work["operator"] == operator]
        print_rows(operator, shown)
    costs = {row.provider: (row.found["host_ms"] or row.p50_ms or math.nan) / 1e3 for row in small}
    print(
        f"a small call, linear_sigmoid {small[0].work['shape']} forward and backward on one thread: "
        f"eager {duration(costs['eager'])}, torchpar {duration(costs['torchpar'])}"
    )
    return results.status


if __name__ == "__main__":
    run(main)
