# SPDX-License-Identifier: MIT
"""Data parallelism without PyTorch: a NumPy network on processes that exchange arrays by MPI.

    mpirun -n 2 python examples/train_mpi.py

Each process draws the same weights and the same batches. It computes the gradient of its share of a batch.
Allreduce adds up the gradients, so all take the same step. The losses are those of one process.

A table at the end shows the time of each phase. A process waits for Allreduce, where DistributedDataParallel
computes on. With batches of 10 the messages cost more time than two processes save. Larger batches and layers
compute more for each message: ``--batch-size 128 --hidden 128 --lr 0.5``.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# NumPy reads it when it is imported. With a process per core each process needs one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from support import cli, console, plots

from torchpar.baselines import mpi
from torchpar.baselines.numpy_mlp import MLP, SGD, Array, batches
from torchpar.data import load
from torchpar.errors import ConfigError
from torchpar.profile.phases import Phases, phase
from torchpar.training import EpochResult


@dataclass(kw_only=True)
class Flags(cli.DataFlags):
    """Train a digit classifier in NumPy, by data parallelism over MPI."""

    epochs: int = 5  # Passes over the training samples.
    batch_size: int = 10  # Samples per step, over all processes.
    lr: float = 0.1  # Learning rate.
    momentum: float = 0.5  # Momentum.
    weight_decay: float = 1e-5  # L2 penalty λ of the weights: λ/2·‖W‖² in the loss.
    hidden: tuple[int, ...] = (30,)  # Widths of the hidden layers.
    samples: int | None = None  # Train on the first ones only.
    log_dir: Path | None = None  # Folder for TensorBoard: losses, accuracy and speed.


def shares(
    world: Any, x: Array, labels: Array, batch_size: int, order: np.random.Generator
) -> Iterator[tuple[Array, Array, int]]:
    """Yield this process's share of each batch of an epoch, perhaps an empty one, and the batch's size."""
    for batch in batches(len(x), batch_size, order):
        own = np.array_split(batch, world.size)[world.rank]
        yield x[own], labels[own], len(batch)


def main(flags: Flags) -> None:
    with mpi.join() as world:
        if flags.device == "cuda":
            raise ConfigError("--device cuda: NumPy computes on the CPU; train_ddp.py takes a GPU")
        train, test = load(flags.dataset, flags.data)
        train = train[: flags.samples]
        x, test_x = (samples.inputs(slice(None)).numpy() for samples in (train, test))
        labels, test_labels = (samples.labels.numpy() for samples in (train, test))
        own_test = [t[world.rank :: world.size] for t in (test_x, test_labels)]
        model = MLP([x.shape[1], *flags.hidden, len(test.classes)], seed=flags.seed)
        optimizer = SGD(model, flags.lr, flags.momentum, flags.weight_decay)
        order = np.random.default_rng(flags.seed)  # the same on all processes
        message = np.empty(model.parameters.size + 1, model.parameters.dtype)  # gradient and loss
        total = np.empty_like(message)
        results: list[EpochResult] = []
        epochs = console.progress(range(1, flags.epochs + 1), "epochs")  # of process 0, if it has a terminal
        with Phases(torch.device("cpu")) as phases:
            backward = phase("backward")(model.backward)
            allreduce = phase("collectives")(world.Allreduce)
            for epoch in epochs:
                start, train_loss = time.perf_counter(), 0.0
                drawn = shares(world, x, labels, flags.batch_size, order)
                for own_x, own_labels, global_size in phases.steps(drawn):
                    inputs, outputs = model.forward(own_x)
                    message[-1], delta = model.loss_sum(outputs, own_labels)
                    message[:-1] = backward(inputs, delta)
                    allreduce(message, total)
                    optimizer.step(total[:-1] / global_size)
                    train_loss += float(total[-1])
                speed = len(x) / (time.perf_counter() - start)
                test_loss, accuracy = mpi.evaluate(world, model, own_test, len(test))
                figures = (epoch, train_loss / len(x), test_loss, accuracy, speed)
                results.append(EpochResult(*figures, time.perf_counter() - start, world.size, "cpu"))
                if world.rank == 0:
                    print(console.epoch_line(results[-1], flags.epochs))
        if world.rank == 0:
            rows = [asdict(result) for result in results]
            console.write_metrics(flags.metrics, rows)
            console.write_log(flags.log_dir, rows, "epoch")
            if flags.plots:
                plots.save(flags.plots, results, torch.from_numpy(model.forward(test_x)[1]), test)
            console.print_phases(phases)
            print(console.summary(results))


if __name__ == "__main__":
    cli.main(main, Flags)
