# SPDX-License-Identifier: MIT
"""The training loop of the lessons, for tests."""

from typing import Any

from support.learning_rate import LRSchedule, lr_scheduler

import torch
from torch.optim import Optimizer

from torchpar.data import Samples
from torchpar.parallel.launch.world import World
from torchpar.training import Classification, Run
from torchpar.training.classification import cross_entropy_sum


def train(
    model: torch.nn.Module,
    optimizer: Optimizer,
    world: World,
    samples: Samples,
    test: Samples,
    *,
    epochs: int,
    batch_size: int,
    replica: torch.nn.Module | None = None,
    schedule: LRSchedule | None = "linear",
    **options: Any,
) -> Run:
    """Train by a plain loop and return its `torchpar.training.Run`.

    Args:
        replica: the wrapper of ``model`` that averages gradients over ranks.
        options: of `torchpar.training.Run` and `torchpar.training.Classification`.
    """
    steps = epochs * -(-len(samples) // batch_size)
    scheduler = lr_scheduler(optimizer, schedule, steps) if schedule else None
    own = {name: options.pop(name) for name in ("predict", "loss", "seed") if name in options}
    task = Classification(samples, test, batch_size, **own)
    with Run(model, optimizer, scheduler, world, task, epochs=epochs, **options) as run:
        run.resume()
        for epoch in run.epochs():
            for x, labels, global_size in run.batches(epoch):
                total = cross_entropy_sum((replica or model)(x), labels)
                (total * (world.dp_size / global_size)).backward()
                optimizer.step()
                if scheduler:
                    scheduler.step()
                optimizer.zero_grad()
                run.end_step(loss_sum=total)
            run.end_epoch()
    return run
