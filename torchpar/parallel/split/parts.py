# SPDX-License-Identifier: MIT
"""This rank's part of a parameter: all of it, or a shard, of a DTensor or in a split layer.

Optimizer, clipping and checkpoints all read `part_of`.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar.errors import ConfigError, check_whole
from torchpar.library.sharding import is_dtensor


class Part(NamedTuple):
    """A rank's part of a tensor: a shard, or all of a replicated tensor.

    Attributes:
        whole: the shape of the unsharded tensor.
        start: the first index of the part along each axis.
        size: the size of the part along each axis.
        mesh: the mesh that shards the tensor; None if it is replicated.
        axis: the axis along which a split layer's tensor is cut; None for other tensors.
    """

    whole: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    mesh: DeviceMesh | None = None
    axis: int | None = None

    @property
    def is_slice(self) -> bool:
        """Whether a split layer holds the part, as a plain tensor; False for a DTensor's shard."""
        return self.axis is not None

    def narrow(self, t: Tensor) -> Tensor:
        """This part of the unsharded ``t``; a view."""
        ends = map(sum, zip(self.start, self.size, strict=True))
        return t[tuple(map(slice, self.start, ends))]


def slice_along(axis: int, whole: Sequence[int], mesh: DeviceMesh) -> Part:
    """This rank's shard of a tensor of shape ``whole``, cut along ``axis`` as by `torch.chunk`."""
    step = -(-whole[axis] // mesh.size())
    start, size = [0] * len(whole), list(whole)
    start[axis] = min(step * mesh.get_local_rank(), whole[axis])
    size[axis] = min(step, whole[axis] - start[axis])
    return Part(tuple(whole), tuple(start), tuple(size), mesh, axis)


def mark_slice(p: Tensor, part: Part) -> None:
    """Record that the plain tensor ``p`` is ``part`` of a parameter, from `slice_along`.

    An optimizer gets the parameters without their layer. A DTensor would record its placement, but
    it dispatches each operator in Python, which takes long.
    """
    p.tensor_parallel_part = part  # type: ignore[attr-defined]


def mark_shard(p: Tensor, axis: int, size: int, mesh: DeviceMesh) -> None:
    """Say that the plain parameter ``p`` is this rank's shard of a larger one.

    For a layer of the features that a rank has between a column and a row layer, such as
    ``BatchNorm1d(hidden // tp)``: ``for p in norm.parameters(): mark_shard(p, 0, hidden, mesh)``.
    Optimizers, clipping and checkpoints then treat ``p`` as the shard of a split layer, and
    `torchpar.training.Run` expects another gradient on each rank. A parameter without a mark is one
    that all ranks share. A copy of a module has no marks: mark its parameters, too.

    Args:
        p: of any shape and dtype.
        axis: the axis along which the larger parameter is cut, as by `torch.chunk`.
        size: the larger parameter's size along it.
        mesh: the ranks that have the shards; of one dimension, such as ``world.mesh["tp"]``.

    Raises:
        ConfigError: ``p`` has no such axis, or another size than this rank's shard; ``mesh`` has
            several dimensions.
    """
    size = check_whole("size", size)
    if not 0 <= axis < p.dim():
        expected = f"from 0 to {p.dim() - 1}" if p.dim() else "a parameter that has axes"
        raise ConfigError(f"axis is {axis} of shape {tuple(p.shape)}, expected {expected}")
    if mesh.ndim != 1:
        raise ConfigError(f'the mesh has {mesh.ndim} dimensions; give one of them, as mesh["tp"]')
    part = slice_along(axis, [*p.shape[:axis], size, *p.shape[axis + 1 :]], mesh)
    if part.size != tuple(p.shape):
        rank = f"rank {mesh.get_local_rank()} of {mesh.size()}"
        raise ConfigError(
            f"the shard has {p.shape[axis]} of {size} along axis {axis}, expected "
            f"{part.size[axis]} on {rank}; cut as torch.chunk does"
        )
    mark_slice(p, part)


def as_dtensor(t: Tensor, part: Part) -> Tensor:
    """A view of the shard ``t`` as a DTensor; ``part`` is from `slice_along`."""
    from torch.distributed.tensor import DTensor, Shard

    assert part.axis is not None
    full = torch.empty(part.whole, device="meta")
    cut = [Shard(part.axis)]
    return DTensor.from_local(
        t, part.mesh, cut, run_check=False, shape=full.shape, stride=full.stride()
    )


def part_of(p: Tensor) -> Part:
    """The part of ``p`` on this rank.

    Raises:
        ConfigError: a DTensor of partial sums.
    """
    marked: Part | None = getattr(p, "tensor_parallel_part", None)
    if marked is not None:
        return marked
    if not is_dtensor(p):
        return Part(tuple(p.shape), (0,) * p.dim(), tuple(p.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = p.device_mesh, p.placements
    if any(placement.is_partial() for placement in placements):
        raise ConfigError(f"its placements are {placements}, expected Shard or Replicate")
    size, start = compute_local_shape_and_global_offset(p.shape, mesh, placements)
    return Part(tuple(p.shape), tuple(start), tuple(size), mesh)


def reshard(model: torch.nn.Module) -> None:
    """Put the shards of `fully_shard` back in place of unsharded parameters.

    A forward pass without a backward pass leaves the outermost module unsharded, and the optimizer
    has its state by shards.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()
