# SPDX-License-Identifier: MIT
"""Full-batch descent of a small network in PyTorch: on one process, by DistributedDataParallel, or on a GPU.

    python examples/fashion_pooled_torch.py
    torchrun --nproc_per_node=2 examples/fashion_pooled_torch.py
    python examples/fashion_pooled_torch.py --device cuda

This is the exercise of ``fashion_pooled.py``, from the same first weights. Each rank has a share of the
samples. In the backward pass the wrapper averages the gradients over the ranks.
"""

import os
import time
from collections.abc import Sequence

# Read when NumPy and PyTorch are imported. With a process per core each process needs one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from support import cli
from support.pooled import SIZES, Flags, Plan, Result, pooled, report
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from torchpar.baselines import numpy_mlp
from torchpar.baselines.mpi import Samples
from torchpar.nn import MLP
from torchpar.parallel import World, join_world
from torchpar.profile.collectives import Collectives
from torchpar.profile.phases import Phases
from torchpar.training import loss_sum


def train(world: World, splits: Sequence[Samples], plan: Plan) -> Result:
    """Train on all ranks; ``splits`` are all training and test samples."""
    model = MLP(SIZES, output="sigmoid").to(world.device)
    numpy_mlp.MLP(SIZES, seed=plan.seed).copy_to(model)
    replica = DistributedDataParallel(model) if world.world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), plan.lr, plan.momentum)
    costs = torch.zeros(plan.iterations, device=world.device)
    with Phases(world.device) as phases:
        with phases.measure("data"):
            shares = [[share(world, array) for array in split] for split in splits]
        (x, labels), count = shares[0], len(splits[0].labels)
        loss_sum("bce", replica(x), labels).backward()  # a GPU's kernels are compiled in the first call
        optimizer.zero_grad()
        start = time.perf_counter()
        for i in range(plan.iterations):
            with Collectives(world), phases.step():
                loss = loss_sum("bce", replica(x), labels)
                (loss * (world.dp_size / count)).backward()  # the wrapper averages over the ranks
                optimizer.step()
                optimizer.zero_grad()
            costs[i] = loss.detach()
        costs = world.sum(costs) / count
        seconds = time.perf_counter() - start
    ends = [evaluate(world, model, *pair) for pair in zip(shares, splits, strict=True)]
    weight = next(model.parameters()).detach().cpu().numpy().T
    return Result(plan, costs.tolist(), ends, seconds, phases.seconds, weight)


def share(world: World, array: numpy_mlp.Array) -> Tensor:
    """Return this rank's rows of ``array`` on its device."""
    return world.share(len(array)).narrow(torch.from_numpy(array), 0).to(world.device)


@torch.no_grad()
def evaluate(world: World, model: MLP, own: Sequence[Tensor], split: Samples) -> list[float]:
    """Return the mean cost and the accuracy on ``split``, of which this rank has ``own``."""
    x, labels = own
    p = model(x)
    sums = world.sum(torch.stack([loss_sum("bce", p, labels), (p.argmax(1) == labels).sum()]))
    cost, accuracy = (sums / len(split.labels)).tolist()
    return [cost, accuracy]


def main(flags: Flags) -> None:
    with join_world(flags.device) as world:
        splits = pooled(flags)
        results = [train(world, splits, plan) for plan in flags.plans()]
        if world.rank == 0:
            report(flags, "PyTorch", world.device.type, world.world_size, results)


if __name__ == "__main__":
    cli.main(main, Flags)
