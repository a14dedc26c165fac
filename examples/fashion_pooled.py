# SPDX-License-Identifier: MIT
"""Full-batch descent of a small network: NumPy, NumPy with MPI, PyTorch, DDP, and a GPU.

    python examples/fashion_pooled.py                                # NumPy, one process
    mpirun -n 2 python examples/fashion_pooled.py                    # NumPy, MPI
    torchrun --nproc_per_node=2 examples/fashion_pooled.py           # PyTorch, DDP
    python examples/fashion_pooled.py --engine torch --device cuda   # PyTorch, a GPU

5000 images are pooled to 20 × 20. The network is 400-25-10 with sigmoids. The cost is the binary
cross-entropy of each class, summed over the classes and averaged over the samples:

    C = −1/n · Σ_samples Σ_classes [t·log p + (1 − t)·log(1 − p)]

Every iteration takes the gradient over all samples. The first run has the settings of a university project:
60 iterations at rate 0.1, after which the network has hardly begun to learn. The second run trains it. In
each iteration the processes exchange the gradient, 10 285 numbers for any number of samples.
"""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

# NumPy reads it when it is imported. With a process per core each process needs one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from support import cli
from support.pooled import SIZES, Plan, PooledFlags, Result, prepare, report
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from torchpar.baselines import mpi, numpy_mlp
from torchpar.baselines.bridge import copy_weights
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel import World, join_world
from torchpar.parallel.launch.rendezvous import find_rank_info
from torchpar.profile.collectives import Collectives
from torchpar.profile.phases import Phases, phase
from torchpar.training import loss_sum


@dataclass(kw_only=True)
class Flags(PooledFlags):
    """Train a small network on pooled images by full-batch descent."""

    iterations: int = 800  # Iterations of the second run.
    lr: float = 0.1  # Learning rate of the second run.
    momentum: float = 0.9  # Momentum of the second run.
    # Library that computes; auto takes PyTorch under torchrun and with --device cuda, else NumPy.
    engine: Literal["auto", "numpy", "torch"] = "auto"


def train_numpy(world: Any, splits: Sequence[Any], counts: Sequence[int], plan: Plan) -> Result:
    """Train on the processes of an MPI communicator. Process 0 has the samples and scatters them once."""
    orders = [np.array_split(np.arange(count), world.size) for count in counts]
    model = numpy_mlp.MLP(SIZES, loss="bce", seed=plan.seed)  # the same on all processes
    optimizer = numpy_mlp.SGD(model, plan.lr, plan.momentum)
    message = np.empty(model.parameters.size + 1, model.parameters.dtype)  # gradient and cost
    total = np.empty_like(message)
    costs = []
    with Phases(torch.device("cpu")) as phases:
        with phase("data"):
            shares = [mpi.scatter(world, *pair) for pair in zip(splits, orders, strict=True)]
        (x, labels), count = shares[0], counts[0]
        start = time.perf_counter()
        for _ in range(plan.iterations):
            with phase("forward"):
                inputs, outputs = model.forward(x)
                message[-1], delta = model.loss_sum(outputs, labels)
            with phase("backward"):
                message[:-1] = model.backward(inputs, delta)
            with phase("collectives"):
                world.Allreduce(message, total)
            with phase("optimizer"):
                optimizer.step(total[:-1] / count)
            costs.append(float(total[-1]) / count)
        seconds = time.perf_counter() - start
    ends = [mpi.evaluate(world, model, *pair) for pair in zip(shares, counts, strict=True)]
    return Result(plan, costs, ends, seconds, phases.seconds, model.weights[0])


def train_torch(world: World, splits: Sequence[mpi.Samples], plan: Plan) -> Result:
    """Train by torchpar's layers, by DistributedDataParallel on several ranks."""
    model = MLP(SIZES, output="sigmoid").to(world.device)
    copy_weights(numpy_mlp.MLP(SIZES, seed=plan.seed), model)
    replica = DistributedDataParallel(model) if world.world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), plan.lr, plan.momentum)
    costs = torch.zeros(plan.iterations, device=world.device)
    with Phases(world.device) as phases:
        with phase("data"):
            shares = [[share(world, array) for array in split] for split in splits]
        (x, labels), count = shares[0], len(splits[0].labels)
        loss_sum("bce", replica(x), labels).backward()  # a GPU's kernels are compiled in the first call
        optimizer.zero_grad()
        start = time.perf_counter()
        for i in range(plan.iterations):
            with Collectives(world):
                with phase("forward"):
                    loss = loss_sum("bce", replica(x), labels)
                with phase("backward"):
                    (loss * (world.dp_size / count)).backward()  # the wrapper averages over the ranks
                with phase("optimizer"):
                    optimizer.step()
                    optimizer.zero_grad()
            costs[i] = loss.detach()
        costs = world.sum(costs) / count
        seconds = time.perf_counter() - start
    ends = []
    for (x, labels), split in zip(shares, splits, strict=True):
        p = model(x).detach()
        sums = world.sum(torch.stack([loss_sum("bce", p, labels), (p.argmax(1) == labels).sum()]))
        ends.append((sums / len(split.labels)).tolist())
    weight = next(model.parameters()).detach().cpu().numpy().T
    return Result(plan, costs.tolist(), ends, seconds, phases.seconds, weight)


def share(world: World, array: numpy_mlp.Array) -> Tensor:
    """Return this rank's rows of ``array`` on its device."""
    return world.share(len(array)).narrow(torch.from_numpy(array), 0).to(world.device)


def main(flags: Flags) -> None:
    plans = [Plan(60, 0.1, 0.0, flags.seed), Plan(flags.iterations, flags.lr, flags.momentum, flags.seed)]
    info = find_rank_info()
    by_torchrun = info is not None and info.launcher in ("torchrun", "env")
    if flags.engine == "torch" or (flags.engine == "auto" and (by_torchrun or flags.device == "cuda")):
        with join_world(flags.device) as world:
            splits: list[mpi.Samples] = []
            world.gather_results(lambda: splits.extend(prepare(flags)))  # raises on all ranks alike
            results = [train_torch(world, splits, plan) for plan in plans]
            if world.rank == 0:
                report(flags, "PyTorch", world.device.type, world.world_size, results)
        return
    if by_torchrun or flags.device == "cuda":
        raise ConfigError("--engine numpy computes on CPUs, alone or under mpirun; take --engine torch")
    with mpi.join() if info else nullcontext(mpi.OneProcess()) as comm:
        found = mpi.on_rank_0(comm, lambda: prepare(flags))
        counts = comm.bcast([len(samples.labels) for samples in found or ()])
        results = [train_numpy(comm, found or (None, None), counts, plan) for plan in plans]
        if comm.rank == 0:
            report(flags, "NumPy", "cpu", comm.size, results)


if __name__ == "__main__":
    cli.main(main, Flags)
