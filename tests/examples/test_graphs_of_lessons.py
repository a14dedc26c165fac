# SPDX-License-Identifier: MIT
"""The lessons by a CUDA graph, on an emulated GPU."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import train_ddp
from commands import lesson
from fake_data import fashion_mnist
from torch import Tensor
from torch.optim import Optimizer

from nogpu import cuda_is_cpu, emulate
from torchpar import training
from torchpar.training import Run
from torchpar.training.graphed import WARMUP_DDP, count_replays


def with_rates(make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """Let an optimizer's rates be tensors of float32, as they are in a graph."""

    def made(*args: object, **options: object) -> Optimizer:
        optimizer = make(*args, **options)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device="cuda")
            if "ns_steps" not in group:  # SGD
                group["fused"], group["foreach"] = True, False
        return optimizer

    return made


def train_lesson(*flags: str) -> tuple[list[Tensor], int]:
    """Train by `train_ddp.py`; the weights, and the number of replays."""
    runs: list[Run] = []

    class Kept(Run):
        def __init__(self, *parts: object, **options: object):
            super().__init__(*parts, **options)  # type: ignore[arg-type]
            runs.append(self)

    with (
        emulate() as gpu,
        cuda_is_cpu(gpu),
        patch.object(train_ddp, "Run", Kept),
        patch.object(training, "muon", with_rates(training.muon)),
    ):
        code, _, err = lesson("train_ddp", *flags)
        assert (code, gpu.faults) == (0, []), err
    (run,) = runs
    weights = [p.detach().cpu() for p in run.state.model.parameters()]
    return weights, count_replays(run.state.optimizer)


# A rate that float32 holds, and whole batches of an epoch.
BATCHES = 14
LESSON = "--epochs 1 --samples 226 --batch-size 16 --hidden 8 --lr 0.25 --schedule constant"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Flags of a data set with few test samples, which are evaluated on the emulated GPU, too."""
    root = fashion_mnist(tmp_path_factory.mktemp("data"), train=500, test=20)
    return ["--dataset", "fashion-mnist", "--data", str(root)]


@pytest.mark.parametrize(
    "world_size, flags",
    [
        (1, "--optimizer sgd --clip 1 --weight-decay 0"),
        pytest.param(2, "--optimizer sgd --weight-decay 0", marks=pytest.mark.slow),
        pytest.param(1, "", marks=pytest.mark.slow),
    ],
)
def test_the_lesson_trains_as_without_a_graph(ranks, data, world_size, flags):
    """DistributedDataParallel averages in the graph, too."""
    shared = *LESSON.split(), *flags.split(), *data
    if world_size == 1:
        (eager, none), (captured, replays) = train_lesson(*shared), train_lesson(*shared, "--graph")
    else:
        (eager, none), _ = ranks(world_size, train_lesson, *shared)
        (captured, replays), (other, _) = ranks(world_size, train_lesson, *shared, "--graph")
        assert all(map(torch.equal, captured, other))
    assert (none, replays) == (0, BATCHES - WARMUP_DDP)
    for a, b in zip(captured, eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_train_fast_shows_what_a_graph_gains(data):
    small = "--epochs 1 --samples 500 --batch-size 64 --hidden 8 --optimizer sgd"
    with emulate() as gpu, cuda_is_cpu(gpu):
        code, out, err = lesson("train_fast", *small.split(), *data)
    assert (code, gpu.faults) == (0, []), err
    assert "CUDA graph of DistributedDataParallel" in out
    assert "training with CUDA graph of gradients by hand" in out
