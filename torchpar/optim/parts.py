# SPDX-License-Identifier: MIT
"""The part of a parameter that a rank holds: all of it, a DTensor's shard, or a split layer's slice."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.ops._library import is_dtensor


class Part(NamedTuple):
    """A rank's part of a tensor of shape ``whole``: its first index and its size along each axis."""

    whole: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.size)

    def of(self, t: Tensor) -> Tensor:
        """This part of ``t``, which is whole; a view."""
        for dim, (start, size) in enumerate(zip(self.start, self.size, strict=True)):
            t = t.narrow(dim, start, size)
        return t


def part_of(p: Tensor) -> tuple[Part, Any]:
    """The part of ``p`` on this rank, and the mesh whose ranks share ``p``; None if this rank has all of it.

    Raises:
        ConfigError: a DTensor of partial sums.
    """
    split = getattr(p, "tensor_parallel_split", None)
    if split is not None:
        whole, begin, axis = list(p.shape), [0] * p.dim(), split.axis
        whole[axis], begin[axis] = split.partition.size, split.partition.offset()
        return Part(tuple(whole), tuple(begin), tuple(p.shape)), split.mesh
    if not is_dtensor(p):
        return Part(tuple(p.shape), (0,) * p.dim(), tuple(p.shape)), None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ConfigError(f"its placements are {placements}, expected Shard or Replicate")
    size, start = compute_local_shape_and_global_offset(p.shape, mesh, placements)
    return Part(tuple(p.shape), tuple(start), tuple(size)), mesh


def is_tensor_parallel(p: Tensor) -> bool:
    """Whether ``p`` is a slice that a `ColumnParallelLinear` or a `RowParallelLinear` holds; no DTensor."""
    return hasattr(p, "tensor_parallel_split")


def local(t: Tensor) -> Tensor:
    """This rank's elements of ``t``."""
    return t.to_local() if is_dtensor(t) else t  # type: ignore[attr-defined]


def holders_of(name: str, parts: Sequence[Part]) -> dict[Part, list[int]]:
    """The ranks that have each part of a matrix, for the ``parts`` of all ranks.

    Raises:
        ConfigError: the parts do not make a whole.
    """
    holders: dict[Part, list[int]] = {}
    for rank, part in enumerate(parts):
        if part.shape.numel():
            holders.setdefault(part, []).append(rank)
    elements = sum(part.shape.numel() for part in holders)
    if elements != torch.Size(parts[0].whole).numel():
        raise ConfigError(
            f"Muon: the ranks have {elements} elements of {name}, which has shape {parts[0].whole}; expected "
            "a process_group of all ranks that have parts of it"
        )
    return holders
