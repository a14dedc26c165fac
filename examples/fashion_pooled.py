# SPDX-License-Identifier: MIT
"""Full-batch descent of a small network in NumPy or in PyTorch, on one process or on several.

    python examples/fashion_pooled.py
    mpirun -n 2 python examples/fashion_pooled.py
    torchrun --nproc_per_node=2 examples/fashion_pooled.py --library torch

5000 images are pooled to 20 × 20. The network is 400-25-10 with sigmoids. The cost is the binary
cross-entropy of each class, summed over the classes and averaged over the samples:

    C = −1/n · Σ_samples Σ_classes [t·log p + (1 − t)·log(1 − p)]

Every iteration takes the gradient over all samples. The first run has the settings of a university project:
60 iterations at rate 0.1, after which the network has hardly begun to learn. The second run trains it. The
project took Fashion-MNIST, as ``--dataset fashion-mnist`` does. In
each iteration the processes exchange the gradient, 10 285 numbers for any number of samples. Both libraries
start from the same weights. With PyTorch ``--device cuda`` takes a GPU.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

# NumPy reads it when it is imported. With a process per core each process needs one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from support import cli, console, plots
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, binary_cross_entropy, one_hot
from torch.nn.parallel import DistributedDataParallel

from torchpar.baselines import mpi, numpy_mlp
from torchpar.data import Samples, load
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel import World, join_world
from torchpar.training import evaluate

SIZES = (400, 25, 10)


@dataclass(kw_only=True)
class Flags(cli.DataFlags):
    """Train a small network on pooled images by full-batch descent."""

    library: Literal["numpy", "torch"] = "numpy"  # Library that computes.
    samples: int = 5000  # Number of training images, the first ones.
    iterations: int = 800  # Iterations of the second run.
    lr: float = 0.1  # Learning rate of the second run.
    momentum: float = 0.9  # Momentum of the second run.


class Plan(NamedTuple):
    """Settings of a run: full-batch steps of SGD, and the seed of the first weights."""

    iterations: int
    lr: float
    momentum: float
    seed: int


class Result(NamedTuple):
    """Figures of a run."""

    costs: list[float]  # of each iteration, before its step
    ends: Sequence[Sequence[float]]  # mean cost and accuracy at the end, on training and on test samples
    seconds: float  # of all iterations
    weights: numpy_mlp.Array  # of the first layer, (400, 25)


def pooled(flags: Flags) -> list[Samples]:
    """Return the training and test images: rows of 400 numbers in [0, 1], and their labels."""
    train, test = load(flags.dataset, flags.data)
    return [
        replace(samples, features=adaptive_avg_pool2d(samples.features / 255, 20).flatten(1))
        for samples in (train[: flags.samples], test)
    ]


def train_numpy(world: Any, splits: Sequence[Samples], plan: Plan) -> Result:
    """Train on the processes of an MPI communicator, each of which has all samples and takes its share."""
    shares = [
        [np.array_split(t.numpy(), world.size)[world.rank] for t in (one.features, one.labels)]
        for one in splits
    ]
    (x, labels), count = shares[0], len(splits[0])
    model = numpy_mlp.MLP(SIZES, loss="bce", seed=plan.seed)  # the same on all processes
    optimizer = numpy_mlp.SGD(model, plan.lr, plan.momentum)
    own = np.empty(model.parameters.size + 1, model.parameters.dtype)  # gradient and cost of this share
    total = np.empty_like(own)
    costs = []
    start = time.perf_counter()
    for _ in range(plan.iterations):
        inputs, outputs = model.forward(x)
        own[-1], delta = model.loss_sum(outputs, labels)
        own[:-1] = model.backward(inputs, delta)
        world.Allreduce(own, total)
        optimizer.step(total[:-1] / count)
        costs.append(float(total[-1]) / count)
    seconds = time.perf_counter() - start
    ends = [mpi.evaluate(world, model, *pair) for pair in zip(shares, map(len, splits), strict=True)]
    return Result(costs, ends, seconds, model.weights[0])


def cost_sum(p: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy of the probabilities ``p (b, classes)``, summed over both."""
    return binary_cross_entropy(p, one_hot(labels, p.shape[-1]).to(p), reduction="sum")


