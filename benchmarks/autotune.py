# SPDX-License-Identifier: MIT
"""Autotune the kernels and time them beside PyTorch's own: ``python -m benchmarks run autotune``.

As in Triton's tutorials: three kernels under `triton.autotune`, and a `triton.testing.perf_report`
of each. The configurations of products are those of the rule. Triton keeps the autotuner's times on
disk. Each result is compared with float64 before and after it is timed.

Without a GPU each configuration is compiled for GPUs that are not there; see
`benchmarks.resources`.
"""

import argparse
import importlib.util
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.command import Command, require, run

if importlib.util.find_spec("triton") is None:
    run(lambda: require("triton"))  # which ends with one line

import triton
import triton.language as tl
from triton.runtime import KernelInterface
from triton.testing import do_bench, do_bench_cudagraph

import torchpar
from benchmarks.compare import Work
from benchmarks.resources import ARCHITECTURES, Operator, compile_all, describe
from benchmarks.results import Result, Table, print_results, track
from benchmarks.timing import Rejected
from torchpar.errors import ConfigError
from torchpar.kernels.device import device
from torchpar.kernels.gemm import by_columns
from torchpar.kernels.linear_sigmoid import (
    LINEAR_SIGMOID,
    linear_sigmoid_kernel,
    linear_sigmoid_tma_kernel,
)
from torchpar.kernels.matmul_t import SYMMETRIC_MATMUL, mirror, symmetric_matmul_kernel
from torchpar.kernels.matmul_t_tma import symmetric_matmul_tma_kernel
from torchpar.kernels.maximum import FLAT_CANDIDATES, maximum_flat_kernel
from torchpar.kernels.rule import (
    KINDS,
    Product,
    Tiles,
    configurations,
    count_tiles,
    resident_programs,
    unaligned_tiles,
)
from torchpar.kernels.tiles import Choice
from torchpar.ops.matrix import fp32_precision
from torchpar.ptx.estimate import estimate_tiles
from torchpar.ptx.triton.driver import why_not_compiled

Call = Callable[[], Tensor]
Speeds = tuple[float, float, float]  # the median, the slowest and the fastest

QUANTILES = (0.5, 0.2, 0.8)
PRINTED = [
    "shape",
    "contestant",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "speedup",
    "gb_per_s",
    "gflop_per_s",
    "max_error",
    "config",
]
SHORT = 0.03  # ms; the host takes as long to launch, which CUDA graphs leave out
IN, OUT = 1024, 4096  # features of the layer
# Further layers, where the rule of docs/tuning.md changes: at the kernel's longest sums and beyond
# them, and the lesson's hidden layer on two ranks and on one. They are timed, and are not in the
# plot over m.
BORDERS = {
    "linear_sigmoid": [
        {"m": 8192, "k": 2048, "n": 4096},
        {"m": 8192, "k": 4096, "n": 4096},
        {"m": 512, "k": 121, "n": 512},
        {"m": 1024, "k": 121, "n": 512},
    ]
}
# Inductor's own search for the fastest product. It leaves CUDA graphs to the timer.
MAX_AUTOTUNE, MODE = "torch.compile, max-autotune", "max-autotune-no-cudagraphs"
OURS = "torchpar", "autotuned"
# Words of factors, see `torchpar.kernels.gemm.float_of_words`: 1.0 has these bits in its high one.
ONE_HIGH, ZERO = tl.constexpr(0x3FF00000), tl.constexpr(0)

EVEN_K = {"EVEN_K": lambda given: given["k"] % given["BLOCK_K"] == 0}

# The kernels. Those of the library also take strides, batches, factors and a matrix C.


def candidates(matrix_product: Product) -> list[triton.Config]:
    """The rule's configurations for all dtypes and GPUs, except those that split k."""
    every = (
        one
        for kind, capability in product(KINDS, (90, *ARCHITECTURES))  # sm_90 has the most
        for rule in (configurations, unaligned_tiles)
        for one in rule(matrix_product, kind, capability)
        if one.variant != "split_k"
    )
    return [
        triton.Config({**one.blocks, "WARPS": one.num_warps, "VARIANT": one.variant}, **one.options)
        for one in dict.fromkeys(every)
    ]


