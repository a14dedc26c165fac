# SPDX-License-Identifier: MIT
"""Partition of an axis (samples, features) among the ranks of a mesh dimension."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchpar.parallel.split.reduction import SHARDS, Reduction, check_reduction


@dataclass(frozen=True)
class Partition:
    """The parts of an axis that ranks share.

    The axis is cut into ``parts`` shards as `torch.tensor_split` cuts it, so any size will do. Each rank
    takes ``parts / ranks`` consecutive shards.

    Attributes:
        size: length of the whole axis.
        parts: number of shards: ``ranks`` if the reduction is fast, `SHARDS` if it is invariant.
        ranks: number of ranks that share the axis.
        rank: this rank, 0 … ranks − 1.
    """

    size: int
    parts: int
    ranks: int
    rank: int

    @classmethod
    def over(cls, size: int, ranks: int, rank: int, reduction: Reduction = "fast") -> "Partition":
        """The partition of an axis of ``size`` over ``ranks`` ranks, of which this is number ``rank``.

        Raises:
            ConfigError: see `check_reduction`.
        """
        check_reduction(reduction, ranks)
        return cls(size, ranks if reduction == "fast" else SHARDS, ranks, rank)

    def shards(self, rank: int | None = None) -> list[int]:
        """The sizes of a rank's shards; of this rank's by default."""
        each = self.parts // self.ranks
        first = (self.rank if rank is None else rank) * each
        return [self.size // self.parts + (i < self.size % self.parts) for i in range(first, first + each)]

    def widths(self) -> list[int]:
        """The length of each rank's part of the axis."""
        return [sum(self.shards(rank)) for rank in range(self.ranks)]

    def offset(self) -> int:
        """The index at which this rank's part begins."""
        return sum(self.widths()[: self.rank])

    def narrow(self, t: Tensor, dim: int) -> Tensor:
        """This rank's part of ``t`` along ``dim``, where ``t`` is whole; a view."""
        return t.narrow(dim, self.offset(), sum(self.shards()))

    def split(self, t: Tensor, dim: int) -> list[Tensor]:
        """This rank's shards of ``t`` along ``dim``, where ``t`` is this rank's part."""
        if self.parts == self.ranks:
            return [t]
        # The bits of a product may depend on strides and alignment. A copy has those of a rank that holds
        # this shard alone.
        return [part.clone(memory_format=torch.contiguous_format) for part in t.split(self.shards(), dim)]
