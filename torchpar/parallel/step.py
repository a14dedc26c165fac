# SPDX-License-Identifier: MIT
"""How the ranks come to the gradient of one step: each by itself, by a fixed tree, or along a pipeline."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from torchpar.parallel.reduction import all_reduce, tree_sum
from torchpar.parallel.world import World
from torchpar.phases import NoPhases, Phases

LossSum = Callable[[Tensor, Tensor], Tensor]  # outputs, labels → the loss summed over samples


class Step(Protocol):
    """What `torchpar.training.fit` needs of a way to train."""

    def gradients(
        self, x: Tensor, labels: Tensor, global_size: int, loss_sum: LossSum, measure: Phases | NoPhases
    ) -> Tensor:
        """Leave the gradient of the mean loss over the global batch in every parameter's ``grad``.

        Args:
            x, labels: this rank's share of the global batch.
            global_size: samples of the global batch.

        Returns:
            This rank's part of the sum of the losses: the ranks' parts add up to it.
        """
        ...

    def outputs(self, x: Tensor) -> Tensor | None:
        """The model's outputs, without gradient; None on ranks that do not come to have them."""
        ...


class ReplicaStep:
    """A forward and a backward pass over the whole model on every rank.

    Args:
        forward: the model, or its DistributedDataParallel wrapper, which averages the gradients over
            the ranks that share a batch; compiled or not.
        data_ranks: how many they are.
    """

    def __init__(self, forward: torch.nn.Module, data_ranks: int = 1):
        self.forward = forward
        self.data_ranks = data_ranks

    def gradients(
        self, x: Tensor, labels: Tensor, global_size: int, loss_sum: LossSum, measure: Phases | NoPhases
    ) -> Tensor:
        with measure("forward"):
            loss = loss_sum(self.forward(x), labels)
            # The wrapper averages over the ranks, whose shares may differ in size.
            objective = loss * (self.data_ranks / global_size)
        with measure("backward"):
            objective.backward()
        return loss.detach()

    def outputs(self, x: Tensor) -> Tensor | None:
        module = getattr(self.forward, "module", self.forward)  # the wrapper would set up a backward pass
        return module(x)  # type: ignore[no-any-return]


class InvariantStep:
    """Gradients with the same bits for every number of ranks (`torchpar.parallel.reduction`).

    A rank computes the gradient of each shard of the batch by itself; a tree within the rank and a
    butterfly between ranks add them, and the losses with them.

    Args:
        model: of layers whose reduction is invariant too.
        world: its mesh's "dp" dimension shares each batch.
    """

    def __init__(self, model: torch.nn.Module, world: World):
        self.model = model
        self.world = world

    def gradients(
        self, x: Tensor, labels: Tensor, global_size: int, loss_sum: LossSum, measure: Phases | NoPhases
    ) -> Tensor:
        assert self.world.mesh is not None
        mesh, share = self.world.mesh["dp"], self.world.share(global_size)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        terms = []
        for x_i, labels_i in zip(share.split(x, 0), share.split(labels, 0), strict=True):
            with measure("forward"):
                loss = loss_sum(self.model(x_i), labels_i)
            with measure("backward"):
                gradients = torch.autograd.grad(loss, parameters)
                terms.append(torch.cat([loss.detach().view(1), *(g.flatten() for g in gradients)]))
        total = tree_sum(terms)
        all_reduce(total, mesh, "invariant")
        loss, gradient = total[:1].squeeze(0), total[1:] / global_size
        for p, g in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p)
        return loss if mesh.get_local_rank() == 0 else torch.zeros_like(loss)

    def outputs(self, x: Tensor) -> Tensor | None:
        return self.model(x)  # type: ignore[no-any-return]
