# SPDX-License-Identifier: MIT
"""The borders of a tensor-split region, under Megatron-LM's names.

With p ranks, x whole (the same on every rank) and x_r rank r's share of its last axis:

| function | forward | backward |
|---|---|---|
| `copy_to_tensor_model_parallel_region` | x → x | all-reduce: Σ_r dy_r |
| `reduce_from_tensor_model_parallel_region` | all-reduce: Σ_r x_r | dy → dy |
| `scatter_to_tensor_model_parallel_region` | x → x_r | all-gather: dy_r → dy |
| `gather_from_tensor_model_parallel_region` | all-gather: x_r → x | dy → dy_r |

Each backward is the forward of another, so that they differentiate any number of times. Ranks that pass
different shapes, new to all of them, get a ConfigError, all of them (`torchpar.parallel.agreement`).
Source: Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism", 2019, figure 3.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar.parallel.agreement import check_shape
from torchpar.parallel.reduction import Reduction, all_reduce, wire_device


def copy_to_tensor_model_parallel_region(
    x: Tensor, mesh: DeviceMesh, reduction: Reduction = "fast"
) -> Tensor:
    """``x``, whole on every rank, into a region where each rank uses it differently."""
    return _Copy.apply(x, mesh, reduction)  # type: ignore[no-any-return]


def reduce_from_tensor_model_parallel_region(
    x: Tensor, mesh: DeviceMesh, reduction: Reduction = "fast"
) -> Tensor:
    """The ranks' partial sums ``x``, all of one shape, out of the region as their sum."""
    return _Reduce.apply(x, mesh, reduction)  # type: ignore[no-any-return]


def scatter_to_tensor_model_parallel_region(
    x: Tensor, mesh: DeviceMesh, widths: Sequence[int] | None = None
) -> Tensor:
    """This rank's share of the last axis of ``x``.

    Args:
        widths: how much of the axis each rank takes; by default as `torch.tensor_split`.
    """
    if widths is None:
        widths = [len(part) for part in torch.arange(x.shape[-1]).tensor_split(mesh.size())]
    return _Scatter.apply(x, mesh, list(widths))  # type: ignore[no-any-return]


def gather_from_tensor_model_parallel_region(
    x: Tensor, mesh: DeviceMesh, widths: Sequence[int] | None = None
) -> Tensor:
    """The ranks' shares ``x``, side by side along the last axis.

    Args:
        widths: how much of the axis each rank has; by default as much as this one.
    """
    widths = [x.shape[-1]] * mesh.size() if widths is None else list(widths)
    return _Gather.apply(x, mesh, widths)  # type: ignore[no-any-return]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, reduction: Reduction) -> Tensor:
        ctx.arguments = mesh, reduction
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return reduce_from_tensor_model_parallel_region(g, *ctx.arguments), None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, reduction: Reduction) -> Tensor:
        ctx.arguments = mesh, reduction
        return all_reduce(x.clone(memory_format=torch.contiguous_format), mesh, reduction)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return copy_to_tensor_model_parallel_region(g, *ctx.arguments), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, widths: list[int]) -> Tensor:
        ctx.arguments = mesh, widths
        shares: tuple[Tensor, ...] = x.split(widths, -1)
        return shares[mesh.get_local_rank()].contiguous()

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
    """The ranks' shares along ``dim``, of ``widths``, as one tensor on every rank; no gradient."""
    if mesh.size() == 1:
        return x.clone()
    # gloo gathers equal shapes only: pad each share to the widest. The gathered axis goes first, where
    # shares are contiguous.
    group = mesh.get_group()
    mine = x.movedim(dim, 0).to(wire_device(x, group))
    padded = mine.new_zeros(max(widths), *mine.shape[1:])
    padded[: len(mine)] = mine
    shares = [torch.empty_like(padded) for _ in widths]
    check_shape(padded, group)
    dist.all_gather(shares, padded, group=group)
    whole = torch.cat([share[:n] for share, n in zip(shares, widths, strict=True)])
    return whole.to(x.device).movedim(0, dim).contiguous()
