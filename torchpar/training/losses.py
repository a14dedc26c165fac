# SPDX-License-Identifier: MIT
"""Evaluation by several ranks, and the orthogonality penalty."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.ops import matmul_t
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.reduction import all_gather
from torchpar.parts import is_marked, part_of

Loss = Callable[[Tensor, Tensor], Tensor]
# Samples per forward pass; 1, 2, 4 and 8 ranks share a test set of 10 000 evenly.
EVALUATION_BATCH = 1250
cross_entropy_sum: Loss = partial(F.cross_entropy, reduction="sum")


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor | None],
    samples: Samples,
    world: World,
    loss: Loss = cross_entropy_sum,
) -> tuple[float, Tensor]:
    """Return the mean loss and the outputs ``(n, classes)`` of all samples, on every rank.

    The samples are cut into chunks of 1250 for every number of ranks, and each rank takes some of
    the chunks. So the loss does not depend on the number of ranks. Every rank makes the same number
    of forward passes, as `fully_shard` and buffers of DistributedDataParallel need: one without a
    chunk repeats the first.

    Args:
        predict: inputs → outputs ``(b, classes)``, or None on ranks without outputs.
        loss: outputs ``(n, classes)`` in float64 and labels ``(n)`` → the sum of the losses.

    Raises:
        ConfigError: outputs of another shape, on the ranks that have them.
    """
    chunks = list(torch.arange(len(samples), device=world.device).split(EVALUATION_BATCH))
    outputs = torch.zeros(len(samples), len(samples.classes), device=world.device)
    own = world.share(torch.arange(len(chunks))).tolist()
    passes = -(-len(chunks) // world.dp_size)
    for i in own + [None] * (passes - len(own)):
        chunk = chunks[i or 0]
        mine = predict(samples.inputs(chunk))
        if mine is not None and world.owns_outputs and i is not None:
            expected = len(chunk), len(samples.classes)
            if mine.shape != expected:
                raise ConfigError(
                    f"the model's outputs have shape {tuple(mine.shape)}, expected {expected}, one "
                    "for each sample and class; change its last layer, or the classes of the "
                    "samples"
                )
            outputs[chunk] = mine.float()
    world.sum(outputs)  # zero except on the rank that computed them
    return loss(outputs.double(), samples.labels).item() / len(samples), outputs


def orthogonality_penalty(model: torch.nn.Module) -> Tensor:
    """Return ``Σ ‖W·Wᵀ − I‖²`` over the model's weight matrices (Frobenius norm)."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    products = [matmul_t(all_gather(p, part_of(p)) if is_marked(p) else p) for p in matrices]
    identities = [torch.eye(len(one), dtype=one.dtype, device=one.device) for one in products]
    return torch.stack(
        [(a - b).square().sum() for a, b in zip(products, identities, strict=True)]
    ).sum()


def add_orthogonality_gradient(model: torch.nn.Module, factor: float) -> None:
    """Add the gradient of ``factor · orthogonality_penalty(model)`` to each ``p.grad`` that is not
    None.

    The penalty is the same on every rank, so its gradient is not averaged over ranks as the loss's
    is.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        factor * orthogonality_penalty(model), parameters, allow_unused=True
    )
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and p.grad is not None:
            p.grad += gradient
