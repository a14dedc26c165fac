# SPDX-License-Identifier: MIT
"""Compare the operators with PyTorch's own, eager and compiled:
``python -m benchmarks run operators``.

The work of a case is what the operator needs, whoever computes it: a symmetric product is n(n + 1)k
operations, so that a contestant which computes all of it reaches half of a processor's GFLOP/s at
most.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

import torchpar
from benchmarks.command import Command, run
from benchmarks.compare import MODES, Implementation, OperatorCase, Work, compare
from benchmarks.results import Result, Table, print_results
from torchpar.errors import ConfigError
from torchpar.ops.cpu import mirror_

ROUNDS = 20
SECONDS = {"cpu": 0.25, "cuda": 2.0}  # of a contestant's turns in one mode
WARM = 2**22  # bytes of a case that is also called `WARM_CALLS` times in a row, on a CPU
WARM_CALLS = 100
MAXIMUM_BYTES = 160  # of device memory for each element of maximum in float64, oracle included
ALPHA, BETA = 0.5, 2.0  # of symmetric_matmul


def linear_sigmoid_backward(g: Tensor, y: Tensor) -> Tensor:
    """dL/dZ; dL/db, its sum over rows, is computed and dropped."""
    dz: Tensor = torch.ops.aten.sigmoid_backward(g, y)
    dz.sum(0)
    return dz


NATIVE: dict[str, Implementation] = {
    "maximum": torch.maximum,
    "matmul_t": lambda x: x @ x.mT,  # torch.mm, if x is a matrix
    "symmetric_matmul": lambda a, b, c: ALPHA * (a @ b.mT) + BETA * c,
    "linear_sigmoid": lambda x, weight, bias: linear(x, weight, bias).sigmoid(),
    "linear_sigmoid_backward": linear_sigmoid_backward,
    "exact_matmul": lambda a, b: a @ b.mT,
    "exact_matmul_t": lambda x: x @ x.mT,
}
OURS: dict[str, Implementation] = {
    "maximum": torchpar.maximum,
    "matmul_t": torchpar.matmul_t,
    "symmetric_matmul": lambda a, b, c: torchpar.symmetric_matmul(a, b, c, alpha=ALPHA, beta=BETA),
    "linear_sigmoid": torchpar.linear_sigmoid,
    "linear_sigmoid_backward": lambda g, y: torch.ops.torchpar.linear_sigmoid_backward(g, y)[0],
    "exact_matmul": torchpar.exact_matmul,
    "exact_matmul_t": torchpar.exact_matmul_t,
}
# The operators are held to eager PyTorch's errors, and libraries to none: Inductor, for one, sums
# long columns on a CPU with eight times eager's error.
LIBRARIES = ("torch.compile", "torchpar + torch.compile", "numpy")
FINISH = {"addmm": torch.sigmoid}  # of linear_sigmoid, the product and the bias alone
MIRRORED = "eager, mirrored"
FORWARD_ONLY = ("numpy", "addmm", MIRRORED)
DTYPES = ("float32", "bfloat16", "float64", "int8")
TICKS = (64, 128, 256, 512, 1024, 2048, 4096)  # of the picture

# Of maximum both shapes; of products (*, n, k); of linear_sigmoid rows, in_features and
# out_features, and of its backward rows and out_features; of exact_matmul m, k and n.
Sizes = tuple[Any, ...]  # numbers; of maximum, the two shapes
Shapes = dict[str, Sequence[Sizes]]
QUICK: Shapes = {
    "maximum": [((16, 256), (256,))],
    "matmul_t": [(65, 65)],
    "symmetric_matmul": [(65, 65)],
    "linear_sigmoid": [(8, 33, 5)],
    "linear_sigmoid_backward": [(8, 5)],
    "exact_matmul": [(65, 65, 65)],
    "exact_matmul_t": [(65, 65)],
}
CPU: Shapes = {
    "maximum": [((2**21,), (2**21,)), ((1024, 2048), (2048,)), ((1024, 2048), (1024, 1))],
    "matmul_t": [(n, n) for n in (64, 128, 192, 256, 384, 512, 768, 1000, 1024, 1500, 2048, 4096)]
    + [
        (256, 4096),
        (300, 5000),
        (1024, 4096),
        (2048, 256),
        (2048, 64),
        (64, 64, 256),
        (8, 512, 512),
    ],
    "symmetric_matmul": [(256, 256), (1024, 1024)],
    "linear_sigmoid": [(64, 128, 10), (64, 784, 128), (256, 768, 1024)],
    "exact_matmul": [(n, n, n) for n in (256, 1024, 2048)],
    "exact_matmul_t": [(n, n) for n in (256, 1024, 2048)],
}
GPU: Shapes = {
    "maximum": [((n,), (n,)) for n in (2**20, 2**26, 2**28)]
    + [((16384, 16384), (16384,)), ((16384, 16384), (16384, 1))],
    "matmul_t": [(n, n) for n in (64, 128, 256, 512, 1000, 1024, 2048, 4096, 8192, 16384)]
    + [(64, 16384), (1024, 4096), (4096, 1024), (16384, 64)]
    + [(64, 128, 128), (256, 256, 256), (32, 1024, 1024)],
    "symmetric_matmul": [(n, n) for n in (256, 512, 1024, 2048, 4096, 8192)],
    # linear_sigmoid: the first layer of an MLP.
    "linear_sigmoid": [(m, 784, n) for m in (64, 512) for n in (128, 512)]
    + [(128, 784, 1000), (256, 784, 1001), (256, 784, 2056), (512, 784, 4096)]
    + [(64, 8192, 1024), (512, 3072, 12288), (8192, 4096, 4096)],
    "linear_sigmoid_backward": [(64, 4096), (512, 12288), (8192, 4096)],
    "exact_matmul": [(n, n, n) for n in (1024, 2048, 4096, 8192)],
    "exact_matmul_t": [(n, n) for n in (1024, 2048, 4096, 8192)],
}
COMPILED = (  # which takes seconds
    "2097152 2097152",
    "1024x2048 2048",
    "1024x2048 1024x1",
    "268435456 268435456",
    "256x256",
    "1024x1024",
    "4096x4096",
    "64x784->128",
    "256x768->1024",
    "512x784->512",
    "8192x4096->4096",
)


def draw(
    seed: int, dtype: torch.dtype, device: torch.device, *shapes: Sequence[int]
) -> list[Tensor]:
    """Normally distributed; integers are uniform in [0, 255], those of 8 bits in [0, 126]."""
    generator = torch.Generator(device).manual_seed(seed)
    if dtype.is_floating_point:
        return [
            torch.randn(shape, dtype=dtype, device=device, generator=generator) for shape in shapes
        ]
    high = 127 if dtype.itemsize == 1 else 256
    return [
        torch.randint(high, shape, dtype=dtype, device=device, generator=generator)
        for shape in shapes
    ]


def make_case(
    operator: str, shape: Sizes, dtype: torch.dtype, device: torch.device
) -> OperatorCase:
    """The case of an operator. ``forward`` and ``backward`` are numbers through memory, and
    operations."""
    text = "x".join(map(str, shape))
    if operator == "maximum":
        text = " ".join("x".join(map(str, one)) for one in shape)
        shapes = [*shape, shape[0]]
        a, b = map(math.prod, shape)
        forward, backward = (2 * a + b, a), (3 * a + 2 * b, a)
    elif operator in ("matmul_t", "exact_matmul_t"):
        *batch, n, k = shape
        shapes = [shape, (*batch, n, n)]
        b = math.prod(batch)
        forward = b * (n * k + n * n), b * n * (n + 1) * k
        backward = b * (n * n + 2 * n * k), b * 2 * n * n * k
    elif operator == "symmetric_matmul":
        n, k = shape
        shapes = [(n, k), (n, n), (n, n)]
        forward, backward = (
            (2 * n * k + 2 * n * n, n * (n + 1) * k),
            (2 * n * n + 4 * n * k, 4 * n * n * k),
        )
    elif operator == "linear_sigmoid_backward":
        m, n = shape
        shapes = [shape] * 3
        forward, backward = (3 * m * n + n, 5 * m * n), (0, 0)  # its own derivatives are not timed
    else:
        m, k, n = shape
        text = f"{m}x{k}->{n}"
        bias = n if operator == "linear_sigmoid" else 0
        shapes = [(m, k), (n, k), *([(n,)] if bias else []), (m, n)]
        forward = m * k + n * k + bias + m * n, 2 * m * n * k
        y = m * n if bias else 0  # which the derivative takes
        backward = m * n + y + 2 * m * k + 2 * n * k + bias, 4 * m * n * k

    def inputs(seed: int) -> list[Tensor]:
        drawn = draw(seed, dtype, device, *shapes)
        if operator == "symmetric_matmul":  # B is equal to A, which the operator is not told
            a, c, gradient = drawn
            return [a, a.clone(), (c + c.mT) / 2, gradient]
        if operator == "linear_sigmoid_backward":
            drawn[1] = drawn[1].sigmoid()
        if operator == "linear_sigmoid":  # so scaled, the sigmoid does not saturate
            drawn[1] /= math.sqrt(k)
        return drawn

    return OperatorCase(
        operator,
        text,
        dtype,
        device,
        inputs,
        NATIVE[operator],
        forward=Work(dtype.itemsize * forward[0], forward[1]),
        backward=Work(dtype.itemsize * backward[0], backward[1]),
        modes=MODES if dtype.is_floating_point and any(backward) else MODES[:1],
    )


def cases(device: torch.device, quick: bool) -> Iterator[OperatorCase]:
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else math.inf
    for operator, shapes in (QUICK if quick else GPU if on_gpu else CPU).items():
        dtypes = [torch.float32]
        if not quick and not operator.startswith("exact"):
            dtypes += [torch.bfloat16]
            dtypes += [torch.float64] * (operator != "linear_sigmoid")
            dtypes += [torch.int8] * (operator == "maximum" and on_gpu)
        for dtype in dtypes:
            for shape in shapes:
                if operator != "maximum" or MAXIMUM_BYTES * math.prod(shape[0]) < memory:
                    yield make_case(operator, shape, dtype, device)


def contestants(case: OperatorCase, quick: bool) -> dict[str, Implementation]:
    """Eager and ours, of some shapes both compiled; NumPy's product, and the linear layer alone."""
    native, ours = NATIVE[case.operator], OURS[case.operator]
    compared: dict[str, Implementation] = {"eager": native, "torchpar": ours}
    if not quick and case.shape in COMPILED:
        torch.compiler.reset()  # every shape is compiled anew, and recompilations are limited
        compared["torch.compile"] = torch.compile(native, dynamic=False)
        compared["torchpar + torch.compile"] = torch.compile(ours, dynamic=False)
    on_cpu, is_matrix = case.device.type == "cpu", case.shape.count("x") == 1
    if case.operator == "matmul_t" and on_cpu and is_matrix and case.dtype.itemsize >= 4:
        compared["numpy"] = lambda x: torch.from_numpy(np.dot(array := x.detach().numpy(), array.T))
    if case.operator == "matmul_t" and on_cpu and is_matrix:
        compared[MIRRORED] = lambda x: mirror_(x @ x.mT)
    if case.operator == "linear_sigmoid":
        compared["addmm"] = linear
    return compared


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("operators", "Compare the operators with PyTorch's own.")
    parser = command.parser
    parser.add_argument(
        "--operators", nargs="+", choices=NATIVE, default=list(NATIVE), help="by default all"
    )
    parser.add_argument("--shapes", nargs="+", help="as in the tables; by default all")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="by default all"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="a GPU if there is one"
    )
    modes = (*MODES, "warm")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=modes,
        default=modes,
        help="full: forward and backward; warm: operands in the cache; by default all",
    )
    options = command.parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but PyTorch finds no GPU; take cpu")
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    every = torch.get_num_threads()
    threads = [every] if on_gpu or options.quick else sorted({1, every})
    device = torch.device("cuda" if on_gpu else "cpu")
    asked = [case for case in cases(device, options.quick) if case.operator in options.operators]
    shapes = list(dict.fromkeys(case.shape for case in asked))
    if unknown := [shape for shape in options.shapes or () if shape not in shapes]:
        raise ConfigError(
            f"--shapes has {unknown[0]!r}, expected of {', '.join(map(repr, shapes))}"
        )
    listed = [
        case
        for case in asked
        if case.shape in (options.shapes or [case.shape])
        and str(case.dtype).removeprefix("torch.") in options.dtypes
    ]
    if not listed:
        raise ConfigError("no case has these --operators, --shapes and --dtypes here; name others")
    table = Table(command.csv(options), device)
    for count in threads:
        torch.set_num_threads(count)
        measure(listed, table, options)
    if not table.results:
        raise ConfigError("no case has these --operators and --modes on this device; name others")
    for operator in options.operators:
        print_results(
            operator, [result for result in table.results if result.case["operator"] == operator]
        )
    if options.output and not on_gpu and "matmul_t" in options.operators:
        draw_crossover(options.output / "crossover.png", table.results)
    return table.status


