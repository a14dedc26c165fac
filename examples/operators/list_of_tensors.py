# SPDX-License-Identifier: MIT
"""An operator of a list of tensors: y = Σ w_i·x_i, as an average of checkpoints takes it.

With G = dL/dy:

    dL/dx_i = w_i·G        dL/dw_i = Σ G·x_i over all elements
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from shared import each_sample
from torch import Tensor

import torchpar
from torchpar.library.rules import Context, Sharding, Spec


def weighted_sum(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    if weights.shape != (len(tensors),) or any(t.shape != tensors[0].shape for t in tensors):
        shapes = [tuple(t.shape) for t in tensors]
        raise ValueError(
            f"tensors have shapes {shapes} and weights {tuple(weights.shape)}, expected tensors of "
            "one shape, and one weight for each"
        )
    y = tensors[0].new_zeros(tensors[0].shape)
    for t, weight in zip(tensors, weights.tolist(), strict=True):
        y.add_(t, alpha=weight)
    return y


def register(library: ModuleType, name: str) -> Any:
    op = library.custom_op(name, weighted_sum, mutates_args=())

    def setup_context(ctx: Context, inputs: tuple[list[Tensor], Tensor], output: Tensor) -> None:
        tensors, weights = inputs
        ctx.save_for_backward(*tensors, weights)

    def backward(ctx: Context, g: Tensor) -> tuple[list[Tensor], Tensor]:
        *tensors, weights = ctx.saved_tensors
        each = [weights[i] * g for i in range(len(tensors))]
        return each, torch.stack([(g * t).sum() for t in tensors])

    op.register_fake(lambda tensors, weights: tensors[0].new_empty(tensors[0].shape))
    op.register_autograd(backward, setup_context=setup_context)
    op.register_vmap(each_sample(op))
    return op


def shard(tensors: Sequence[Spec], weights: Spec) -> list[Sharding]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    each = (Replicate(), Partial(), *map(Shard, range(tensors[0].ndim)))
    return [([p], [*[p] * len(tensors), Replicate()]) for p in each]


before = register(torch.library, "gallery_before::weighted_sum")
after = register(torchpar.library, "gallery::weighted_sum")
after.register_autocast()
after.register_sharding(shard)


def samples() -> list[tuple[list[Tensor], Tensor]]:
    x, y, weights = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3), (2, 3), (2,)))
    return [([x, y], weights)]


def reference(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    return torch.einsum("i...,i->...", torch.stack(list(tensors)), weights)
