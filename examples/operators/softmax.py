# SPDX-License-Identifier: MIT
"""Softmax over the last dimension by a Triton kernel: y = exp(x − max x) / Σ exp(x − max x)."""

import os
from functools import partial
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from shared import shard_rows
from torch import Tensor
from torch.library import wrap_triton

import torchpar
from torchpar.library.rules import Context, VmapInfo


@triton.jit
def softmax_kernel(x_ptr, y_ptr, columns, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + column, mask=column < columns, other=-float("inf"))
    e = tl.exp((x - tl.max(x, 0)).to(WIDE))
    tl.store(y_ptr + row * columns + column, e / tl.sum(e, 0), mask=column < columns)


def check_rows(x: Tensor, dims: int = 1) -> None:
    if x.dim() < dims:  # with a batch, the operator would take numbers for a row
        raise ValueError("the operand has no dimension, expected (*, columns)")


def softmax(x: Tensor) -> Tensor:
    check_rows(x)
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return torch.softmax(x, -1).contiguous()
    x, columns = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    if x.numel():
        wide = tl.float64 if x.dtype == torch.float64 else tl.float32
        grid = (x.numel() // columns,)
        wrap_triton(softmax_kernel)[grid](x, y, columns, wide, triton.next_power_of_2(columns))
    return y


def register(library: ModuleType, name: str) -> Any:
    op = library.triton_op(name, softmax, mutates_args=())

    def setup_context(ctx: Context, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    def backward(ctx: Context, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y * (g - (g * y).sum(-1, keepdim=True))

    def vmap(info: VmapInfo, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        check_rows(x, 2)
        return op(x.movedim(in_dims[0], 0)), 0

    op.register_autograd(backward, setup_context=setup_context)
    op.register_vmap(vmap)
    return op


before = register(torch.library, "gallery_before::softmax")
after = register(torchpar.library, "gallery::softmax")
after.register_sharding(shard_rows)

reference = partial(torch.softmax, dim=-1)


def samples() -> list[tuple[Tensor]]:
    return [(torch.randn(*shape, dtype=torch.float64),) for shape in ((4, 5), (2, 3, 6))]
