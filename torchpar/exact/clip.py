# SPDX-License-Identifier: MIT
"""Gradient clipping in exact arithmetic, with the same bits on any mesh."""

import torch
import torch.distributed as dist
from torch import Tensor

from torchpar.ops import _exact
from torchpar.ops._exact import power_of_two
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.clip import clip_by

_HALF = 30  # bits of each half of a square below 1, cut to 60 bits; an int64 holds the sum of 2³³ halves


@torch.no_grad()
def clip_grad_norm_(model: torch.nn.Module, max_norm: float, world: World) -> Tensor:
    """`torchpar.parallel.clip_grad_norm_` with the same bits on any mesh, by two all-reduces.

    Squares are cut to multiples of 2⁻⁶⁰ times the square of a power of two above them all.
    """
    return clip_by(_square, model, max_norm, world)


def _square(gradients: list[Tensor], world: World, whole: bool) -> Tensor:
    empty = torch.empty(1, 0, device=world.device)
    exponents = [_exact.row_exponents(gradient.reshape(1, -1)) for gradient in (empty, *gradients)]
    exponent = torch.stack(exponents).amax(0)
    if not whole:
        dist.all_reduce(exponent, dist.ReduceOp.MAX)
    halves = torch.zeros(2, dtype=torch.int64, device=world.device)
    for gradient in gradients:
        square = (gradient.double() * power_of_two(-exponent, torch.float64)).square()  # exact, and below 1
        units = (square * 2.0 ** (2 * _HALF)).to(torch.int64)
        halves += torch.stack([(units >> _HALF).sum(), (units & (2**_HALF - 1)).sum()])
    if not whole:
        world.sum(halves)
    total = halves[0].double() * 2.0**-_HALF + halves[1].double() * 2.0 ** (-2 * _HALF)
    finite = power_of_two(2 * exponent, torch.float64).squeeze()
    return torch.where(exponent.squeeze() > _exact.MAX_EXPONENT, torch.nan, total * finite)
