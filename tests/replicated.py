# SPDX-License-Identifier: MIT
"""A model with a sparse embedding and a replicated scale, trained by `Run` on a mesh."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from torchpar.data import Samples
from torchpar.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    World,
    clip_grad_norm_,
    join_world,
)
from torchpar.parallel.split.shared_memory import register_shared_memory_hook
from torchpar.training import Classification, Run, run

ROWS, CLASSES, WORDS = 11, 3, 4


class Way(NamedTuple):
    """A model and its training.

    Attributes:
        place: of the scale, before, between or after the split layers.
        adds_up: whether the parts of its gradient are added up.
        sparse: whether the embedding's gradient is sparse.
        clips: the norm to which gradients are clipped, or 0.
        width: of the split layers.
        seed: of the weights and samples.
        checks: whether `Run` compares gradients, as it should.
    """

    place: Literal["before", "between", "after"]
    adds_up: bool
    sparse: bool
    clips: float
    width: int
    seed: int
    checks: bool = True


class Model(torch.nn.Module):
    def __init__(self, world: World, way: Way):
        super().__init__()
        mesh, self.place = world.mesh["tp"], way.place
        self.embedding = torch.nn.Embedding(ROWS, 5, sparse=way.sparse)
        self.column = ColumnParallelLinear(5, way.width, mesh=mesh, activation="tanh")
        self.row = RowParallelLinear(way.width, CLASSES, mesh=mesh)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        scales = [
            self.scale if self.place == one else 1.0 for one in ("before", "between", "after")
        ]
        features = self.embedding(x.long()).sum(1) * scales[0]
        outputs: Tensor = self.row(self.column(features) * scales[1]) * scales[2]
        return outputs


def train_replicated(mesh: Mapping[str, int], way: Way) -> list[float]:
    """The sums of each step's losses on the whole mesh.

    Raises:
        ConfigError: of `Run`.
    """
    losses = []
    skipped = patch.object(run, "check_replicas", lambda *_: None)
    with join_world("cpu", timeout=20) as alone, nullcontext() if way.checks else skipped:
        world = alone.with_mesh(**mesh)
        torch.manual_seed(way.seed)
        model = Model(world, way)
        x = torch.randint(0, ROWS, (26, WORDS)).float()
        samples = Samples(x, x[:, 0].long() % CLASSES, classes=tuple("abc"))
        replica: torch.nn.Module = model
        if world.dp_size > 1:
            group = world.mesh.get_group("dp")
            replica = ddp = DistributedDataParallel(model, process_group=group)
            register_shared_memory_hook(ddp, world)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        task = Classification(samples, samples, 13, seed=way.seed)
        with Run(model, optimizer, None, world, task, epochs=2) as one:
            for epoch in one.epochs():
                for inputs, labels, size in one.batches(epoch):
                    loss = cross_entropy(replica(inputs), labels, reduction="sum")
                    (loss * (world.dp_size / size)).backward()
                    if way.adds_up and way.place == "between" and world.tp_size > 1:
                        dist.all_reduce(model.scale.grad, group=world.mesh.get_group("tp"))
                    if way.clips:
                        clip_grad_norm_(model, way.clips, world)
                    optimizer.step()
                    optimizer.zero_grad()
                    one.end_step(loss_sum=loss)
                    losses.append(world.sum(loss.detach() * world.owns_outputs).item())
                one.end_epoch()
    return losses
