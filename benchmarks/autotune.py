# SPDX-License-Identifier: MIT
"""Autotune the kernels and time them beside PyTorch's own: ``python -m benchmarks run autotune``.

The records' `benchmarks.records.Tuned` are timed. `triton.autotune` times each configuration, and
the fastest is kept. Then `triton.testing.do_bench` times it beside PyTorch's functions, and a
`triton.testing.perf_report` of each operator draws it. The configurations of products are those of
the rule. Each result is compared with float64 before and after it is timed. With
``--configurations`` the time of each configuration is a row, beside its estimate, so that the rule
and the model of `torchpar.testing.estimate` can be judged on this GPU.

Without a GPU each configuration is compiled for GPUs that are not there; see
`benchmarks.compile_kernels`.
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

from .flags import Command, require, run

if importlib.util.find_spec("triton") is None:
    run(lambda: require("triton"))  # which ends with one line

import triton
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.errors import PTXASError
from triton.testing import do_bench, do_bench_cudagraph

from torchpar.errors import ConfigError, first_line, writing
from torchpar.kernels.device import GPUS
from torchpar.kernels.rule import KINDS, Kind
from torchpar.ops.matrix import fp32_precision
from torchpar.optional import has_nogpu, import_nogpu

from .compile_kernels import compile_all, shapes_of, tuned_of, work_of
from .driver import Launched, capture_launches
from .operators import draw
from .records import OPERATORS
from .records.record import Operator, Tuned
from .results import Result, Table, print_results, track
from .timing import Rejected

Call = Callable[[], Tensor]

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
DEVICE = "cuda"
COMPILED, OURS, AUTOTUNED = "torch.compile", "torchpar", "autotuned"
# Inductor's own search for the fastest product. It leaves CUDA graphs to the timer.
MAX_AUTOTUNE, MODE = "torch.compile, max-autotune", "max-autotune-no-cudagraphs"


def providers(tuned: Tuned) -> list[str]:
    """Names of what is timed; the first is the one that others are compared with."""
    return [*tuned.native, COMPILED, OURS, AUTOTUNED]


def call_of(operator: Operator, tuned: Tuned, operands: Sequence[Tensor], provider: str) -> Call:
    """The call of a provider, except `AUTOTUNED`."""
    if provider == OURS:
        function = operator.function
    elif provider == COMPILED:
        function = torch.compile(tuned.compiled_native, dynamic=False)
    elif provider == MAX_AUTOTUNE:
        function = torch.compile(tuned.compiled_native, dynamic=False, mode=MODE)
    else:
        function = tuned.native[provider]
    return partial(function, *operands)


def tune(tuned: Tuned, operands: Sequence[Tensor], precision: str) -> dict[Any, Sequence[float]]:
    """The `QUANTILES` of each configuration's times in ms, which are infinite if it does not fit.

    Triton's autotuner times the configurations of one kernel at a time.
    """
    from torchpar.kernels.autotune import ConfiguredKernel

    of_kernels: dict[int, list[tuple[Any, triton.Config, Any]]] = {}
    first: dict[int, Launched] = {}  # the others' tensors are freed
    for tiles in tuned.candidates(operands, precision):
        (launch,) = capture_launches(partial(tuned.launch, tiles, operands, precision))
        first.setdefault(id(launch.kernel), launch)
        found = tiles, config_of(launch), launch.grid
        of_kernels.setdefault(id(launch.kernel), []).append(found)
    times: dict[Any, Sequence[float]] = {}
    for kernel, several in of_kernels.items():
        candidates, configs, grids = zip(*several, strict=True)
        if len(configs) == 1:  # Triton times none without a choice
            launch_of = partial(tuned.launch, candidates[0], operands, precision, None)
            times[candidates[0]] = times_of(launch_of)
            continue
        configured = ConfiguredKernel(first[kernel].kernel, configs, grids)
        tuner = triton.autotune(configs=list(configs), key=[])(configured)
        tuner[None](*first[kernel].arguments)
        times |= dict(zip(candidates, tuner.configs_timings.values(), strict=True))
    return times


def config_of(launch: Launched) -> triton.Config:
    """The constants and the options of a launch, as Triton's autotuner takes them."""
    options = dict(launch.options)
    constants = {
        name: options.pop(name) for name in launch.options if name in launch.kernel.arg_names
    }
    return triton.Config(constants, **options)


