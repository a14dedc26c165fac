# SPDX-License-Identifier: MIT
"""Triton's autotuner without a GPU: at run time, with times that are made up, and in the
benchmark."""

import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from multiprocessing import active_children
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from commands import run
from ptx.cases import lower_twice
from ptx.launch import Gpu, idle_gpu
from torch import Tensor

from torchpar.ptx.machine.block import SCHEDULES

pytest.importorskip("rich", reason="rich prints the tables")

from benchmarks import autotune as benchmark
from benchmarks import driver, resources
from benchmarks.results import Table
from torchpar.errors import ConfigError
from torchpar.kernels import autotune, launch, linear_sigmoid, matmul_t, maximum
from torchpar.kernels.linear_sigmoid import LINEAR_SIGMOID
from torchpar.kernels.matmul_t import SYMMETRIC_MATMUL
from torchpar.kernels.rule import KINDS, Speed, Tiles, configurations, unaligned_tiles
from torchpar.ops.cpu import mirror_

SMALL = Tiles(16, 16, 32, 1, 2), Tiles(32, 32, 32, 1, 2)  # quick to compile
SPLIT = Tiles(16, 16, 32, 1, 2, "split_k")


# The grids and the arguments of launches. Triton keeps a compiled kernel with the launcher that it
# had first: all tests share one.
LAUNCHED: list[Any] = []


@pytest.fixture
def tuner(tmp_path, monkeypatch) -> Iterator[Any]:
    """The autotuner is on. ``times`` are those of the next configurations, ``timed`` counts
    them."""
    state = SimpleNamespace(times=[], timed=0)
    LAUNCHED.clear()

    def bench(call: Any, quantiles: Any) -> list[float]:
        call()
        state.timed += 1
        return [state.times.pop(0)] * 3

    for one, tiles in ((SYMMETRIC_MATMUL, SMALL), (LINEAR_SIGMOID, (*SMALL, SPLIT))):
        monkeypatch.setitem(one.unaligned, "bfloat16", SMALL[:1])
        monkeypatch.setitem(one.tiles, "bfloat16", dict.fromkeys(tiles, Speed(0.1, 0.1)))
    monkeypatch.setattr(autotune, "ENABLED", True)
    monkeypatch.setattr(driver.Driver, "get_benchmarker", lambda self: bench, raising=False)
    launch.forget_plans()
    first = 9  # of the launcher's arguments, the kernel's
    with idle_gpu(tmp_path, lambda *args: LAUNCHED.append((args[0], args[first + 4 :]))):
        yield state
    launch.forget_plans()


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def product(x: Tensor, **options: Any) -> None:
    matmul_t.symmetric_matmul(x, x, "ieee", options.pop("wrap", None), **options)


def test_the_first_launch_times_all_configurations_and_keeps_the_fastest(tuner):
    x = meta(64, 32)
    for chosen, times in ((SMALL[1], [2.0, 1.0]), (SMALL[0], [1.0, 2.0])):
        tuner.times = times
        LAUNCHED.clear()
        product(x)
        product(torch.empty_like(x))
        assert tuner.timed == 2
        assert not tuner.times
        product(x, tiles=chosen)  # without the autotuner
        assert len(LAUNCHED) == 5, "one of each configuration, and three launches"
        grids = [grid for grid, _ in LAUNCHED]
        assert grids[:2] == [10, 3], "the tiles on and below the diagonal, of 16 and of 32 rows"
        assert LAUNCHED[2] == LAUNCHED[3] == LAUNCHED[4]
        x, tuner.timed = meta(64, 64), 0  # another layout


def test_operands_that_no_configuration_loads_are_tuned(tuner, monkeypatch):
    monkeypatch.setitem(SYMMETRIC_MATMUL.unaligned, "bfloat16", SMALL)
    tuner.times = [2.0, 1.0]
    product(meta(64, 33))
    assert tuner.timed == 2
    assert LAUNCHED[-1][0] == 3, "tiles of 32 rows"


def test_triton_keeps_the_times_on_disk(tuner):
    for count in (2, 2):
        tuner.times = [2.0, 1.0]
        product(meta(64, 32))
        assert (tuner.timed, LAUNCHED[-1][0]) == (count, 3)
        launch.forget_plans()
    (plan,) = [product(meta(64, 32)), *launch._plans.values()][1:]
    assert isinstance(plan, autotune.AutotunedPlan)
    assert plan.kernel.cache_results


