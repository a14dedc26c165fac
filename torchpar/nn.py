# SPDX-License-Identifier: MIT
"""Linear layers and a multilayer perceptron on torchpar's operators."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from torchpar.ops import linear_sigmoid
from torchpar.ops.linear_cpu import linear


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` with Xavier's uniform initialisation, ``y = x @ weight.T + bias``.

    ``x (*, in_features)`` → ``y (*, out_features)``. The state dict holds ``weight``
    ``(out_features, in_features)`` and ``bias`` ``(out_features)``. The variance of the initial weight is
    2/(in_features + out_features) (Glorot and Bengio, 2010), and the initial bias is 0.
    """

    weight: torch.nn.Parameter

    def reset_parameters(self) -> None:
        # `torch.nn.init.xavier_uniform_` makes x·(b − a) + a, which some processors round only once.
        with torch.no_grad():
            bound = math.sqrt(6 / (self.in_features + self.out_features)) if self.weight.numel() else 0.0
            self.weight.uniform_().mul_(2 * bound).sub_(bound)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LinearSigmoid(Linear):
    """A linear layer followed by a sigmoid, ``y = sigmoid(x @ weight.T + bias)``.

    It calls `torchpar.linear_sigmoid`. Arguments, shapes and state dict are those of `Linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear_sigmoid(x, self.weight, self.bias)


class LinearReLU(Linear):
    """A linear layer followed by `torch.relu`, ``y = max(x @ weight.T + bias, 0)``.

    Arguments, shapes and state dict are those of `Linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class MLP(torch.nn.Module):
    """A multilayer perceptron: linear layers with an activation between them.

    ``x (*, sizes[0])`` → ``y (*, sizes[-1])``. The state dict's keys are ``layers.<i>.weight``
    ``(sizes[i + 1], sizes[i])`` and ``layers.<i>.bias`` ``(sizes[i + 1])`` for i = 0, 1, ….

    Args:
        sizes: at least two widths, from the input to the output.
        hidden: the activation between layers, "sigmoid" or "relu".
        output: "logits" for no activation after the last layer, or "sigmoid".

    Raises:
        ValueError: fewer than two sizes; an unknown ``hidden`` or ``output``.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        hidden: Literal["sigmoid", "relu"] = "sigmoid",
        output: Literal["logits", "sigmoid"] = "logits",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        hidden_layers = {"sigmoid": LinearSigmoid, "relu": LinearReLU}
        output_layers = {"logits": Linear, "sigmoid": LinearSigmoid}
        if len(sizes) < 2:
            raise ValueError(f"sizes is {list(sizes)}, expected at least an input and an output size")
        if hidden not in hidden_layers:
            raise ValueError(f"hidden is {hidden!r}, expected one of {sorted(hidden_layers)}")
        if output not in output_layers:
            raise ValueError(f"output is {output!r}, expected one of {sorted(output_layers)}")
        self.sizes = tuple(sizes)
        self.hidden = hidden
        self.output = output
        kinds = [hidden_layers[hidden]] * (len(sizes) - 2) + [output_layers[output]]
        self.layers = torch.nn.Sequential(
            *(
                kind(*pair, device=device, dtype=dtype)
                for kind, pair in zip(kinds, pairwise(sizes), strict=True)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]
