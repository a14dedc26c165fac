# SPDX-License-Identifier: MIT
"""Tensor-parallel products in exact arithmetic: ranks agree on exponents, and add integers.

| of ``y = x @ weight.T`` | sum over | ranks add, if the weight is split by |
|---|---|---|
| y | inputs | columns |
| dL/dx | outputs | rows |
| dL/dweight | samples | no messages: each rank has its slice of the whole gradient |

Each result has the bits of the unsplit product in `torchpar.exact.mode`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchpar.exact.operands import Operand
from torchpar.exact.ordinary import ordinary
from torchpar.ops import _exact, exact_matmul
from torchpar.ops.matrix import rows
from torchpar.parallel.split.reduction import all_reduce


def shared_exponents(matrices: list[Tensor], mesh: DeviceMesh | None) -> list[Tensor]:
    """The exponents of the rows of ``matrices``, whose columns the ranks of ``mesh`` share."""
    exponents = [_exact.row_exponents(t) for t in matrices]
    if mesh is None or mesh.size() == 1:
        return exponents
    largest = all_reduce(torch.cat(exponents), mesh, dist.ReduceOp.MAX)
    return list(largest.split([len(e) for e in exponents]))


def shared_product(a: Operand, b: Operand, mesh: DeviceMesh | None) -> Tensor:
    """The product of ``a`` with the transpose of ``b``, whose columns the ranks of ``mesh`` share."""
    if mesh is None or mesh.size() == 1:
        return a.product(b)
    return _exact.rounded(all_reduce(a.sums(b), mesh), a.e, b.e)


def _product(a: Tensor, b: Tensor, mesh: DeviceMesh | None) -> Tensor:
    e, f = shared_exponents([a, b], mesh)
    return shared_product(Operand(a, e), Operand(b, f), mesh)


class _Linear(torch.autograd.Function):
    @staticmethod
    @ordinary
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, outputs: DeviceMesh | None, inputs: DeviceMesh | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.inputs = inputs
        return _product(rows(x), weight, outputs).view(*x.shape[:-1], len(weight))

    @staticmethod
    @ordinary
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        dz = rows(g)
        dx = _product(dz, weight.T, ctx.inputs).view(x.shape)
        return dx, exact_matmul(dz.T, rows(x).T), None, None


def linear(
    x: Tensor, weight: Tensor, *, outputs: DeviceMesh | None = None, inputs: DeviceMesh | None = None
) -> Tensor:
    """``x @ weight.T`` for float32 ``x (*, in_r)`` and this rank's ``weight (out_r, in_r)``.

    Args:
        outputs: the ranks that share the terms of the result, as their weights are split by columns.
        inputs: the ranks that share the terms of the gradient of ``x``, as their weights are split by rows.
    """
    return _Linear.apply(x, weight, outputs, inputs)  # type: ignore[no-any-return]
