# SPDX-License-Identifier: MIT
"""Losses as sums over samples, and the orthogonality penalty."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torchpar.errors import ConfigError
from torchpar.ops import matmul_t
from torchpar.parallel.split.layers import split_parameters

Loss = Literal["cross-entropy", "bce", "mse"]
Gram = Callable[[Tensor], Tensor]


def loss_sum(loss: Loss, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the loss summed over samples, and for "bce" and "mse" over classes too.

    Args:
        loss: "cross-entropy" takes logits: −log softmax(outputs)[label]. "bce" takes probabilities and
            "mse" takes any outputs; both compare them with the one-hot label.
        outputs: ``(b, classes)``.
        labels: ``(b)`` int64.

    Raises:
        ConfigError: an unknown loss.
    """
    if loss == "cross-entropy":
        return F.cross_entropy(outputs, labels, reduction="sum")
    targets = F.one_hot(labels, outputs.shape[-1]).to(outputs)
    if loss == "bce":
        return F.binary_cross_entropy(outputs, targets, reduction="sum")
    if loss == "mse":
        return F.mse_loss(outputs, targets, reduction="sum")
    raise ConfigError(f"loss is {loss!r}, expected 'cross-entropy', 'bce' or 'mse'")


def orthogonality_penalty(model: torch.nn.Module, gram: Gram = matmul_t) -> Tensor:
    """Return ``Σ ‖W·Wᵀ − I‖²`` over the model's weight matrices (Frobenius norm).

    Args:
        gram: the product W·Wᵀ of a matrix.

    Raises:
        ConfigError: the model has no weight matrix.
    """
    split = {layer.weight: layer.full_weight for _, _, layer in split_parameters(model)}
    weights = [split[p]() if p in split else p for p in model.parameters() if p.dim() == 2]
    if not weights:
        raise ConfigError("the model has no weight matrix, and an orthogonality penalty needs one; drop it")
    products = [gram(weight) for weight in weights]
    identities = [torch.eye(len(one), dtype=one.dtype, device=one.device) for one in products]
    return torch.stack([(a - b).square().sum() for a, b in zip(products, identities, strict=True)]).sum()


def add_orthogonality_gradient(model: torch.nn.Module, factor: float, gram: Gram = matmul_t) -> None:
    """Add the gradient of ``factor · orthogonality_penalty(model)`` to each ``p.grad`` that is not None.

    The penalty is the same on every rank, so its gradient is not averaged over ranks as the loss's is.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        factor * orthogonality_penalty(model, gram), parameters, allow_unused=True
    )
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and p.grad is not None:
            p.grad += gradient
