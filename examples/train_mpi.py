# SPDX-License-Identifier: MIT
"""Data parallelism without PyTorch: a NumPy network on processes that exchange arrays by MPI.

    mpirun -n 2 python examples/train_mpi.py

What DistributedDataParallel does is written out in `benchmarks.baselines.mpi`: process 0 broadcasts the
weights and scatters the samples; each process computes the gradient of its share of a batch; Allreduce adds
the gradients up, and all take the same step. So N processes see the losses that one would. What each phase
costs is printed at the end: MPI waits for a message, where DDP lets it travel during the backward pass.
Batches of 10 cost more in messages than two processes save; ``--batch-size 128 --hidden 128 --lr 0.5`` pays.
"""

import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Before NumPy is imported: a process per core, so a thread per process, unless it is told otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed

import numpy as np
import torch

from benchmarks.baselines import mpi
from benchmarks.baselines.numpy_mlp import MLP, SGD, Init
from torchpar import cli, report
from torchpar.data import Dataset, Samples, load
from torchpar.errors import ConfigError
from torchpar.parallel.world import World
from torchpar.phases import Phases
from torchpar.progress import EpochResult

CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Train a digit classifier in NumPy, by data parallelism over MPI."""

    data: Path = Path(__file__).parent / "data"
    """Folder of the data sets, as torchvision's root."""
    dataset: Dataset = "mnist"
    """What to learn."""
    epochs: int = 5
    """Passes over the training samples."""
    batch_size: int = 10
    """Samples per step, over all processes."""
    lr: float = 0.1
    """Learning rate."""
    momentum: float = 0.5
    """Momentum."""
    weight_decay: float = 1e-5
    """L2 penalty λ of the weights: λ/2·‖W‖² in the loss."""
    hidden: tuple[int, ...] = (30,)
    """Widths of the hidden layers."""
    init: Init = "xavier"
    """Initial weights; with zeros all neurons of a layer stay alike, and learn little."""
    samples: int | None = None
    """Train on the first ones only."""


def main(flags: Flags) -> None:
    with mpi.join() as world:
        if flags.device == "cuda":
            raise ConfigError("--device cuda: NumPy computes on the CPU; train_ddp.py takes a GPU")
        # To torchpar each process is alone: what connects them here is MPI.
        alone = World(world.rank, world.rank, world_size=1, device=CPU)

        def read() -> tuple[Samples, Samples]:
            report.prepare_outputs(alone, folders=[flags.plots], files=[flags.metrics])
            train, test = load(flags.dataset, flags.data, alone)
            return train[: flags.samples], test

        loaded = mpi.on_rank_0(world, read)
        sizes, n_train, n_test = world.bcast(loaded and describe(*loaded, flags.hidden))
        train, test = map(bytes_of, loaded) if loaded else (None, None)

        model = MLP(sizes, init=flags.init, seed=flags.seed)
        optimizer = SGD(model, flags.lr, flags.momentum, flags.weight_decay)
        phases = Phases(CPU, dict.fromkeys(mpi.PHASES, 0.0))
        trainer = mpi.Trainer(world, model, optimizer, phases)
        own_test = mpi.scatter(world, test, np.array_split(np.arange(n_test), world.size))
        order = np.random.default_rng(flags.seed)
        results = []
        with report.reporting(alone, flags.epochs, n_train, flags.metrics) as shown:
            for epoch in range(1, flags.epochs + 1):
                start = time.perf_counter()
                on_step = partial(shown.step, epoch)
                train_loss = trainer.epoch(train, n_train, flags.batch_size, order, on_step)
                training = time.perf_counter() - start
                test_loss, accuracy = trainer.evaluate(own_test, n_test)
                seconds = time.perf_counter() - start
                speed = n_train / training
                results.append(
                    EpochResult(epoch, train_loss, test_loss, accuracy, speed, seconds, world.size, "cpu")
                )
                shown.epoch(results[-1])
        if loaded and test:
            if flags.plots:
                from torchpar import plots

                outputs = model.forward(mpi.inputs(test.x))[1]
                plots.save(flags.plots, results, torch.from_numpy(outputs), loaded[1])
            report.print_phases(phases)
            print(report.summary(results))


def describe(train: Samples, test: Samples, hidden: tuple[int, ...]) -> tuple[list[int], int, int]:
    """The network's sizes, and how many samples there are."""
    return [train.images[0].numel(), *hidden, len(train.classes)], len(train), len(test)


def bytes_of(samples: Samples) -> mpi.Samples:
    """The images as rows of bytes."""
    return mpi.Samples(samples.images.flatten(1).numpy(), samples.labels.numpy())


if __name__ == "__main__":
    cli.main(main, Flags)
