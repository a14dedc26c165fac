# SPDX-License-Identifier: MIT
"""Linear layers in exact arithmetic: the same bits on every mesh of ranks.

Each product is a sum of integers (`torchpar.ops._exact`). Where its terms lie on several ranks, these agree
on the exponents by a maximum, cut their parts into digits, and add integers:

| of a layer ``y = act(x @ weight.T + bias)`` | sum over | ranks add over |
|---|---|---|
| y | inputs | "tp", if the layer is split by rows |
| dL/dx | outputs | "tp", if the layer is split by columns |
| dL/dweight, dL/dbias | samples | "dp", once per step, by `ExactGradients` |

A backward pass keeps what the gradients of weights and biases need, for a sum over all micro-batches. What is
computed element by element has the same bits anyway, if it is made of the operations of IEEE 754
(`torchpar.ieee`).
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
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.layers import (
    LINEAR_LAYERS,
    Activation,
    Arithmetic,
    ColumnParallelLinear,
    RowParallelLinear,
)
from torchpar.parallel.split.operands import Operand, rounded_sums, row_sums
from torchpar.parallel.split.reduction import all_reduce
from torchpar.parallel.split.shared_memory import SharedSum, make_shared_sum
from torchpar.profile.collectives import all_reduced
from torchpar.profile.phases import phase


class _Kept(NamedTuple):
    """A backward pass of a layer: its input, and dL/dz ``(b, out)``."""

    x: Operand
    dz: Tensor


class _Exact(torch.nn.Module):
    """Base of the layers in exact arithmetic, which take and return float32.

    Attributes:
        kept: the backward passes since the last step.
        adds_outputs, adds_inputs: the mesh whose ranks add y, and dL/dx; None for no ranks.
    """

    weight: Any  # a parameter; the bases differ in what they call it
    bias: Any  # a parameter, or None
    activation: Activation
    adds_outputs: DeviceMesh | None = None
    adds_inputs: DeviceMesh | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kept: list[_Kept] = []
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
        return _Layer.apply(x, self.weight, self.bias, self)  # type: ignore[no-any-return]


class ExactLinear(_Exact, nn.Linear):
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


class ExactColumnParallelLinear(_Exact, ColumnParallelLinear):
    """`ColumnParallelLinear` in exact arithmetic."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.adds_inputs = self.mesh

    def forward(self, x: Tensor) -> Tensor:
        return self._gathered(self.affine(x))


