# SPDX-License-Identifier: MIT
"""What runs on the ranks of `benchmarks.scaling.ranks`, where each call comes to all of them at once."""

import time
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import torchpar
from benchmarks.baselines.numpy_mlp import Array
from benchmarks.ladder import epochs
from benchmarks.ladder.inputs import Problem, Training, operands
from benchmarks.scaling.plan import CORES
from benchmarks.timing import flush
from torchpar.nn import MLP
from torchpar.parallel.world import join_world

WARM_CALLS = 100


def noted(note: str) -> str:
    """``note`` on a row of two processes, and that there are fewer cores."""
    return note if CORES > 1 else f"{note}; they share a core"


def operate(name: str, shape: tuple[int, ...], cold: bool) -> tuple[float, Array]:
    """Seconds of a call, and this rank's part of the result, which stays there: rows, or linear+sigmoid's
    columns."""
    call = _operation(name, shape)
    calls = 1 if cold else WARM_CALLS
    if cold:
        flush(torch.device("cpu"))
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    return (time.perf_counter() - start) / calls, result.numpy()


@cache
def _operation(name: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    arguments = [torch.from_numpy(t) for t in operands(name, shape).arguments]
    with join_world("cpu") as world:
        share = world.share(shape[-1] if name == "linear_sigmoid" else shape[0])
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


class Replica(epochs.Torch):
    """Data parallelism: this rank's share of each batch; the losses are those of the whole batch."""

    def __init__(self, problem: Problem):
        model = MLP(problem.training.sizes)
        self.wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        super().__init__(problem, model, forward=self.wrapped)

    def train(self, first: int, last: int) -> Array:
        losses = []
        with join_world("cpu") as world:
            for indices in self.order[first:last]:
                mine = world.share(len(indices)).narrow(indices, 0)
                loss = cross_entropy(self.forward(self.x[mine]), self.labels[mine], reduction="sum")
                # The wrapper averages over the ranks, whose shares may differ in size.
                (loss * (world.world_size / len(indices))).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                losses.append(loss.detach() / len(indices))
            return np.array(world.sum(torch.stack(losses)).tolist())


@cache
def _replica(training: Training) -> Replica:
    with join_world("cpu") as world:
        return Replica(Problem(training, world))


def restart(training: Training) -> None:
    _replica(training).restart()


def train(training: Training, first: int, last: int) -> tuple[float, Array]:
    dist.barrier()
    return _replica(training).timed(first, last)