def times_of(launch: Call) -> Sequence[float]:
    """The times of a launch as Triton's autotuner takes them."""
    try:
        return do_bench(launch, quantiles=QUANTILES)  # type: ignore[no-any-return]
    except (triton.OutOfResources, CompileTimeAssertionFailure, PTXASError):
        return [math.inf] * 3


def excess(kind: Kind, operands: Sequence[Tensor]) -> float:
    """The error that a product may have beside twice the library's, relative to the largest result;
    docs/numerics.md says why.

    Products of TF32 cut off what exceeds 11 bits of each operand. Those of float32 and float64 add
    their terms in one chain, where the library may add parts.
    """
    terms = operands[0].shape[-1]
    if kind.precision == "tf32":
        return 2.0**-9
    wide = kind.dtype in (torch.float32, torch.float64)
    return math.sqrt(terms) * torch.finfo(kind.dtype).eps / 2 if wide else 2.0**-52


def gpu_of(name: str) -> str | None:
    """The name of a GPU in `GPUS`."""
    return next((gpu for gpu in GPUS if gpu in name), None)


class Tuning:
    """The measurements of one operator in one kind of operands.

    Attributes:
        each: whether each configuration is a result.
        results: of all measurements so far.
    """

    def __init__(self, name: str, kind: str, each: bool = False):
        self.operator, self.tuned, self.kind = OPERATORS[name], tuned_of(name), kind
        self.each = each
        self.results: list[Result] = []
        self.measured = cache(self.measure)  # a picture takes the times of the table

    def report(self, values: Sequence[int], names: Sequence[str]) -> triton.testing.Mark:
        """The report of Triton that draws ``values`` of the operator's axis."""
        unit = "TFLOP/s" if self.tuned.estimate is not None else "GB/s"
        picture = triton.testing.Benchmark(
            x_names=[self.tuned.axis],
            x_vals=list(values),
            x_log=True,
            line_arg="provider",
            line_vals=list(names),
            line_names=list(names),
            ylabel=unit,
            plot_name=self.operator.name,
            args={},
        )
        return triton.testing.perf_report(picture)(self.measured)

    def measure(self, provider: str, **named: int) -> tuple[float, float, float]:
        """Check and time a provider, and before it the first one.

        Returns the speeds at the median, the slowest and the fastest time.
        """
        tuned, kind = self.tuned, KINDS[self.kind]
        sizes = tuned.sizes(**named)
        drawn = draw(0, kind.dtype, torch.device(DEVICE), shapes_of(self.operator.name, sizes))
        operands = self.operator.workloads[0].operands(*drawn)
        first = call_of(self.operator, tuned, operands, next(iter(tuned.native)))
        work = work_of(self.operator.name, sizes, kind.dtype)
        times, columns, reason = [math.nan] * 3, {}, ""
        try:
            # A small GPU may lack the memory.
            exact = tuned.compiled_native(*(t.double() for t in operands))
            of_first, largest = error_of(first, exact, kind.dtype), exact.abs().max().item()
            beside = 2.0**-52 if tuned.product is None else excess(kind, operands)
            allowed = 2 * of_first + largest * beside
            config, call = None, first
            if provider == AUTOTUNED:
                precision, _ = fp32_precision(operands[0])
                found = tune(tuned, operands, precision)
                config = min(found, key=lambda config: found[config][0])
                call = partial(tuned.launch, config, operands, precision, None)
            else:
                call = call_of(self.operator, tuned, operands, provider)
            whole = (lambda: call().sigmoid()) if provider in tuned.unfinished else call
            judge_of = partial(
                check,
                exact=exact,
                dtype=kind.dtype,
                allowed=allowed,
                symmetric=provider in tuned.symmetric,
            )
            judge = partial(judge_of, whole)
            judge()
            is_short = do_bench(first, quantiles=QUANTILES)[0] < SHORT
            timer = do_bench_cudagraph if is_short else do_bench
            before = timer(first, quantiles=QUANTILES)[0]
            times = timer(call, quantiles=QUANTILES)
            columns = {
                "gb_per_s": work.bytes / times[0] * 1e-6,
                "gflop_per_s": work.flops / times[0] * 1e-6 or None,
                "max_error": judge(),
                "timer": timer.__name__,
                "config": "" if config is None else str(config),
            }
        except Exception as failure:  # of one provider; the others go on
            times, reason = [math.nan] * 3, first_line(failure)
        p50, p20, p80 = times
        measured = (
            {} if reason else {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "speedup": before / p50}
        )
        case = {"operator": self.operator.name, "shape": tuned.text(sizes), "dtype": self.kind}
        if provider == AUTOTUNED and self.each and not reason:
            self.add_each(case, found, operands, precision, judge_of)
        result = Result(
            case=case,
            contestant=provider,
            columns=columns,
            ok=not reason,
            reason=reason,
            **measured,
        )
        self.results.append(result)
        speed = work.flops * 1e-9 or work.bytes * 1e-6
        return speed / p50, speed / p80, speed / p20

    def add_each(
        self,
        case: Mapping[str, str],
        found: Mapping[Any, Sequence[float]],
        operands: Sequence[Tensor],
        precision: str,
        judge: Callable[[Call], float],
    ) -> None:
        """Add a result for each configuration that fits into this GPU; its value is checked."""
        gpu = gpu_of(torch.cuda.get_device_name())
        for config, (p50, p20, p80) in found.items():
            if math.isinf(p50):
                continue
            columns: dict[str, Any] = {"config": str(config), "timer": "autotune"}
            if gpu is not None and has_nogpu() and self.tuned.estimate is not None:
                estimated = self.tuned.estimate(config, operands, self.kind, gpu)
                columns["estimate_ms"] = estimated / 1e3
            reason = ""
            try:
                launch = partial(self.tuned.launch, config, operands, precision, None)
                columns["max_error"] = judge(launch)
            except Rejected as failure:
                reason = str(failure)
            self.results.append(
                Result(
                    case=case,
                    contestant=str(config),
                    p20_ms=p20,
                    p50_ms=p50,
                    p80_ms=p80,
                    columns=columns,
                    ok=not reason,
                    reason=reason,
                )
            )


