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

from support import cli
from support.session import Run, adjust_gradients, compile_model, make_optimizer, prepare
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchpar.nn import MLP
from torchpar.parallel import join_world
from torchpar.parallel.split.pipeline import Pipeline, PipelineSchedule, stage_mlp
from torchpar.profile.phases import phase


@dataclass(kw_only=True)
class Flags(cli.TrainFlags):
    """Train a digit classifier by pipeline parallelism."""

    pipeline: PipelineSchedule = "1f1b"
    """Order of the forward and backward passes."""
    micro_batches: int = 4
    """Parts into which a batch is cut."""


def loss_sum(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum")


def main(flags: Flags) -> None:
    with join_world(flags.device, flags.timeout) as world:
        world = world.with_mesh(pp=world.world_size)
        train, test, sizes = prepare(flags, world)
        # Every rank draws all weights, the same on all, and keeps the layers of its stage.
        stage = stage_mlp(MLP(sizes).to(world.device), world.mesh["pp"])
        if flags.compile:
            compile_model(stage, world)
        pipeline = Pipeline(stage, world, flags.pipeline, flags.micro_batches)
        optimizer, lr_scheduler = make_optimizer(flags, stage, len(train))

        def train_step(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
            # Forward and backward passes of all micro-batches. The first stage reads x, the last one labels.
            loss = pipeline.step(x, labels, global_size, loss_sum)
            with phase("optimizer"):
                adjust_gradients(flags, stage, world)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            return loss

        with Run(
            *(flags, world, stage, optimizer, lr_scheduler, train, test),
            predict=pipeline.predict,
            micro_batches=flags.micro_batches,
        ) as run:
            for epoch in run.epochs():
                for batch in run.batches(epoch):
                    run.log(train_step(*batch))


if __name__ == "__main__":
    cli.main(main, Flags)
