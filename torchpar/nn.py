# SPDX-License-Identifier: MIT
"""Linear layers, layers with an activation, and a multilayer perceptron on torchpar's operators.

`Linear` is a `torch.nn.Linear`. `LinearSigmoid`, `LinearReLU`, `LinearTanh` and `LinearMaxout` are
not, since a tool that finds a `torch.nn.Linear` takes it for a linear map: LoRA would add its
product after the activation and merge it before, and torchao would replace the layer by a linear
one, without its activation. Such tools leave the layers as they are, or raise an error
(docs/own_model.md). `torchpar.parallel.split.styles` shards the layers by `parallelize_module`.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, SupportsIndex

import torch
from torch import Tensor

from torchpar.ops import linear_sigmoid, maximum
from torchpar.ops.cpu import linear


def _reset(layer: "Linear | LinearParameters") -> None:
    """Draw the weight by Xavier's uniform initialization, and set the bias to 0.

    `torch.nn.init.xavier_uniform_` makes x·(b − a) + a, which some processors round only once.
    """
    with torch.no_grad():
        bound = (
            math.sqrt(6 / (layer.in_features + layer.out_features)) if layer.weight.numel() else 0.0
        )
        layer.weight.uniform_().mul_(2 * bound).sub_(bound)
    if layer.bias is not None:
        torch.nn.init.zeros_(layer.bias)


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` with Xavier's uniform initialization, ``y = x @ weight.T + bias``.

    ``x (*, in_features)`` → ``y (*, out_features)``. The state dict holds ``weight``
    ``(out_features, in_features)`` and ``bias`` ``(out_features)``. The variance of the initial
    weight is 2/(in_features + out_features) (Glorot and Bengio, 2010), and the initial bias is 0.
    """

    weight: torch.nn.Parameter

    def reset_parameters(self) -> None:
        _reset(self)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LinearParameters(torch.nn.Module):
    """The parameters of a `Linear`: the base of layers that are no linear maps.

    The state dict and the initialization are those of `Linear`. A subclass defines ``forward``.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.

    Attributes:
        pieces: the linear maps of each unit, whose weights stand below each other in ``weight``.
    """

    pieces: ClassVar[int] = 1
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        rows = self.pieces * out_features
        self.weight = torch.nn.Parameter(torch.empty(rows, in_features, device=device, dtype=dtype))
        vector = torch.nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", vector)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset(self)

    @property
    def _is_hf_initialized(self) -> bool:
        """Whether transformers has loaded or initialized this layer; initialize it if not.

        transformers asks this of each layer. Then it initializes what a checkpoint lacked, which is
        memory without values, but only in the layers that it knows. What the model's own
        `_init_weights` does with this layer comes after, and counts.
        """
        is_done: bool = self.__dict__.get("_is_hf_initialized", False)
        # Others that read all attributes, as torch.jit.trace does, must not draw the weights anew.
        asks = sys._getframe(1).f_globals.get("__name__", "").startswith("transformers.")
        if asks and not is_done:
            loaded = [
                (p, p.detach().clone())
                for p in self.parameters(recurse=False)
                if getattr(p, "_is_hf_initialized", False)
            ]
            self.reset_parameters()
            with torch.no_grad():
                for p, value in loaded:
                    p.copy_(value)
        return is_done

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        self.__dict__["_is_hf_initialized"] = value

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


