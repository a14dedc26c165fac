# SPDX-License-Identifier: MIT
"""Copies of the NumPy network's weights in PyTorch."""

import torch

from torchpar.baselines.numpy_mlp import MLP


@torch.no_grad()
def copy_weights(source: MLP, model: torch.nn.Module) -> None:
    """Copy the weights and biases of ``source`` to ``model``, linear layers of the same sizes."""
    layers = zip(source.weights, source.biases, strict=True)
    for p, value in zip(model.parameters(), (t for layer in layers for t in layer), strict=True):
        p.copy_(torch.from_numpy(value.T))
