# SPDX-License-Identifier: MIT
"""Traces of the training lessons, and the phases of a step."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from commands import lesson, rows_of
from fake_data import fashion_mnist

from torchpar.profile.collectives import SHARED
from torchpar.profile.memory import Memory
from torchpar.profile.phases import Phases, phase

PRODUCT = r"aten::(add)?mm|mkldnn::_linear_pointwise"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Flags of two epochs of twelve steps; the tenth traced step is in the second epoch.

    With 64 units the products stay among the ten costliest operators on a busy machine too.
    """
    pytest.importorskip("tyro", reason="tyro reads the flags")
    root = fashion_mnist(tmp_path_factory.mktemp("data"), train=600, test=100)
    flags = (
        "--dataset fashion-mnist --hidden 64 --device cpu --epochs 2 --batch-size 50 --schedule "
        "constant"
    )
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
        assert ("costliest operators of rank 0\n" in out) == bool(added)
        losses.append(
            [(row["train_loss"], row["test_loss"]) for row in rows_of(tmp_path / "metrics")]
        )
    assert losses[0] == losses[1]
    for rank in range(2):
        names = names_in(profiles / f"rank-{rank}.json.gz")
        assert SHARED in names
        assert any(re.fullmatch(PRODUCT, one) for one in names)
        assert sum(name.startswith("ProfilerStep#") for name in names) == 10
    assert re.search(rf"^ +({PRODUCT}) ", out, re.MULTILINE)


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
            phase("collectives")(spend)(0.25)
            spend(2.0)
    expected = {"data": 10.0, "forward": 2.0, "backward": 6.0, "collectives": 1.5, "optimizer": 4.0}
    assert phases.seconds == {"pipeline": 0.0, **expected}
    assert torch.Tensor.backward is backward


def test_memory_counts_each_tensor_once_and_until_autograd_lets_go_of_it():
    """Sigmoids keep their outputs, linear layers their inputs; float64, and momentum of the
    weights' size."""
    layers = torch.nn.Linear(5, 4), torch.nn.Sigmoid(), torch.nn.Linear(4, 3)
    model = torch.nn.Sequential(*layers).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    memory = Memory(model, optimizer)
    weights = 8 * (5 * 4 + 4 + 4 * 3 + 3)
    assert memory.measured() == {
        "weights": weights,
        "gradients": 0,
        "optimizer": 0,
        "activations": 0,
    }
    batch = torch.randn(8, 5, dtype=torch.float64)
    for _ in range(3):  # the same in each step
        with memory.measure():
            for x in batch.split(4):  # parts of one memory
                model(x).sum().backward()
        optimizer.step()
    kept = 4 * (5 + 4) * 8
    expected = {"weights": weights, "gradients": weights, "optimizer": weights, "activations": kept}
    assert memory.measured() == expected
    with memory.measure():
        model(batch)  # a larger batch, of which no step is made
    assert memory.measured()["activations"] == 2 * kept
    with memory.measure():
        losses = [model(x).sum() for x in batch.split(2)]  # four at a time, as in gpipe
        sum(losses).backward()
    assert memory.measured()["activations"] == 2 * kept
