# SPDX-License-Identifier: MIT
"""Parts that several operators of the gallery share."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def runs_kernel(x: Tensor) -> bool:
    """Whether a Triton kernel can read ``x``: on a GPU, and on CPUs in Triton's interpreter."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def check_rows(x: Tensor, dims: int = 1) -> None:
    if x.dim() < dims:  # with a batch, the operator would take numbers for a row
        raise ValueError("the operand has no dimension, expected (*, columns)")


def batch_of_rows(x: Tensor, dim: int) -> Tensor:
    """A batch of operands ``(*, columns)``, with the batch dimension first."""
    check_rows(x, 2)
    return x.movedim(dim, 0)


def each_sample(op: Any) -> Callable[..., tuple[Tensor, int]]:
    """A batching rule for any operator: a loop over the batch."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        leaves, spec = tree_flatten(args)
        pairs = [*zip(leaves, tree_leaves(in_dims), strict=True)]
        batch = range(info.batch_size)
        samples = [[x if dim is None else x.select(dim, i) for x, dim in pairs] for i in batch]
        return torch.stack([op(*tree_unflatten(sample, spec)) for sample in samples]), 0

    return rule


def shard_rows(x: Any, results: int = 1, others: int = 0, constants: int = 0) -> list[Any]:
    """Placements for an operator of rows: any dimension but the last is split, other operands are whole."""
    from torch.distributed.tensor import Replicate, Shard

    rest = [*[Replicate()] * others, *[None] * constants]
    splits = [Replicate(), *(Shard(dim) for dim in range(x.ndim - 1))]
    return [([split] * results, [split, *rest]) for split in splits]
