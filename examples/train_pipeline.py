# SPDX-License-Identifier: MIT
"""Pipeline parallelism: every rank holds some consecutive layers.

    torchrun --nproc_per_node=2 examples/train_pipeline.py

The batch is cut into micro-batches. While the second stage works on the first micro-batch, the first
stage works on the second, and so on; backward passes flow the other way. With p stages and m micro-batches
each rank is idle for a share (p − 1)/(m + p − 1) of a step, at its beginning and its end:

    rank 0   F0 F1 F2 F3 ·  ·  B0 B1 B2 B3
    rank 1   ·  F0 F1 F2 F3 B0 B1 B2 B3 ·        gpipe: all forward passes, then all backward

    rank 0   F0 F1 ·  B0 F2 B1 F3 B2 ·  B3
    rank 1   ·  F0 B0 F1 B1 F2 B2 F3 B3 ·        1f1b: a backward pass as soon as there is one

Both take the same time; 1f1b keeps the activations of at most p micro-batches in the place of m. Only
neighbours talk: one micro-batch's activations at the border forward, their gradient backward. The sums
are those of one process that adds up the micro-batches' gradients, bit for bit.
"""

from dataclasses import dataclass
from pathlib import Path

from torchpar import cli
from torchpar.nn import MLP
from torchpar.parallel.pipeline import PipelineStep, Schedule, stage_mlp
from torchpar.parallel.world import join_world
from torchpar.script import Spread, train


@dataclass(kw_only=True)
class Flags(cli.TrainFlags):
    """Train a digit classifier by pipeline parallelism."""

    pipeline: Schedule = "1f1b"
    """Order of the forward and backward passes."""
    micro_batches: int = 4
    """Parts into which a batch is cut."""
    data: Path = Path(__file__).parent / "data"
    """Folder of the data sets, as torchvision's root."""


def main(flags: Flags) -> None:
    with join_world(flags.device, flags.timeout) as world:
        world = world.split(pp=world.world_size)
        assert world.mesh is not None
        mesh = world.mesh["pp"]

        def spread(mlp: MLP) -> Spread:
            stage = stage_mlp(mlp, mesh)
            if flags.compile:
                stage.compile()
            step = PipelineStep(stage, world, flags.pipeline, flags.micro_batches)
            return Spread(stage, step, flags.micro_batches)

        train(flags, world, spread)


if __name__ == "__main__":
    cli.main(main, Flags)
