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

Init = Literal["xavier_uniform", "xavier_normal"]


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` with Xavier's initialisation, ``y = x @ weight.T + bias``.

    ``x (*, in_features)`` → ``y (*, out_features)``. The state dict holds ``weight``
    ``(out_features, in_features)`` and ``bias`` ``(out_features)``.

    Args:
        init: the distribution of the initial weight, "xavier_uniform" or "xavier_normal" (Glorot and Bengio,
            2010). Its variance is 2/(in_features + out_features). The initial bias is 0.

    Raises:
        ValueError: an unknown ``init``.
    """

    weight: torch.nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        init: Init = "xavier_uniform",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.init = init  # before `reset_parameters`, which the base class calls
        super().__init__(in_features, out_features, bias, device, dtype)

    def reset_parameters(self) -> None:
        if self.init == "xavier_uniform":
            # `torch.nn.init.xavier_uniform_` makes x·(b − a) + a, which some processors round only once.
            with torch.no_grad():
                bound = math.sqrt(6 / (self.in_features + self.out_features)) if self.weight.numel() else 0.0
                self.weight.uniform_().mul_(2 * bound).sub_(bound)
        elif self.init == "xavier_normal":
            torch.nn.init.xavier_normal_(self.weight)
        else:
            raise ValueError(f"init is {self.init!r}, expected 'xavier_uniform' or 'xavier_normal'")
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, init={self.init!r}"


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
        init: as in `Linear`.

    Raises:
        ValueError: fewer than two sizes, or sizes that are not whole numbers of at least 0; an unknown
            ``hidden``, ``output`` or ``init``.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        hidden: Literal["sigmoid", "relu"] = "sigmoid",
        output: Literal["logits", "sigmoid"] = "logits",
        *,
        init: Init = "xavier_uniform",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        hidden_layers = {"sigmoid": LinearSigmoid, "relu": LinearReLU}
        output_layers = {"logits": Linear, "sigmoid": LinearSigmoid}
        if len(sizes) < 2:
            raise ValueError(f"sizes is {list(sizes)}, expected at least an input and an output size")
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError(f"sizes is {list(sizes)}, expected whole numbers")
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
                kind(*pair, init=init, device=device, dtype=dtype)
                for kind, pair in zip(kinds, pairwise(sizes), strict=True)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        parameters = sum(p.numel() for p in self.parameters())
        return f"{'-'.join(map(str, self.sizes))}, {self.hidden}, {self.output}, {parameters:,} parameters"
