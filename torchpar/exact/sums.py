# SPDX-License-Identifier: MIT
"""Sums whose bits do not depend on the order of their terms, which become integers.

For a row with the largest |x| below 2^e, each term becomes the integer round(x·2^(40 − e)): x in
units of a power of two. A word of 64 bits holds the sum of 2²² such integers, whatever the order,
and two words hold the sum of 2³³. The sum of the integers is rounded to float64 once. The rounding
of a term is at most 2⁻⁴¹ of the largest term.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torchpar.exact.registry import check_dtypes
from torchpar.ops.exact_digits import power_of_two
from torchpar.ops.exact_squares import exponents_of

BITS = 40  # of the integer of the largest term
_LONGEST = 2**22  # terms


def exact_sum(x: Tensor, dims: list[int] | None = None, keepdim: bool = False) -> Tensor:
    """The sum of ``x``, float32 or float64, over ``dims`` (all by default), as float64.

    A sum with a NaN or an infinity is NaN or infinite, as the sum by `torch.sum` is. NaN and
    infinities change no other row.
    """
    if x.dim() == 0:
        return x.double()
    dims = sorted({dim % x.dim() for dim in (dims or range(x.dim()))})
    if x.numel() == 0:
        return x.double().sum(dims, keepdim)
    exponents, unusual = exponents_of(x.abs().amax(dims, True).double())
    units = (x.double() * power_of_two(BITS - exponents, torch.float64)).round_().long()
    total = _total(units, lambda t: t.sum(dims, True), math.prod(x.shape[dim] for dim in dims))
    total *= power_of_two(exponents - BITS, torch.float64)
    if unusual.any():  # NaN or infinity, the same in any order
        total = torch.where(
            unusual, torch.where(x.isfinite(), 0.0, x).double().sum(dims, True), total
        )
    return total if keepdim else total.squeeze(dims)


def _total(units: Tensor, add: Callable[[Tensor], Tensor], terms: int) -> Tensor:
    """The sums by ``add`` of at most ``terms`` integers each, as float64."""
    if terms <= _LONGEST:
        return add(units).double()
    return add(units >> 20).double() * 2.0**20 + add(units & (2**20 - 1)).double()


def exact_index_sum(values: Tensor, indices: Tensor, size: int) -> Tensor:
    """The sums of the rows of ``values (n, k)`` that have the same index, float32 ``(size, k)``.

    Each sum has the unit of its largest term, so it does not depend on the other sums.
    """
    check_dtypes(values)
    if size > 4 * len(indices):  # most rows get nothing, as in the gradient of an embedding
        rows, places = indices.unique(return_inverse=True)
        result = values.new_zeros(size, values.shape[1])
        return result.index_copy_(0, rows, exact_index_sum(values, places, len(rows)))
    is_finite, to = values.isfinite(), indices[:, None].expand_as(values)
    x = torch.where(is_finite, values, 0.0).double()
    largest = x.new_zeros(size, values.shape[1]).scatter_reduce_(0, to, x.abs(), "amax")
    exponents, _ = exponents_of(largest)
    units = (x * power_of_two(BITS - exponents, torch.float64).gather(0, to)).round_().long()
    total = _total(
        units, lambda t: t.new_zeros(largest.shape).index_add_(0, indices, t), len(values)
    )
    result = (total * power_of_two(exponents - BITS, torch.float64)).float()
    if not is_finite.all():  # NaN or infinity, the same in any order
        result.index_add_(0, indices, torch.where(is_finite, 0.0, values))
    return result