class LinearSigmoid(LinearParameters):
    """A linear layer followed by a sigmoid, ``y = sigmoid(x @ weight.T + bias)``.

    It calls `torchpar.linear_sigmoid`. Arguments, shapes and state dict are those of `Linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear_sigmoid(x, self.weight, self.bias)


class LinearReLU(LinearParameters):
    """A linear layer followed by `torch.relu`, ``y = max(x @ weight.T + bias, 0)``.

    Arguments, shapes and state dict are those of `Linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(linear(x, self.weight, self.bias))


class LinearTanh(LinearParameters):
    """A linear layer followed by `torch.tanh`, ``y = tanh(x @ weight.T + bias)``.

    Arguments, shapes and state dict are those of `Linear`.
    """

    # 2·linear_sigmoid(x, 2·weight, 2·bias) − 1 would be the same, but its error is the error of a
    # number near 1.
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(linear(x, self.weight, self.bias))


class LinearMaxout(LinearParameters):
    """The elementwise maximum of two linear layers, ``y = max(x @ w1.T + b1, x @ w2.T + b2)``.

    ``x (*, in_features)`` → ``y (*, out_features)``. The state dict holds ``weight``
    ``(2·out_features, in_features)``, with w1 above w2, and ``bias`` ``(2·out_features)``, with b1
    before b2. So one product computes both pieces. `torchpar.maximum` takes their maximum, and
    gives its gradient: the gradient of a unit goes to its larger piece. The variance of the initial
    weight is 2/(in_features + out_features), as for a `Linear` of one piece.
    `torchpar.optim.Muon.for_model` takes w1 and w2 as two matrices.

    Source: Goodfellow, Warde-Farley, Mirza, Courville and Bengio, "Maxout Networks", ICML 2013,
    with k = 2.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
    """

    pieces: ClassVar[int] = 2

    def forward(self, x: Tensor) -> Tensor:
        pieces = linear(x, self.weight, self.bias).split([self.out_features] * 2, -1)
        return maximum(pieces[0], pieces[1])  # torch.fx cannot unpack what it traces


Hidden = Literal["sigmoid", "relu", "tanh", "maxout"]
"""The names of the activations between the layers of an `MLP`."""

HIDDEN_LAYERS: dict[Hidden, type[LinearParameters]] = {
    "sigmoid": LinearSigmoid,
    "relu": LinearReLU,
    "tanh": LinearTanh,
    "maxout": LinearMaxout,
}


def _is_width(size: object) -> bool:
    return isinstance(size, SupportsIndex) and size.__index__() >= 1


class MLP(torch.nn.Module):
    """A multilayer perceptron: linear layers with an activation between them.

    ``x (*, sizes[0])`` → ``y (*, sizes[-1])``. The state dict's keys are ``layers.<i>.weight``
    ``(sizes[i + 1], sizes[i])`` and ``layers.<i>.bias`` ``(sizes[i + 1])`` for i = 0, 1, …. Hidden
    layers of "maxout" have twice as many rows, see `LinearMaxout`.

    Args:
        sizes: at least two widths, from the input to the output.
        hidden: the hidden layers: "sigmoid" for `LinearSigmoid`, "relu" for `LinearReLU`, "tanh"
            for `LinearTanh`, or "maxout" for `LinearMaxout`.
        output: "logits" for no activation after the last layer, or "sigmoid".

    Raises:
        ValueError: fewer than two sizes, or one that is no integer of 1 or more; an
            unknown ``hidden`` or ``output``.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        hidden: Hidden = "sigmoid",
        output: Literal["logits", "sigmoid"] = "logits",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        output_layers: dict[str, type[Linear | LinearParameters]] = {
            "logits": Linear,
            "sigmoid": LinearSigmoid,
        }
        if not isinstance(sizes, Iterable) or not all(map(_is_width, sizes)):
            shown = list(sizes) if isinstance(sizes, list | tuple) else repr(sizes)
            raise ValueError(f"sizes is {shown}, expected widths of at least 1, as [784, 128, 10]")
        if len(sizes) < 2:
            raise ValueError(
                f"sizes is {list(sizes)}, expected at least an input and an output size"
            )
        if hidden not in HIDDEN_LAYERS:
            raise ValueError(f"hidden is {hidden!r}, expected one of {sorted(HIDDEN_LAYERS)}")
        if output not in output_layers:
            raise ValueError(f"output is {output!r}, expected one of {sorted(output_layers)}")
        self.sizes = tuple(sizes)
        self.hidden: Hidden = hidden
        self.output = output
        kinds = [HIDDEN_LAYERS[hidden]] * (len(sizes) - 2) + [output_layers[output]]
        self.layers = torch.nn.Sequential(
            *(
                kind(*pair, device=device, dtype=dtype)
                for kind, pair in zip(kinds, pairwise(sizes), strict=True)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]
