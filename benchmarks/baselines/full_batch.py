# SPDX-License-Identifier: MIT
"""Full-batch descent of one network, in NumPy or PyTorch, in one process or several.

Each process has its share of the samples throughout. In each iteration all add up their gradients, of the
binary cross-entropy per class, averaged over all samples; so the costs are those of one process.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.baselines import mpi, numpy_mlp
from benchmarks.baselines.bridge import copy_weights
from benchmarks.baselines.numpy_mlp import Array
from torchpar.collectives import WatchedStep
from torchpar.nn import MLP
from torchpar.parallel.step import ReplicaStep, Step
from torchpar.parallel.world import World
from torchpar.phases import NoPhases, Phases
from torchpar.training import loss_sum


class Plan(NamedTuple):
    """How to train: layer sizes, plain SGD with momentum, the seed of the first weights."""

    sizes: tuple[int, ...]
    iterations: int
    lr: float
    momentum: float = 0.0
    seed: int = 0


class Run(NamedTuple):
    """What came of it.

    Attributes:
        costs: of each iteration, before its step.
        train, test: mean loss and accuracy at the end.
        seconds: of all iterations.
        phases: the seconds of each phase; "scatter" and "data" come once, before the iterations.
        weights: of the first layer, ``(size_0, size_1)``.
    """

    costs: list[float]
    train: tuple[float, float]
    test: tuple[float, float]
    seconds: float
    phases: dict[str, float]
    weights: Array


def in_numpy(world: Any, splits: Sequence[mpi.Samples | None], counts: Sequence[int], plan: Plan) -> Run:
    """On the processes of a communicator.

    Args:
        splits: training and test samples, on process 0.
        counts: how many there are of each.
    """
    phases = Phases(torch.device("cpu"), dict.fromkeys(mpi.PHASES, 0.0))
    orders = [np.array_split(np.arange(count), world.size) for count in counts]
    with phases("scatter"):
        train, test = (mpi.scatter(world, *pair) for pair in zip(splits, orders, strict=True))
    model = numpy_mlp.MLP(plan.sizes, loss="bce", seed=plan.seed)
    trainer = mpi.Trainer(world, model, numpy_mlp.SGD(model, plan.lr, plan.momentum), phases)
    start = time.perf_counter()
    costs = [trainer.step(*train, counts[0]) / counts[0] for _ in range(plan.iterations)]
    seconds = time.perf_counter() - start
    ends = [trainer.evaluate(samples, count) for samples, count in zip((train, test), counts, strict=True)]
    return Run(costs, ends[0], ends[1], seconds, phases.seconds, model.weights[0])


def in_torch(world: World, splits: Sequence[mpi.Samples], plan: Plan) -> Run:
    """On torchpar's layers, by DistributedDataParallel where there are several ranks.

    Args:
        splits: training and test samples, on every rank.
    """
    phases = Phases(world.device)
    with phases("data"):
        shares = [[_share(world, t) for t in samples] for samples in splits]
    (x, labels), count = shares[0], len(splits[0].labels)
    model = MLP(plan.sizes, output="sigmoid").to(world.device)
    copy_weights(numpy_mlp.MLP(plan.sizes, seed=plan.seed), model)
    forward = DistributedDataParallel(model) if world.world_size > 1 else model
    step: Step = ReplicaStep(forward, world.world_size)
    if world.world_size > 1:
        step = WatchedStep(step, world)  # which tells collectives apart
    optimizer = torch.optim.SGD(model.parameters(), plan.lr, plan.momentum)
    bce, parts = partial(loss_sum, "bce"), []
    step.gradients(x, labels, count, bce, NoPhases())  # a GPU's kernels are compiled in the first call
    optimizer.zero_grad()
    start = time.perf_counter()
    for _ in range(plan.iterations):
        parts.append(step.gradients(x, labels, count, bce, phases))
        with phases("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
    costs = (world.sum(torch.stack(parts)) / count).tolist()
    seconds = time.perf_counter() - start
    ends = []
    for (x, labels), samples in zip(shares, splits, strict=True):
        with torch.no_grad():
            outputs = model(x)
        sums = torch.stack([bce(outputs, labels), (outputs.argmax(1) == labels).sum()])
        loss, accuracy = (world.sum(sums) / len(samples.labels)).tolist()
        ends.append((loss, accuracy))
    weight = next(model.parameters()).detach().cpu().numpy().T
    return Run(costs, ends[0], ends[1], seconds, phases.seconds, weight)


def _share(world: World, array: Array) -> Tensor:
    return world.share(len(array)).narrow(torch.from_numpy(array), 0).to(world.device)
