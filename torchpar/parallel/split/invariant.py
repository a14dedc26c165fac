# SPDX-License-Identifier: MIT
"""Gradients with the same bits for every number of ranks (`torchpar.parallel.split.reduction`)."""

from collections.abc import Callable

import torch
from torch import Tensor

from torchpar.parallel.launch.world import World
from torchpar.parallel.split.reduction import all_reduce, tree_sum
from torchpar.profile.phases import phase

LossSum = Callable[[Tensor, Tensor], Tensor]  # outputs, labels → the loss summed over samples


def invariant_gradients(
    model: torch.nn.Module, world: World, x: Tensor, labels: Tensor, global_size: int, loss_sum: LossSum
) -> Tensor:
    """Set each ``p.grad`` to the gradient of the mean loss over the global batch.

    A rank computes the gradient of each shard of the batch by itself. A tree within the rank and a
    butterfly between ranks add the shards' gradients and losses, in one message.

    Args:
        model: its layers' reduction is invariant too.
        world: its mesh's "dp" dimension shares each batch.
        x, labels: this rank's share of the global batch.
        global_size: samples of the global batch.

    Returns:
        The sum of the losses of the global batch on the first rank of "dp", 0 on the others.
    """
    mesh, share = world.mesh["dp"], world.share(global_size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    terms = []
    for x_i, labels_i in zip(share.split(x, 0), share.split(labels, 0), strict=True):
        with phase("forward"):
            loss = loss_sum(model(x_i), labels_i)
        with phase("backward"):
            gradients = torch.autograd.grad(loss, parameters)
            terms.append(torch.cat([loss.detach().view(1), *(g.flatten() for g in gradients)]))
    total = tree_sum(terms)
    all_reduce(total, mesh, "invariant")
    loss, gradient = total[:1].squeeze(0), total[1:] / global_size
    for p, g in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        p.grad = g.view_as(p)
    return loss if mesh.get_local_rank() == 0 else torch.zeros_like(loss)
