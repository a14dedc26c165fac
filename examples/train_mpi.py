# SPDX-License-Identifier: MIT
"""Data parallelism without PyTorch: a NumPy network on processes that exchange arrays by MPI.

    mpirun -n 2 python examples/train_mpi.py

Process 0 broadcasts the weights and scatters the samples. Each process computes the gradient of its share of
a batch. Allreduce adds up the gradients, so all take the same step. The losses are those of one process.

A table at the end shows the time of each phase. A process waits for Allreduce, where DistributedDataParallel
computes on. With batches of 10 the messages cost more time than two processes save. Larger batches and layers
compute more for each message: ``--batch-size 128 --hidden 128 --lr 0.5``.
"""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

# NumPy reads it when it is imported. With a process per core each process needs one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from support import cli, console, plots

from torchpar.baselines import mpi
from torchpar.baselines.numpy_mlp import MLP, SGD
from torchpar.data import Samples, load
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


def main(flags: Flags) -> None:
    with mpi.join() as world:
        if flags.device == "cuda":
            raise ConfigError("--device cuda: NumPy computes on the CPU; train_ddp.py takes a GPU")
        loaded = load(flags.dataset, flags.data) if world.rank == 0 else None
        train, test, shape = None, None, None
        if loaded:
            train, test = as_arrays(loaded[0][: flags.samples]), as_arrays(loaded[1])
            sizes = [train.x.shape[1], *flags.hidden, len(loaded[1].classes)]
            shape = sizes, len(train.x), len(test.x)
        sizes, n_train, n_test = world.bcast(shape)
        own_test = mpi.scatter(world, test, np.array_split(np.arange(n_test), world.size))

        model = MLP(sizes, seed=flags.seed)
        world.Bcast(model.parameters)
        optimizer = SGD(model, flags.lr, flags.momentum, flags.weight_decay)
        order = np.random.default_rng(flags.seed)
        message = np.empty(model.parameters.size + 1, model.parameters.dtype)  # gradient and loss
        total = np.empty_like(message)
        results: list[EpochResult] = []
        epochs = console.progress(range(1, flags.epochs + 1), "epochs")  # of process 0, if it has a terminal
        with Phases(torch.device("cpu")) as phases:
            scatter = phase("data")(mpi.scatter_batches)
            backward = phase("backward")(model.backward)
            allreduce = phase("collectives")(world.Allreduce)
            for epoch in epochs:
                start, train_loss = time.perf_counter(), 0.0
                batches = scatter(world, train, n_train, flags.batch_size, order)
                for x, labels, global_size in phases.steps(batches):
                    inputs, outputs = model.forward(mpi.scale_pixels(x))
                    message[-1], delta = model.loss_sum(outputs, labels)
                    message[:-1] = backward(inputs, delta)
                    allreduce(message, total)
                    optimizer.step(total[:-1] / global_size)
                    train_loss += float(total[-1])
                speed = n_train / (time.perf_counter() - start)
                test_loss, accuracy = mpi.evaluate(world, model, own_test, n_test)
                figures = (epoch, train_loss / n_train, test_loss, accuracy, speed)
                results.append(EpochResult(*figures, time.perf_counter() - start, world.size, "cpu"))
                if world.rank == 0:
                    print(console.epoch_line(results[-1], flags.epochs))
        if loaded and test:
            rows = [asdict(result) for result in results]
            console.write_metrics(flags.metrics, rows)
            console.write_log(flags.log_dir, rows, "epoch")
            if flags.plots:
                outputs = model.forward(mpi.scale_pixels(test.x))[1]
                plots.save(flags.plots, results, torch.from_numpy(outputs), loaded[1])
            console.print_phases(phases)
            print(console.summary(results))


def as_arrays(samples: Samples) -> mpi.Samples:
    """Return the images as rows of bytes: a message of bytes is a quarter of one of float32."""
    return mpi.Samples(samples.features.flatten(1).numpy(), samples.labels.numpy())


if __name__ == "__main__":
    cli.main(main, Flags)
