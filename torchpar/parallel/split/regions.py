# SPDX-License-Identifier: MIT
"""Collectives with gradients, for the borders of a tensor-parallel region, with Megatron-LM's names.

With p ranks, x whole (the same on every rank) and x_r rank r's part of its last axis:

| function | forward | backward |
|---|---|---|
| `copy_to_tensor_model_parallel_region` | x → x | all-reduce: Σ_r dy_r |
| `reduce_from_tensor_model_parallel_region` | all-reduce: Σ_r x_r | dy → dy |
| `scatter_to_tensor_model_parallel_region` | x → x_r | all-gather: dy_r → dy |
| `gather_from_tensor_model_parallel_region` | all-gather: x_r → x | dy → dy_r |

Each backward is the forward of another, so they can be differentiated any number of times. If the ranks pass
different shapes for the first time, every rank raises a ConfigError (`torchpar.parallel.launch.agreement`).
Source: Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism", 2019, figure 3.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar.parallel.launch.agreement import check_shape
from torchpar.parallel.split.reduction import all_reduce
from torchpar.wire import wire_device


def copy_to_tensor_model_parallel_region(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """``x``, whole on every rank; the ranks use it for different outputs, so their gradients are summed."""
    return _Copy.apply(x, mesh)  # type: ignore[no-any-return]


def reduce_from_tensor_model_parallel_region(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the ranks' ``x``, which all have one shape."""
    return _Reduce.apply(x, mesh)  # type: ignore[no-any-return]


def scatter_to_tensor_model_parallel_region(
    x: Tensor, mesh: DeviceMesh, widths: Sequence[int] | None = None
) -> Tensor:
    """This rank's part of the last axis of ``x``.

    Args:
        widths: the length of each rank's part; by default as `torch.tensor_split` cuts.
    """
    if widths is None:
        widths = [len(part) for part in torch.arange(x.shape[-1]).tensor_split(mesh.size())]
    return _Scatter.apply(x, mesh, list(widths))  # type: ignore[no-any-return]


def gather_from_tensor_model_parallel_region(
    x: Tensor, mesh: DeviceMesh, widths: Sequence[int] | None = None
) -> Tensor:
    """The ranks' ``x``, concatenated along the last axis.

    Args:
        widths: the length of each rank's last axis; by default the same on all ranks.
    """
    widths = [x.shape[-1]] * mesh.size() if widths is None else list(widths)
    return _Gather.apply(x, mesh, widths)  # type: ignore[no-any-return]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return reduce_from_tensor_model_parallel_region(g, ctx.mesh), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return all_reduce(x.clone(memory_format=torch.contiguous_format), mesh)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return copy_to_tensor_model_parallel_region(g, ctx.mesh), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, widths: list[int]) -> Tensor:
        ctx.arguments = mesh, widths
        parts: tuple[Tensor, ...] = x.split(widths, -1)
        return parts[mesh.get_local_rank()].contiguous()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return gather_from_tensor_model_parallel_region(g, *ctx.arguments), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, widths: list[int]) -> Tensor:
        ctx.arguments = mesh, widths
        return gather(x, mesh, widths)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return scatter_to_tensor_model_parallel_region(g, *ctx.arguments), None, None


def gather(x: Tensor, mesh: DeviceMesh, widths: Sequence[int], dim: int = -1) -> Tensor:
    """The ranks' ``x``, of lengths ``widths`` along ``dim``, concatenated on every rank; no gradient."""
    if mesh.size() == 1:
        return x.clone()
    # gloo gathers equal shapes only, so each part is padded to the widest. The gathered axis goes first,
    # where parts are contiguous.
    group = mesh.get_group()
    mine = x.movedim(dim, 0).to(wire_device(x, group))
    padded = mine.new_zeros(max(widths), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in widths]
    check_shape(padded, group)
    dist.all_gather(parts, padded, group=group)
    whole = torch.cat([part[:n] for part, n in zip(parts, widths, strict=True)])
    return whole.to(x.device).movedim(0, dim).contiguous()