def tiles_of(given: Mapping[str, Any], num_stages: int = 0) -> Tiles:
    """The tiles of a configuration's constants, which do not hold the stages."""
    blocks = given["BLOCK_M"], given["BLOCK_N"], given["BLOCK_K"]
    return Tiles(*blocks, given["WARPS"], num_stages, given["VARIANT"])


def those_of_the_rule(matrix_product: Product) -> dict[str, Any]:
    """The configurations among which the rule chooses for the operands of a launch."""

    def prune(
        configs: list[triton.Config], arguments: dict[str, Any], PRECISION: str, **_: object
    ) -> list[triton.Config]:
        operands = [arguments[name] for name in ("x_ptr", "weight_ptr") if name in arguments]
        sizes = len(operands[0]), arguments["n"], arguments["k"], 1
        times = Choice(matrix_product, PRECISION, sizes, operands).times
        return [one for one in configs if tiles_of(one.kwargs, one.num_stages) in times]

    return {"early_config_prune": prune}


@triton.autotune(
    configs=[triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in FLAT_CANDIDATES],
    key=["numel"],
    cache_results=True,
)
@triton.jit
def maximum_kernel(a_ptr, b_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    maximum_flat_kernel(a_ptr, b_ptr, out_ptr, numel, False, False, BLOCK)


@triton.autotune(
    configs=candidates(SYMMETRIC_MATMUL),
    key=["n", "k", "PRECISION"],
    prune_configs_by=those_of_the_rule(SYMMETRIC_MATMUL),
    cache_results=True,
)
@triton.heuristics(EVEN_K)
@triton.jit
def matmul_t_kernel(
    x_ptr,
    out_ptr,
    n,
    k,
    x_row,
    x_col,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    WARPS: tl.constexpr,
    VARIANT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: off
    numel = n.to(tl.int64) * k
    if VARIANT == "pointers":
        symmetric_matmul_kernel(
            x_ptr, x_ptr, x_ptr, out_ptr, ZERO, ONE_HIGH, ZERO, ZERO, n, k,
            numel, x_row, x_col, numel, x_row, x_col, numel, x_row, x_col,
            False, BLOCK_M, BLOCK_K, EVEN_K, PRECISION,
        )
    else:
        symmetric_matmul_tma_kernel(
            x_ptr, x_ptr, x_ptr, out_ptr, ZERO, ONE_HIGH, ZERO, ZERO,
            1, n, k, numel, k, 1, numel, k, 1, numel, k, 1,
            BLOCK_M, BLOCK_N, BLOCK_K, True, "N", "N", "", VARIANT == "flat", PRECISION,
        )
    # fmt: on


@triton.autotune(
    configs=candidates(LINEAR_SIGMOID),
    key=["m", "n", "k", "PRECISION"],
    prune_configs_by=those_of_the_rule(LINEAR_SIGMOID),
    cache_results=True,
)
@triton.heuristics(EVEN_K)
@triton.jit
def layer_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    x_row,
    x_col,
    weight_row,
    weight_col,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    WARPS: tl.constexpr,
    VARIANT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: off
    if VARIANT == "tma":
        linear_sigmoid_tma_kernel(
            x_ptr, weight_ptr, bias_ptr, out_ptr, m, n, k, k, 1, k, 1, 1,
            True, BLOCK_M, BLOCK_N, BLOCK_K, "N", "N", True, WARPS == 8, PRECISION,
        )
    else:
        linear_sigmoid_kernel(
            x_ptr, weight_ptr, bias_ptr, out_ptr, m, n, k, k,
            x_row, x_col, weight_row, weight_col, 1,
            True, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION, 1,
        )
    # fmt: on


# Their launches, of contiguous tensors.


def maximum(a: Tensor, b: Tensor, kernel: KernelInterface = maximum_kernel) -> Tensor:
    out = torch.empty_like(a)
    kernel[partial(blocks, out.numel())](a, b, out, out.numel())
    return out


def matmul_t(x: Tensor, kernel: KernelInterface = matmul_t_kernel) -> Tensor:
    (n, k), out = x.shape, x.new_empty(len(x), len(x))
    precision, _ = fp32_precision(x)
    x = by_columns(x, precision)
    kernel[partial(programs, x, n, n, True)](x, out, n, k, *x.stride(), PRECISION=precision)
    return out


def linear_sigmoid(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: KernelInterface = layer_kernel
) -> Tensor:
    (m, k), n = x.shape, len(weight)
    out = x.new_empty(m, n)
    precision, _ = fp32_precision(x)
    x, weight = by_columns(x, precision), by_columns(weight, precision)
    strides = *x.stride(), *weight.stride()
    kernel[partial(programs, x, m, n, False)](
        x, weight, bias, out, m, n, k, *strides, PRECISION=precision
    )
    return out


def blocks(numel: int, given: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(numel, given["BLOCK"]),)


def programs(x: Tensor, m: int, n: int, symmetric: bool, given: dict[str, Any]) -> tuple[int]:
    """By TMA, programs are persistent."""
    one, count = tiles_of(given), blocks_of_result(m, n, symmetric, given)
    return (min(count, resident_programs(one, device(x))) if one.by_tma else count,)


def blocks_of_result(m: int, n: int, symmetric: bool, given: dict[str, Any]) -> int:
    return count_tiles(tiles_of(given), m, n, symmetric)


def estimated(
    matrix_product: Product,
    sizes: tuple[int, int, int, int],
    config: triton.Config,
    of_kind: str,
    gpu: str,
) -> float:
    """The estimated µs of a configuration for products of ``sizes`` (m, n, k and batch)."""
    tiles = tiles_of(config.kwargs, config.num_stages)
    return estimate_tiles(matrix_product, of_kind, tiles, sizes, gpu).microseconds


# The reports. The first provider is the one that others are compared with.


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["numel"],
        x_vals=[2**20, 2**22, 2**24, 2**26, 2**28],
        x_log=True,
        line_arg="provider",
        line_vals=["torch.maximum", "torch.compile", "torchpar", "autotuned"],
        line_names=["torch.maximum", "torch.compile", "torchpar", "autotuned"],
        ylabel="GB/s",
        plot_name="maximum",
        args={},
    )
)
@cache
def report_maximum(numel: int, provider: str) -> Speeds:
    a, b = draw((numel,), (numel,))
    calls: Mapping[str, Call] = {
        "torch.maximum": partial(torch.maximum, a, b),
        "torch.compile": partial(torch.compile(torch.maximum, dynamic=False), a, b),
        MAX_AUTOTUNE: partial(torch.compile(torch.maximum, dynamic=False, mode=MODE), a, b),
        "torchpar": partial(torchpar.maximum, a, b),
        "autotuned": partial(maximum, a, b),
    }
    work = Work(3 * numel * a.element_size(), 0)
    return measure(
        "maximum", str(numel), provider, calls, lambda: torch.maximum(a.double(), b.double()), work
    )


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["n"],
        x_vals=[256, 512, 1024, 2048, 4096, 8192],
        x_log=True,
        line_arg="provider",
        line_vals=["torch.mm", "torch.mm, mirrored", "torch.compile", "torchpar", "autotuned"],
        line_names=["torch.mm", "torch.mm, mirrored", "torch.compile", "torchpar", "autotuned"],
        ylabel="TFLOP/s",
        plot_name="matmul_t",
        args={},
    )
)
@cache
def report_matmul_t(n: int, provider: str) -> Speeds:
    (x,) = draw((n, n))
    calls: Mapping[str, Call] = {
        "torch.mm": partial(gram, x),
        "torch.mm, mirrored": lambda: mirror(gram(x), None),
        "torch.compile": partial(torch.compile(gram, dynamic=False), x),
        MAX_AUTOTUNE: partial(torch.compile(gram, dynamic=False, mode=MODE), x),
        "torchpar": partial(torchpar.matmul_t, x),
        "autotuned": partial(matmul_t, x),
    }
    work = Work(2 * n * n * x.element_size(), n * (n + 1) * n)
    return measure("matmul_t", f"{n}x{n}", provider, calls, lambda: gram(x.double()), work)


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["m"],
        x_vals=[64, 256, 1024, 4096, 16384],
        x_log=True,
        line_arg="provider",
        line_vals=["addmm, sigmoid", "addmm alone", "torch.compile", "torchpar", "autotuned"],
        line_names=["addmm, sigmoid", "addmm alone", "torch.compile", "torchpar", "autotuned"],
        ylabel="TFLOP/s",
        plot_name="linear_sigmoid",
        args={},
    )
)
@cache
def report_linear_sigmoid(m: int, provider: str, k: int = IN, n: int = OUT) -> Speeds:
    x, weight, bias = draw((m, k), (n, k), (n,))
    weight /= math.sqrt(k)  # so that the sigmoid does not saturate
    calls: Mapping[str, Call] = {
        "addmm, sigmoid": partial(layer, x, weight, bias),
        "addmm alone": partial(linear, x, weight, bias),
        "torch.compile": partial(torch.compile(layer, dynamic=False), x, weight, bias),
        MAX_AUTOTUNE: partial(torch.compile(layer, dynamic=False, mode=MODE), x, weight, bias),
        "torchpar": partial(torchpar.linear_sigmoid, x, weight, bias),
        "autotuned": partial(linear_sigmoid, x, weight, bias),
    }
    work = Work((m * k + n * k + n + m * n) * x.element_size(), 2 * m * k * n)

    def exact() -> Tensor:
        return layer(x.double(), weight.double(), bias.double())

    return measure("linear_sigmoid", f"{m}x{k}->{n}", provider, calls, exact, work)


