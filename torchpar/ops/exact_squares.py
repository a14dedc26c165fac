# SPDX-License-Identifier: MIT
"""The sum of the squares of numbers that ranks share, as integers, so that its bits have no order.

Where the largest square is below 2^e, each square becomes the integer round(x²·2^(40 − e)). Ranks
add the integers, and their sum is rounded to float64 once.
"""

import math

import torch
from torch import Tensor

from torchpar.ops.exact_digits import power_of_two

BITS = 40  # of the integer of the largest term


def exponents_of(largest: Tensor) -> tuple[Tensor, Tensor]:
    """The exponents e with largest < 2^e, for float64 largest ≥ 0; and where it is not finite."""
    unusual = ~(largest < math.inf)
    bits = torch.where(unusual, 1.0, largest).view(torch.int64)
    return ((bits >> 52) - 1022).clamp(min=-900).to(torch.int32), unusual


class SumOfSquares:
    """The sum of the squares of numbers, of which ranks have parts or copies, as integers.

    Args:
        largest: the largest |x| on all ranks, float64; infinity if a number is not finite.
    """

    def __init__(self, largest: Tensor):
        exponents, self._unusual = exponents_of(largest.square())
        self._exponent = exponents - BITS
        # The units without their last 20 bits, these bits, and the NaN. Ranks add them up.
        self.words = torch.zeros(3, dtype=torch.int64, device=largest.device)

    def add(self, x: Tensor, times: int) -> None:
        """Add the squares of the elements of ``x``, each ``times`` times."""
        if self._unusual:
            self.words[2] += x.isnan().any()
            return
        units = (x.double().square() * power_of_two(-self._exponent, torch.float64)).round_().long()
        self.words[0] += (units >> 20).sum() * times
        self.words[1] += (units & (2**20 - 1)).sum() * times

    def total(self, times: int) -> Tensor:
        """The sum, float64, of numbers that were each added ``times`` times on all ranks."""
        if self._unusual:
            return torch.where(self.words[2] > 0, math.nan, math.inf).double()
        upper, lower = (self.words[:2] // times).double()
        total: Tensor = (upper * 2.0**20 + lower) * power_of_two(self._exponent, torch.float64)
        return total
