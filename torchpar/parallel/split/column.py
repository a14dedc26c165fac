# SPDX-License-Identifier: MIT
"""The product of a column layer, as an autograd function whose all-reduce overlaps with other work."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from torchpar.ops import linear_sigmoid
from torchpar.ops.linear_sigmoid import sigmoid_backward
from torchpar.ops.matrix import rows
from torchpar.parallel.split.reduction import start_all_reduce
from torchpar.parallel.split.regions import copy_to_tensor_model_parallel_region

if TYPE_CHECKING:
    from torchpar.parallel.split.layers import ColumnParallelLinear


class ColumnProduct(torch.autograd.Function):
    """A column layer's product and sigmoid, with an all-reduce of dX that overlaps with dW and db.

    Autograd's backward pass of a linear layer would compute both gradients before the all-reduce starts.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: "ColumnParallelLinear"
    ) -> Tensor:
        y = _affine(x, weight, bias, layer)
        ctx.layer = layer
        ctx.save_for_backward(x, weight, bias, y if layer.activation == "sigmoid" else None)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        layer: ColumnParallelLinear = ctx.layer
        x, weight, bias, y = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_gradients(ctx, g, x, weight, bias)
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        dz, db, dx, dw = g, None, None, None
        if y is not None:
            dz, db = sigmoid_backward(g, y, need_bias)
        elif need_bias:
            db = rows(dz).sum(0)
        if need_x:
            dx = dz @ weight
            wait = start_all_reduce(dx, layer.mesh)
        if need_weight:
            dw = rows(dz).mT @ rows(x)
        if need_x:
            wait()
        return dx, dw, db if need_bias else None, None


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, layer: "ColumnParallelLinear") -> Tensor:
    """``act(x @ weight.T + bias)`` with this rank's parameters."""
    return (linear_sigmoid if layer.activation == "sigmoid" else linear)(x, weight, bias)


def _differentiable_gradients(
    ctx: Any, g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients as autograd computes them, which can be differentiated again."""
    y = _affine(copy_to_tensor_model_parallel_region(x, ctx.layer.mesh), weight, bias, ctx.layer)
    inputs = [
        t if needed else None for t, needed in zip((x, weight, bias), ctx.needs_input_grad[:3], strict=True)
    ]
    gradients = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], g, create_graph=True))
    return *(None if t is None else next(gradients) for t in inputs), None
