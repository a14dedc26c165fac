# SPDX-License-Identifier: MIT
"""Partition of an axis (samples, features) among the ranks of a mesh dimension."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """The parts of an axis that ranks share, cut as `torch.tensor_split` does; any size is allowed.

    Attributes:
        size: length of the whole axis.
        ranks: number of ranks that share the axis.
        rank: this rank, 0 … ranks − 1.
    """

    size: int
    ranks: int
    rank: int

    def widths(self) -> list[int]:
        """The length of each rank's part of the axis."""
        return [self.size // self.ranks + (rank < self.size % self.ranks) for rank in range(self.ranks)]

    def offset(self) -> int:
        """The index at which this rank's part begins."""
        return sum(self.widths()[: self.rank])

    def narrow(self, t: Tensor, dim: int) -> Tensor:
        """This rank's part of ``t`` along ``dim``, where ``t`` is whole; a view."""
        return t.narrow(dim, self.offset(), self.widths()[self.rank])
