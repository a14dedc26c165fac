# SPDX-License-Identifier: MIT
"""Data parallelism: every rank holds the whole model and takes a share of each batch.

    torchrun --nproc_per_node=2 examples/train_ddp.py

All ranks draw the same weights, because they start from the same seed. In every step a rank computes the
gradient of its own samples. DistributedDataParallel averages the gradients over the ranks, so all ranks take
the same step. `torchpar.reference.average_gradients` shows the average in a few lines. Two ranks compute the
same as one, up to rounding, and in about half the time once the work of a step outweighs the exchange of
gradients. Ranks on the CPUs of one machine exchange them through shared memory
(`torchpar.parallel.split.shared_memory`).

By default the gradients of the MLP are computed by formulas and added over the ranks at once
(`torchpar.training.fused`), which is faster; ``--fused off`` takes autograd and DistributedDataParallel, as
for any other model. On a GPU a step is one CUDA graph (`torchpar.training.graph`); ``--graph off`` launches
each kernel by itself.

Without torchrun, ``python examples/train_ddp.py`` is one process, and nothing is exchanged.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from support import cli
from support.session import (
    Run,
    adjust_gradients,
    compile_model,
    fused_gradients,
    graphed_step,
    make_optimizer,
    prepare,
)
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from torchpar.nn import MLP
from torchpar.parallel import join_world
from torchpar.parallel.split.shared_memory import register_shared_memory_hook
from torchpar.profile.phases import phase


@dataclass(kw_only=True)
class Flags(cli.StepFlags):
    """Train a digit classifier by data parallelism."""

    # The 98.0% record of `benchmarks.speedrun`, but with five iterations of Newton–Schulz, and in float32:
    # bfloat16 is slow on processors that do not have it.
    epochs: int = 2
    batch_size: int = 1536
    optimizer: Literal["sgd", "muon"] = "muon"
    lr: float = 0.3
    """Learning rate at the start."""
    momentum: float = 0.8
    """Nesterov momentum."""
    weight_decay: float = 0.0
    """λ of the weights: for muon decoupled decay, for sgd an L2 penalty λ/2·‖W‖² in the loss."""
    hidden: tuple[int, ...] = (320,)
    activation: Literal["sigmoid", "relu"] = "relu"
    label_smoothing: float = 0.1
    crop: int = 3
    pool: int = 2


def main(flags: Flags) -> None:
    with join_world(flags.device, flags.timeout) as world:
        train, test, sizes = prepare(flags, world)
        model = MLP(sizes, flags.activation).to(world.device)
        fused = fused_gradients(flags, model, world)
        replica: torch.nn.Module = model
        if world.world_size > 1 and fused is None:
            # Its forward pass is the model's; its backward pass averages the gradients over the ranks.
            replica = ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
            register_shared_memory_hook(ddp, world)  # on CPUs
        if flags.compile:
            compile_model(replica, world)
        optimizer, lr_scheduler = make_optimizer(flags, model, len(train))

        def gradients(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
            if fused is not None:
                with phase("backward"):
                    return fused(x, labels, global_size)
            with phase("forward"):
                outputs = replica(x)
                loss = cross_entropy(outputs, labels, reduction="sum", label_smoothing=flags.label_smoothing)
            with phase("backward"):
                # The loss is the mean over the global batch. The wrapper averages over the ranks, whose
                # shares of the batch may differ in size.
                (loss * (world.dp_size / global_size)).backward()
            return loss.detach()

        def train_step(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
            loss = gradients(x, labels, global_size)
            with phase("optimizer"):
                adjust_gradients(flags, model, world)
                optimizer.step()
                optimizer.zero_grad()
            return loss

        parts = (model, optimizer, lr_scheduler, train, test)
        graphed = graphed_step(flags, world, train_step, train, optimizer, fused is not None)
        with graphed as graph, Run(flags, world, *parts, fused=fused is not None) as run:
            # A CUDA graph gathers its batch itself.
            step, batches = (graph, run.indices) if graph else (train_step, run.batches)
            for epoch in run.epochs():
                for batch in batches(epoch):
                    run.log(step(*batch))
                    lr_scheduler.step()


if __name__ == "__main__":
    cli.main(main, Flags)