def test_what_is_not_tuned(tuner):
    """One configuration, given tiles, a compiled graph, split sums, and Triton's interpreter."""
    product(meta(64, 33))
    product(meta(64, 32), tiles=SMALL[1])
    product(meta(64, 32), wrap=lambda kernel: kernel)
    linear_sigmoid.linear_sigmoid(meta(16, 4096), meta(16, 4096), None, "ieee", None)
    assert tuner.timed == 0
    assert not any(isinstance(plan, autotune.AutotunedPlan) for plan in launch._plans.values())
    interpreted = torch.zeros(64, 32, dtype=torch.bfloat16)
    choice = "ieee", None, True, False  # the tiles, by TMA, only if faster
    assert type(matmul_t._plan_product(interpreted, None, None, *choice)) is launch.Plan
    tuner.times = [1.0, 2.0]
    linear_sigmoid.linear_sigmoid(meta(64, 32), meta(64, 32), None, "ieee", None)
    assert tuner.timed == 2


def test_a_result_that_is_also_read_is_restored_between_launches(tuner, monkeypatch):
    restored: list[Any] = []
    copy = Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda t, source: restored.append(t) or copy(t, source))
    x, h = meta(64, 32), meta(64, 64)
    tuner.times = [1.0, 2.0]
    product(x, c=h, alpha=1.0, beta=2.0, out=h)
    assert [id(t) for t in restored] == [id(h)] * 2


# The benchmark


@pytest.mark.slow
def test_without_triton_the_command_ends_with_one_line():
    blocked = "import runpy, sys; sys.modules['triton'] = None; sys.argv = ['autotune']; "
    module = "runpy.run_module('benchmarks.autotune', run_name='__main__')"
    status, _, error = run(sys.executable, "-c", blocked + module)
    assert (status, error) == (
        2,
        "python -m benchmarks run autotune: error: this benchmark needs triton; "
        "pip install triton\n",
    )


def first_configuration(kernel: Any, **wanted: Any) -> Any:
    (first, *_) = [one for one in kernel.configs if one.all_kwargs().items() >= wanted.items()]
    return first


def execute(call: Any, kernel: Any, config: Any, *operands: Tensor) -> Tensor:
    """The result of the benchmark's launch with one configuration, by executing its PTX."""
    gpu = Gpu(SCHEDULES[0])
    given = [gpu.tensor(t) for t in operands]

    def launching(wrap: Any) -> Any:
        def start(grid: Any) -> Any:
            def run(*args: Any, **options: Any) -> None:
                function, constants = kernel.fn, {}
                if hasattr(function, "values"):  # heuristics, around the jitted function
                    constants = options | config.all_kwargs()
                    named = dict(zip(function.arg_names, args, strict=False))
                    for name, value in function.values.items():
                        constants[name] = value(named | constants)
                    function = function.fn
                wrap(function)[(*grid(config.kwargs), 1, 1)](
                    *args, **(options | config.all_kwargs() | constants)
                )

            return run

        stand_in = MagicMock()
        stand_in.__getitem__.side_effect = start
        return call(*given, kernel=stand_in)

    return gpu.read(gpu.run(launching))


def integers(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape).bfloat16()


@pytest.mark.parametrize("variant", ["tma", pytest.param("pointers", marks=pytest.mark.slow)])
def test_the_benchmarks_kernels_compute_what_the_operators_do(variant):
    torch.manual_seed(0)
    x, weight, bias = integers(72, 72), integers(40, 72) / 16, integers(40)
    config = first_configuration(benchmark.matmul_t_kernel, BLOCK_M=64, BLOCK_N=64, VARIANT=variant)
    found = execute(benchmark.matmul_t, benchmark.matmul_t_kernel, config, x)
    assert torch.equal(found, lower_twice(x.double() @ x.double().T).bfloat16())
    config = first_configuration(benchmark.layer_kernel, BLOCK_M=64, BLOCK_N=64, VARIANT=variant)
    y = execute(benchmark.linear_sigmoid, benchmark.layer_kernel, config, x, weight, bias)
    exact = (x.double() @ weight.double().T + bias.double()).sigmoid()
    assert (y.double() - exact).abs().max() <= 2**-8 * exact.max()
    a, b = integers(1000), integers(1000)
    config = first_configuration(benchmark.maximum_kernel, BLOCK=512)
    assert torch.equal(
        execute(benchmark.maximum, benchmark.maximum_kernel, config, a, b), torch.maximum(a, b)
    )