def gram(x: Tensor) -> Tensor:
    return torch.mm(x, x.T)


def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(x, weight, bias).sigmoid_()


# What is timed, and checked. `main` sets the dtype, and takes the results.

DEVICE = "cuda"
kind = "bfloat16"  # of `torchpar.kernels.rule.KINDS`
results: list[Result] = []


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [
        torch.randn(shape, device=DEVICE, generator=generator).to(KINDS[kind].dtype)
        for shape in shapes
    ]


def measure(
    operator: str, shape: str, provider: str, calls: Mapping[str, Call], oracle: Call, work: Work
) -> Speeds:
    """Check and time ``calls[provider]``, and before it the first of the calls; return speeds.

    Args:
        oracle: the result in float64, for which a small GPU may lack the memory.
    """
    first, call = next(iter(calls.values())), calls[provider]
    whole = (lambda: call().sigmoid()) if provider == "addmm alone" else call
    symmetric = operator == "matmul_t" and provider in ("torch.mm, mirrored", *OURS)
    times, columns, reason = [math.nan] * 3, {}, ""
    try:
        exact = oracle()
        allowed = (
            2 * error_of(first, exact) + exact.abs().max().item() * torch.finfo(exact.dtype).eps
        )
        check(whole, exact, allowed, symmetric)
        timer = do_bench_cudagraph if do_bench(first, quantiles=QUANTILES)[0] < SHORT else do_bench
        before = timer(first, quantiles=QUANTILES)[0]
        times = timer(call, quantiles=QUANTILES)
        error = check(whole, exact, allowed, symmetric)
        columns = {
            "gb_per_s": work.bytes / times[0] * 1e-6,
            "gflop_per_s": work.flops / times[0] * 1e-6 or None,
        }
        columns |= {"max_error": error, "timer": timer.__name__}
        columns["config"] = (
            describe(OPERATORS[operator].kernel.best_config) if provider == "autotuned" else ""
        )
    except Exception as failure:  # of one provider; the others go on
        reason = f"{type(failure).__name__}: {failure}".partition("\n")[0]
    p50, p20, p80 = times
    measured = (
        {} if reason else {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "speedup": before / p50}
    )
    case = {"operator": operator, "shape": shape, "dtype": kind}
    results.append(
        Result(
            case=case,
            contestant=provider,
            columns=columns,
            ok=not reason,
            reason=reason,
            **measured,
        )
    )
    speed = work.flops * 1e-9 or work.bytes * 1e-6
    return speed / p50, speed / p80, speed / p20


