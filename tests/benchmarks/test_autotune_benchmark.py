# SPDX-License-Identifier: MIT
"""The benchmark `autotune` without a GPU: small sizes on the CPU, and what it compiles."""

import math
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from torch import Tensor

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("triton", reason="the kernels are written in Triton")

from launching import Gpu, idle_gpu

from benchmarks import autotune, compile_kernels, driver
from benchmarks.compile_kernels import Job, all_jobs, tuned_jobs, tuned_of
from benchmarks.records import OPERATORS
from benchmarks.results import Table
from nogpu.machine.gpu_state import SCHEDULES
from torchpar.errors import ConfigError
from torchpar.kernels import launch, matmul_t, maximum
from torchpar.kernels.matmul_t import symmetric_matmul
from torchpar.kernels.rule import KINDS, Tiles, configurations, unaligned_tiles
from torchpar.ops.cpu import mirror_

NAMES = [name for name, operator in OPERATORS.items() if operator.tuned is not None]


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


def options(**given: Any) -> Namespace:
    return Namespace(
        **{"quick": True, "output": None, "max_autotune": False, "dtype": "bfloat16"}
        | {"configurations": False}
        | given
    )


@pytest.fixture
def small_sizes(monkeypatch) -> None:
    """Of each operator one small size on the CPU, where its kernel's launch is PyTorch's
    formula."""
    monkeypatch.setattr(autotune, "DEVICE", "cpu")
    timed = [2.0, 1.0, 4.0]
    monkeypatch.setattr(autotune, "do_bench", lambda call, quantiles: call() is None or timed)
    monkeypatch.setattr(
        autotune, "tune", lambda tuned, *how: dict.fromkeys(tuned.candidates(*how), timed)
    )
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(matmul_t, "mirror", lambda c, wrap: mirror_(c.clone()))
    for name in NAMES:
        tuned = tuned_of(name)
        small: dict[str, Any] = {"values": [48], "candidates": lambda *_: ["one", "other"]}
        small["launch"] = lambda config, given, *_, name=name: OPERATORS[name].native(*given)
        if tuned.borders:
            small["borders"] = [{"k": 9, "n": 5} | ({"m": 8} if tuned.axis == "m" else {})]
        change(monkeypatch, name, **small)
    change(monkeypatch, "matmul_t", launch=lambda config, given, *_: mirror_(given[0] @ given[0].T))


def change(monkeypatch: pytest.MonkeyPatch, name: str, **changed: Any) -> None:
    tuned = tuned_of(name)._replace(**changed)
    monkeypatch.setitem(OPERATORS, name, OPERATORS[name]._replace(tuned=tuned))


@pytest.mark.parametrize("name", NAMES)
def test_a_report_checks_times_and_draws_each_provider(small_sizes, tmp_path, name):
    pytest.importorskip("matplotlib", reason="perf_report draws by it")
    pytest.importorskip("pandas", reason="perf_report makes a table by it")
    table = Table(tmp_path / "autotune.csv", torch.device("cpu"))
    tuning = autotune.time_operator(name, table, options(quick=False, output=tmp_path))
    shapes = 1 + len(tuning.tuned.borders)
    assert [one.contestant for one in table.results] == autotune.providers(tuning.tuned) * shapes
    assert len(tuning.results) == len(table.results), "drawing measures nothing again"
    assert all(
        (one.ok, one.p20_ms, one.p50_ms, one.p80_ms) == (True, 1.0, 2.0, 4.0)
        for one in table.results
    )
    assert [one.columns["config"] for one in table.results][-2:] == ["", "one"]
    assert {path.name for path in tmp_path.iterdir()} == {"autotune.csv", f"autotune-{name}.png"}


def test_the_fastest_configuration_is_kept(small_sizes, monkeypatch):
    launched: list[str] = []
    times = {"too large": math.inf, "slow": 3.0, "fast": 1.0, "between": 2.0}
    change(
        monkeypatch,
        "maximum",
        launch=lambda config, given, *_: launched.append(config) or torch.maximum(*given),
    )
    monkeypatch.setattr(autotune, "tune", lambda *_: {one: [t] * 3 for one, t in times.items()})
    tuning = autotune.Tuning("maximum", "bfloat16")
    tuning.measure("autotuned", numel=48)
    (result,) = tuning.results
    assert result.columns["config"] == "fast"
    assert set(launched) == {"fast"}


