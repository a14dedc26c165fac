# SPDX-License-Identifier: MIT
"""Traces of the training lessons, and the bottleneck that `torchpar.profile.trace` finds in them."""

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import lesson, rows_of
from fake_data import fashion_mnist

from torchpar.profile.collectives import SHARED
from torchpar.profile.trace import BETWEEN, SKIP, STEP, Row, StepProfile, Trace, bottleneck, summarize

PRODUCTS = {"aten::mm", "aten::addmm", "aten::_int_mm", "mkldnn::_linear_pointwise"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Flags of two epochs of twelve steps; the tenth traced step is in the second epoch.

    With 64 units the products stay among the ten costliest operators on a busy machine too.
    """
    pytest.importorskip("torchvision", reason="torchvision reads the data sets")
    pytest.importorskip("tyro", reason="tyro reads the flags")
    root = tmp_path_factory.mktemp("data")
    fashion_mnist(root / "FashionMNIST" / "raw", train=600, test=100)
    flags = "--dataset fashion-mnist --hidden 64 --device cpu --epochs 2 --batch-size 50 --schedule constant"
    return [*flags.split(), "--data", str(root)]


def trace_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


LESSONS = [
    ("train_ddp", 1, "", set()),
    ("train_ddp", 2, "--fused off --phases --collectives", {SHARED}),
    ("train_tensor_parallel", 2, "", {"gloo:all_reduce"}),
    ("train_pipeline", 2, "", {"gloo:send", "gloo:recv"}),
]
RARE = [
    ("train_ddp", 1, "--fused off --optimizer muon", set()),
    ("train_ddp", 2, "", {SHARED}),
    ("train_ddp", 2, "--compile", {SHARED}),
    ("train_parallel", 2, "--tp 2 --arithmetic exact", {"gloo:all_reduce"}),
    ("train_parallel", 4, "--tp 2 --pp 2 --pipeline gpipe", {"gloo:all_reduce", "gloo:recv"}),
]
LESSONS += [pytest.param(*lesson, marks=pytest.mark.slow) for lesson in RARE]


@pytest.mark.parametrize("name, world_size, flags, messages", LESSONS)
def test_a_profiled_run_has_the_same_bits(ranks, data, tmp_path, name, world_size, flags, messages):
    losses, profiles = [], tmp_path / "profiles"
    for number, added in enumerate(([], ["--profile", str(profiles)])):
        metrics = tmp_path / str(number)
        flags_of_run = [*data, *flags.split(), "--metrics", str(metrics), *added]
        (code, out, err), *others = ranks(world_size, lesson, name, *flags_of_run)
        assert code == 0, err
        assert [other[:2] for other in others] == [(0, "")] * (world_size - 1)
        assert ("bottleneck" in out) == bool(added)
        losses.append([(row["train_loss"], row["test_loss"]) for row in rows_of(metrics)])
    assert losses[0] == losses[1]
    assert sorted(path.name for path in profiles.iterdir()) == [
        f"rank-{rank}.json.gz" for rank in range(world_size)
    ]
    for path in profiles.iterdir():
        names = [event["name"] for event in trace_of(path)]
        assert PRODUCTS & set(names)
        assert messages <= set(names)
        assert any(re.match(f"gloo:|{SHARED}", one) for one in names) == bool(messages)
        assert names.count(STEP) == 10 + 1  # the end of an epoch is noticed when there is no other batch
    assert "costliest operators of 10 steps, rank 0" in out
    product = r"aten::(add)?mm|aten::_int_mm|mkldnn::_linear_pointwise"
    assert re.search(rf"│ ({product}) +│ arithmetic +│ +\d+ │ +\d+\.\d{{3}} │", out)
    (line,) = re.findall(r"^bottleneck: (.*)$", out, re.MULTILINE)
    assert re.match(
        r"(arithmetic|memory|communication|calls) — \d+% of a profiled step of \d+\.\d\d ms", line
    )
    assert ("which waits least" in line) == (world_size > 1)


def test_a_resumed_run_is_profiled(data, tmp_path):
    """A run that is complete or has three steps left is too short."""
    profiles = tmp_path / "profiles"
    flags = [*data, "--checkpoint", str(tmp_path / "checkpoints")]
    assert lesson("train_ddp", *flags, "--epochs", "1")[0] == 0
    for epochs, recorded in ((1, False), (2, True)):
        code, out, err = lesson("train_ddp", *flags, "--epochs", str(epochs), "--profile", str(profiles))
        assert (code, err) == (0, "")
        assert ("of 9 steps" in out, "nothing was recorded" not in out) == (recorded, recorded)
        assert len(list(profiles.iterdir())) == recorded
    code, out, err = lesson(
        "train_ddp", *data, "--batch-size", "400", "--epochs", "1", "--profile", str(tmp_path)
    )
    assert "nothing was recorded, no more than 3 steps" in out
    assert not (tmp_path / "rank-0.json.gz").exists()


def test_a_trace_that_cannot_be_written_ends_no_training(data, tmp_path):
    (tmp_path / "rank-0.json.gz").mkdir()
    code, out, err = lesson("train_ddp", *data, "--profile", str(tmp_path))
    assert code == 2
    assert "epoch 2/2" in out
    assert re.fullmatch(r"train_ddp\.py: error: \S+ cannot be written: .*\n", err)


def traced(folder: Path, work: Any) -> StepProfile:
    trace = Trace(folder, 0, torch.device("cpu"), steps=4)
    with trace.profiler:
        for batch in trace.steps(iter(range(SKIP + 6))):
            work(batch)
    result = trace.result()
    assert result is not None
    return result


def test_rows_add_up_to_the_steps(tmp_path):
    """Their own times are PyTorch's; 4 of 9 steps are recorded."""
    a = torch.randn(64, 64)
    profile = traced(tmp_path, lambda _: (a @ a).relu())
    steps = [event["dur"] for event in trace_of(tmp_path / "rank-0.json.gz") if event["name"] == STEP]
    assert len(steps) == 4
    # Chrome's format has microseconds with three digits.
    assert profile.seconds("arithmetic", "memory", "calls") == pytest.approx(sum(steps) / 4e6, abs=1e-9)
    assert profile.flops == 2 * 64**3
    rows = {row.name: row for row in profile.rows}
    assert (rows["aten::mm"].calls, rows["aten::mm"].kind) == (1, "arithmetic")
    assert (rows["aten::clamp_min"].calls, rows["aten::clamp_min"].kind) == (1, "memory")


def event(name: str, start: float, end: float, **others: Any) -> SimpleNamespace:
    """What `summarize` reads of a profiler's event; times in microseconds."""
    standard = {"device": "CPU", "is_async": False, "is_user_annotation": False, "kernels": ()}
    values = standard | {"flops": 0, "input_shapes": []} | others
    device = SimpleNamespace(name=values.pop("device"))
    return SimpleNamespace(
        name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device, **values
    )


def message(start: float, end: float, name: str = "gloo:all_reduce") -> SimpleNamespace:
    return event(name, start, end, is_async=True)


SHAPES = [[10, 300], [500, 300], [500]]
BOTTLENECKS = {
    "a product": (
        [event("aten::mm", 100, 700, flops=6e7), event("aten::add", 700, 900)],
        "arithmetic — 60% of a profiled step of 1.00 ms is matrix products, at 100 GFLOP/s;",
    ),
    "a product in another": (
        [event("aten::linear", 100, 700), event("aten::addmm", 200, 700, flops=6e7)],
        "arithmetic — 60% of a profiled step of 1.00 ms is matrix products, at 100 GFLOP/s;",
    ),
    "a product of oneDNN": (
        [event("mkldnn::_linear_pointwise", 0, 600, input_shapes=[[10, 300], [10, 500], [500, 300]])],
        "arithmetic — 60% of a profiled step of 1.00 ms is matrix products, at 5 GFLOP/s;",
    ),
    "copies": (
        [event("aten::copy_", 0, 400), event("aten::add", 400, 700), event("aten::mm", 700, 990)],
        "memory — 70% of a profiled step of 1.00 ms is operators that move memory, aten::copy_ most of all;",
    ),
    "compiled": (
        [event("## Call CompiledFxGraph f0a1 ##", 0, 800), event("aten::mm", 100, 350)],
        "memory — 55% of a profiled step of 1.00 ms is operators that move memory, CompiledFxGraph most",
    ),
    "a message": (
        [event("c10d::allreduce_", 90, 100), message(100, 800), event("aten::mm", 850, 990)],
        "communication — 71% of a profiled step of 1.00 ms passes while messages are under way and no "
        "operator runs, 1 messages a step;",
    ),
    "a message beneath a product": (
        [message(100, 800), event("aten::mm", 100, 800, flops=7e5)],
        "arithmetic — 70% of a profiled step of 1.00 ms is matrix products, at 1 GFLOP/s;",
    ),
    "a send that nobody waits for": (
        [message(100, 990, "gloo:send"), event("aten::mm", 100, 200)],
        "calls — 90% of a profiled step of 1.00 ms is spent between operators,",
    ),
    "views and Python": (
        [event("aten::t", 0, 300), event("AddmmBackward0", 300, 700), event("aten::mm", 700, 990)],
        "calls — 71% of a profiled step of 1.00 ms is spent between operators, in Python, autograd and "
        "launches, 2 calls a step;",
    ),
    "an operator of this package": (
        [event("torchpar::linear_sigmoid", 0, 900), event("aten::addmm", 100, 300)],
        "calls — 80% of a profiled step",
    ),
    "an evaluation after the step": (
        [event("aten::mm", 1000, 9000)],
        "calls — 100% of a profiled step of 1.00 ms is spent between operators,",
    ),
    "a kernel of this package": (
        [
            event("Optimizer.step#SGD.step", 200, 990, device="CUDA", is_user_annotation=True),
            event(
                "torchpar::linear_sigmoid", 0, 90, kernels=[SimpleNamespace(name="_k")], input_shapes=SHAPES
            ),
            event("_k", 100, 700, device="CUDA"),
            event("ncclDevKernel_AllReduce", 600, 990, device="CUDA"),
        ],
        "arithmetic — 60% of a profiled step of 1.00 ms is matrix products, at 5 GFLOP/s;",
    ),
    "a kernel of another": (
        [
            event("aten::mm", 0, 900, kernels=[SimpleNamespace(name="gemm")], flops=7),
            event("aten::sigmoid", 900, 990, kernels=[SimpleNamespace(name="vectorized")]),
            event("gemm", 100, 300, device="CUDA"),
            event("vectorized", 300, 990, device="CUDA"),
        ],
        "memory — 69% of a profiled step of 1.00 ms is operators that move memory, vectorized most of all;",
    ),
}


@pytest.mark.parametrize("events, sentence", BOTTLENECKS.values(), ids=BOTTLENECKS)
def test_the_bottleneck_takes_most_of_a_step(events, sentence):
    assert bottleneck([summarize(0, 1, [event(STEP, 0, 1000), *events])]).startswith(
        f"bottleneck: {sentence}"
    )


def test_several_steps_are_averaged():
    steps = [event(STEP, 0, 10), event("aten::mm", 1, 9, flops=80), event(STEP, 20, 40)]
    profile = summarize(0, 2, [*steps, event("aten::mm", 22, 30, flops=80)])
    assert profile.flops == 80
    assert [(row.name, row.calls, row.seconds) for row in profile.rows] == [
        ("aten::mm", 1, pytest.approx(8e-6)),
        (BETWEEN, 0, pytest.approx(7e-6)),
    ]


def test_the_rank_that_waits_least_speaks():
    waits = StepProfile(0, 1, [Row("gloo:recv", "communication", 1, 8e-3), Row(BETWEEN, "calls", 0, 2e-3)], 0)
    works = StepProfile(1, 1, [Row("aten::mm", "arithmetic", 1, 9e-3), Row(BETWEEN, "calls", 0, 1e-3)], 9e6)
    expected = "bottleneck: arithmetic — 90% of a profiled step of 10.00 ms on rank 1, which waits least, is"
    assert bottleneck([waits, works]).startswith(expected)
    assert bottleneck([waits]).startswith("bottleneck: communication — 80%")
