# SPDX-License-Identifier: MIT
"""Hard operands of exact products: far apart, canceling, subnormal, at ties and at limits."""

import math
from functools import partial

import torch
from exact_bits import made_of_integers
from samples import normal
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max
LEAST = 2.0**-149  # subnormal
# The largest numbers of an exponent and their neighbours, normal and subnormal
LIMITS = [
    math.ldexp((1 - 2.0**-7) * (1 + i * 2.0**-23), e)
    for e in (-140, -126, -1, 0, 127)
    for i in (-1, 0, 1)
]

random = partial(normal, dtype=torch.float32)


def wide(*shape: int, device: str = "cpu", seed: int = 0) -> Tensor:
    """Numbers whose magnitudes differ by factors up to 2⁴⁰ within a row."""
    return made_of_integers(*shape, seed=seed).to(device)


def canceling(k: int) -> tuple[Tensor, Tensor]:
    """Rows whose product is 0, but whose digits but the first are −128 or −127: what is left out
    adds up."""
    x = torch.full((1, k), -(65 * 2.0**24 - 2.0**23 - 2.0**15 - 2.0**7) / 2.0**31)
    return x, x * torch.tensor([1.0, -1.0]).repeat(k // 2)


HARD = {
    "wide": (wide(9, 64), wide(8, 64, seed=5000)),
    "canceling": canceling(64),
    "the smallest and the largest": (
        torch.tensor([[LEAST, -LARGEST, 0.0], [-LEAST, LEAST, -0.0], [1.0, -LEAST, 2.0**-31]]),
        torch.tensor([[LARGEST, LEAST, 1.0], [-LEAST, LARGEST * 2.0**-40, 3.0]]),
    ),
    "subnormal": (random(9, 64) * 2.0**-140, random(8, 64, seed=1) * 2.0**100),
    "the least number": (
        torch.full((1, 1), LEAST),
        torch.full((1, 1), (0.5 + 2.0**-17) * 2.0**100),
    ),
    # Half of the least number; rounded to float32 before, the sum would lose what lies above it.
    "a subnormal sum": (torch.tensor([[2.0**-75, 2.0**-105]]), torch.full((1, 2), 2.0**-75)),
    "infinite results": (random(5, 9) * 2.0**65, random(4, 9, seed=1) * 2.0**65),
    "sums that overflow on the way": (
        torch.tensor([[LARGEST, LARGEST, -LARGEST, -LARGEST], [LARGEST] * 4, [-LARGEST] * 4]),
        torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0], [LARGEST] * 4]),
    ),
    # Of X, whose unit is 2⁻³⁰ in a row whose largest is 1; of the sum, whose last bit is worth
    # 2⁻²³.
    "ties of X": (
        torch.tensor([[1.0, n * 2.0**-31] for n in range(-5, 6)]),
        torch.tensor([[0.0, 1.0]]),
    ),
    "ties of sums": (torch.tensor([[1.0, n * 2.0**-24] for n in range(6)]), torch.ones(1, 2)),
    "limits of exponents": (
        torch.tensor([[x, -x] for x in LIMITS]),
        torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
    ),
    "zeros": (torch.zeros(40, 1), torch.tensor([[-1.0], [0.0]])),  # none is −0
}
