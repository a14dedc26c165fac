# SPDX-License-Identifier: MIT
"""Linear layers in exact arithmetic: the same bits on every mesh of ranks.

Each product is a sum of integers (`torchpar.ops._exact`). Where its terms lie on several ranks, these agree
on the exponents by a maximum, cut their parts into digits, and add integers:

| of a layer ``y = act(x @ weight.T + bias)`` | sum over | ranks add over |
|---|---|---|
| y | inputs | "tp", if the layer is split by rows |
| dL/dx | outputs | "tp", if the layer is split by columns |
| dL/dweight, dL/dbias | samples | "dp", once per step, by `ExactGradients` |

A backward pass keeps what the gradients of weights and biases need, and `ExactGradients` adds them over all
micro-batches (`torchpar.exact.gradients`). Elementwise functions have the same bits
anyway, if they are made of the operations of IEEE 754 (`torchpar.exact.ieee`).
"""

import copy
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar import nn
from torchpar.errors import ConfigError
from torchpar.exact import ieee
from torchpar.exact.operands import Operand
from torchpar.exact.tensor_parallel import shared_exponents, shared_product
from torchpar.ops.matrix import rows
from torchpar.parallel.split.layers import (
    LINEAR_LAYERS,
    Activation,
    ColumnParallelLinear,
    RowParallelLinear,
)
from torchpar.parallel.split.mlp import split_mlp

M = TypeVar("M", nn.MLP, torch.nn.Sequential)


class BackwardPass(NamedTuple):
    """The input of a layer in one forward pass, and dL/dz ``(b, out)`` of its backward pass."""

    x: Operand
    dz: Tensor


class ExactLayer(torch.nn.Module):
    """Base of the layers in exact arithmetic, which take and return float32.

    Attributes:
        passes: the backward passes that `ExactGradients` has not added yet.
        output_mesh, input_gradient_mesh: the mesh over which y, and dL/dx, are all-reduced, or None.
    """

    weight: Any  # a parameter; the base classes annotate it differently
    bias: Any  # a parameter, or None
    activation: Activation
    output_mesh: DeviceMesh | None = None
    input_gradient_mesh: DeviceMesh | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.passes: list[BackwardPass] = []
        if self.weight.dtype != torch.float32:
            raise ConfigError(f"exact arithmetic takes float32, the layer has {self.weight.dtype}")

    def is_trainable(self) -> bool:
        """Whether a parameter needs a gradient."""
        return any(p.requires_grad for p in self.parameters())

    def affine(self, x: Tensor) -> Tensor:
        """``act(x @ weight.T + bias)``."""
        for name, t in (("the input", x), ("the layer's weight", self.weight)):
            if t.dtype != torch.float32:
                raise ConfigError(f"exact arithmetic takes float32, {name} is {t.dtype}; convert it")
        latest: list[BackwardPass] = []
        recorder = _RecordPass.apply(self.weight, self.bias, self, latest)
        return _Layer.apply(x, self.weight, self.bias, recorder, self, latest)  # type: ignore[no-any-return]


class ExactLinear(ExactLayer, nn.Linear):
    """`torchpar.nn.Linear` with an ``activation``, in exact arithmetic."""

    def __init__(self, *args: Any, activation: Activation = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.activation = activation

    @classmethod
    def from_linear(cls, linear: Any) -> "ExactLinear":
        """A copy in exact arithmetic of a linear layer that is among `LINEAR_LAYERS`.

        Raises:
            ConfigError: another kind of layer.
        """
        if type(linear) not in LINEAR_LAYERS:
            expected = ", ".join(f"{kind.__module__}.{kind.__name__}" for kind in LINEAR_LAYERS)
            raise ConfigError(f"cannot copy a {type(linear).__name__}, expected one of {expected}")
        own, shape = LINEAR_LAYERS[type(linear)], (linear.in_features, linear.out_features)
        layer = cls(*shape, linear.bias is not None, activation=own, device="meta", dtype=linear.weight.dtype)
        for name, parameter in linear.named_parameters():
            setattr(layer, name, copy.deepcopy(parameter))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x)


class ExactColumnParallelLinear(ExactLayer, ColumnParallelLinear):
    """`ColumnParallelLinear` in exact arithmetic."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.input_gradient_mesh = self.mesh

    def forward(self, x: Tensor) -> Tensor:
        return self._gathered(self.affine(x))


class ExactRowParallelLinear(ExactLayer, RowParallelLinear):
    """`RowParallelLinear` in exact arithmetic."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.output_mesh = self.mesh

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(self._scattered(x))


class _RecordPass(torch.autograd.Function):
    """Append a backward pass to ``layer.passes`` if it computes gradients of the parameters.

    Autograd calls ``backward`` only in such a pass, because its inputs are the parameters. `_Layer.backward`
    also runs for the gradient of the layer's input alone.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, layer: ExactLayer, latest: list[BackwardPass]
    ) -> Tensor:
        ctx.layer, ctx.latest = layer, latest
        return weight.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None, None, None]:
        ctx.layer.passes.append(ctx.latest.pop())
        return None, None, None, None


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        recorder: Tensor,
        layer: ExactLayer,
        latest: list[BackwardPass],
    ) -> Tensor:
        matrix = rows(x.detach())  # the operand keeps it after the backward pass
        e, f = shared_exponents([matrix, weight], layer.output_mesh)
        operand = Operand(matrix, e)
        z = shared_product(operand, Operand(weight, f), layer.output_mesh)
        if bias is not None:
            z += bias
        y = z
        if layer.activation == "sigmoid":
            y = ieee.sigmoid(z)
        elif layer.activation == "relu":
            y = z.relu_()
        ctx.layer, ctx.x, ctx.shape, ctx.latest = layer, operand, x.shape, latest
        # Without an activation, the backward pass does not need y.
        ctx.save_for_backward(weight, None if layer.activation is None else y)
        result: Tensor = y.view(*x.shape[:-1], y.shape[-1])
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, Tensor, None, None]:
        if torch.is_grad_enabled():
            raise ConfigError("layers in exact arithmetic have no second derivative; leave out create_graph")
        layer: ExactLayer = ctx.layer
        weight, y = ctx.saved_tensors
        dz = rows(g)
        if layer.activation == "sigmoid":
            dz = dz * (y * (1 - y))
        elif layer.activation == "relu":
            dz = torch.ops.aten.threshold_backward(dz, y, 0)
        ctx.latest[:] = [BackwardPass(ctx.x, dz)]
        recorder_gradient = g.new_zeros(())
        if not ctx.needs_input_grad[0]:
            return None, None, None, recorder_gradient, None, None
        e, f = shared_exponents([dz, weight.T], layer.input_gradient_mesh)
        dx = shared_product(Operand(dz, e), Operand(weight.T, f), layer.input_gradient_mesh)
        return dx.view(ctx.shape), None, None, recorder_gradient, None, None


def parallel_mlp(mlp: M, mesh: DeviceMesh) -> M:
    """`torchpar.parallel.parallel_mlp` in exact arithmetic: the same bits on any mesh.

    Its layers are float32, and have their own activations.
    """
    pair = ExactColumnParallelLinear, ExactRowParallelLinear
    return split_mlp(mlp, mesh, pair, ExactLinear.from_linear, ())