QUICK = Namespace(quick=True, output=None, max_autotune=False)


@pytest.fixture
def small_sizes(monkeypatch) -> None:
    """The reports, of one small size on the CPU, where the autotuned kernels are PyTorch's
    formulas."""
    monkeypatch.setattr(benchmark, "DEVICE", "cpu")
    monkeypatch.setattr(benchmark, "BORDERS", {"linear_sigmoid": [{"m": 8, "k": 9, "n": 5}]})
    monkeypatch.setattr(
        benchmark, "do_bench", lambda call, quantiles: [call() is None or 2.0, 1.0, 4.0]
    )
    monkeypatch.setattr(benchmark, "mirror", lambda c, wrap: mirror_(c.clone()))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for name, report in benchmark.REPORTS.items():
        report.fn.cache_clear()
        monkeypatch.setattr(report.benchmarks, "x_vals", [48])
        for lines in ("line_vals", "line_names"):  # a test may set others
            monkeypatch.setattr(report.benchmarks, lines, getattr(report.benchmarks, lines))
        kernel = benchmark.OPERATORS[name].kernel
        monkeypatch.setattr(kernel, "best_config", kernel.configs[0], raising=False)
    monkeypatch.setattr(benchmark, "maximum", torch.maximum)
    monkeypatch.setattr(benchmark, "matmul_t", lambda x: mirror_(x @ x.T))
    monkeypatch.setattr(benchmark, "linear_sigmoid", benchmark.layer)


@pytest.mark.parametrize("operator", benchmark.REPORTS)
def test_a_report_checks_times_and_draws_each_provider(small_sizes, tmp_path, operator):
    pytest.importorskip("matplotlib", reason="perf_report draws by it")
    pytest.importorskip("pandas", reason="perf_report makes a table by it")
    table = Table(tmp_path / "autotune.csv", torch.device("cpu"))
    benchmark.time_operator(
        operator, table, Namespace(quick=False, output=tmp_path, max_autotune=False)
    )
    providers = benchmark.REPORTS[operator].benchmarks.line_vals
    layers = 2 if operator == "linear_sigmoid" else 1
    assert [one.contestant for one in table.results] == providers * layers
    assert len(benchmark.results) == len(table.results), "drawing measures nothing again"
    assert all(
        (one.ok, one.p20_ms, one.p50_ms, one.p80_ms) == (True, 1.0, 2.0, 4.0)
        for one in table.results
    )
    assert [bool(one.columns["config"]) for one in table.results][-2:] == [False, True]
    assert {path.name for path in tmp_path.iterdir()} == {
        "autotune.csv",
        f"autotune-{operator}.png",
    }


def test_max_autotune_is_timed_beside_two_others(small_sizes):
    table = Table(None, torch.device("cpu"))
    options = Namespace(quick=False, output=None, max_autotune=True)
    benchmark.time_operator("matmul_t", table, options)
    names = ["torch.mm", "torch.compile, max-autotune", "torchpar"]
    assert [one.contestant for one in table.results] == names
    assert all(one.ok for one in table.results)


def test_a_report_rejects_a_wrong_result_and_goes_on(small_sizes, monkeypatch):
    off = torch.zeros(48, 48)
    off[0, 1] = 0.25  # within the error, but not symmetric
    wrong = {
        "Rejected: an error of 7": lambda x: (x @ x.T) * 2,
        "Rejected: the result is not symmetric": lambda x: (
            x.float() @ x.float().T + off
        ).bfloat16(),
        "Rejected: an error of nan": lambda x: (x @ x.T).fill_diagonal_(torch.nan),
        "RuntimeError": lambda x: x.view(-1, 7),
    }
    for message, function in wrong.items():
        monkeypatch.setattr(benchmark, "matmul_t", function)
        benchmark.REPORTS["matmul_t"].fn.cache_clear()
        table = Table(None, torch.device("cpu"))
        benchmark.time_operator("matmul_t", table, QUICK)
        assert [one.ok for one in table.results] == [True] * 4 + [False]
        assert table.results[-1].p50_ms is None
        assert table.results[-1].reason.startswith(message[:25])


