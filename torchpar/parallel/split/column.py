# SPDX-License-Identifier: MIT
"""The product of a column layer, as an autograd function whose all-reduce overlaps with other work."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from torchpar.ops import linear_sigmoid
from torchpar.ops._matrix import rows
from torchpar.ops.linear_sigmoid import sigmoid_backward
from torchpar.parallel.split.reduction import start_all_reduce, tree_sum
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
        shards = layer.partition
        dz = shards.split(g, -1)
        db = None
        if y is not None:
            pairs = [
                sigmoid_backward(g_i, y_i, need_bias)
                for g_i, y_i in zip(dz, shards.split(y, -1), strict=True)
            ]
            dz, db = [dz_i for dz_i, _ in pairs], [db_i for _, db_i in pairs]
        elif need_bias:
            db = [rows(dz_i).sum(0) for dz_i in dz]
        dx, wait = None, None
        if need_x:
            dx = tree_sum(
                [dz_i @ weight_i for dz_i, weight_i in zip(dz, shards.split(weight, 0), strict=True)]
            )
            wait = start_all_reduce(dx, layer.mesh, layer.reduction)
        dw = torch.cat([rows(dz_i).mT @ rows(x) for dz_i in dz]) if need_weight else None
        if wait is not None:
            wait()
        return dx, dw, torch.cat(db) if need_bias else None, None  # type: ignore[arg-type]


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, layer: "ColumnParallelLinear") -> Tensor:
    """``act(x @ weight.T + bias)`` with this rank's parameters, shard by shard."""
    shards = layer.partition
    weights = shards.split(weight, 0)
    biases = [None] * len(weights) if bias is None else shards.split(bias, 0)
    product: Callable[..., Tensor] = linear_sigmoid if layer.activation == "sigmoid" else linear
    parts = [product(x, weight_i, bias_i) for weight_i, bias_i in zip(weights, biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _differentiable_gradients(
    ctx: Any, g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients as autograd computes them, which can be differentiated again."""
    y = _affine(
        copy_to_tensor_model_parallel_region(x, ctx.layer.mesh, ctx.layer.reduction), weight, bias, ctx.layer
    )
    inputs = [
        t if needed else None for t, needed in zip((x, weight, bias), ctx.needs_input_grad[:3], strict=True)
    ]
    gradients = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], g, create_graph=True))
    return *(None if t is None else next(gradients) for t in inputs), None