def measure(listed: Sequence[OperatorCase], table: Table, options: argparse.Namespace) -> None:
    """Add the results of all cases, with the present number of threads."""
    device, on_gpu = table.device, table.device.type == "cuda"
    for case in listed:
        compared = contestants(case, options.quick)
        chosen = [(mode, 1) for mode in case.modes if mode in options.modes]
        if "warm" in options.modes and not on_gpu and case.forward.bytes <= WARM:
            chosen.append(("forward", WARM_CALLS))
        for mode, calls in chosen:
            names = [name for name in compared if mode == "forward" or name not in FORWARD_ONLY]
            results = compare(
                case,
                {name: compared[name] for name in names},
                reference="eager",
                libraries=LIBRARIES,
                finish=FINISH,
                mode=mode,
                rounds=2 if options.quick else ROUNDS,
                seconds=SECONDS[device.type],
                calls=calls,
            )
            table.add(results)


def draw_crossover(path: Path, results: Sequence[Result]) -> None:
    """Draw the speed-up of matmul_t of square matrices over torch.mm with a mirror, and alone, by
    rows."""
    from matplotlib.figure import Figure

    curves: dict[tuple[int, str], dict[int, tuple[float, float]]] = {}
    speedups = {(*one.case.values(), one.contestant): one.speedup for one in results}
    for one in results:
        n, *rest = (
            map(int, one.case["shape"].split("x")) if one.case["operator"] == "matmul_t" else [0, 0]
        )
        mirrored = speedups.get((*one.case.values(), MIRRORED))
        if (
            one.contestant == "torchpar"
            and one.case["mode"] == "forward"
            and rest == [n]
            and mirrored
        ):
            key = one.case["threads"], one.case["dtype"]
            if one.speedup:
                curves.setdefault(key, {})[n] = one.speedup / mirrored, one.speedup
    counts = sorted({threads for threads, _ in curves})
    figure = Figure(figsize=(4.2 * max(len(counts), 1), 3.8), layout="constrained")
    for place, count in enumerate(counts, 1):
        axes = figure.add_subplot(1, len(counts), place, title=f"threads: {count}")
        for color, dtype in enumerate(
            sorted(dtype for threads, dtype in curves if threads == count)
        ):
            rows = sorted(curves[count, dtype].items())
            ns = [n for n, _ in rows]
            axes.plot(ns, [by for _, (by, _) in rows], f"C{color}-", label=dtype)
            axes.plot(ns, [by for _, (_, by) in rows], f"C{color}:")
        axes.axhline(1, color="gray", lw=1)
        axes.set(xscale="log", yscale="log", xlabel="rows and columns", ylabel="speed-up")
        axes.set_xticks(TICKS, map(str, TICKS), minor=False)
        axes.set_yticks((0.5, 1, 2, 4), ("0.5", "1", "2", "4"))
        axes.minorticks_off()
        axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)