def train_torch(world: World, splits: Sequence[Samples], plan: Plan) -> Result:
    """Train on all ranks by DistributedDataParallel, from the weights of `train_numpy`."""
    model = MLP(SIZES, output="sigmoid").to(world.device)
    numpy_mlp.MLP(SIZES, seed=plan.seed).copy_to(model)
    replica = DistributedDataParallel(model) if world.world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), plan.lr, plan.momentum)
    costs = torch.zeros(plan.iterations, device=world.device)
    train, test = (samples.to(world.device) for samples in splits)
    x, labels = map(world.share, (train.features, train.labels))
    cost_sum(replica(x), labels).backward()  # a GPU's kernels are compiled in the first call
    optimizer.zero_grad()
    start = time.perf_counter()
    for i in range(plan.iterations):
        loss = cost_sum(replica(x), labels)
        (loss * (world.dp_size / len(train))).backward()  # the wrapper averages over the ranks
        optimizer.step()
        optimizer.zero_grad()
        costs[i] = loss.detach()
    costs = world.sum(costs) / len(train)
    seconds = time.perf_counter() - start
    ends = []
    for samples in (train, test):
        cost, p = evaluate(model, samples, world, cost_sum)
        ends.append((cost, (p.argmax(1) == samples.labels).double().mean().item()))
    weights = next(model.parameters()).detach().cpu().numpy().T
    return Result(costs.tolist(), ends, seconds, weights)


def report(flags: Flags, device: str, ranks: int, runs: dict[Plan, Result]) -> None:
    """Print the figures of the runs, and write the metrics and plots that the flags ask for."""
    rows: list[dict[str, Any]] = []
    for plan, (costs, (train, test), seconds, _) in runs.items():
        figures = {"first_cost": costs[0], "last_cost": costs[-1], "train_accuracy": train[1]}
        figures |= {"test_loss": test[0], "test_accuracy": test[1], "seconds": seconds}
        rows.append(plan._asdict() | figures | {"library": flags.library, "ranks": ranks})
    console.print_rows(rows, ("iterations", "lr", "momentum", "last_cost", "train_accuracy", "test_accuracy"))
    console.write_metrics(flags.metrics, rows)
    if flags.plots:
        curves = {f"rate {plan.lr:g}, momentum {plan.momentum:g}": run.costs for plan, run in runs.items()}
        plots.save_curves(flags.plots / "costs.png", curves, "iteration", "cost")
        neurons = torch.from_numpy(runs[plan].weights.T.reshape(-1, 20, 20))
        plots.save_matrices(flags.plots / "neurons.png", neurons, "Weights of each hidden neuron")
    print(console.last_line(test[1], test[0], seconds, ranks, device))


def main(flags: Flags) -> None:
    if flags.library == "numpy" and flags.device == "cuda":
        raise ConfigError("--device cuda: NumPy computes on the CPU; --library torch takes a GPU")
    plans = Plan(60, 0.1, 0.0, flags.seed), Plan(flags.iterations, flags.lr, flags.momentum, flags.seed)
    splits = pooled(flags)
    if flags.library == "torch":
        with join_world(flags.device) as world:
            runs = {plan: train_torch(world, splits, plan) for plan in plans}
            if world.rank == 0:
                report(flags, world.device.type, world.world_size, runs)
        return
    with mpi.join() as processes:
        runs = {plan: train_numpy(processes, splits, plan) for plan in plans}
        if processes.rank == 0:
            report(flags, "cpu", processes.size, runs)


if __name__ == "__main__":
    cli.main(main, Flags)
