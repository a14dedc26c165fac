# SPDX-License-Identifier: MIT
"""All-reduces and all-gathers over the ranks of a mesh dimension, with their gradients.

With p ranks, x whole (the same on every rank) and x_r rank r's:

| function | forward | backward |
|---|---|---|
| `copy_to_region` | x → x | all-reduce: Σ_r dy_r |
| `reduce_from_region` | all-reduce: Σ_r x_r | dy → dy |
| `all_gather` | all-gather: x_r → x | dy → dy_r |

Each of the first two is the derivative of the other, so they can be differentiated any number of times. If
the ranks pass different shapes for the first time, every rank raises a ConfigError (`check_shape`).
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
from torchpar.partition import Partition
from torchpar.wire import wire_device


def all_reduce(t: Tensor, mesh: DeviceMesh, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """``t`` summed over the ranks of ``mesh``, or reduced by ``op``, in place; returns ``t``."""
    start_all_reduce(t, mesh, op)()
    return t


def start_all_reduce(t: Tensor, mesh: DeviceMesh, op: Any = dist.ReduceOp.SUM) -> Callable[[], object]:
    """Start an `all_reduce` and return a function that waits for its end."""
    if mesh.size() == 1:
        return lambda: None
    group = mesh.get_group()
    check_shape(t, group)
    return dist.all_reduce(t, op, group, async_op=True).wait


def copy_to_region(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """``x``, whole on every rank; the ranks use it for different outputs, so their gradients are summed."""
    return _Copy.apply(x, mesh)  # type: ignore[no-any-return]


def reduce_from_region(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the ranks' ``x``, which all have one shape."""
    return _Reduce.apply(x, mesh)  # type: ignore[no-any-return]


def all_gather(x: Tensor, mesh: DeviceMesh, partition: Partition, axis: int) -> Tensor:
    """The ranks' parts ``x`` of a tensor, concatenated along ``axis``, which ``partition`` cuts."""
    return _Gather.apply(x, mesh, partition, axis)  # type: ignore[no-any-return]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return reduce_from_region(g, ctx.mesh), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return all_reduce(x.clone(memory_format=torch.contiguous_format), mesh)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return copy_to_region(g, ctx.mesh), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, partition: Partition, axis: int) -> Tensor:
        ctx.partition, ctx.axis = partition, axis
        if mesh.size() == 1:
            return x.clone()
        # gloo gathers equal shapes only, so each part is padded to the widest. The gathered axis goes first,
        # where parts are contiguous.
        group, widths = mesh.get_group(), partition.widths()
        mine = x.movedim(axis, 0).to(wire_device(x, group))
        padded = mine.new_zeros(max(widths), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in widths]
        check_shape(padded, group)
        dist.all_gather(parts, padded, group=group)
        whole = torch.cat([part[:n] for part, n in zip(parts, widths, strict=True)])
        return whole.to(x.device).movedim(0, axis).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.partition.narrow(g, ctx.axis), None, None, None
