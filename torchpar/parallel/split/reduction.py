# SPDX-License-Identifier: MIT
"""All-reduces and all-gathers over the ranks of a mesh dimension, with their gradients.

With p ranks, x replicated (the same on every rank) and x_r of rank r:

| function | forward | backward |
|---|---|---|
| `reduce_from_region` | all-reduce: Σ_r x_r | dy → dy |
| `all_gather` | x_r → x | dy → dy_r |

If the ranks pass shapes that are new and differ, every rank raises a ConfigError (`check_shape`).

Source: Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism", 2019, figure 3.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from torchpar.parallel.launch.agreement import check_shape
from torchpar.parallel.split.parts import Part


def all_reduce(
    t: Tensor, mesh: DeviceMesh, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """``t`` summed over the ranks of ``mesh``, or reduced by ``op``, in place; returns ``t``."""
    start_all_reduce(t, mesh, op)()
    return t


def start_all_reduce(
    t: Tensor, mesh: DeviceMesh, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Callable[[], object]:
    """Start an `all_reduce` and return a function that waits for its end."""
    if mesh.size() == 1:
        return lambda: None
    group = mesh.get_group()
    check_shape(t, group)
    return dist.all_reduce(t, op, group, async_op=True).wait


def reduce_from_region(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of ``x`` over the ranks, on which it has one shape."""
    return _Reduce.apply(x, mesh)  # type: ignore[no-any-return]


def all_gather(x: Tensor, part: Part) -> Tensor:
    """The unsharded tensor on every rank; ``x`` is this rank's shard, at the place ``part``."""
    assert part.mesh is not None
    # gloo gathers equal shapes only. A sum of −0 and a term has the bits of the term, also if the
    # term is a zero.
    padded = x.new_full(part.whole, -0.0)
    part.narrow(padded).copy_(x)
    return reduce_from_region(padded, part.mesh)


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), mesh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None
