# SPDX-License-Identifier: MIT
"""Gradient clipping for a model that is split over a mesh."""

import torch
from torch import Tensor

from torchpar.parallel.launch.world import World
from torchpar.parts import is_marked


@torch.no_grad()
def clip_grad_norm_(model: torch.nn.Module, max_norm: float, world: World) -> Tensor:
    """Scale the gradient of the whole model to a norm of at most ``max_norm``, in place.

    ``‖g‖ = √Σ‖g_i‖²`` over all parameters of the model. Every part of a split parameter counts, and a
    parameter that several ranks hold whole counts once. This costs one all-reduce of one number, and nothing
    if every rank holds the whole model.

    Args:
        model: this rank's part of the model, its gradients averaged over the data-parallel ranks.
        max_norm: the largest norm that is left as it is.
        world: the ranks and their mesh.

    Returns:
        The norm before clipping, a float64 scalar, the same on every rank. A norm that is not finite makes
        every gradient so, as with `torch.nn.utils.clip_grad_norm_`.
    """
    gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
    whole = world.dp_size == world.world_size
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for p, gradient in gradients.items():
        # Data-parallel rank 0 counts for the others, which have the same gradients.
        if whole or (world.dp_rank == 0 and (is_marked(p) or world.tp_rank == 0)):
            total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
    norm = (total if whole else world.sum(total)).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(scale.to(gradient.dtype))
    return norm
