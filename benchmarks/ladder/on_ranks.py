# SPDX-License-Identifier: MIT
"""The part of each rank in the rungs of two ranks, run by `torchpar.parallel.launch.local`."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import torchpar
from benchmarks.ladder.inputs import LR, Training, TrainingInputs, operands
from benchmarks.ladder.training import advance_by
from benchmarks.timing import CPU, flush, time_calls
from torchpar.baselines.bridge import copy_weights
from torchpar.baselines.numpy_mlp import Array
from torchpar.nn import MLP
from torchpar.parallel.launch.local import current_world

WARM_CALLS = 100
Advance = Callable[[int], tuple[float, Array]]
_training: list[Advance] = []  # the epoch that is under way


def operate(name: str, shape: tuple[int, ...], cold: bool) -> tuple[float, Array]:
    """Seconds of a call, and this rank's part of the result, which stays there.

    The part is rows of the result, of linear+sigmoid columns.
    """
    call = _operation(name, shape)
    if cold:
        flush(CPU)
    dist.barrier()
    timed = time_calls(call, calls=1 if cold else WARM_CALLS)
    return timed.seconds(), timed.result.numpy()


@cache
def _operation(name: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    arguments = [torch.from_numpy(t) for t in operands(name, shape).arguments]
    share = current_world().share(shape[-1] if name == "linear_sigmoid" else shape[0])
    if name == "maximum":
        a, b = (share.narrow(t, 0) for t in arguments)
        return lambda: torchpar.maximum(a, b)
    if name == "matmul_t":
        (x,) = arguments
        own = share.narrow(x, 0)
        return lambda: torch.mm(own, x.T)
    x, weight, bias = arguments
    weight, bias = share.narrow(weight, 0), share.narrow(bias, 0)
    return lambda: torchpar.linear_sigmoid(x, weight, bias)


def begin(training: Training, order: Sequence[Array]) -> None:
    """Begin to train on batches of these indices by data parallelism."""
    _training[:] = [advance_by(data_parallel(training, order))]


def advance(batches: int) -> tuple[float, Array]:
    """Train on so many batches more: the seconds, and this rank's parts of the mean losses."""
    dist.barrier()
    return _training[0](batches)


def data_parallel(training: Training, order: Sequence[Array]) -> Iterator[Tensor | None]:
    world, (inputs, model, wrapped) = current_world(), _replica(training)
    copy_weights(inputs.start, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, labels = torch.from_numpy(inputs.x), torch.from_numpy(inputs.labels)
    batches = [torch.from_numpy(indices) for indices in order]
    yield None
    for indices in batches:
        mine = world.share(len(indices)).narrow(indices, 0)
        loss = cross_entropy(wrapped(x[mine]), labels[mine], reduction="sum")
        # The wrapper averages over the ranks, whose shares may differ in size.
        (loss * (world.world_size / len(indices))).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach() / len(indices)


@cache
def _replica(training: Training) -> tuple[TrainingInputs, MLP, DistributedDataParallel]:
    model = MLP(training.sizes)
    return TrainingInputs(training), model, DistributedDataParallel(model, gradient_as_bucket_view=True)


def forget() -> None:
    """Drop the wrapper and its group, before the ranks leave."""
    _training.clear()
    _replica.cache_clear()
    _operation.cache_clear()
