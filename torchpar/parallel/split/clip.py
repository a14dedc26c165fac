# SPDX-License-Identifier: MIT
"""Gradient clipping for a model that is split over a mesh."""

import torch
from torch import Tensor

from torchpar.parallel.launch.world import World
from torchpar.parallel.split.layers import split_parameters
from torchpar.parallel.split.reduction import SHARDS


@torch.no_grad()
def clip_grad_norm_(model: torch.nn.Module, max_norm: float, world: World) -> Tensor:
    """Scale the gradient of the whole model to a norm of at most ``max_norm``, in place.

    ``‖g‖ = √Σ‖g_i‖²`` over all parameters of the model. Every part of a split parameter counts, and a
    parameter that several ranks hold whole counts once. This costs one all-reduce of one number (of `SHARDS`
    numbers if the reduction is invariant), and nothing if every rank holds the whole model.

    Args:
        model: this rank's part of the model, its gradients averaged over the data-parallel ranks.
        max_norm: the largest norm that is left as it is.
        world: the ranks and their mesh.

    Returns:
        The norm before clipping, a float64 scalar, the same on every rank. A norm that is not finite makes
        every gradient so, as with `torch.nn.utils.clip_grad_norm_`.
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
        elif world.tp_rank == 0:
            shards, first = [gradient], 0
        else:
            continue
        for i, shard in enumerate(shards, first):
            squares[i] += torch.linalg.vector_norm(shard, dtype=torch.float64).square()
    if world.dp_size < world.world_size:
        if world.dp_rank != 0:
            squares.zero_()  # data-parallel rank 0 has the same gradients and counts them
        world.sum(squares)
    norm = squares.sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(scale.to(gradient.dtype))
    return norm