def check(call: Call, exact: Tensor, allowed: float, symmetric: bool) -> float:
    """The largest error of a call; a Rejected if it is over ``allowed``."""
    error = error_of(call, exact, symmetric)
    if not error <= allowed:
        raise Rejected(f"an error of {error:.1e}, over {allowed:.1e}")
    return error


def error_of(call: Call, exact: Tensor, symmetric: bool = False) -> float:
    """The largest error of a call; a Rejected if the result should be symmetric and is not."""
    poison = [torch.full_like(exact, math.nan, dtype=KINDS[kind].dtype) for _ in range(4)]
    del poison  # the allocator gives this memory to the call: what it leaves unwritten is NaN
    found = call()
    error = (found.double() - exact).abs().max().item()
    if symmetric and not math.isnan(error) and not torch.equal(found, found.mT):
        raise Rejected("the result is not symmetric")
    return error


REPORTS = {
    "maximum": report_maximum,
    "matmul_t": report_matmul_t,
    "linear_sigmoid": report_linear_sigmoid,
}
# Of each operator the sizes that are compiled where there is no GPU.
LAYER = (4096, IN), (OUT, IN), (OUT,)
OPERATORS = {
    "maximum": Operator(
        maximum_kernel,
        maximum,
        ((2**26,), (2**26,)),
        blocks=lambda given: triton.cdiv(2**26, given["BLOCK"]),
        numbers=3 * 2**26,
    ),
    "matmul_t": Operator(
        matmul_t_kernel,
        matmul_t,
        ((4096, 4096),),
        blocks=partial(blocks_of_result, 4096, 4096, True),
        numbers=2 * 4096**2,
        estimate=partial(estimated, SYMMETRIC_MATMUL, (4096, 4096, 4096, 1)),
    ),
    "linear_sigmoid": Operator(
        layer_kernel,
        linear_sigmoid,
        LAYER,
        blocks=partial(blocks_of_result, 4096, OUT, False),
        numbers=sum(map(math.prod, LAYER)) + 4096 * OUT,
        estimate=partial(estimated, LINEAR_SIGMOID, (4096, OUT, IN, 1)),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    global kind
    command = Command("autotune", "Autotune the kernels, and time them beside PyTorch's own.")
    command.parser.add_argument(
        "--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS), help="by default all"
    )
    of_pytorch = [name for name, one in KINDS.items() if one.precision in ("ieee", "tf32")]
    command.parser.add_argument(
        "--dtype",
        choices=of_pytorch,
        default="bfloat16",
        help="of all operands; by default bfloat16",
    )
    command.parser.add_argument(
        "--max-autotune",
        action="store_true",
        help="time torch.compile(mode='max-autotune') of large products, beside the library and "
        "torchpar alone",
    )
    options = command.parse(arguments)
    kind, operators = options.dtype, list(dict.fromkeys(options.operators))
    if reason := why_not_compiled():
        raise ConfigError(reason)
    if not torch.cuda.is_available():
        return compile_all(operators, kind, options.quick, command.csv(options))
    triton.set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=DEVICE)
    )
    table = Table(command.csv(options), torch.device(DEVICE))
    if options.output and (missing := missing_to_draw()):
        print(f"{' and '.join(missing)}: not installed, so that no plot is drawn")
    with torch.backends.flags(fp32_precision=KINDS[kind].precision):
        for operator in operators:
            time_operator(operator, table, options)
    return table.status


