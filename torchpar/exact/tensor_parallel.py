# SPDX-License-Identifier: MIT
"""Tensor-parallel products in exact arithmetic: ranks agree on exponents, and add integers.

| of ``y = x @ weight.T`` | sum over | ranks add, if the weight is split by |
|---|---|---|
| y | inputs | columns |
| dL/dx | outputs | rows |
| dL/dweight | samples | no messages: each rank has its shard of the gradient |

Each finite result has the bits of the unsharded product in `torchpar.exact.mode`. Where ranks add,
a row that is not finite becomes NaN.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar.ops import exact_digits, exact_matmul
from torchpar.ops.matrix import ordinary, rows
from torchpar.parallel.split.parts import mark_slice, slice_along
from torchpar.parallel.split.reduction import all_reduce


def _sharded_product(a: Tensor, b: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """``a @ b.T``, whose terms are divided over the ranks of ``mesh``."""
    if mesh is None or mesh.size() == 1:
        return exact_matmul(a, b)
    exponents = torch.cat([exact_digits.row_exponents(a), exact_digits.row_exponents(b)])
    e, f = all_reduce(exponents, mesh, dist.ReduceOp.MAX).split([len(a), len(b)])
    total = all_reduce(exact_digits.sums(a, b, e, f), mesh)
    return exact_digits.rounded(total, e, f, a.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    @ordinary()
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, outputs: DeviceMesh | None, inputs: DeviceMesh | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.inputs = inputs
        return _sharded_product(rows(x), weight, outputs).view(*x.shape[:-1], len(weight))

    @staticmethod
    @ordinary()
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        dz = rows(g)
        dx = (
            _sharded_product(dz, weight.T, ctx.inputs).view(x.shape)
            if ctx.needs_input_grad[0]
            else None
        )
        return dx, exact_matmul(dz.T, rows(x).T), None, None


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    outputs: DeviceMesh | None = None,
    inputs: DeviceMesh | None = None,
) -> Tensor:
    """``y = x @ weight.T`` in exact arithmetic, by this rank's shard of the weight.

    Each finite number has the bits of the unsharded product in `mode`.

    Args:
        x: ``(*, in_r)`` float32, bfloat16 or float16.
        weight: ``(out_r, in_r)`` of the same dtype, this rank's shard.
        outputs: the mesh over which y is summed, if the weight is split by columns.
        inputs: the mesh over which the gradient of ``x`` is summed, if the weight is split by rows.

    Returns:
        ``(*, out_r)`` of the same dtype. A row that is not finite becomes NaN where ranks add.

    Raises:
        RuntimeError: another dtype, or shapes that do not fit.
    """
    return _Linear.apply(x, weight, outputs, inputs)  # type: ignore[no-any-return]


class Linear(torch.nn.Module):
    """A linear layer without bias. The ranks of ``mesh`` have shards of its weight ``(out, in)``.

    Args:
        axis: the axis of the weight that is cut: 0 by rows, which are the outputs; 1 by columns,
            which are the inputs. A layer cut by columns takes the outputs of a layer cut by rows.
    """

    def __init__(self, in_features: int, out_features: int, mesh: DeviceMesh, axis: int):
        super().__init__()
        self.mesh, self.axis = mesh, axis
        self.in_features, self.out_features = in_features, out_features  # of all ranks
        part = slice_along(axis, (out_features, in_features), mesh)
        device = torch.get_default_device()  # as for layers of torch.nn
        unsharded = torch.randn(out_features, in_features, device=device) * in_features**-0.5
        self.weight = torch.nn.Parameter(part.narrow(unsharded).clone())
        mark_slice(self.weight, part)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, **{"inputs" if self.axis == 0 else "outputs": self.mesh})