def test_each_configuration_is_a_row_with_an_estimate(small_sizes, monkeypatch):
    """Its value is checked, too; ours of the first operand times two is wrong."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")

    def launch(config: str, given: Sequence[torch.Tensor], *_: Any) -> torch.Tensor:
        return mirror_(given[0] @ given[0].T) * (2 if config == "wrong" else 1)

    change(
        monkeypatch,
        "matmul_t",
        borders=[],
        launch=launch,
        candidates=lambda *_: ["right", "wrong"],
        estimate=lambda config, given, kind, gpu: {"right": 5.0, "wrong": 7.0}[config],
    )
    table = Table(None, torch.device("cpu"))
    autotune.time_operator("matmul_t", table, options(quick=False, configurations=True))
    names = ["torch.mm", "torch.mm, mirrored", "torchpar", "right", "wrong", "autotuned"]
    assert [one.contestant for one in table.results] == names
    right, wrong = table.results[3:5]
    assert (right.ok, right.p50_ms, right.columns["estimate_ms"]) == (True, 2.0, 0.005)
    assert (wrong.ok, wrong.columns["estimate_ms"]) == (False, 0.007)
    assert "an error of" in wrong.reason


def test_max_autotune_is_timed_beside_two_others(small_sizes):
    table = Table(None, torch.device("cpu"))
    autotune.time_operator("matmul_t", table, options(quick=False, max_autotune=True))
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
        change(
            monkeypatch, "matmul_t", launch=lambda config, given, *_, wrong=function: wrong(*given)
        )
        table = Table(None, torch.device("cpu"))
        autotune.time_operator("matmul_t", table, options())
        assert [one.ok for one in table.results] == [True] * 4 + [False]
        assert table.results[-1].p50_ms is None
        assert table.results[-1].reason.startswith(message[:25])


@pytest.mark.parametrize(
    "kind, name, part, is_right",
    [
        ("float32", "matmul_t", 0.5, True),  # one chain of 48 terms rounds as much
        ("float32", "matmul_t", 4.0, False),
        ("float32", "maximum", 0.5, False),  # which rounds nothing
    ],
)
def test_a_chain_of_sums_may_have_its_own_error(
    small_sizes, monkeypatch, kind, name, part, is_right
):
    off = part * 48**0.5 * 2**-24  # of the largest result
    native = OPERATORS[name].native

    def launch(config: str, given: Sequence[torch.Tensor], *_: Any) -> torch.Tensor:
        exact = native(*(t.double() for t in given))
        wrong = exact + off * exact.abs().max() * torch.eye(*exact.shape[-2:]).reshape(exact.shape)
        return wrong.float()

    monkeypatch.setattr(autotune, "draw", lambda *_: operands)
    shapes = [(48, 48)] * (2 if name == "maximum" else 1)
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(shape, generator=generator) for shape in shapes]
    change(monkeypatch, name, launch=launch)
    tuning = autotune.Tuning(name, kind)
    tuning.measure("autotuned", **{tuning.tuned.axis: 48})
    assert tuning.results[-1].ok == is_right, tuning.results[-1].reason


def test_without_memory_for_the_oracle_the_other_sizes_go_on(small_sizes, monkeypatch):
    class OutOfMemory(RuntimeError):
        pass

    def double(t: Tensor) -> Tensor:
        raise OutOfMemory("out of memory")

    monkeypatch.setattr(Tensor, "double", double)
    table = Table(None, torch.device("cpu"))
    autotune.time_operator("maximum", table, options())
    assert {one.reason for one in table.results} == {"OutOfMemory: out of memory"}


# The configurations


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("kind", KINDS)
def test_the_benchmark_times_the_rules_configurations(kind, capability):
    """All that suit, except those that split k; for operands that none suits, those of the rule."""
    dtype, precision = KINDS[kind][:2]
    with driver.target(capability):
        for k, rule in ((64, configurations), (121, unaligned_tiles)):
            x, weight = (torch.empty(rows, k, dtype=dtype, device="meta") for rows in (64, 128))
            bias = torch.empty(128, dtype=dtype, device="meta")
            if k == 121 and kind == "float32":
                continue  # a copy by columns is aligned
            for name, operands in (("matmul_t", [x]), ("linear_sigmoid", [x, weight, bias])):
                tuned = tuned_of(name)
                expected = [
                    tiles
                    for tiles in rule(tuned.product(), kind, capability)
                    if tiles.variant != "split_k"
                ]
                assert sorted(tuned.candidates(operands, precision)) == sorted(expected)


def test_the_operators_blocks_are_among_those_that_the_benchmark_times():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        a = torch.empty(2**20, dtype=dtype, device="meta")
        plan = maximum._plan_forward(a, a, a)
        assert plan is not None
        listed = tuned_of("maximum").candidates([a, a], "ieee")
        assert (plan.constants["BLOCK"], 4) in listed, "Triton's default is 4 warps"


def test_a_configuration_of_maximum_computes_it():
    torch.manual_seed(0)
    a, b = (torch.randint(-2, 3, (1000,)).bfloat16() for _ in range(2))
    tuned, gpu = tuned_of("maximum"), Gpu(SCHEDULES[0])
    operands = [gpu.tensor(t) for t in (a, b)]
    (block, *_) = tuned.candidates(operands, "ieee")
    result = gpu.run(lambda wrap: tuned.launch(block, operands, "ieee", wrap))
    assert torch.equal(gpu.read(result), torch.maximum(a, b))


def test_all_configurations_are_compiled():
    found = all_jobs(90)
    assert len(found) == len(set(found)) > 40
    assert Job("matmul_t", Tiles(128, 256, 64, 8, 4, "tma"), "bfloat16", 90) in found
    assert not [job for job in all_jobs(80) if job.config.by_tma]


def test_a_launch_finds_what_was_compiled(tmp_path: Path):
    tiles = Tiles(128, 128, 64, 8, 3)
    size = tuned_of("matmul_t").compiled
    with idle_gpu(tmp_path, lambda *args: None):
        assert compile_kernels.count_kernels(Job("matmul_t", tiles, "bfloat16", 90)) == 1
        (one,) = tmp_path.rglob("*.cubin")
        for rows, count in ((2048, 1), (size - 1, 2)):
            x = torch.empty(rows, size, dtype=torch.bfloat16, device="meta")
            launch.forget_launches()
            symmetric_matmul(x, x, "ieee", None, tiles=tiles)
            assert len(list(tmp_path.rglob("*.cubin"))) == count
            assert one.exists()
    launch.forget_launches()


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
    assert compile_kernels.resident_blocks(90, registers, warps, shared, columns) == blocks


def test_a_kernel_that_does_not_compile_is_named():
    config = next(tuned_jobs(["maximum"], "bfloat16", [90])).config._replace(numel=3)
    result = compile_kernels.examine(Job("maximum", config, "bfloat16", 90))
    assert not result.ok
    assert "power of 2" in result.reason or "CompilationError" in result.reason


@pytest.mark.slow
def test_an_interruption_ends_the_processes_within_their_jobs(monkeypatch):
    monkeypatch.setattr(compile_kernels, "examine", time.sleep)
    before, handler = set(active_children()), signal.getsignal(signal.SIGINT)

    def interrupted() -> None:
        with compile_kernels.examine_in_pool([0, 600, 600, 600]) as found:
            assert next(found) is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(active_children()) == before
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match=r"TRITON_INTERPRET is set, .*; unset it"):
        autotune.main(["--quick"])


def test_an_operator_that_is_named_twice_is_taken_once(monkeypatch):
    taken: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(autotune, "compile_all", lambda names, *others: taken.append(names))
    autotune.main(["--operators", "maximum", "matmul_t", "maximum"])
    assert taken == [["maximum", "matmul_t"]]
