# SPDX-License-Identifier: MIT
"""The norm of a gradient that is spread over a mesh."""

import torch
from torch import Tensor

from torchpar.parallel.layers import split_parameters
from torchpar.parallel.reduction import SHARDS
from torchpar.parallel.world import World


@torch.no_grad()
def clip_grad_norm_(model: torch.nn.Module, max_norm: float, world: World) -> Tensor:
    """Scale the gradient of the whole model to a norm of at most ``max_norm``, in place.

    ``‖g‖ = √Σ‖g_i‖²`` over all parameters: those split over ranks are summed over the ranks, those whole
    on several count once. One all-reduce of a number (of `SHARDS` numbers if the reduction is
    invariant), none if every rank has the whole model.

    Args:
        model: this rank's part of it, its gradients averaged over the data-parallel ranks.

    Returns:
        The norm before, a float64 scalar; the same on every rank. A norm that is not finite leaves
        gradients that are not, as `torch.nn.utils.clip_grad_norm_` does.
    """
    split = {name: (axis, layer.partition) for name, axis, layer in split_parameters(model)}
    squares = torch.zeros(
        SHARDS if world.reduction == "invariant" else 1, dtype=torch.float64, device=world.device
    )
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        if name in split:
            axis, partition = split[name]
            shards = partition.split(gradient, axis)
            first = partition.rank * len(shards) % len(squares)
        elif world.tensor_rank == 0:
            shards, first = [gradient], 0
        else:
            continue
        for i, shard in enumerate(shards, first):
            squares[i] += torch.linalg.vector_norm(shard, dtype=torch.float64).square()
    if world.mesh is not None and world.mesh["tp"].size() * world.mesh["pp"].size() > 1:
        if world.data_rank != 0:
            squares.zero_()  # the same gradient as on data-parallel rank 0
        world.sum(squares)
    norm = squares.sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(scale.to(gradient.dtype))
    return norm
