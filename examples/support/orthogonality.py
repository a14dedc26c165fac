# SPDX-License-Identifier: MIT
"""The orthogonality penalty: its value, and its gradient."""

import torch
from torch import Tensor

from torchpar.ops import matmul_t
from torchpar.parallel.split.parts import part_of
from torchpar.parallel.split.reduction import all_gather


def orthogonality_penalty(model: torch.nn.Module) -> Tensor:
    """Return ``Σ ‖W·Wᵀ − I‖²`` over the model's weight matrices (Frobenius norm)."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    products = [matmul_t(all_gather(p, part_of(p)) if part_of(p).is_slice else p) for p in matrices]
    identities = [torch.eye(len(one), dtype=one.dtype, device=one.device) for one in products]
    return torch.stack(
        [(a - b).square().sum() for a, b in zip(products, identities, strict=True)]
    ).sum()


def add_orthogonality_gradient(model: torch.nn.Module, factor: float) -> None:
    """Add the gradient of ``factor · orthogonality_penalty(model)`` to each ``p.grad`` not None.

    The penalty is the same on every rank, so its gradient is not averaged over ranks, unlike the
    gradient of the loss.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        factor * orthogonality_penalty(model), parameters, allow_unused=True
    )
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and p.grad is not None:
            p.grad += gradient