def missing_to_draw() -> list[str]:
    """The packages by which `perf_report` draws, as far as they are not installed."""
    return [name for name in ("matplotlib", "pandas") if importlib.util.find_spec(name) is None]


def time_operator(operator: str, table: Table, options: argparse.Namespace) -> None:
    """Time all sizes, a small one if ``quick``; add the results, print them, and draw them."""
    report = REPORTS[operator]
    benchmark = report.benchmarks
    if options.quick:
        benchmark.x_vals = benchmark.x_vals[:1]
    borders = [] if options.quick else BORDERS.get(operator, [])
    if options.max_autotune:
        first = benchmark.line_vals[0]
        benchmark.line_vals = benchmark.line_names = [first, MAX_AUTOTUNE, "torchpar"]
        benchmark.x_vals, borders = benchmark.x_vals[-3:], []  # it searches for half a minute
    results.clear()
    (name,) = benchmark.x_names
    sizes = [{name: size} for size in benchmark.x_vals] + borders
    for size, provider in track(list(product(sizes, benchmark.line_vals)), operator):
        report.fn(**size, provider=provider)
        table.add(results[-1:])
    print_results(f"{operator} in {kind}", results, PRINTED)
    if options.output and not missing_to_draw():
        with TemporaryDirectory() as folder:  # for the picture alone: our CSV has more columns
            report.run(
                save_path=folder
            )  # which calls ``report.fn`` by the same keywords: the times are cached
            shutil.copy(
                Path(folder, f"{operator}.png"), options.output / f"autotune-{operator}.png"
            )


if __name__ == "__main__":
    run(main)
