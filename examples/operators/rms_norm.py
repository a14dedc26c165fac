# SPDX-License-Identifier: MIT
"""RMSNorm by a Triton kernel: y = x·r·weight, with r = 1/√(mean(x²) + eps) of each row.

With n = x·r and G = dL/dy:

    dL/dx = r·(G·weight − n·mean(G·weight·n))        dL/dweight = Σ G·n over the rows
"""

from typing import Any

import torch
import triton
import triton.language as tl
from shared import check_rows, each_sample, runs_kernel, shard_rows
from torch import Tensor
from torch.library import wrap_triton

import torchpar


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, y_ptr, columns, eps, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + column, mask=column < columns, other=0.0).to(WIDE)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(WIDE)
    y = x / tl.sqrt(tl.sum(x * x, 0) / columns + eps) * weight
    tl.store(y_ptr + row * columns + column, y, mask=column < columns)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    check_rows(x)
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {tuple(x.shape[-1:])}, {x.dtype}")
    if not runs_kernel(x):
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps).contiguous()
    x, weight, columns = x.contiguous(), weight.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    if x.numel():
        wide = tl.float64 if x.dtype == torch.float64 else tl.float32
        grid, block = (x.numel() // columns,), triton.next_power_of_2(columns)
        wrap_triton(rms_norm_kernel)[grid](x, weight, y, columns, eps, wide, block)
    return y


def register(library: Any, name: str) -> Any:
    op = library.triton_op(name, rms_norm, mutates_args=())

    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        r = (x.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        n, scaled = x * r, g * weight
        dx = r * (scaled - n * (scaled * n).mean(-1, keepdim=True))
        return dx, (g * n).sum_to_size(weight.shape), None

    op.register_autograd(backward, setup_context=setup_context)
    op.register_vmap(each_sample(op))
    return op


before = register(torch.library, "gallery_before::rms_norm")
after = register(torchpar.library, "gallery::rms_norm")
after.register_sharding(lambda x, weight, eps=1e-6: shard_rows(x, others=1, constants=1))


def samples() -> list[tuple[Any, ...]]:
    return [(torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64), 1e-3)]


def reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
