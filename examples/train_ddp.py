# SPDX-License-Identifier: MIT
"""Data parallelism: every rank holds the whole model and takes a share of each batch.

    torchrun --nproc_per_node=2 examples/train_ddp.py

All ranks draw the same weights, because they start from the same seed. In every step a rank computes the
gradient of its own samples. DistributedDataParallel averages the gradients over the ranks while the backward
pass is still running, so all ranks take the same step. `torchpar.reference.average_gradients` shows the
average in a few lines. Two ranks compute the same as one, up to rounding, and in about half the time once the
work of a step outweighs the exchange of gradients.

Without torchrun, ``python examples/train_ddp.py`` is one process, and nothing is exchanged.
"""

from dataclasses import dataclass

import torch
from support import cli
from support.session import Run, adjust_gradients, make_optimizer, prepare
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from torchpar.nn import MLP
from torchpar.parallel import join_world
from torchpar.profile.phases import phase


@dataclass(kw_only=True)
class Flags(cli.TrainFlags):
    """Train a digit classifier by data parallelism."""


def main(flags: Flags) -> None:
    with join_world(flags.device, flags.timeout) as world:
        train, test, sizes = prepare(flags, world)
        model = MLP(sizes).to(world.device)
        replica: torch.nn.Module = model
        if world.world_size > 1:
            # Its forward pass is the model's; its backward pass averages the gradients over the ranks.
            replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if flags.compile:
            replica.compile()
        optimizer, lr_scheduler = make_optimizer(flags, model, len(train))

        def train_step(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
            with phase("forward"):
                loss = cross_entropy(replica(x), labels, reduction="sum")
            with phase("backward"):
                # The loss is the mean over the global batch. The wrapper averages over the ranks, whose
                # shares of the batch may differ in size.
                (loss * (world.dp_size / global_size)).backward()
            with phase("optimizer"):
                adjust_gradients(flags, model, world)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            return loss.detach()

        with Run(flags, world, model, optimizer, lr_scheduler, train, test) as run:
            for epoch in run.epochs():
                for batch in run.batches(epoch):
                    run.log(train_step(*batch))


if __name__ == "__main__":
    cli.main(main, Flags)
