# SPDX-License-Identifier: MIT
"""Training steps as CUDA graphs: every bit of steps one by one, in every mode, and reasons where none can be.

On a CPU `fake_graph` stands in for CUDA's graphs.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_graph
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchpar import training
from torchpar.data import Samples, batches, indices
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.optim import SGD
from torchpar.parallel import join_world
from torchpar.parallel.split.clip import clip_grad_norm_
from torchpar.partition import Partition
from torchpar.training import CheckpointConfig, Run
from torchpar.training.fused import FusedGradients
from torchpar.training.graph import GraphedStep, why_not_graphed

SIZES = [12, 9, 4]
BATCH = 10


@pytest.fixture(autouse=True)
def without_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(GraphedStep, "_capture", fake_graph.capture)


def samples(n: int, device: str) -> Samples:
    generator = torch.Generator().manual_seed(n)
    features = torch.randint(0, 256, (n, SIZES[0]), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, SIZES[-1], (n,), generator=generator)
    return Samples(features.to(device), labels.to(device), tuple("abcd"))


def by_formulas(model: MLP, **options: Any) -> Callable[[Tensor, Tensor, int], Tensor]:
    return FusedGradients(model, **options)


def by_autograd(
    model: MLP, parts: int = 1, label_smoothing: float = 0.0, autocast: bool = False
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The gradients of a batch in ``parts``, which add up."""

    def gradients(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        total = torch.zeros((), device=x.device)
        for part, of_part in zip(x.tensor_split(parts), labels.tensor_split(parts), strict=True):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                outputs = model(part)
            loss = cross_entropy(outputs.float(), of_part, reduction="sum", label_smoothing=label_smoothing)
            (loss / global_size).backward()
            total += loss.detach()
        return total

    return gradients


def sgd(model: MLP) -> torch.optim.Optimizer:
    return training.sgd(model, lr=0.3, momentum=0.9, weight_decay=1e-3)


def muon(model: MLP) -> torch.optim.Optimizer:
    return training.muon(model, lr=0.02, momentum=0.9, weight_decay=0.01)


def clip(model: MLP, world: Any) -> None:
    clip_grad_norm_(model, 0.01, world)


def penalty(model: MLP, world: Any) -> None:
    training.add_orthogonality_gradient(model, 0.01)


Mode = tuple[Callable[..., Any], dict[str, Any], Callable[[MLP], Any], Any]
MODES: dict[str, Mode] = {
    "formulas": (by_formulas, {}, sgd, None),
    "formulas, smoothed labels": (by_formulas, {"label_smoothing": 0.1}, sgd, None),
    "autograd": (by_autograd, {}, sgd, None),
    "autograd, smoothed labels": (by_autograd, {"label_smoothing": 0.1}, sgd, None),
    "accumulated": (by_autograd, {"parts": 3}, sgd, None),
    "autocast": (by_autograd, {"autocast": True}, sgd, None),
    "clipped": (by_formulas, {}, sgd, clip),
    "penalty": (by_autograd, {}, sgd, penalty),
    "muon": (by_formulas, {}, muon, None),
    "muon, autograd": (by_autograd, {}, muon, clip),
}


def train(
    device: str,
    mode: str,
    graph: bool,
    epochs: int = 3,
    folder: Path | None = None,
    change: Callable[[int], None] = lambda number: None,
) -> tuple[list[tuple[float, float]], list[Tensor], int]:
    """Losses, weights, and how many graphs were recorded, of a run of three batches of 10 and one of 3."""
    kind, options, make_optimizer, adjust = MODES[mode]
    torch.manual_seed(0)
    model = MLP(SIZES).to(device)
    optimizer = make_optimizer(model)
    schedule = training.lr_scheduler(optimizer, "linear", 4 * epochs)
    gradients = kind(model, **options)
    made = 0

    def step(x: Tensor, labels: Tensor, size: int) -> Tensor:
        nonlocal made
        made += 1
        change(made)
        loss = gradients(x, labels, size)
        if adjust:
            adjust(model, world)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    train, test = samples(33, device), samples(20, device)
    checkpoint = CheckpointConfig(folder, every=3) if folder else None
    with join_world(device) as world:
        graphed = GraphedStep(step, train, optimizer)
        config = {"epochs": epochs, "batch_size": BATCH, "checkpoint": checkpoint}
        with Run(model, optimizer, schedule, world, train, test, **config) as run:
            for epoch in run.epochs():
                for batch in run.indices(epoch) if graph else run.batches(epoch):
                    if graph:
                        loss = graphed(*batch)
                    else:  # the rates as a graph holds them
                        rates = [group["lr"] for group in optimizer.param_groups]
                        for group in optimizer.param_groups:
                            group["lr"] = torch.tensor(group["lr"], device=device)
                        loss = step(*batch)
                        for group, rate in zip(optimizer.param_groups, rates, strict=True):
                            group["lr"] = rate
                    run.log(loss)
                    schedule.step()
    losses = [(result.train_loss, result.test_loss) for result in run.results]
    return losses, [p.detach().clone() for p in model.parameters()], made


def assert_same(a: Any, b: Any) -> None:
    assert a[0] == b[0]
    assert all(torch.equal(p, q) for p, q in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_graphs_have_the_bits_of_steps_one_by_one(device: str, mode: str) -> None:
    one_by_one, graphed = train(device, mode, False), train(device, mode, True)
    assert_same(graphed, one_by_one)
    assert (one_by_one[2], graphed[2]) == (12, 4)  # the first and the second batch of each of two sizes


def test_the_comparison_rejects_a_step_that_python_changes(device: str) -> None:
    """A graph repeats the loss of the batch that was recorded, doubled or not."""
    runs = []
    for graph in (False, True):
        torch.manual_seed(0)
        model = MLP(SIZES).to(device)
        calls: list[float] = []

        def step(x: Tensor, labels: Tensor, size: int, model: MLP = model, calls: Any = calls) -> Tensor:
            calls.append(1.0)
            return model(x).sum().detach() * len(calls)

        data = samples(40, device)
        graphed = GraphedStep(step, data, SGD(model.parameters(), lr=0.1))
        index = torch.arange(BATCH, device=device)
        x, labels = data.inputs(index), data.labels[:BATCH]
        runs.append([float(graphed(index, BATCH) if graph else step(x, labels, BATCH)) for _ in range(4)])
    assert runs[0][:2] == runs[1][:2]
    assert runs[0][2] != runs[1][2] == runs[1][3] == runs[1][1]


@pytest.mark.parametrize("ways", [(True, True), (True, False), (False, True)])
def test_either_way_resumes_the_others_checkpoint(
    device: str, tmp_path: Path, ways: tuple[bool, bool]
) -> None:
    """A run ends in the middle of its second epoch, and another continues it."""

    def fail(number: int) -> None:
        if number == (6 if not ways[0] else 4):  # of the second epoch: its second batch, or its recorded rest
            raise KeyError("ended")

    with pytest.raises(KeyError):
        train(device, "formulas", ways[0], 3, tmp_path, fail)
    assert_same(train(device, "formulas", ways[1], 3, tmp_path), train(device, "formulas", False))


def test_recording_that_fails_leaves_steps_one_by_one(device: str) -> None:
    reasons: list[str] = []
    torch.manual_seed(0)
    model, data = MLP(SIZES).to(device), samples(40, device)
    optimizer, gradients = SGD(model.parameters(), lr=0.1), FusedGradients(model)

    def step(x: Tensor, labels: Tensor, size: int) -> Tensor:
        loss = gradients(x, labels, size)
        assert loss.item() > 0
        optimizer.step()
        optimizer.zero_grad()
        return loss

    graphed = GraphedStep(step, data, optimizer, reasons.append)
    found = [float(graphed(index, size)) for index, size in indices(data, BATCH, seed=0, epoch=1)]
    assert len(reasons) == 1
    assert "captur" in reasons[0]
    torch.manual_seed(0)
    model.load_state_dict(MLP(SIZES).state_dict())
    assert found == [float(step(*batch)) for batch in batches(data, BATCH, seed=0, epoch=1)]


def test_a_schedule_within_the_step_is_refused(device: str) -> None:
    model, data = MLP(SIZES).to(device), samples(40, device)
    optimizer, gradients = SGD(model.parameters(), lr=0.1), FusedGradients(model)
    schedule = training.lr_scheduler(optimizer, "linear", 10)

    def step(x: Tensor, labels: Tensor, size: int) -> Tensor:
        loss = gradients(x, labels, size)
        optimizer.step()
        schedule.step()
        return loss

    graphed = GraphedStep(step, data, optimizer)
    with pytest.raises(ConfigError, match="step the scheduler after it"):
        graphed(torch.arange(BATCH, device=device), BATCH)
    assert isinstance(optimizer.param_groups[0]["lr"], float)


def test_why_a_step_cannot_be_a_graph() -> None:
    model = MLP(SIZES)
    with join_world("cpu") as world:
        assert "needs a GPU" in why_not_graphed(sgd(model), world, True)
        gpu = replace(world, device=torch.device("cuda"))
        assert why_not_graphed(sgd(model), gpu, False) == ""
        assert why_not_graphed(muon(model), gpu, True) == ""
        assert "Adam" in why_not_graphed(torch.optim.Adam(model.parameters()), gpu, True)
        assert "gloo" in why_not_graphed(sgd(model), replace(gpu, world_size=2), True)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_indices_are_those_of_the_batches(device: str, ranks: int) -> None:
    data = samples(43, device)
    for rank in range(ranks):
        options = {"seed": 1, "epoch": 2, "share": lambda n, rank=rank: Partition(n, ranks, rank)}
        for start in (0, 2):
            expected = list(batches(data, BATCH, start=start, **options))
            found = list(indices(data, BATCH, start=start, **options))
            assert [size for _, size in found] == [batch.global_size for batch in expected]
            for (index, _), batch in zip(found, expected, strict=True):
                assert torch.equal(data.inputs(index), batch.x)
                assert torch.equal(data.labels[index], batch.labels)
