# SPDX-License-Identifier: MIT
"""Full-batch descent of a small network in NumPy, on one process or on several by MPI.

    python examples/fashion_pooled.py
    mpirun -n 2 python examples/fashion_pooled.py

5000 images are pooled to 20 × 20. The network is 400-25-10 with sigmoids. The cost is the binary
cross-entropy of each class, summed over the classes and averaged over the samples:

    C = −1/n · Σ_samples Σ_classes [t·log p + (1 − t)·log(1 − p)]

Every iteration takes the gradient over all samples. The first run has the settings of a university project:
60 iterations at rate 0.1, after which the network has hardly begun to learn. The second run trains it. In
each iteration the processes exchange the gradient, 10 285 numbers for any number of samples.

``fashion_pooled_torch.py`` is the same exercise in PyTorch.
"""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

# NumPy reads it when it is imported. With a process per core each process needs one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from support import cli
from support.pooled import SIZES, Flags, Plan, Result, pooled, report

from torchpar.baselines import mpi
from torchpar.baselines.numpy_mlp import MLP, SGD
from torchpar.errors import ConfigError
from torchpar.parallel.launch.rendezvous import find_rank_info
from torchpar.profile.phases import Phases, timed


def train(world: Any, splits: Sequence[Any], counts: Sequence[int], plan: Plan) -> Result:
    """Train on the processes of an MPI communicator. Process 0 has the samples and scatters them once.

    Args:
        splits: training and test samples on process 0, None on the others.
        counts: the numbers of samples.
    """
    orders = [np.array_split(np.arange(count), world.size) for count in counts]
    model = MLP(SIZES, loss="bce", seed=plan.seed)  # the same on all processes
    optimizer = SGD(model, plan.lr, plan.momentum)
    own = np.empty(model.parameters.size + 1, model.parameters.dtype)  # gradient and cost of this share
    total = np.empty_like(own)
    costs = []
    with Phases(torch.device("cpu")) as phases:
        scatter = timed("data")(mpi.scatter)
        backward = timed("backward")(model.backward)
        allreduce = timed("collectives")(world.Allreduce)
        shares = [scatter(world, *pair) for pair in zip(splits, orders, strict=True)]
        (x, labels), count = shares[0], counts[0]
        start = time.perf_counter()
        for _ in range(plan.iterations):
            with phases.step():
                inputs, outputs = model.forward(x)
                own[-1], delta = model.loss_sum(outputs, labels)
                own[:-1] = backward(inputs, delta)
                allreduce(own, total)
                optimizer.step(total[:-1] / count)
            costs.append(float(total[-1]) / count)
        seconds = time.perf_counter() - start
    ends = [mpi.evaluate(world, model, *pair) for pair in zip(shares, counts, strict=True)]
    return Result(plan, costs, ends, seconds, phases.seconds, model.weights[0])


def main(flags: Flags) -> None:
    if flags.device == "cuda":
        raise ConfigError("--device cuda: NumPy computes on the CPU; fashion_pooled_torch.py takes a GPU")
    # One process needs no MPI.
    with mpi.join() if find_rank_info() else nullcontext(mpi.OneProcess()) as world:
        splits = pooled(flags) if world.rank == 0 else None
        counts = world.bcast([len(samples.labels) for samples in splits or ()])
        results = [train(world, splits or (None, None), counts, plan) for plan in flags.plans()]
        if world.rank == 0:
            report(flags, "NumPy", "cpu", world.size, results)


if __name__ == "__main__":
    cli.main(main, Flags)