def test_without_memory_for_the_oracle_the_other_sizes_go_on(small_sizes, monkeypatch):
    class OutOfMemory(RuntimeError):
        pass

    def double(t: Tensor) -> Tensor:
        raise OutOfMemory("out of memory")

    monkeypatch.setattr(Tensor, "double", double)
    table = Table(None, torch.device("cpu"))
    benchmark.time_operator("maximum", table, QUICK)
    assert {one.reason for one in table.results} == {"OutOfMemory: out of memory"}


def test_the_benchmarks_autotuner_keeps_precisions_apart():
    """TF32 and IEEE products have other configurations, and the same shapes and dtypes."""
    for kernel in (benchmark.matmul_t_kernel, benchmark.layer_kernel):
        assert "PRECISION" in kernel.keys
        assert set(kernel.keys) <= set(kernel.arg_names), "others would not be looked at"


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("kind", KINDS)
def test_the_benchmark_times_the_rules_configurations(kind, capability):
    """All that suit, except those that split k; for operands that none suits, those of the rule."""
    dtype, precision = KINDS[kind][:2]
    with driver.target(capability):
        for k, rule in ((64, configurations), (121, unaligned_tiles)):
            x, weight = (torch.empty(rows, k, dtype=dtype, device="meta") for rows in (64, 128))
            for one, kernel, operands in (
                (SYMMETRIC_MATMUL, benchmark.matmul_t_kernel, {"x_ptr": x, "n": 64}),
                (
                    LINEAR_SIGMOID,
                    benchmark.layer_kernel,
                    {"x_ptr": x, "weight_ptr": weight, "n": 128},
                ),
            ):
                chosen = kernel.early_config_prune(
                    kernel.configs, operands | {"k": k}, PRECISION=precision, grid=None
                )
                names = [resources.describe(config) for config in chosen]
                expected = [
                    str(tiles)
                    for tiles in rule(one, kind, capability)
                    if tiles.variant != "split_k"
                ]
                assert sorted(names) == sorted(expected)
                for config in chosen:
                    assert config.kwargs["WARPS"] == config.num_warps


def test_the_operators_blocks_are_among_those_that_the_benchmark_times():
    listed = {(one.kwargs["BLOCK"], one.num_warps) for one in benchmark.maximum_kernel.configs}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        a = torch.empty(2**20, dtype=dtype, device="meta")
        plan = maximum._plan_forward(a, a, a)
        assert plan is not None
        assert (plan.constants["BLOCK"], 4) in listed, "Triton's default is 4 warps"


@pytest.mark.parametrize(
    "registers, warps, shared, columns, blocks",
    [
        (32, 4, 0, 0, 16),  # 64 warps
        (33, 4, 0, 0, 12),  # 40 registers
        (255, 8, 0, 0, 1),
        (32, 1, 0, 0, 32),
        (32, 4, 96 * 1024, 0, 2),
        (32, 4, 227 * 1024, 0, 1),
        (32, 4, 228 * 1024, 0, 0),
        (32, 4, 0, 256, 2),
    ],
)
def test_blocks_of_a_multiprocessor(registers, warps, shared, columns, blocks):
    """By NVIDIA's calculator."""
    gpu = resources.ARCHITECTURES[90]
    assert resources.resident_blocks(gpu, registers, warps, shared, columns) == blocks


def test_a_kernel_that_does_not_compile_is_named(monkeypatch):
    broken = benchmark.OPERATORS["maximum"]
    monkeypatch.setattr(broken.kernel, "configs", [benchmark.triton.Config({"BLOCK": 3})])
    result = resources.examine(resources.Job("maximum", 0, 90, "bfloat16"))
    assert not result.ok
    assert "power of 2" in result.reason or "CompilationError" in result.reason


@pytest.mark.slow
def test_an_interruption_ends_the_processes_within_their_jobs(monkeypatch):
    monkeypatch.setattr(resources, "examine", time.sleep)
    before, handler = set(active_children()), signal.getsignal(signal.SIGINT)

    def interrupted() -> None:
        with resources.examine_in_pool([0, 600, 600, 600]) as found:
            assert next(found) is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(active_children()) == before
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match=r"TRITON_INTERPRET is set, .*; unset it"):
        benchmark.main(["--quick"])


def test_an_operator_that_is_named_twice_is_taken_once(monkeypatch):
    taken: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmark, "compile_all", lambda names, *others: taken.append(names))
    benchmark.main(["--operators", "maximum", "matmul_t", "maximum"])
    assert taken == [["maximum", "matmul_t"]]
