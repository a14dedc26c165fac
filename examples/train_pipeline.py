# SPDX-License-Identifier: MIT
"""Pipeline parallelism: every rank holds consecutive layers.

    torchrun --nproc_per_node=2 examples/train_pipeline.py

The batch is cut into micro-batches. While the second stage works on the first micro-batch, the first stage
works on the second one. Backward passes flow the other way. With p stages and m micro-batches each rank is
idle for a share (p − 1)/(m + p − 1) of a step, shown as dots:

    rank 0   F0 F1 F2 F3 ·  ·  B0 B1 B2 B3
    rank 1   ·  F0 F1 F2 F3 B0 B1 B2 B3 ·        gpipe: all forward passes, then all backward passes

    rank 0   F0 F1 ·  B0 F2 B1 F3 B2 ·  B3
    rank 1   ·  F0 B0 F1 B1 F2 B2 F3 B3 ·        1f1b: each backward pass as soon as possible

Both take the same time. 1f1b keeps the activations of at most p micro-batches, gpipe those of m. Only
neighbours communicate: the activations of a micro-batch forward, their gradients backward. The gradients
equal, bit for bit, those of one process that adds up the gradients of the micro-batches.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from support import cli, session
from support.log import Log
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from torchpar import training
from torchpar.nn import MLP
from torchpar.parallel import join_world
from torchpar.parallel.split.pipeline import Pipeline, PipelineSchedule, stage_mlp
from torchpar.training import Run


@dataclass(kw_only=True)
class Flags(cli.TrainFlags):
    """Train a digit classifier by pipeline parallelism."""

    optimizer: Literal["sgd", "muon"] = "sgd"
    pipeline: PipelineSchedule = "1f1b"
    """Order of the forward and backward passes."""
    micro_batches: int = 4
    """Parts into which a batch is cut."""


def loss_sum(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum")


def make_optimizer(flags: Flags, stage: MLP) -> Optimizer:
    if flags.optimizer == "sgd":
        return training.sgd(stage, **flags.optimizer_options(lr=0.5, momentum=0.9, weight_decay=3e-5))
    return training.muon(stage, **flags.optimizer_options(lr=0.02, momentum=0.95, weight_decay=0.01))


def main(flags: Flags) -> None:
    with join_world(flags.device, flags.timeout) as world:
        world = world.with_mesh(pp=world.world_size)
        train, test = session.load(flags, world)
        torch.manual_seed(flags.seed)
        # Every rank draws all weights, the same on all, and keeps the layers of its stage.
        stage = stage_mlp(MLP(flags.layer_sizes(train)).to(world.device), world.mesh["pp"])
        if flags.compile:
            stage.compile()
        pipeline = Pipeline(stage, world, flags.pipeline, flags.micro_batches)
        optimizer = make_optimizer(flags, stage)
        lr_scheduler = training.lr_scheduler(optimizer, flags.schedule, flags.total_steps(train))

        parts = (stage, optimizer, lr_scheduler, world, train, test)
        log = Log(flags, world, micro_batches=flags.micro_batches)
        with Run(*parts, predict=pipeline.predict, log=log, **flags.run_options()) as run:
            for epoch in run.epochs():
                for x, labels, global_size in run.batches(epoch):
                    # The first stage reads x, the last one labels.
                    loss = pipeline.step(x, labels, global_size, loss_sum)
                    session.adjust_gradients(flags, stage, world)  # --clip and --orthogonality
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
                    run.log(loss)


if __name__ == "__main__":
    cli.main(main, Flags)
