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
from torchpar.profile.phases import Phases, phase, timed
from torchpar.profile.trace import ADVICE, SKIP, STEP, Trace, bottleneck, seconds_by_kind

PRODUCT = r"aten::(add)?mm|mkldnn::_linear_pointwise"


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


def names_in(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def test_a_profiled_run_has_the_same_bits(ranks, data, tmp_path):
    losses, profiles = [], tmp_path / "profiles"
    for added in ([], ["--profile", str(profiles)]):
        flags = [*data, "--phases", "--collectives", "--metrics", str(tmp_path / "metrics"), *added]
        (code, out, err), _ = ranks(2, lesson, "train_ddp", *flags)
        assert code == 0, err
        assert ("bottleneck" in out) == bool(added)
        losses.append([(row["train_loss"], row["test_loss"]) for row in rows_of(tmp_path / "metrics")])
    assert losses[0] == losses[1]
    for rank in range(2):
        names = names_in(profiles / f"rank-{rank}.json.gz")
        assert SHARED in names
        assert any(re.fullmatch(PRODUCT, one) for one in names)
        assert names.count(STEP) == 10 + 1  # the end of an epoch is noticed when there is no other batch
    assert "costliest operators of 10 steps\n" in out
    assert re.search(rf"^ +({PRODUCT}) ", out, re.MULTILINE)
    (line,) = re.findall(r"^bottleneck: (.*)$", out, re.MULTILINE)
    assert re.match(r"\w+ — \d+% of a profiled step of \d+\.\d\d ms on rank \d, which waits least; ", line)


@pytest.mark.slow
def test_a_short_run_is_not_profiled(data, tmp_path):
    few = ["--batch-size", "400", "--epochs", "1", "--collectives"]
    code, out, err = lesson("train_ddp", *data, *few, "--profile", str(tmp_path))
    assert (code, err) == (0, "")
    assert "nothing was recorded, no more than 3 steps" in out
    assert "none was recorded, no more than two steps" in out
    assert not list(tmp_path.iterdir())


def test_a_step_is_divided_at_its_backward_pass(monkeypatch):
    now = 1000.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("torchpar.profile.phases.time.perf_counter", lambda: now)
    x, backward = torch.ones(1, requires_grad=True), torch.Tensor.backward
    with Phases(torch.device("cpu")) as phases:
        (x * 2).backward()  # outside of a step
        for _ in phases.steps(map(spend, [5.0, 5.0])):
            spend(1.0)
            with phase("collectives"):
                spend(0.5)
            loss = x * 2
            loss.register_hook(lambda g: spend(3.0))
            loss.backward()
            timed("collectives")(spend)(0.25)
            spend(2.0)
    expected = {"data": 10.0, "forward": 2.0, "backward": 6.0, "collectives": 1.5, "optimizer": 4.0}
    assert phases.seconds == {"pipeline": 0.0, **expected}
    assert torch.Tensor.backward is backward


def test_the_kinds_add_up_to_the_steps(tmp_path):
    """4 of 9 steps are recorded, and a table of them and their trace written."""
    a = torch.randn(64, 64)
    trace = Trace(tmp_path, 0, torch.device("cpu"), steps=4)
    with trace.profiler:
        for _ in trace.steps(iter(range(SKIP + 6))):
            (a @ a).relu()
    seconds = trace.save()
    with gzip.open(tmp_path / "rank-0.json.gz", "rt") as file:
        steps = [e["dur"] for e in json.load(file)["traceEvents"] if e.get("ph") == "X" and e["name"] == STEP]
    assert len(steps) == 4
    # Chrome's format has microseconds with three digits.
    assert sum(seconds.values()) == pytest.approx(sum(steps) / 4e6, abs=1e-9)
    assert min(seconds["arithmetic"], seconds["memory"]) > 0
    assert re.search(r"costliest operators of 4 steps\n(?s:.*)aten::mm .* 4  ", str(trace))


def event(name: str, start: float, end: float, **others: Any) -> SimpleNamespace:
    """What `seconds_by_kind` reads of a profiler's event; times in microseconds."""
    values = {"is_async": False, "is_user_annotation": False, "kernels": ()}
    values |= others | {"device_type": SimpleNamespace(name=others.get("device", "CPU"))}
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), **values)


def message(start: float, end: float, name: str = "gloo:all_reduce") -> SimpleNamespace:
    return event(name, start, end, is_async=True)


BOTTLENECKS = [
    # A product in another counts once.
    ("arithmetic — 60%", [event("aten::linear", 100, 700), event("aten::addmm", 200, 700)]),
    (
        "memory — 70%",
        [event("aten::copy_", 0, 400), event("aten::add", 400, 700), event("aten::mm", 700, 990)],
    ),
    (
        "communication — 71%",
        [event("c10d::allreduce_", 90, 100), message(100, 800), event("aten::mm", 850, 990)],
    ),
    # A message beneath a product does not count, nor does a send that nobody waits for.
    (
        "arithmetic — 70%",
        [message(100, 800), event("aten::mm", 100, 800), message(800, 990, "gloo:send")],
    ),
    ("calls — 71%", [event("aten::t", 0, 300), event("Add", 300, 700), event("aten::mm", 700, 990)]),
    ("calls — 100%", [event("aten::mm", 1000, 9000)]),  # an evaluation after the step
    (
        "arithmetic — 60%",  # a kernel of this package
        [
            event("Optimizer.step#SGD.step", 200, 990, device="CUDA", is_user_annotation=True),
            event("torchpar::linear_sigmoid", 0, 90, kernels=[SimpleNamespace(name="_k")]),
            event("_k", 100, 700, device="CUDA"),
            event("ncclDevKernel_AllReduce", 600, 990, device="CUDA"),
        ],
    ),
]


@pytest.mark.parametrize("sentence, events", BOTTLENECKS)
def test_the_bottleneck_takes_most_of_a_step(sentence, events):
    seconds = seconds_by_kind([event(STEP, 0, 1000), *events])
    assert bottleneck([seconds]).startswith(f"bottleneck: {sentence} of a profiled step of 1.00 ms; ")


def test_the_rank_that_waits_least_speaks():
    waits = dict.fromkeys(ADVICE, 0) | {"communication": 8e-3, "calls": 2e-3}
    works = dict.fromkeys(ADVICE, 0) | {"arithmetic": 9e-3, "calls": 1e-3}
    expected = "bottleneck: arithmetic — 90% of a profiled step of 10.00 ms on rank 1, which waits least; "
    assert bottleneck([waits, works]).startswith(expected)
    assert bottleneck([waits]).startswith("bottleneck: communication — 80%")
