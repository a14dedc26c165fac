# SPDX-License-Identifier: MIT
"""A small MLP that learns digits, and a training of it whose bits are the same on any mesh."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchpar.data import Samples, batches
from torchpar.exact.data_parallel import DataParallel
from torchpar.exact.dispatch import mode
from torchpar.exact.tensor_parallel import Linear
from torchpar.parallel.launch.world import World
from torchpar.partition import Partition
from torchpar.reference import P2PCommunicator, gpipe
from torchpar.training import lr_scheduler

SIZES = (784, 128, 64, 10)
STEPS = 100  # of the training
BATCH_SIZE, UNIT = 128, 32  # samples of a step; of a unit of work, whatever ranks there are


class MLP(nn.Module):
    """This rank's part of an MLP with sigmoids: of a stage's layers the slices of a rank of "tp"."""

    def __init__(self, world: World):
        super().__init__()
        tp, pp = world.mesh["tp"], world.mesh["pp"]
        first, second, third = pairwise(SIZES)
        layers = [Linear(*first, tp, 0), Linear(*second, tp, 1), nn.Linear(*third)]
        mine = Partition(len(layers), pp.size(), pp.get_local_rank()).narrow(torch.arange(len(layers)), 0)
        self.layers = nn.ModuleDict({str(i): layers[i] for i in mine.tolist()})

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in self.layers.items():
            x = layer(x if i == "0" else x.sigmoid())
        return x


def train(samples: Samples, world: World) -> MLP:
    """Train on the first samples by SGD.

    The ranks of "dp" share the units of each step, which pass through the stages of "pp".
    """
    samples = samples[: STEPS * BATCH_SIZE]
    with mode():
        torch.manual_seed(0)
        model = MLP(world).to(world.device)
        features = next(model.parameters()).shape[1]  # of the activations that this stage receives
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.5, momentum=0.9, weight_decay=3e-5, foreach=False
        )
        scheduler = lr_scheduler(optimizer, "linear", STEPS)
        parallel = DataParallel(model, world.mesh["dp"].get_group())
        p2p = P2PCommunicator(world.mesh["pp"].get_group(), world.device, torch.float32)
        for x, labels, size in batches(samples, BATCH_SIZE, seed=0, epoch=1):
            units = [*zip(x.split(UNIT), labels.split(UNIT), strict=True)]
            mine = units[world.dp_rank :: world.dp_size]

            def forward(i: int, activations: Tensor | None) -> Tensor:
                x, labels = mine[i]  # noqa: B023 (called within this step)
                y: Tensor = model(x if activations is None else activations)
                return F.cross_entropy(y, labels, reduction="sum") / size if p2p.is_last else y  # noqa: B023

            gpipe(forward, parallel.backward, [(len(x), features) for x, _ in mine], p2p)
            parallel.all_reduce()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model
