# SPDX-License-Identifier: MIT
"""Tensor parallelism: every rank sees the whole batch and holds a slice of each layer.

    torchrun --nproc_per_node=2 examples/train_tensor_parallel.py

Two layers make a pair. The first is split by columns, that is by outputs: rank r computes its share of
the hidden neurons from the whole input, activation included, and needs nobody for it. The second is
split by rows, by inputs: rank r multiplies its own neurons with its own slice of the weights and has a
part of every output; one all-reduce adds the parts up. The bias joins after that, or it would be added
once by every rank.

    x ──┬─ W₀⁽⁰⁾ ─ σ ─ W₁⁽⁰⁾ ─┐
        │                     Σ ─ + b₁ ─ y        rank 0 above, rank 1 below
        └─ W₀⁽¹⁾ ─ σ ─ W₁⁽¹⁾ ─┘

Backward, each rank's slice of the weights gets its gradient from what the rank has; only the gradient of
x is a sum over ranks, and the first pair does not need it. So a step of 784-128-10 sends one message,
forward, of batch × 10 numbers, however wide the hidden layer is; data parallelism would send all 101 770
gradients. It pays where the model is large and the batch small.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar import cli
from torchpar.errors import ConfigError
from torchpar.nn import MLP, Linear
from torchpar.parallel.layers import ColumnParallelLinear, RowParallelLinear
from torchpar.parallel.step import ReplicaStep
from torchpar.parallel.world import join_world
from torchpar.script import Spread, train


@dataclass(kw_only=True)
class Flags(cli.TrainFlags):
    """Train a digit classifier by tensor parallelism."""

    hidden: tuple[int, ...] = (128,)
    """Width of the hidden layer."""
    data: Path = Path(__file__).parent / "data"
    """Folder of the data sets, as torchvision's root."""


class SplitMLP(torch.nn.Module):
    """One hidden layer, split by hand: rank r of p holds a p-th of its neurons."""

    def __init__(self, whole: MLP, mesh: DeviceMesh):
        super().__init__()
        first, second = whole.layers
        assert isinstance(first, Linear)
        assert isinstance(second, Linear)
        # weight (neurons / p, features): x (b, features) → σ(x·Wᵀ + b) (b, neurons / p), by the fused kernel
        self.column = ColumnParallelLinear.from_linear(first, mesh=mesh)
        # weight (classes, neurons / p): (b, neurons / p) → Σ over ranks → + b (b, classes)
        self.row = RowParallelLinear.from_linear(second, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        return self.row(self.column(x))  # type: ignore[no-any-return]


def main(flags: Flags) -> None:
    if len(flags.hidden) != 1:
        raise ConfigError(f"--hidden is {flags.hidden}, expected one width; train_parallel.py splits any MLP")
    with join_world(flags.device, flags.timeout) as world:
        world = world.split(tp=world.world_size)
        assert world.mesh is not None
        mesh = world.mesh["tp"]

        def spread(whole: MLP) -> Spread:
            model = SplitMLP(whole, mesh)
            if flags.compile:
                model.compile()
            return Spread(model, ReplicaStep(model))

        train(flags, world, spread)


if __name__ == "__main__":
    cli.main(main, Flags)
