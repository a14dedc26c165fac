# SPDX-License-Identifier: MIT
"""An operator with two results: the norms s of the rows, and the rows u = x/s of norm 1.

With the gradients G of u and H of s:

    dL/dx = (G − u·(u·G))/s + H·u
"""

from typing import Any

import torch
from shared import batch_of_rows, check_rows, shard_rows
from torch import Tensor

import torchpar


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    check_rows(x)
    norms = torch.linalg.vector_norm(x, dim=-1)
    return (x / norms[..., None]).contiguous(), norms


def register(library: Any, name: str) -> Any:
    op = library.custom_op(name, normalize, mutates_args=())

    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    def backward(ctx: Any, g: Tensor, h: Tensor) -> Tensor:
        u, norms = ctx.saved_tensors
        dx = (g - u * (u * g).sum(-1, keepdim=True)) / norms[..., None] + h[..., None] * u
        return dx  # type: ignore[no-any-return]

    op.register_fake(lambda x: (x.new_empty(x.shape), x.new_empty(x.shape[:-1])))
    op.register_autograd(backward, setup_context=setup_context)
    op.register_vmap(lambda info, in_dims, x: (op(batch_of_rows(x, in_dims[0])), (0, 0)))
    return op


before = register(torch.library, "gallery_before::normalize")
after = register(torchpar.library, "gallery::normalize")
after.register_sharding(lambda x: shard_rows(x, results=2))


def samples() -> list[tuple[Any, ...]]:
    return [(torch.randn(3, 4, dtype=torch.float64),)]


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    norms = x.square().sum(-1).sqrt()
    return x / norms[..., None], norms
