# SPDX-License-Identifier: MIT
"""Train the NumPy network for an epoch: ``mpirun -n 2 python -m benchmarks.train.mpi_epoch``.

Process 0 prints the seconds and the mean loss as JSON.
"""

import json
import os
import sys
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is imported: a thread per process

import numpy as np

from benchmarks.timing import time_calls
from benchmarks.train.inputs import LR, Training, TrainingInputs
from torchpar.baselines import mpi
from torchpar.baselines.numpy_mlp import MLP, SGD


def train(world: Any, train: mpi.Samples | None, size: int, model: MLP, batch_size: int) -> float:
    """Train on each of ``size`` samples once; the mean loss."""
    optimizer = SGD(model, LR)
    own = np.empty(model.parameters.size + 1, model.parameters.dtype)  # gradient and loss
    total = np.empty_like(own)
    loss = 0.0
    batches = mpi.scatter_batches(world, train, size, batch_size, np.random.default_rng(0))
    for x, labels, global_size in batches:
        own[-1], own[:-1] = model.gradients(mpi.scale_pixels(x), labels)
        world.Allreduce(own, total)
        optimizer.step(total[:-1] / global_size)
        loss += float(total[-1])
    return loss / size


def main(sizes: list[int], batch_size: int, size: int) -> None:
    with mpi.join() as world:
        samples = None
        if world.rank == 0:
            inputs = TrainingInputs(Training(tuple(sizes), batch_size, size))
            samples = mpi.Samples(inputs.train.features.flatten(1).numpy(), inputs.labels)
        model = MLP(tuple(sizes), seed=0)
        world.Bcast(model.parameters)
        timed = time_calls(lambda: train(world, samples, size, model, batch_size))
        if world.rank == 0:
            print(json.dumps({"seconds": timed.seconds(), "loss": timed.result}))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
