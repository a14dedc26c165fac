# SPDX-License-Identifier: MIT
"""Who has which part of an axis."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar.parallel.reduction import SHARDS, Reduction, check_reduction


@dataclass(frozen=True)
class Partition:
    """How the ranks of a mesh dimension share an axis.

    The axis is cut into ``parts`` shards as `torch.tensor_split` cuts, so that any size goes; each rank
    takes ``parts / ranks`` consecutive ones.

    Attributes:
        size: of the whole axis.
        parts: shards: the ranks if the reduction is fast, `SHARDS` if it is invariant.
        ranks: how many share it.
        rank: this one.
    """

    size: int
    parts: int
    ranks: int
    rank: int

    @classmethod
    def of(cls, size: int, mesh: DeviceMesh, reduction: Reduction) -> "Partition":
        """Of an axis of ``size`` over ``mesh``, of one dimension; `check_reduction` says what it raises."""
        check_reduction(reduction, mesh.size())
        parts = mesh.size() if reduction == "fast" else SHARDS
        return cls(size, parts, mesh.size(), mesh.get_local_rank())

    def shards(self, rank: int | None = None) -> list[int]:
        """Sizes of the shards of a rank, by default this one."""
        each = self.parts // self.ranks
        first = (self.rank if rank is None else rank) * each
        return [self.size // self.parts + (i < self.size % self.parts) for i in range(first, first + each)]

    def widths(self) -> list[int]:
        """How much of the axis each rank has."""
        return [sum(self.shards(rank)) for rank in range(self.ranks)]

    def offset(self) -> int:
        """Where this rank's share begins."""
        return sum(self.widths()[: self.rank])

    def narrow(self, t: Tensor, dim: int) -> Tensor:
        """This rank's share of ``t``, whose axis ``dim`` is whole; a view."""
        return t.narrow(dim, self.offset(), sum(self.shards()))

    def split(self, t: Tensor, dim: int) -> list[Tensor]:
        """This rank's shards of ``t``, whose axis ``dim`` is this rank's share."""
        if self.parts == self.ranks:
            return [t]
        # A copy has the strides and the alignment that a rank with this shard alone would have, on
        # which a product's bits may depend.
        return [part.clone(memory_format=torch.contiguous_format) for part in t.split(self.shards(), dim)]