def check(call: Call, exact: Tensor, dtype: torch.dtype, allowed: float, symmetric: bool) -> float:
    """The largest error of a call; a Rejected if it is over ``allowed``."""
    error = error_of(call, exact, dtype, symmetric)
    if not error <= allowed:
        raise Rejected(f"an error of {error:.1e}, over {allowed:.1e}")
    return error


def error_of(call: Call, exact: Tensor, dtype: torch.dtype, symmetric: bool = False) -> float:
    """The largest error of a call; a Rejected if the result should be symmetric and is not."""
    poison = [torch.full_like(exact, math.nan, dtype=dtype) for _ in range(4)]
    del poison  # the allocator gives this memory to the call: what it leaves unwritten is NaN
    found = call()
    error = (found.double() - exact).abs().max().item()
    if symmetric and not math.isnan(error) and not torch.equal(found, found.mT):
        raise Rejected("the result is not symmetric")
    return error


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("autotune")
    names = [name for name, one in OPERATORS.items() if one.tuned is not None]
    command.choose("--operators", names)
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
    command.parser.add_argument(
        "--configurations",
        action="store_true",
        help="a row for each configuration, with the model's estimate of its time, beside the "
        "library and torchpar",
    )
    options = command.parse(arguments)
    kind, operators = options.dtype, list(dict.fromkeys(options.operators))
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set, so that kernels are not compiled; unset it")
    if not torch.cuda.is_available():
        import_nogpu("compiling for a GPU that is not here")  # for its data sheets
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


def time_operator(name: str, table: Table, options: argparse.Namespace) -> Tuning:
    """Time all sizes, a small one if ``quick``; add the results, print them, and draw them."""
    tuning = Tuning(name, options.dtype, options.configurations)
    tuned, names = tuning.tuned, providers(tuning.tuned)
    values, borders = list(tuned.values), list(tuned.borders)
    if options.quick:
        values, borders = values[:1], []
    if options.configurations:
        names.remove(COMPILED)  # each shape would be compiled for seconds
    if options.max_autotune:
        names = [names[0], MAX_AUTOTUNE, OURS]
        values, borders = values[-3:], []  # it searches for half a minute
    sizes = [{tuned.axis: value} for value in values] + borders
    already = len(table.results)
    for size, provider in track(list(product(sizes, names)), f"sizes of {name}"):
        tuning.measured(**size, provider=provider)
        table.add(tuning.results[len(table.results) - already :])
    print_results(f"{name} in {options.dtype}", tuning.results, PRINTED)
    if options.output and not missing_to_draw():
        with TemporaryDirectory() as folder:  # for the picture alone: our CSV has more columns
            # It calls `Tuning.measured` by the same keywords: the times are cached.
            tuning.report(values, names).run(save_path=folder)
            with writing(file := options.output / f"autotune-{name}.png", "--output"):
                shutil.copy(Path(folder, f"{name}.png"), file)
    return tuning


if __name__ == "__main__":
    run(main)
