# SPDX-License-Identifier: MIT
"""The part of each rank in the epochs of two ranks, run by `torchpar.parallel.launch.local`."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.train.inputs import LR, Training, TrainingInputs
from benchmarks.train.rungs import Advance, advance_by
from torchpar.baselines.bridge import copy_weights
from torchpar.baselines.numpy_mlp import Array
from torchpar.data import batches
from torchpar.nn import MLP
from torchpar.optim import SGD
from torchpar.parallel.launch.local import current_world
from torchpar.parallel.split.shared_memory import register_shared_memory_hook
from torchpar.training.fused import FusedGradients

Way = Literal["DDP", "shared", "fused"]
_training: dict[Way, Advance] = {}  # the epochs that are under way


def begin(training: Training, way: Way) -> None:
    """Begin to train by data parallelism: by DistributedDataParallel, alone or with the gradients averaged
    through shared memory, or with fused gradients.
    """
    _training[way] = advance_by(data_parallel(training, way))


def advance(way: Way, count: int) -> tuple[float, Array]:
    """Train on so many batches more: the seconds, and this rank's parts of the mean losses."""
    dist.barrier()
    return _training[way](count)


def data_parallel(training: Training, way: Way) -> Iterator[Tensor | None]:
    world, inputs = current_world(), TrainingInputs(training)
    model: torch.nn.Module = MLP(training.sizes)
    copy_weights(inputs.start, model)
    fused = FusedGradients(model, world) if way == "fused" else None
    wrapped = model
    if way != "fused":
        wrapped = replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if way == "shared":
            register_shared_memory_hook(replica, world)
    optimizer = SGD(model.parameters(), lr=LR)
    yield None
    for x, labels, size in batches(inputs.train, training.batch_size, seed=0, epoch=1, share=world.share):
        if fused is not None:
            loss = fused(x, labels, size)
        else:
            loss = cross_entropy(wrapped(x), labels, reduction="sum")
            # The wrapper averages over the ranks, whose shares may differ in size.
            (loss * (world.world_size / size)).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach() / size


def forget() -> None:
    """Drop the wrappers and their group, before the ranks leave."""
    _training.clear()
