# SPDX-License-Identifier: MIT
"""Triton's autotuner at run time, without a GPU, with times that are made up."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import idle_gpu
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")

import triton

from benchmarks import autotune as benchmark
from benchmarks import driver
from benchmarks.compile_kernels import tuned_of
from torchpar.kernels import autotune, launch, linear_sigmoid, matmul_t
from torchpar.kernels.linear_sigmoid import LINEAR_SIGMOID
from torchpar.kernels.matmul_t import SYMMETRIC_MATMUL
from torchpar.kernels.rule import Speed, Tiles

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

    state.bench = bench

    for one, tiles in ((SYMMETRIC_MATMUL, SMALL), (LINEAR_SIGMOID, (*SMALL, SPLIT))):
        monkeypatch.setitem(one.unaligned, "bfloat16", SMALL[:1])
        monkeypatch.setitem(one.tiles, "bfloat16", dict.fromkeys(tiles, Speed(0.1, 0.1)))
    monkeypatch.setattr(autotune, "ENABLED", True)
    monkeypatch.setattr(driver.Driver, "get_benchmarker", lambda self: bench, raising=False)
    launch.forget_launches()
    first = 9  # of the launcher's arguments, the kernel's
    with idle_gpu(tmp_path, lambda *args: LAUNCHED.append((args[0], args[first + 4 :]))):
        yield state
    launch.forget_launches()


def plans() -> list[launch.Plan]:
    """The plans that are kept, in their order."""
    kept = filter(None, launch._launches.values())
    return [step.plan for one in kept for step in one.steps]


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
        launch.forget_launches()
    product(meta(64, 32))
    (plan,) = plans()
    assert isinstance(plan, autotune.AutotunedPlan)
    assert plan.kernel.cache_results


def test_what_is_not_tuned(tuner):
    """One configuration, given tiles, a compiled graph, split sums, and Triton's interpreter."""
    product(meta(64, 33))
    product(meta(64, 32), tiles=SMALL[1])
    product(meta(64, 32), wrap=lambda kernel: kernel)
    linear_sigmoid.linear_sigmoid(meta(16, 4096), meta(16, 4096), None, "ieee", None)
    assert tuner.timed == 0
    assert not any(isinstance(plan, autotune.AutotunedPlan) for plan in plans())
    interpreted = torch.zeros(64, 32, dtype=torch.bfloat16)
    choice = "ieee", None, True, False, False  # the tiles, by TMA, only if faster, traced
    prepared = matmul_t._prepare(interpreted, None, None, None, *choice)
    assert prepared is not None
    assert [type(step.plan) for step in prepared.steps] == [launch.Plan]
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


def test_the_benchmark_has_triton_time_the_configurations_of_each_kernel(tuner, monkeypatch):
    """Also two that differ in the number of warps alone, of whose persistent programs twice as many
    are launched; one that does not fit; and a kernel's only one."""
    few, many = (Tiles(64, 64, 64, warps, 2, "tma") for warps in (4, 8))
    pointers = Tiles(64, 64, 64, 4, 2)
    monkeypatch.setitem(
        LINEAR_SIGMOID.tiles, "bfloat16", dict.fromkeys((few, pointers, many), Speed(0.1, 0.1))
    )
    monkeypatch.setattr(benchmark, "do_bench", tuner.bench)
    tuner.times = [3.0, 2.0, 4.0]
    operands = [meta(64 * 30, 64), meta(64 * 30, 64), meta(64 * 30)]
    tuned = tuned_of("linear_sigmoid")
    found = benchmark.tune(tuned, operands, "ieee")
    assert found == {pointers: [4.0] * 3, few: [3.0] * 3, many: [2.0] * 3}
    assert [grid for grid, _ in LAUNCHED] == [264, 132, 132, 900], "the third one is the fastest's"
    tuner.times = [2.0, 3.0, 4.0]
    LAUNCHED.clear()
    assert benchmark.tune(tuned, operands, "ieee")[few] == [2.0] * 3, "times are taken anew"
    assert [grid for grid, _ in LAUNCHED] == [264, 132, 264, 900]

    def too_large(call: Any, quantiles: Any) -> list[float]:
        raise triton.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(benchmark, "do_bench", too_large)
    tuner.times = [2.0, 3.0]
    assert benchmark.tune(tuned, operands, "ieee")[pointers] == [math.inf] * 3


def test_the_benchmark_has_triton_time_the_blocks_of_maximum(tuner):
    tuner.times = [5.0, 4.0, 1.0, 3.0, 2.0]
    found = benchmark.tune(tuned_of("maximum"), [meta(5000), meta(5000)], "ieee")
    assert [(*block, times[0]) for block, times in found.items()] == [
        (512, 4, 5.0),
        (1024, 4, 4.0),
        (2048, 4, 1.0),
        (2048, 8, 3.0),
        (4096, 8, 2.0),
    ]
    assert [grid for grid, _ in LAUNCHED] == [10, 5, 3, 3, 2, 3]
