# SPDX-License-Identifier: MIT
"""The scaling benchmarks: what their checks reject, what is counted on many ranks, and that they run."""

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from ranks import fork_context
from torch import Tensor

pytest.importorskip("rich", reason="rich prints the tables")
from benchmarks import scale_model
from benchmarks.results import Result
from benchmarks.scale_model import MESHES, MeshPlan, difference
from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import show, steps
from torchpar.profile.collectives import Call
from torchpar.training.cost import Expected, Link


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Callable[..., Any]]:
    """``elsewhere(function, *args)`` in a process whose fake process group disturbs nobody."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        yield lambda function, *args: worker.submit(function, *args).result()


# Ranks that are not here


def places(plan: MeshPlan, rank: int, width: int, layers: int) -> tuple[list[int], dict[str, Any]]:
    """The coordinates (pp, dp, tp) of a rank, and the shapes of its parameters."""
    with scale_model.fake_world(plan, rank) as world:
        model = scale_model.build(width, layers, world)
        return list(world.mesh.get_coordinate()), {n: tuple(p.shape) for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "plan, rank, coordinate, layers",
    [
        (MESHES[0], 13, [0, 1, 5], range(16)),
        (MESHES[1], 300, [2, 5, 4], range(8, 12)),  # (2·16 + 5)·8 + 4
        (MESHES[2], 4095, [7, 63, 7], range(14, 16)),
    ],
)
def test_a_rank_of_many_has_its_place_and_its_shards(elsewhere, plan, rank, coordinate, layers):
    width = 4099  # 8 × 512 + 3: the first three of eight ranks have one more
    assert plan.rank(coordinate[0], *coordinate[1:]) == rank
    own = 513 if coordinate[2] < 3 else 512
    expected: dict[str, tuple[int, ...]] = {}
    for i in layers:
        expected[f"layers.{i}.weight"] = (width, own) if i % 2 else (own, width)
        expected[f"layers.{i}.bias"] = (width,) if i % 2 else (own,)
    assert elsewhere(places, plan, rank, width, 16) == (coordinate, expected)


@pytest.mark.parametrize(
    "plan, width",
    [
        (MESHES[0], 65536),
        (MESHES[1], 4096),
        pytest.param(MESHES[2], 16384, marks=pytest.mark.slow),
    ],
)
def test_a_rank_of_many_sends_what_is_predicted(elsewhere, plan, width):
    batch = 2**10 * plan.dp * plan.micro_batches
    calls, different = elsewhere(scale_model.count, width, 16, batch, plan)
    assert different == ""
    sent = Counter((call.dimension, call.operation, call.bytes) for call in calls)
    # By hand: bfloat16, a rank's 1024 samples a micro-batch; the busiest stage is inside the pipeline.
    activations = 2 * 2**10 * width
    pairs = 8 // plan.pp
    expected = {("tp", "all_reduce", activations): plan.micro_batches * (2 * pairs - (plan.pp == 1))}
    if plan.pp > 1:
        expected |= {("pp", op, activations): 2 * plan.micro_batches for op in ("send", "recv")}
    assert {kind: calls for kind, calls in sent.items() if kind[0] != "dp"} == expected
    assert {kind[1] for kind in sent if kind[0] == "dp"} == {"all_reduce"}
    parameters = pairs * (2 * width**2 // 8 + width // 8 + width)
    assert sum(kind[2] * calls for kind, calls in sent.items() if kind[0] == "dp") == 2 * parameters


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        [Expected("tp", "all_reduce", 8, 100)],
        [Expected("tp", "all_reduce", 8, 100)] * 3,
        [Expected("tp", "all_reduce", 8, 100), Expected("tp", "all_reduce", 8, 104)],
        [Expected("tp", "all_reduce", 8, 96), Expected("tp", "all_reduce", 8, 104)],  # as much in all
        [Expected("dp", "all_reduce", 8, 100)] * 2,
        [Expected("tp", "all_gather", 8, 100)] * 2,
    ],
)
def test_other_sizes_or_another_number_of_calls_are_a_difference(wrong):
    calls = [Call("tp", "all_reduce", 8, 100, 0.0)] * 2
    assert difference(calls, [Expected("tp", "all_reduce", 8, 100)] * 2) == ""
    assert difference(calls, wrong)


def test_the_fake_backend_leaves_no_trace(elsewhere):
    before, after = elsewhere(capabilities)
    assert before == after


def capabilities() -> tuple[Any, Any]:
    import torch.distributed as dist

    def state() -> Any:
        return dict(dist.Backend.backend_capability), dict(dist.Backend.default_device_backend_map)

    before = state()
    with scale_model.fake_world(MeshPlan(2, 2), 1):
        pass
    assert not dist.is_initialized()
    return before, state()


def counted_main(wrong: bool) -> int:
    """The status of the command on one small mesh; with ``wrong``, of a prediction that leaves a call out."""
    scale_model.MESHES[:] = [MeshPlan(4, 2)]
    collectives = scale_model.cost.collectives
    if wrong:
        scale_model.cost.collectives = lambda *args, **options: collectives(*args, **options)[1:]
    try:
        return scale_model.main(["--layers=2", "--widths", "64"])
    finally:
        scale_model.cost.collectives = collectives


def test_counted_calls_that_differ_from_the_prediction_are_not_ok(elsewhere):
    assert elsewhere(counted_main, False) == 0
    assert elsewhere(counted_main, True) == 1


# The check before the timing


def test_a_wrong_gradient_and_a_wrong_loss_are_rejected():
    torch.manual_seed(0)
    exact = torch.randn(1000, dtype=torch.float64)
    single, other = (exact + 1e-7 * torch.randn(1000).double() for _ in range(2))

    def reason(grad: Tensor, loss: float) -> str:
        return steps.compare_with_one_rank(grad, (single, exact), loss, (2.3, 2.3), 100)[0]

    one_off = other.clone()
    one_off[7] += 1e-4
    assert reason(other, 2.3) == ""
    assert "gradient" in reason(2 * other, 2.3)  # summed and not averaged
    assert "gradient" in reason(one_off, 2.3)
    assert "gradient" in reason(other * torch.nan, 2.3)
    assert "loss" in reason(other, 2.3001)
    assert "loss" in reason(other, 1.15)
    assert "loss" in reason(other, torch.nan)


# What is shown


@pytest.mark.parametrize(
    "speedups, batch",
    [
        ({8: 0.5, 32: 2.0}, 16.0),
        ({8: 0.5, 32: 0.25, 128: 4.0}, 64.0),  # from there on
        ({8: 2.0, 16: 0.5, 64: 2.0}, 32.0),
        ({8: 1.5, 16: 1.0}, 8.0),
        ({8: 1.5, 16: 0.9}, None),
    ],
)
def test_crossover(speedups, batch):
    assert show.crossover(speedups) == (batch and pytest.approx(batch))


def step(batch: int, dp: int, ms: float, speedup: float, threads: int = 1) -> Result:
    work = {"kind": "step", "sizes": "784-512-10", "batch": batch, "dp": dp, "tp": 1}
    work |= {"threads": threads, "arithmetic": "fast"}
    name = f"dp {dp}" if dp > 1 else f"1 rank × {threads} thread{'s' * (threads > 1)}"
    found = {"tables": "batch", "oversubscribed": dp > 2}
    return Result(case=work, contestant=name, p50_ms=ms, speedup=speedup, found=found)


def test_tables_by_hand():
    rows = [step(128, 1, 10.0, 1.0), step(128, 2, 16.0, 0.625), step(256, 1, 20.0, 1.0)]
    rows += [step(256, 2, 12.5, 1.6), step(256, 4, 20.0, 1.0), step(256, 1, 11.0, 1.8, threads=2)]
    lines = show.pivot(rows, "batch", lambda row: row.case["batch"])
    assert lines[0] == {"batch": "128", "1 rank × 1 thread": "10 ms", "dp 2": "0.62×"}
    assert (lines[1]["dp 4"], lines[1]["1 rank × 2 threads"]) == ("1.00×*", "1.80×")
    assert show.weak(rows) == [{"samples a rank": "128", "dp 2": "80%"}]
    # 1.6 on 2 ranks: 2·(1 − 1/1.6) = 0.75, limit 4; the oversubscribed 4 ranks do not count.
    assert show.by_law(rows)[1] == {"batch": "256", "p": "0.750", "limit": "4.00", "achieved on 2": "1.60"}


def test_the_link_is_fitted_to_the_all_reduces():
    link = Link(alpha=1e-4, beta=2e-9)

    def all_reduce(nbytes: int, way: str, factor: float = 1.0) -> Result:
        ms = 1e3 * factor * link.seconds("all_reduce", 2, nbytes)
        work = {"kind": "all_reduce", "nbytes": nbytes, "way": way}
        return Result(case=work, contestant="2 ranks", p50_ms=ms, mean_ms=2 * ms)

    rows = [all_reduce(n, "gloo") for n in (2**10, 2**16, 2**22)] + [all_reduce(2**10, "gloo's default", 5.0)]
    fitted = show.fit_link(rows)
    assert (fitted.alpha, fitted.beta) == pytest.approx((1e-4, 2e-9), rel=1e-6)
    first = show.all_reduces(rows)[0]
    assert (first["median"], first["mean"]) == ("202 µs", "404 µs")
    assert first["median, gloo's default"] == "1,010 µs"
    assert show.fit_link([]) is None


def test_it_runs_on_two_ranks(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="an extra")
    fork_context()
    plan = scaling.QUICK._replace(batches=[32], all_reduces=[4, 2**12])
    monkeypatch.setattr(scaling, "QUICK", plan)
    monkeypatch.setattr(scaling, "BLOCK_SECONDS", 0.0)
    assert scaling.main(["--quick", f"--output={tmp_path}"]) == 0
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "scaling.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["cores"] for row in rows} == {str(steps.CORES)}
    measured = [row for row in rows if row["kind"] == "step"]
    ways = {(row["dp"], row["tp"], row["threads"]) for row in measured}
    assert ways == {("1", "1", "1"), ("1", "1", "2"), ("2", "1", "1"), ("1", "2", "1")}
    assert {row["arithmetic"] for row in measured} == {"fast", "exact"}
    for row in measured:
        assert float(row["p50_ms"]) > 0
        assert row["ok"] == "True"
        assert (row["calls"], row["call_bytes"]) == (row["predicted_calls"], row["predicted_bytes"])
    printed = capsys.readouterr().out
    assert "fitted to the medians: α" in printed
    assert "the price of arithmetic='exact'" in printed
