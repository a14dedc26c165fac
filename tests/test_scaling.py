# SPDX-License-Identifier: MIT
"""The scaling benchmarks: what they predict, what they count at a scale that is not here, that they run."""

import csv
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.scale_model import counted, predicted
from benchmarks.scale_model.counted import MESHES, Mesh, StageWork
from benchmarks.scale_model.predicted import Machine
from benchmarks.scaling import ranks, results
from benchmarks.scaling.plan import CORES, Configuration
from benchmarks.scaling.results import Compute
from torchpar.collectives import Call
from torchpar.parallel.cost import Expected, Link

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Callable[..., Any]]:
    """``elsewhere(function, *args)`` in a process whose fake process group disturbs nobody."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        yield lambda function, *args: worker.submit(function, *args).result()


# At a scale that is not here


def places(mesh: Mesh, rank: int, width: int, layers: int) -> tuple[list[int], dict[str, tuple[int, ...]]]:
    """The coordinates (pp, dp, tp) of a rank, and the shapes of its parameters."""
    with counted.fake_world(mesh, rank) as world:
        assert world.mesh is not None
        model = counted.build(width, layers, world)
        coordinate = world.mesh.get_coordinate()
        assert coordinate is not None
        return list(coordinate), {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "mesh, rank, coordinate, layers",
    [
        (MESHES[0], 0, [0, 0, 0], range(16)),
        (MESHES[0], 13, [0, 1, 5], range(16)),
        (MESHES[0], 63, [0, 7, 7], range(16)),
        (MESHES[1], 300, [2, 5, 4], range(8, 12)),  # (2·16 + 5)·8 + 4
        (MESHES[2], 4095, [7, 63, 7], range(14, 16)),
    ],
)
def test_a_rank_of_many_has_its_place_and_its_shards(
    elsewhere: Callable[..., Any], mesh: Mesh, rank: int, coordinate: list[int], layers: range
) -> None:
    width = 4099  # 8 × 512 + 3: the first three of eight ranks have one more
    assert mesh.rank(coordinate[0], *coordinate[1:]) == rank
    own = 513 if coordinate[2] < 3 else 512
    expected: dict[str, tuple[int, ...]] = {}
    for i in layers:
        expected[f"layers.{i}.weight"] = (width, own) if i % 2 else (own, width)
        expected[f"layers.{i}.bias"] = (width,) if i % 2 else (own,)
    assert elsewhere(places, mesh, rank, width, 16) == (coordinate, expected)


@pytest.mark.parametrize("mesh, width", [*zip(MESHES, [65536, 4096, 16384], strict=True)])
def test_a_rank_of_many_sends_what_is_predicted(
    elsewhere: Callable[..., Any], mesh: Mesh, width: int
) -> None:
    batch = 2**10 * mesh.dp * mesh.micro_batches
    found = elsewhere(counted.count, width, 16, batch, mesh)
    assert found.difference == ""
    assert [stage.layers for stage in found.stages] == [16 // mesh.pp] * mesh.pp
    sent = Counter((call.dimension, call.operation, call.bytes) for call in found.calls)
    # By hand: bfloat16, a rank's 1024 samples a micro-batch; the busiest stage is inside the pipeline.
    activations = 2 * 2**10 * width
    pairs = 8 // mesh.pp
    expected = {("tp", "all_reduce", activations): mesh.micro_batches * (2 * pairs - (mesh.pp == 1))}
    if mesh.pp > 1:
        expected |= {("pp", op, activations): 2 * mesh.micro_batches for op in ("send", "recv")}
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
def test_other_sizes_or_another_number_of_calls_are_a_difference(wrong: list[Expected]) -> None:
    calls = [Call("tp", "all_reduce", 8, 100, 0.0)] * 2
    assert counted.difference(calls, [Expected("tp", "all_reduce", 8, 100)] * 2) == ""
    assert counted.difference(calls, wrong)


def test_the_fake_backend_leaves_no_trace(elsewhere: Callable[..., Any]) -> None:
    before, after = elsewhere(capabilities)
    assert before == after


def capabilities() -> tuple[Any, Any]:
    import torch.distributed as dist

    def state() -> Any:
        return dict(dist.Backend.backend_capability), dict(dist.Backend.default_device_backend_map)

    before = state()
    with counted.fake_world(Mesh(2, 2), 1):
        pass
    assert not dist.is_initialized()
    return before, state()


# Predictions


def test_compute_is_fitted() -> None:
    compute = Compute.fit([(batch, 0.5 + 0.25 * batch) for batch in (1, 4, 64)])
    assert (compute.fixed, compute.per_sample) == pytest.approx((0.5, 0.25))
    assert compute.seconds(10) == pytest.approx(3.0)


@pytest.mark.parametrize(
    "sizes, tp, share",
    [((4, 6, 2), 2, 1 / 2), ((4, 6, 2), 1, 1.0), ((4, 6, 6, 10), 2, (60 + 60 / 2) / 120), ((3, 5), 4, 1.0)],
)
def test_share_of_a_tensor_split_mlp(sizes: tuple[int, ...], tp: int, share: float) -> None:
    assert results.tensor_share(sizes, tp) == pytest.approx(share)


def test_a_step_is_its_share_of_computing_and_its_all_reduces() -> None:
    compute, link = Compute(fixed=1.0, per_sample=0.5), Link(alpha=0.1, beta=0.01)
    one = Configuration((4, 6, 2), batch=9)
    reduces = [Expected("dp", "all_reduce", 2, 40), Expected("dp", "all_reduce", 2, 8)]
    # 5 samples of 9; an all-reduce of n bytes takes 2α + nβ.
    assert results.predict(replace(one, dp=2), compute, link, reduces) == pytest.approx(3.5 + 0.6 + 0.28)
    assert results.predict(replace(one, tp=2), compute, link, []) == pytest.approx(2.75)
    assert results.predict(one, compute, link, []) == pytest.approx(5.5)


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
def test_crossover(speedups: dict[int, float], batch: float | None) -> None:
    assert results.crossover(speedups) == (batch and pytest.approx(batch))


def test_a_step_of_many_gpus_by_hand() -> None:
    links = {"tp": Link(0.0, 1.0), "pp": Link(0.5, 0.0), "dp": Link(1.0, 0.0)}
    machine, mesh = Machine(flops=100.0, links=links), Mesh(2, 2, 2, micro_batches=4)
    tensor, message = Expected("tp", "all_reduce", 2, 3), Expected("pp", "send", 2, 1)
    data = Expected("dp", "all_reduce", 2, 1)
    stages = [StageWork(1, [tensor] * 4 + [message] * 4 + [data]), StageWork(1, [tensor] * 8 + [data])]
    # The second stage: 6·10²·8 samples/2 parts = 2400 operations, 24 s, and 8 all-reduces of 3 s; the first,
    # which needs no gradient of its input, 16 s, 4 of them and 4 messages of 0.5 s. 4 + 1 slots of 12 s.
    none = predicted.predict(stages, 10, 16, mesh, machine, "none")
    assert none.step == pytest.approx(5 * (24 + 24) / 4 + 2)
    assert (none.compute, none.tensor, none.data) == pytest.approx((24, 24, 2))
    assert none.pipeline == pytest.approx(12)
    assert none.efficiency == pytest.approx((6 + 4) * 100 * 16 / (8 * 100) / 62)
    # A micro-batch's backward pass, 4 s of its 6, hides the 2 s among replicas.
    full = predicted.predict(stages, 10, 16, mesh, machine, "full")
    assert (full.step, full.data) == pytest.approx((60, 0))
    slow = Machine(100.0, {**links, "dp": Link(2.5, 0.0)})
    assert predicted.predict(stages, 10, 16, mesh, slow, "full").data == pytest.approx(1)


# The check before the timing


def test_a_wrong_gradient_and_a_wrong_loss_are_rejected() -> None:
    torch.manual_seed(0)
    exact = torch.randn(1000, dtype=torch.float64)
    single, other = (exact + 1e-7 * torch.randn(1000).double() for _ in range(2))

    def reason(grad: Tensor, loss: float) -> str:
        return ranks.compare(grad, (single, exact), loss, (2.3, 2.3), 100)[0]

    one_off = other.clone()
    one_off[7] += 1e-4
    assert reason(other, 2.3) == ""
    assert "gradient" in reason(2 * other, 2.3)  # summed and not averaged
    assert "gradient" in reason(one_off, 2.3)
    assert "gradient" in reason(other * torch.nan, 2.3)
    assert "loss" in reason(other, 2.3001)
    assert "loss" in reason(other, 1.15)
    assert "loss" in reason(other, torch.nan)


def test_the_benchmark_runs_on_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra")
    from benchmarks.scale_model.show import read_measured

    command = [sys.executable, "-m", "benchmarks.scaling", "--quick", "--rounds=1", f"--output={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "overtakes one rank × one thread at batch: predicted" in done.stdout
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "scaling.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [field.name for field in fields(results.Row)]
    assert list(rows[0])[: len(columns)] == columns
    assert {row["cores"] for row in rows} == {str(CORES)}
    steps = [row for row in rows if row["kind"] == "step"]
    assert {(row["dp"], row["tp"], row["threads"]) for row in steps} == {
        ("1", "1", "1"),
        ("1", "1", "2"),
        ("2", "1", "1"),
        ("1", "2", "1"),
    }
    assert {row["reduction"] for row in steps} == {"fast", "invariant"}
    assert all(float(row["p50_ms"]) > 0 and row["ok"] == "True" for row in steps)
    points, link = read_measured(tmp_path / "scaling.csv")
    assert {point.name for point in points} <= {"dp 2", "tp 2"}
    assert "α" in link
