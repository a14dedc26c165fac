# SPDX-License-Identifier: MIT
"""Gradient clipping for a model that is split over a mesh."""

import torch
import torch.distributed as dist
from torch import Tensor

from torchpar.ieee import power_of_two
from torchpar.ops import _exact
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.layers import Arithmetic, check_arithmetic
from torchpar.parts import is_marked

_HALF = 30  # bits of each half of a square below 1, cut to 60 bits; an int64 holds the sum of 2³³ halves


@torch.no_grad()
def clip_grad_norm_(
    model: torch.nn.Module, max_norm: float, world: World, arithmetic: Arithmetic = "fast"
) -> Tensor:
    """Scale the gradient of the whole model to a norm of at most ``max_norm``, in place.

    ``‖g‖ = √Σ‖g_i‖²`` over all parameters of the model. Every part of a split parameter counts, and a
    parameter that several ranks hold whole counts once. This costs one all-reduce of one number, and nothing
    if every rank holds the whole model. Exact arithmetic takes two, of three numbers.

    Args:
        model: this rank's part of the model, its gradients averaged over the data-parallel ranks.
        max_norm: the largest norm that is left as it is.
        world: the ranks and their mesh.
        arithmetic: "fast", or "exact" for the same bits on any mesh, by squares that are cut to multiples of
            2⁻⁶⁰ times the square of a power of two above them all.

    Returns:
        The norm before clipping, a float64 scalar, the same on every rank. A norm that is not finite makes
        every gradient so, as with `torch.nn.utils.clip_grad_norm_`.
    """
    check_arithmetic(arithmetic)
    gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
    whole = world.dp_size == world.world_size
    # Data-parallel rank 0 counts for the others, which have the same gradients.
    mine = [
        gradient
        for p, gradient in gradients.items()
        if whole or (world.dp_rank == 0 and (is_marked(p) or world.tp_rank == 0))
    ]
    square = (_exact_square if arithmetic == "exact" else _square)(mine, world, whole)
    norm = square.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(scale.to(gradient.dtype))
    return norm


def _square(gradients: list[Tensor], world: World, whole: bool) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for gradient in gradients:
        total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
    return total if whole else world.sum(total)


def _exact_square(gradients: list[Tensor], world: World, whole: bool) -> Tensor:
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
