# SPDX-License-Identifier: MIT
"""Evaluation of a model, whose test samples the ranks share."""

from collections.abc import Callable

import torch
from torch import Tensor

from torchpar.data import Samples
from torchpar.parallel.launch.world import World
from torchpar.training.losses import Loss, loss_sum

# Samples per forward pass; 1, 2, 4 and 8 ranks share a test set of 10 000 evenly.
EVALUATION_BATCH = 1250


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor | None], samples: Samples, world: World, loss: Loss
) -> tuple[float, Tensor]:
    """Return the mean loss and the outputs ``(n, classes)`` of all samples, on every rank.

    The samples are cut into chunks of `EVALUATION_BATCH` for every number of ranks, and each rank takes some
    of the chunks. So the loss does not depend on the number of ranks.

    Args:
        predict: inputs → outputs, or None on ranks without outputs.
    """
    chunks = list(torch.arange(len(samples), device=world.device).split(EVALUATION_BATCH))
    share = torch.arange(len(chunks)).tensor_split(world.dp_size)[world.dp_rank].tolist()
    outputs = torch.zeros(len(samples), len(samples.classes), device=world.device)
    for chunk in (chunks[i] for i in share):
        mine = predict(samples.inputs(chunk))
        if mine is not None and world.owns_outputs:
            outputs[chunk] = mine.float()
    world.sum(outputs)  # zero except on the rank that computed them
    return loss_sum(loss, outputs.double(), samples.labels).item() / len(samples), outputs
