# SPDX-License-Identifier: MIT
"""Linear layers whose weight is sharded over the ranks of a mesh dimension.

`torchpar.reference` holds both layers in their plainest form. Read it first.

A column layer and the row layer after it are a pair. An elementwise activation between them acts on
each rank's columns alone. So the pair costs one all-reduce forward, of y, and one backward, of dx,
unless its input needs no gradient. With dY = dL/dY and Y = X·Wᵀ + b split by columns, dX = Σ_r
dY_r·W_r and dW_r = dY_rᵀ·X. The all-reduce of dX overlaps with the computation of dW_r.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import linear

from torchpar import nn
from torchpar.errors import ConfigError, check_whole, whole_or_text
from torchpar.ops import linear_sigmoid
from torchpar.ops.linear_sigmoid import dz_and_db
from torchpar.ops.matrix import rows
from torchpar.parallel.launch.agreement import check_same_bits, check_same_on_all_ranks
from torchpar.parallel.launch.world import check_mesh
from torchpar.parallel.split.parts import mark_slice, slice_along
from torchpar.parallel.split.reduction import reduce_from_region, start_all_reduce
from torchpar.parallel.split.scaler import skip_together

Activation = Literal["sigmoid", "relu", "tanh"] | None
_FUNCTIONS = {"sigmoid": torch.sigmoid, "relu": torch.relu, "tanh": torch.tanh}
# Subclasses may compute something else, so a layer's type must be one of these.
LINEAR_LAYERS: dict[type[torch.nn.Module], Activation] = {
    torch.nn.Linear: None,
    nn.Linear: None,
    nn.LinearSigmoid: "sigmoid",
    nn.LinearReLU: "relu",
    nn.LinearTanh: "tanh",
}
SAME_WEIGHTS = (
    "give all ranks the same, as by torch.manual_seed(0) on each before the model is made"
)


class _ParallelLinear(nn.LinearParameters):
    """A layer whose parameters are shards of an unsharded layer's parameters.

    Attributes:
        split_axes: the axis along which each sharded parameter is cut, by the parameter's name.
        mesh: the ranks that hold the shards.
    """

    split_axes: ClassVar[dict[str, int]]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: DeviceMesh,
        activation: Activation = None,
        **options: Any,
    ):
        check_mesh(type(self).__name__, mesh)
        sizes = {"in_features": in_features, "out_features": out_features}
        settings: dict[str, object] = {"layer": type(self).__name__}
        settings |= {name: whole_or_text(size) for name, size in sizes.items()}
        settings |= {"bias": bias, "activation": activation} | options
        check_same_on_all_ranks(mesh.get_group(), "a layer's ranks", settings)
        in_features, out_features = (check_whole(*one, least=0) for one in sizes.items())
        if activation is not None and activation not in _FUNCTIONS:
            raise ValueError(
                f"activation is {activation!r}, expected None, 'sigmoid', 'relu' or 'tanh'"
            )
        self.activation = activation
        self.mesh = mesh
        super().__init__(in_features, out_features, bias, **options)
        self._copy_shards(self)

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Module, *, mesh: DeviceMesh, activation: Activation = None
    ) -> Self:
        """Split ``linear``, whose parameters are the same on every rank: copy this rank's shards.

        Args:
            linear: a `torch.nn.Linear`, or a `torchpar.nn.Linear`, `LinearSigmoid`, `LinearReLU` or
                `LinearTanh`.
            mesh: a mesh of one dimension, such as ``mesh["tp"]``.
            activation: None, "sigmoid", "relu" or "tanh". Leave it out for layers that have an
                activation, such as `LinearSigmoid`.

        Raises:
            ValueError: another kind of layer, a second activation, different weights on different
                ranks, or an error of the constructor.
        """
        if type(linear) not in LINEAR_LAYERS or not isinstance(
            linear, torch.nn.Linear | nn.LinearParameters
        ):
            raise ConfigError(
                f"cannot split a {type(linear).__name__}, expected torch.nn.Linear or "
                "torchpar.nn.Linear, LinearSigmoid, LinearReLU or LinearTanh"
            )
        built_in = LINEAR_LAYERS[type(linear)]
        if built_in is not None and activation not in (None, built_in):
            raise ConfigError(
                f"activation is {activation!r}, but {type(linear).__name__} has "
                f"{built_in!r} already"
            )
        split = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            mesh=mesh,
            activation=built_in or activation,
            device="meta",  # no memory, and no random numbers drawn
            dtype=linear.weight.dtype,
        )
        split._copy_shards(linear)
        return split.train(linear.training)

    def _copy_shards(self, unsharded: torch.nn.Module) -> None:
        sizes = f"{type(self).__name__} of {self.in_features} to {self.out_features} features"
        drawn = {
            f"the {name} of a {sizes}": p
            for name, p in unsharded.named_parameters()
            if not p.is_meta
        }
        check_same_bits(self.mesh.get_group(), drawn, SAME_WEIGHTS)
        for name in ("weight", "bias"):
            parameter = getattr(unsharded, name)
            if parameter is not None:
                shard = parameter.detach()
                if name in self.split_axes:
                    shard = slice_along(self.split_axes[name], shard.shape, self.mesh).narrow(shard)
                shard = shard.clone(memory_format=torch.contiguous_format)
                parameter = torch.nn.Parameter(shard, requires_grad=parameter.requires_grad)
            self.register_parameter(name, parameter)

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._mark()

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # called for a copy, whose parameters are new
        self._mark()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # which may replace parameters
        self._mark()
        return self

    def _mark(self) -> None:
        """Mark each shard as a shard: an optimizer gets the parameters without their layer."""
        for name, axis in self.split_axes.items():
            parameter = self._parameters.get(name)
            if parameter is not None:
                shape = (self.out_features, self.in_features)[: parameter.dim()]
                mark_slice(parameter, slice_along(axis, shape, self.mesh))
        if self.mesh.size() > 1:
            skip_together(self)


class ColumnParallelLinear(_ParallelLinear):
    """A linear layer with sharded outputs: ``y_r = act(x @ weight_r.T + bias_r)``.

    | on rank r of p | shape |
    |---|---|
    | x, replicated | (*, in_features) |
    | weight, this rank's shard | (out_r, in_features) |
    | bias, this rank's shard | (out_r) |
    | y, this rank's shard | (*, out_r) |

    Σ_r out_r = out_features, cut as `torch.chunk` cuts; p need not divide out_features. Every rank
    draws the unsharded weight from PyTorch's random generator and keeps its shard, so the generator
    must be in the same state on all ranks. `from_linear` copies the shards of an existing layer.
    There are no second derivatives, and `torch.func`'s transforms are not supported.

    Args:
        in_features, out_features, bias: of the unsharded layer.
        mesh: a mesh of one dimension, such as ``mesh["tp"]``.
        activation: None, "sigmoid" (fused, by `torchpar.linear_sigmoid`), "relu" or "tanh" (by
            PyTorch).
        options: ``device`` and ``dtype``, as in `torchpar.nn.Linear`.

    Raises:
        ValueError: on every rank: an unknown activation, or a size that is no whole number;
            different arguments, or different weights, on different ranks. Also another ``mesh``.
    """

    split_axes: ClassVar[dict[str, int]] = {"weight": 0, "bias": 0}

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast the backward pass needs the tensors in the forward pass's dtype.
        bias = None if self.bias is None else _cast(self.bias)
        y: Tensor = _ColumnProduct.apply(_cast(x), _cast(self.weight), bias, self)
        return y if self.activation in (None, "sigmoid") else _FUNCTIONS[self.activation](y)


class RowParallelLinear(_ParallelLinear):
    """A linear layer with sharded inputs: ``y = act(Σ_r x_r @ weight_r.T + bias)``.

    | on rank r of p | shape |
    |---|---|
    | x, this rank's shard, such as a column layer's output | (*, in_r) |
    | weight, this rank's shard | (out_features, in_r) |
    | bias, replicated | (out_features) |
    | y, replicated | (*, out_features) |

    Bias and activation follow the all-reduce; before the all-reduce they would count p times.
    Arguments and errors are those of `ColumnParallelLinear`.
    """

    split_axes: ClassVar[dict[str, int]] = {"weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        z = reduce_from_region(linear(x, self.weight), self.mesh)
        if self.bias is not None:
            z = z + self.bias.to(z.dtype)  # the dtypes differ under autocast
        return z if self.activation is None else _FUNCTIONS[self.activation](z)


def meshes_of_shards(model: torch.nn.Module) -> dict[Tensor, DeviceMesh]:
    """The mesh over which a split layer of ``model`` shards each of its parameters.

    Under `fully_shard` a layer's parameters are DTensors, of which `part_of` does not tell that the
    layer is split.
    """
    return {
        p: layer.mesh
        for layer in model.modules()
        if isinstance(layer, _ParallelLinear)
        for name, p in layer.named_parameters(recurse=False)
        if name in layer.split_axes
    }


class _ColumnProduct(torch.autograd.Function):
    """A column layer's product and sigmoid, with an all-reduce of dX that overlaps with dW and db.

    Autograd's backward pass of a linear layer would compute both gradients before the all-reduce
    starts.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: ColumnParallelLinear
    ) -> Tensor:
        ctx.mesh = layer.mesh
        affine = linear_sigmoid if layer.activation == "sigmoid" else linear
        # No view of the product: an activation in place may follow.
        y: Tensor = torch.ops.aten._unsafe_view(
            affine(rows(x), weight, bias), (*x.shape[:-1], len(weight))
        )
        ctx.save_for_backward(x, weight, y if layer.activation == "sigmoid" else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        dz, db, dx, dw = g, None, None, None
        if y is not None:
            dz, db = dz_and_db(g, y, need_bias)
        elif need_bias:
            db = rows(dz).sum(0)
        if need_x:
            dx = dz @ weight
            wait = start_all_reduce(dx, ctx.mesh)
        if need_weight:
            dw = rows(dz).mT @ rows(x)
        if need_x:
            wait()
        return dx, dw, db, None


def _cast(t: Tensor) -> Tensor:
    """``t`` in the dtype that `torch.autocast` gives to the operands of a product."""
    kind = t.device.type
    if t.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return t
    return t.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else t
