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
micro-batches (`torchpar.parallel.split.exact_gradients`). What is computed element by element has the same
bits anyway, if it is made of the operations of IEEE 754 (`torchpar.ieee`).
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar import ieee, nn
from torchpar.errors import ConfigError
from torchpar.ops import _exact
from torchpar.ops._exact import row_exponents
from torchpar.ops._matrix import rows
from torchpar.parallel.split.layers import (
    LINEAR_LAYERS,
    Activation,
    Arithmetic,
    ColumnParallelLinear,
    RowParallelLinear,
)
from torchpar.parallel.split.operands import Operand
from torchpar.parallel.split.reduction import all_reduce


class BackwardPass(NamedTuple):
    """A backward pass, as its gradients need it: the layer's input, and dL/dz ``(b, out)``."""

    x: Operand
    dz: Tensor


class ExactLayer(torch.nn.Module):
    """Base of the layers in exact arithmetic, which take and return float32.

    Attributes:
        passes: the backward passes that `ExactGradients` has not added yet.
        adds_outputs, adds_inputs: the mesh whose ranks add y, and dL/dx; None for no ranks.
    """

    weight: Any  # a parameter; the bases differ in what they call it
    bias: Any  # a parameter, or None
    activation: Activation
    adds_outputs: DeviceMesh | None = None
    adds_inputs: DeviceMesh | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.passes: list[BackwardPass] = []
        if self.weight.dtype != torch.float32:
            raise ConfigError(f"exact arithmetic takes float32, the layer has {self.weight.dtype}")

    def learns(self) -> bool:
        """Whether a parameter needs a gradient."""
        return any(p.requires_grad for p in self.parameters())

    def affine(self, x: Tensor) -> Tensor:
        """``act(x @ weight.T + bias)``."""
        for name, t in (("the input", x), ("the layer's weight", self.weight)):
            if t.dtype != torch.float32:
                raise ConfigError(f"exact arithmetic takes float32, {name} is {t.dtype}; convert it")
        latest: list[BackwardPass] = []
        anchor = _Anchor.apply(self.weight, self.bias, self, latest)
        return _Layer.apply(x, self.weight, self.bias, anchor, self, latest)  # type: ignore[no-any-return]


class ExactLinear(ExactLayer, nn.Linear):
    """`torchpar.nn.Linear` with an ``activation``, in exact arithmetic."""

    def __init__(self, *args: Any, activation: Activation = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.activation = activation

    @classmethod
    def from_linear(cls, linear: Any) -> "ExactLinear":
        """The twin of a linear layer among `LINEAR_LAYERS`, with copies of its parameters.

        Raises:
            ConfigError: another kind of layer.
        """
        if type(linear) not in LINEAR_LAYERS:
            expected = ", ".join(f"{kind.__module__}.{kind.__name__}" for kind in LINEAR_LAYERS)
            raise ConfigError(f"cannot copy a {type(linear).__name__}, expected one of {expected}")
        own, shape = LINEAR_LAYERS[type(linear)], (linear.in_features, linear.out_features)
        twin = cls(*shape, linear.bias is not None, activation=own, device="meta", dtype=linear.weight.dtype)
        for name, parameter in linear.named_parameters():
            setattr(twin, name, copy.deepcopy(parameter))
        return twin

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x)


class ExactColumnParallelLinear(ExactLayer, ColumnParallelLinear):
    """`ColumnParallelLinear` in exact arithmetic."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.adds_inputs = self.mesh

    def forward(self, x: Tensor) -> Tensor:
        return self._gathered(self.affine(x))


class ExactRowParallelLinear(ExactLayer, RowParallelLinear):
    """`RowParallelLinear` in exact arithmetic."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.adds_outputs = self.mesh

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(self._scattered(x))


class _Anchor(torch.autograd.Function):
    """Stands for the parameters in the graph of a layer.

    Autograd runs its backward only in a backward pass for a parameter. `_Layer`'s runs for an input, too.
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
        anchor: Tensor,
        layer: ExactLayer,
        latest: list[BackwardPass],
    ) -> Tensor:
        matrix = rows(x.detach())  # which the operand keeps after the backward pass
        e, f = _shared_exponents([matrix, weight], layer.adds_outputs)
        operand = Operand(matrix, e)
        z = _product(operand, Operand(weight, f), layer.adds_outputs)
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
        anchor = g.new_zeros(())
        if not ctx.needs_input_grad[0]:
            return None, None, None, anchor, None, None
        e, f = _shared_exponents([dz, weight.T], layer.adds_inputs)
        dx = _product(Operand(dz, e), Operand(weight.T, f), layer.adds_inputs)
        return dx.view(ctx.shape), None, None, anchor, None, None


def _shared_exponents(matrices: list[Tensor], mesh: DeviceMesh | None) -> list[Tensor]:
    """The exponents of the rows of ``matrices``, whose columns the ranks of ``mesh`` share."""
    exponents = [row_exponents(t) for t in matrices]
    if mesh is None or mesh.size() == 1:
        return exponents
    largest = all_reduce(torch.cat(exponents), mesh, dist.ReduceOp.MAX)
    return list(largest.split([len(e) for e in exponents]))


def _product(a: Operand, b: Operand, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None or mesh.size() == 1:
        return a.product(b)
    return _exact.rounded(all_reduce(a.sums(b), mesh), a.e, b.e)


def arithmetic_of(model: torch.nn.Module) -> Arithmetic:
    """Return "exact" if a layer of ``model`` is in exact arithmetic, else "fast"."""
    return "exact" if any(isinstance(module, ExactLayer) for module in model.modules()) else "fast"