class ExactRowParallelLinear(_Exact, RowParallelLinear):
    """`RowParallelLinear` in exact arithmetic."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.adds_outputs = self.mesh

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(self._scattered(x))


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: _Exact) -> Tensor:
        matrix = rows(x)
        e, f = _shared_exponents([matrix, weight], layer.adds_outputs)
        operand = Operand(matrix, e)
        z = _product(operand, Operand(weight, f), layer.adds_outputs)
        if bias is not None:
            z += bias
        y = ieee.sigmoid(z) if layer.activation == "sigmoid" else z
        ctx.layer, ctx.x, ctx.shape = layer, operand, x.shape
        # Without an activation, the backward pass does not need y.
        ctx.save_for_backward(weight, None if layer.activation is None else y)
        if layer.activation == "relu":
            y = z.clamp(min=0)
        result: Tensor = y.view(*x.shape[:-1], y.shape[-1])
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, None]:
        if torch.is_grad_enabled():
            raise ConfigError("layers in exact arithmetic have no second derivative; leave out create_graph")
        layer: _Exact = ctx.layer
        weight, y = ctx.saved_tensors
        dz = rows(g)
        if layer.activation == "sigmoid":
            dz = dz * (y * (1 - y))
        elif layer.activation == "relu":
            dz = dz * y.heaviside(y.new_tensor(0.5))  # as `torchpar.maximum`; y is before the ReLU
        if layer.learns():
            layer.kept.append(_Kept(ctx.x, dz))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        e, f = _shared_exponents([dz, weight.T], layer.adds_inputs)
        dx = _product(Operand(dz, e), Operand(weight.T, f), layer.adds_inputs)
        return dx.view(ctx.shape), None, None, None


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


class ExactGradients:
    """Sums the gradients of a model's weights and biases over all samples of a step.

        (loss_sum(model(x), labels) / global_size).backward()
        exact_gradients()  # sets each p.grad

    With dz = dL/dz ``(b, out)`` of a layer, and e_b the exponent of sample b in its input x:

        dL/dweight = (2^e ⊙ dz)ᵀ·(2^−e ⊙ x)        dL/dbias = Σ_b dz_b

    so that the digits of the forward pass serve here too.

    Args:
        model: its linear layers are in exact arithmetic, as those of `parallel_mlp(…, arithmetic="exact")`.
            It passes over a layer whose parameters are all frozen when this object is made. The inputs and
            the incoming gradients of its layers must not be changed between the passes and the call.
        world: its "dp" ranks share each batch. Every rank must make and call this object.

    Raises:
        ConfigError: a parameter of the model belongs to no layer in exact arithmetic.
    """

    def __init__(self, model: torch.nn.Module, world: World):
        layers = [module for module in model.modules() if isinstance(module, _Exact)]
        own = {p for layer in layers for p in layer.parameters()}
        for name, p in model.named_parameters():
            if p not in own:
                raise ConfigError(
                    f"{name} is of no layer in exact arithmetic, expected those of parallel_mlp"
                )
        self.layers = [layer for layer in layers if layer.learns()]
        self.mesh = world.mesh["dp"]
        self._maximum: SharedSum | None = None
        self._sum: SharedSum | None = None
        if self.layers and self.mesh.size() > 1 and world.device.type == "cpu":
            parameters = [p for layer in self.layers for p in layer.parameters()]
            exponents, sums = [(len(p), 1) for p in parameters], [p.shape for p in parameters]
            group, timeout = self.mesh.get_group(), world.timeout
            self._maximum = make_shared_sum(group, exponents, torch.int32, timeout, torch.maximum)
            self._sum = make_shared_sum(group, sums, torch.int64, timeout)

    def __call__(self, passes: int | None = None) -> None:
        """Add the gradients to each ``p.grad``, and forget what the layers kept.

        Args:
            passes: the number of the last backward passes that count, by default all since the last call. A
                pipeline first runs a pass of arbitrary numbers, to learn their shapes.

        Raises:
            ConfigError: there were fewer backward passes, or none.
        """
        with phase("backward"):
            terms = [term for layer in self.layers for term in _terms(layer, passes)]
            exponents = [row_exponents(term.left) for term in terms]
            self._reduce(exponents, self._maximum, dist.ReduceOp.MAX)
            totals = [term.sums(e) for term, e in zip(terms, exponents, strict=True)]
            self._reduce(totals, self._sum, dist.ReduceOp.SUM)
            for term, total, e in zip(terms, totals, exponents, strict=True):
                p = term.parameter
                if p.requires_grad:
                    gradient = term.gradient(total, e)
                    p.grad = gradient if p.grad is None else p.grad.add_(gradient)

    def _reduce(self, tensors: list[Tensor], shared: SharedSum | None, op: Any) -> None:
        """Replace ``tensors`` by their sums or maxima over the ranks."""
        if shared is not None:
            with all_reduced("dp", shared.ranks, shared.nbytes):
                shared(tensors)
        elif tensors and self.mesh.size() > 1:
            flat = all_reduce(torch.cat([t.flatten() for t in tensors]), self.mesh, op)
            for t, reduced in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(reduced.view_as(t))


class _Term(NamedTuple):
    """The gradient of a parameter: ``left (out, b)``·x, for a weight, or the sums of the rows of ``left``."""

    parameter: Tensor
    left: Tensor
    x: Operand | None

    def sums(self, e: Tensor) -> Tensor:
        if self.x is None:
            return row_sums(self.left, e).view(-1)
        return Operand(self.left, e).sums(self.x)

    def gradient(self, total: Tensor, e: Tensor) -> Tensor:
        if self.x is None:
            return rounded_sums(total.view(-1, 1), e).view(-1)
        return _exact.rounded(total, e, self.x.e)


def _terms(layer: _Exact, passes: int | None) -> list[_Term]:
    kept, layer.kept = layer.kept[-(passes or 0) :], []
    if len(kept) < (passes or 1):
        found = f"a layer saw {len(kept)} backward passes since the last call, expected {passes or 1}"
        raise ConfigError(f"{found}; call backward() of the loss before")
    x = Operand.cat([one.x for one in kept])
    dz = torch.cat([one.dz for one in kept]) if len(kept) > 1 else kept[0].dz
    terms = [_Term(layer.weight, _exact.scaled(dz, x.e).T, x.columns())]
    return terms if layer.bias is None else [*terms, _Term(layer.bias, dz.T, None)]


def arithmetic_of(model: torch.nn.Module) -> Arithmetic:
    """Return "exact" if a layer of ``model`` is in exact arithmetic, else "fast"."""
    return "exact" if any(isinstance(module, _Exact) for module in model.modules()) else "fast"
