# SPDX-License-Identifier: MIT
"""Parts that several operators of the gallery share."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from torchpar.library.rules import Sharding, Spec, VmapInfo


def each_sample(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """A batching rule for any operator: a loop over the batch."""

    def rule(info: VmapInfo, in_dims: object, *args: object) -> tuple[Tensor, int]:
        leaves, spec = tree_flatten(args)
        pairs = [*zip(leaves, tree_leaves(in_dims), strict=True)]
        batch = range(info.batch_size)
        samples = [[x if dim is None else x.select(dim, i) for x, dim in pairs] for i in batch]
        return torch.stack([op(*tree_unflatten(sample, spec)) for sample in samples]), 0

    return rule


def shard_rows(x: Spec) -> list[Sharding]:
    """Placements for an operator of rows: any dimension but the last is split."""
    from torch.distributed.tensor import Replicate, Shard

    return [([p], [p]) for p in (Replicate(), *map(Shard, range(x.ndim - 1)))]
