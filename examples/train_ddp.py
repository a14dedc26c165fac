# SPDX-License-Identifier: MIT
"""Data parallelism: every rank holds the whole model and takes a share of each batch.

    torchrun --nproc_per_node=2 examples/train_ddp.py

The ranks start from the same weights, because each draws them from the same seed. In every step a rank
computes the gradient of its own samples; DistributedDataParallel averages the gradients over the ranks
while the backward pass is still running; and so all of them take the same step. Two ranks compute what
one would, in about half the time once the work of a step outweighs the exchange of gradients.

Without torchrun, ``python examples/train_ddp.py``, there is one process and nothing to exchange.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from torchpar import cli
from torchpar.nn import MLP
from torchpar.parallel.step import ReplicaStep
from torchpar.parallel.world import join_world
from torchpar.script import Spread, train


@dataclass(kw_only=True)
class Flags(cli.TrainFlags):
    """Train a digit classifier by data parallelism."""

    data: Path = Path(__file__).parent / "data"
    """Folder of the data sets, as torchvision's root."""


def main(flags: Flags) -> None:
    with join_world(flags.device, flags.timeout) as world:

        def spread(model: MLP) -> Spread:
            # The wrapper's forward computes what the model's does; its backward averages the gradients.
            forward: torch.nn.Module = model
            if world.world_size > 1:
                forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
            if flags.compile:
                forward.compile()
            return Spread(model, ReplicaStep(forward, world.data_ranks))

        train(flags, world, spread)


if __name__ == "__main__":
    cli.main(main, Flags)
