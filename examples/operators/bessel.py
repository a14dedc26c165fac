# SPDX-License-Identifier: MIT
"""The Bessel functions of the first kind by SciPy: J_n′ = (J_{n−1} − J_{n+1})/2, and so J₀′ = −J₁."""

import math
from typing import Any

import scipy.special
import torch
from torch import Tensor

import torchpar


def bessel(x: Tensor, order: int = 0) -> Tensor:
    y = scipy.special.jv(order, x.double().numpy(force=True))
    return torch.empty_like(x).copy_(torch.as_tensor(y))


def register(library: Any, name: str) -> Any:
    op = library.custom_op(name, bessel, mutates_args=())

    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        x, ctx.order = inputs
        ctx.save_for_backward(x)

    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return g * (op(x, ctx.order - 1) - op(x, ctx.order + 1)) / 2, None

    op.register_fake(lambda x, order=0: torch.empty_like(x))
    op.register_autograd(backward, setup_context=setup_context)
    op.register_vmap(lambda info, in_dims, x, order=0: (op(x, order), in_dims[0]))
    return op


def shard(x: Any, order: int = 0) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [([p], [p, None]) for p in (Replicate(), *map(Shard, range(x.ndim)))]


before = register(torch.library, "gallery_before::bessel")
after = register(torchpar.library, "gallery::bessel")
after.register_sharding(shard)


def samples() -> list[tuple[Any, ...]]:
    return [(torch.randn(3, 4, dtype=torch.float64),), (torch.randn(5, dtype=torch.float64), 2)]


def reference(x: Tensor, order: int = 0) -> Tensor:
    """The mean of cos(n·t − x·sin t) over a period, whose error with 64 points is below rounding."""
    t = torch.arange(64, dtype=x.dtype, device=x.device) * (2 * math.pi / 64)
    return torch.cos(order * t - x[..., None] * t.sin()).mean(-1)
