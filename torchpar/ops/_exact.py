# SPDX-License-Identifier: MIT
"""Exact sums of products: float32 matrices as integers, whose sums do not depend on their order.

A row of A ``(m, k)`` is scaled by a power of two, rounded to integers, and cut into four signed 8-bit digits:

    X = round(a · 2^(31 − e))                          e: the row's exponent, such that |X| ≤ 2³¹ − 2²⁴
    X = d₀·2²⁴ + d₁·2¹⁶ + d₂·2⁸ + d₃                   −128 ≤ d ≤ 127

For rows i of A and j of B, with the digits c and the exponents f of B,

    T_ij = Σ_k Σ_{p + q ≤ 3} d_p·c_q · 2^(8·(3 − p − q))
    (A·Bᵀ)_ij ≈ T_ij · 2^(e_i + f_j − 38)

T is an integer: its bits do not depend on the order of the sum, nor on how ranks, threads or a processor's
instructions share it. The products with p + q > 3, of order 4 to 6, are left out.

Source: Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix multiplication by using fast
routines of matrix multiplication and its applications", 2012; Ootomo, Ozaki and Yokota, "DGEMM on integer
matrix multiplication unit", 2024.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

DIGITS, BITS = 4, 8
SCALE = DIGITS * BITS - 1  # |X| < 2^SCALE
WEIGHT = 2 * SCALE - BITS * (DIGITS - 1)  # T counts units of 2^(e + f − WEIGHT)
# Digits from −128 to 127 instead of 0 to 255 carry into the next one: half of a digit is added before the cut.
CARRY = sum(2 ** (BITS * p + BITS - 1) for p in range(DIGITS - 1))
# Terms of a sum whose orders fit in an int32 each, and all together in the 53 bits of a float64.
CHAIN = 2**14
BLOCK = 2**14  # elements that are cut at a time, in a core's cache
_INT8_WORTH = 2**20  # multiplications, from which on int8 products are faster than float64 ones


@cache
def has_int8() -> bool:
    """Whether PyTorch multiplies int8 matrices on this processor by instructions made for it.

    Where these are missing, `torch._int_mm` is a plain loop, and oneDNN's sums of two products may saturate.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_vnni" in flags and torch.backends.mkldnn.is_available()


def row_exponents(x: Tensor) -> Tensor:
    """The exponents e ``(*, m, 1)`` int32 of the rows of ``x (*, m, k)``, −126 to 129.

    The largest |x| of a row is less than (1 − 2⁻⁷)·2^e, and at least (½ − 2⁻⁸)·2^e unless e is −126. A row
    that has a NaN or an infinity has an exponent above `LARGEST`.
    """
    if x.shape[-1] == 0:
        return x.new_zeros((*x.shape[:-1], 1), dtype=torch.int32)
    largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True)
    # The bits of a float, of which the upper 9 are its exponent, grow with its magnitude.
    return ((largest.view(torch.int32) + 2**17) >> 23) - 126


LARGEST = 129


def integers(x: Tensor, exponents: Tensor) -> Tensor:
    """X, the rows of ``x (*, m, k)`` as int32 for ``exponents (*, m, 1)``; ``x`` is finite."""
    exponents = SCALE - exponents
    scaled = (x * power(exponents.clamp(max=127))).mul_(power((exponents - 127).clamp(min=0)))
    return scaled.round_().to(torch.int32)


def power(exponents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2^exponents, whose exponents are those of normal numbers."""
    if dtype == torch.float32:
        return ((exponents + 127) << 23).view(dtype)
    return ((exponents.long() + 1023) << 52).view(dtype)


def sums(a: Tensor, b: Tensor) -> Tensor:
    """T ``(*, m, n)`` for integers ``a (*, m, k)`` and ``b (*, n, k)``: float64 if k ≤ `CHAIN`, else int64."""
    k = a.shape[-1]
    if k > CHAIN:
        chains = zip(a.split(CHAIN, -1), b.split(CHAIN, -1), strict=True)
        return sum((sums(*chain).long() for chain in chains), a.new_zeros((), dtype=torch.int64))
    # One float64 product: in all, its terms are less than 2⁵³.
    digits = torch.cat([_digit(a, p).double() for p in range(DIGITS)], -1)
    leading = torch.cat([_leading(b, DIGITS - p).double() for p in range(DIGITS)], -1)
    return digits @ leading.mT


def _leading(x: Tensor, count: int) -> Tensor:
    """The first ``count`` digits of integers as one integer."""
    unused = BITS * (DIGITS - count)
    return (x + CARRY % 2**unused) >> unused


def _digit(x: Tensor, p: int) -> Tensor:
    return _leading(x, p + 1) - (_leading(x, p) << BITS) if p else _leading(x, 1)


def rounded(total: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """float32 ``(*, m, n)`` of T and the exponents ``e (*, m, 1)`` and ``f (*, n, 1)``."""
    return (total * power(e, torch.float64)).mul_(power(f.mT - WEIGHT, torch.float64)).float()
