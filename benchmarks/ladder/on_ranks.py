# SPDX-License-Identifier: MIT
"""The part of each rank in the rungs of two ranks, run by `torchpar.parallel.launch.local`."""

from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

import torchpar
from benchmarks.ladder.inputs import operands
from benchmarks.timing import CPU, flush, time_calls
from torchpar.baselines.numpy_mlp import Array
from torchpar.parallel.launch.local import current_world

WARM_CALLS = 100


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


def forget() -> None:
    """Drop the operands, before the ranks leave."""
    _operation.cache_clear()
