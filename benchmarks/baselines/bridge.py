# SPDX-License-Identifier: MIT
"""One network in NumPy and in PyTorch."""

import torch

from benchmarks.baselines.numpy_mlp import MLP


@torch.no_grad()
def copy_weights(source: MLP, model: torch.nn.Module) -> None:
    """Give a network of linear layers, whose parameters are weight and bias of each in turn, ``source``'s."""
    layers = zip(source.weights, source.biases, strict=True)
    for p, value in zip(model.parameters(), (t for layer in layers for t in layer), strict=True):
        p.copy_(torch.from_numpy(value.T))
