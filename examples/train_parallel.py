# SPDX-License-Identifier: MIT
"""Data, tensor and pipeline parallelism at once: dp × tp × pp ranks as a mesh.

    torchrun --nproc_per_node=4 examples/train_parallel.py --dp 2 --tp 2

The model is split by tensors first, then cut into stages, then copied: each rank is one of tp slices of
one of pp stages of one of dp replicas. What travels stays within one dimension of the mesh: activations
among the tp ranks of a stage, borders between neighbouring stages, gradients among replicas.

With ``--reduction invariant`` a run has the same bits on 1, 2 and 4 ranks of every dp × tp mesh.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from torchpar import cli
from torchpar.nn import MLP
from torchpar.parallel.mlp import parallel_mlp
from torchpar.parallel.pipeline import PipelineStep, Schedule, stage_mlp
from torchpar.parallel.reduction import Reduction
from torchpar.parallel.step import InvariantStep, ReplicaStep
from torchpar.parallel.world import World, join_world
from torchpar.script import Spread, train


@dataclass(kw_only=True)
class Flags(cli.TrainFlags):
    """Train a digit classifier on a mesh of ranks."""

    dp: int | None = None
    """Ranks that share each batch; by default what --tp and --pp leave."""
    tp: int = 1
    """Ranks that share each layer."""
    pp: int = 1
    """Stages of a pipeline."""
    pipeline: Schedule = "1f1b"
    """Order of a pipeline's forward and backward passes."""
    micro_batches: int = 4
    """Parts into which a pipeline cuts a replica's share of a batch."""
    reduction: Reduction = "fast"
    """How sums over ranks are made: fast, or with the same bits on every mesh."""
    data: Path = Path(__file__).parent / "data"
    """Folder of the data sets, as torchvision's root."""


def main(flags: Flags) -> None:
    with join_world(flags.device, flags.timeout) as world:
        dp = flags.dp or max(world.world_size // (flags.tp * flags.pp), 1)
        world = world.split(dp=dp, tp=flags.tp, pp=flags.pp, reduction=flags.reduction)
        train(flags, world, lambda mlp: spread(mlp, flags, world))


def spread(mlp: MLP, flags: Flags, world: World) -> Spread:
    assert world.mesh is not None
    model = stage_mlp(parallel_mlp(mlp, world.mesh["tp"], flags.reduction), world.mesh["pp"])
    if flags.compile:
        model.compile()
    if flags.reduction == "invariant":
        return Spread(model, InvariantStep(model, world))
    forward: torch.nn.Module = model
    if world.data_ranks > 1:
        # Among the replicas of this rank's slice of its stage.
        forward = DistributedDataParallel(
            model, process_group=world.mesh["dp"].get_group(), gradient_as_bucket_view=True
        )
    if flags.pp == 1:
        return Spread(model, ReplicaStep(forward, world.data_ranks))
    step = PipelineStep(forward, world, flags.pipeline, flags.micro_batches)
    return Spread(model, step, flags.micro_batches)


if __name__ == "__main__":
    cli.main(main, Flags)
