# SPDX-License-Identifier: MIT
"""Tensor parallelism: every rank sees the whole batch and holds a slice of each layer.

    torchrun --nproc_per_node=2 examples/train_tensor_parallel.py

Two layers form a pair. The first layer is split by columns, that is by its outputs: rank r computes
its share of the hidden neurons from the whole input, activation included, without communication.
The second layer is split by rows, that is by its inputs: rank r multiplies its own neurons by its
own slice of the weights, which gives a part of every output. One all-reduce adds the parts up. The
bias is added after it, because before it every rank would add the bias once.

    x ──┬─ W₀⁽⁰⁾ ─ σ ─ W₁⁽⁰⁾ ─┐
        │                     Σ ─ + b₁ ─ y        rank 0 above, rank 1 below
        └─ W₀⁽¹⁾ ─ σ ─ W₁⁽¹⁾ ─┘

In the backward pass each rank computes the gradient of its own slices. Only the gradient of x is a
sum over ranks, and the first pair does not need it. So a step of 784-128-10 sends one message, in
the forward pass, of batch × 10 numbers, for any width of the hidden layer. Data parallelism would
send all 101 770 gradients. Tensor parallelism pays where the model is large and the batch is small.

The model has one hidden layer: a pair is two layers.
"""

from dataclasses import dataclass

from support import cli, learning_rate, lesson

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy

from torchpar.errors import ConfigError
from torchpar.parallel import ColumnParallelLinear, RowParallelLinear, join_world
from torchpar.training import Classification, Run


@dataclass(kw_only=True)
class Flags(lesson.TrainFlags):
    """Train a digit classifier by tensor parallelism."""

    hidden: tuple[cli.Size, ...] = (128,)  # Width of the hidden layer.


class SplitMLP(torch.nn.Module):
    """One hidden layer, split by hand: rank r of p holds a p-th of its neurons."""

    def __init__(self, sizes: list[int], mesh: DeviceMesh):
        super().__init__()
        features, neurons, classes = sizes
        # weight (neurons / p, features): x (b, features) → σ(x·Wᵀ + b) (b, neurons / p), by the
        # fused kernel
        self.column = ColumnParallelLinear(features, neurons, mesh=mesh, activation="sigmoid")
        # weight (classes, neurons / p): (b, neurons / p) → Σ over ranks → + b (b, classes)
        self.row = RowParallelLinear(neurons, classes, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        return self.row(self.column(x))  # type: ignore[no-any-return]


def main(flags: Flags) -> None:
    if len(flags.hidden) != 1:
        raise ConfigError(
            f"--hidden is {flags.hidden}, expected one width; train_parallel.py splits any MLP"
        )
    with join_world(flags.device, flags.timeout, gloo_yields=True) as world:
        world = world.with_mesh(tp=world.world_size)
        train, test = flags.load(world)
        torch.manual_seed(flags.seed)
        # Every rank draws the whole weights, the same on all, and keeps its slice.
        model = SplitMLP(flags.layer_sizes(train), world.mesh["tp"]).to(world.device)
        if flags.compile:
            model.compile()
        optimizer = flags.make_optimizer(model, world.mesh["tp"])
        lr_scheduler = learning_rate.lr_scheduler(
            optimizer, flags.schedule, flags.total_steps(train)
        )

        task = Classification(train, test, flags.batch_size, seed=flags.seed)
        run = Run(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            world=world,
            task=task,
            epochs=flags.epochs,
            checkpoint=flags.saving(),
            config=flags.config(),
        )
        with run, lesson.Log(flags, run) as log:
            run.resume()
            log.resumed()
            for epoch in run.epochs():
                for x, labels, global_size in run.batches(epoch):
                    # Every rank has the whole batch, and so the whole gradient of its slices: no
                    # average.
                    loss = cross_entropy(model(x), labels, reduction="sum")
                    (loss / global_size).backward()
                    flags.adjust_gradients(model, world)  # --clip and --orthogonality
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
                    run.end_step(loss_sum=loss)
                    log.step()
                log.epoch(run.end_epoch())


if __name__ == "__main__":
    cli.main(main, Flags)
