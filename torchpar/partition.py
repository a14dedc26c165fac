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

    def narrow(self, t: Tensor, dim: int) -> Tensor:
        """This rank's part of ``t`` along ``dim``, where ``t`` is whole; a view."""
        return t.tensor_split(self.ranks, dim)[self.rank]
