# SPDX-License-Identifier: MIT
"""Training steps as CUDA graphs: every bit of steps one by one, in every mode, and reasons where none can be.

On a CPU `fake_graph` stands in for CUDA's graphs.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
from torchpar.parallel import join_world
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.clip import clip_grad_norm_
from torchpar.partition import Partition
from torchpar.training import CheckpointConfig, Run
from torchpar.training.fused import FusedGradients
from torchpar.training.graph import GraphedStep, why_not_graphed

SIZES = [12, 9, 4]
BATCH = 10
pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture(autouse=True)
def without_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(GraphedStep, "_capture", fake_graph.capture)


def samples(n: int, device: str) -> Samples:
    generator = torch.Generator().manual_seed(n)
    features = torch.randint(0, 256, (n, SIZES[0]), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, SIZES[-1], (n,), generator=generator)
    return Samples(features.to(device), labels.to(device), tuple("abcd"))


def by_autograd(model: MLP, parts: int = 1) -> Callable[[Tensor, Tensor, int], Tensor]:
    def gradients(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        total = torch.zeros((), device=x.device)
        for part, of_part in zip(x.chunk(parts), labels.chunk(parts), strict=True):
            with torch.autocast(x.device.type, torch.bfloat16):
                outputs = model(part)
            loss = cross_entropy(outputs.float(), of_part, reduction="sum", label_smoothing=0.1)
            (loss / global_size).backward()
            total += loss.detach()
        training.add_orthogonality_gradient(model, 0.01)
        return total

    return gradients


sgd = partial(training.sgd, lr=0.3, momentum=0.9, weight_decay=1e-3)
muon = partial(training.muon, lr=0.02, momentum=0.9, weight_decay=0.01)
MODES: dict[str, tuple[Callable[..., Any], Any, float]] = {
    "formulas": (FusedGradients, sgd, 0.01),
    "formulas, by Muon": (FusedGradients, muon, 0.01),
    "autograd": (by_autograd, sgd, 10.0),
    "accumulated": (partial(by_autograd, parts=3), sgd, 10.0),
}


def train(
    device: str,
    mode: str,
    graph: bool,
    folder: Path | None = None,
    change: Callable[[int], None] = lambda number: None,
) -> tuple[list[Any], int]:
    """Losses and weights of three epochs of four batches, the last of 3; and the steps that Python ran."""
    kind, make_optimizer, norm = MODES[mode]
    torch.manual_seed(0)
    model = MLP(SIZES).to(device)
    optimizer, gradients = make_optimizer(model), kind(model)
    schedule = training.lr_scheduler(optimizer, "linear", 12)
    made = 0

    def step(x: Tensor, labels: Tensor, size: int) -> Tensor:
        nonlocal made
        made += 1
        loss = gradients(x, labels, size)
        change(made)
        clip_grad_norm_(model, norm, world)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    sets = samples(33, device), samples(20, device)
    checkpoint = CheckpointConfig(folder, every=3) if folder else None
    config = {"epochs": 3, "batch_size": BATCH, "checkpoint": checkpoint}
    with (
        join_world(device) as world,
        GraphedStep(step, sets[0], optimizer) as graphed,
        Run(model, optimizer, schedule, world, *sets, **config) as run,
    ):
        for epoch in run.epochs():
            for batch in run.indices(epoch) if graph else run.batches(epoch):
                rates = [group["lr"] for group in optimizer.param_groups]
                for group in optimizer.param_groups if not graph else ():  # a graph holds them as tensors
                    group["lr"] = torch.tensor(group["lr"], device=device)
                loss = graphed(*batch) if graph else step(*batch)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
                run.log(loss)
                schedule.step()
    assert not graphed._graphs  # they would keep NCCL's communicators alive
    losses = [(result.train_loss, result.test_loss) for result in run.results]
    return losses + [p.tolist() for p in model.parameters()], made


@pytest.mark.parametrize("mode", MODES)
def test_graphs_have_the_bits_of_steps_one_by_one(device: str, mode: str) -> None:
    learned, made = train(device, mode, False)
    assert made == 12
    assert train(device, mode, True) == (learned, 4)  # the first and the second batch of each of two sizes


@pytest.mark.parametrize("first", [False, True])
def test_either_way_resumes_the_others_checkpoint(device: str, tmp_path: Path, first: bool) -> None:
    """A run ends in the middle of its second epoch, and another continues it."""

    def fail(number: int) -> None:
        if number == (4 if first else 6):  # of the second epoch: its recorded rest, or its second batch
            raise KeyError("ended")

    with pytest.raises(KeyError):
        train(device, "formulas", first, tmp_path, fail)
    assert train(device, "formulas", not first, tmp_path)[0] == train(device, "formulas", False)[0]


def test_recording_that_fails_leaves_steps_one_by_one(device: str) -> None:
    def fail(number: int) -> None:
        if number == 2:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        learned, made = train(device, "formulas", True, change=fail)
    assert (learned, made - 1) == train(device, "formulas", False)


def test_a_schedule_within_the_step_is_refused(device: str) -> None:
    optimizer = torch.optim.SGD(MLP(SIZES).to(device).parameters(), lr=0.1, fused=True)
    schedule = training.lr_scheduler(optimizer, "linear", 10)
    optimizer.step()  # PyTorch warns of a schedule that is stepped before

    def step(x: Tensor, labels: Tensor, size: int) -> Tensor:
        schedule.step()
        return x.sum()

    with pytest.raises(ConfigError, match="step the scheduler after it"):
        GraphedStep(step, samples(40, device), optimizer)(torch.arange(BATCH, device=device), BATCH)
    assert isinstance(optimizer.param_groups[0]["lr"], float)


def test_why_a_step_cannot_be_a_graph(world: World) -> None:
    model = MLP(SIZES)
    assert "needs a GPU" in why_not_graphed(sgd(model), world, True)
    gpu = replace(world, device=torch.device("cuda"))
    assert why_not_graphed(sgd(model), gpu, False) == ""
    assert why_not_graphed(muon(model), gpu, True) == ""
    assert "SGD" in why_not_graphed(torch.optim.SGD(model.parameters()), gpu, True)
    assert "Adam" in why_not_graphed(torch.optim.Adam(model.parameters()), gpu, True)
    assert "gloo" in why_not_graphed(sgd(model), replace(gpu, world_size=2), True)


@pytest.mark.parametrize("start", [0, 2])
def test_indices_are_those_of_the_batches(device: str, start: int) -> None:
    data = samples(43, device)
    for rank in range(3):
        options = {"seed": 1, "epoch": 2, "share": lambda n, rank=rank: Partition(n, 3, rank), "start": start}
        both = zip(indices(data, BATCH, **options), batches(data, BATCH, **options), strict=True)
        for (index, size), batch in both:
            assert size == batch.global_size
            assert torch.equal(data.inputs(index), batch.x)
            assert torch.equal(data.labels[index], batch.labels)
