# SPDX-License-Identifier: MIT
"""The sum of the squares of numbers on all ranks.

It is a sum of integers, so that its bits do not depend on the order of the terms. Where the largest
square is below 2^e, each square becomes the integer round(x²·2^(52 − e)). Ranks add the integers,
and their sum is rounded to float64 once. The sum of n squares is off by at most n·2⁻⁵³ of 2^e.
"""

import math

import torch
from torch import Tensor

from torchpar.ops.exact_digits import power_of_two

_BITS = 52  # of the integer of the largest square; a square of a float32 has at most 48 bits
_HALF = 26  # so that a word holds the sum of 2³⁷ halves


def exponents_of(largest: Tensor) -> tuple[Tensor, Tensor]:
    """The exponents e with largest < 2^e, for float64 largest ≥ 0; and where it is not finite."""
    unusual = ~(largest < math.inf)
    bits = torch.where(unusual, 1.0, largest).view(torch.int64)
    return ((bits >> 52) - 1022).clamp(min=-900).to(torch.int32), unusual


class SumOfSquares:
    """The sum of the squares of numbers, of which ranks have parts or copies, as integers.

    Args:
        largest: the largest |x| on all ranks, float64; infinity if a number is not finite.

    Attributes:
        words: int64 of shape (3,), which ranks add up: the sum of the upper halves of the integers,
            that of their lower halves, and the number of tensors with a NaN.
    """

    def __init__(self, largest: Tensor):
        exponents, self._unusual = exponents_of(largest.square())
        self._exponent = exponents - _BITS
        self.words = torch.zeros(3, dtype=torch.int64, device=largest.device)

    def add(self, x: Tensor, times: int) -> None:
        """Add the squares of the elements of ``x``, which are real, each ``times`` times."""
        if self._unusual:
            self.words[2] += x.isnan().any()
            return
        units = (x.double().square() * power_of_two(-self._exponent, torch.float64)).round_().long()
        self.words[0] += (units >> _HALF).sum() * times
        self.words[1] += (units & (2**_HALF - 1)).sum() * times

    def total(self, times: int) -> Tensor:
        """The sum, float64, of numbers that were each added ``times`` times on all ranks."""
        if self._unusual:
            return torch.where(self.words[2] > 0, math.nan, math.inf).double()
        upper, lower = (self.words[:2] // times).double()
        unit = power_of_two(self._exponent, torch.float64)
        total: Tensor = (upper * 2.0**_HALF + lower) * unit
        return total
