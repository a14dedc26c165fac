# SPDX-License-Identifier: MIT
"""Gradient clipping for a model that is split over a mesh."""

import torch
from torch import Tensor

from torchpar.parallel.launch.world import World
from torchpar.parts import part_of


@torch.no_grad()
def clip_grad_norm_(model: torch.nn.Module, max_norm: float, world: World) -> Tensor:
    """Scale the gradient of the unsharded model to a norm of at most ``max_norm``, in place.

    ``‖g‖ = √Σ‖g_i‖²`` over all parameters of the model. Every shard of a parameter counts, and a
    parameter that is replicated on several ranks counts once. This costs one all-reduce of one
    number, and nothing if the model is replicated on every rank.

    Args:
        model: this rank's part of the model, with gradients that are averaged over the
            data-parallel ranks.
        max_norm: the largest norm that is not scaled.
        world: the ranks and their mesh.

    Returns:
        The norm before clipping, a float64 scalar, the same on every rank. A norm that is not
        finite makes every gradient not finite, as with `torch.nn.utils.clip_grad_norm_`.
    """
    is_replicated = world.dp_size == world.world_size
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for p in model.parameters():
        # All data-parallel ranks have the same gradients, of which those of rank 0 count.
        counts = is_replicated or (
            world.dp_rank == 0 and (part_of(p).is_slice or world.tp_rank == 0)
        )
        if counts and p.grad is not None:
            total += torch.linalg.vector_norm(p.grad, dtype=torch.float64).square()
    norm = (total if is_replicated else world.sum(total)).sqrt()
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm
