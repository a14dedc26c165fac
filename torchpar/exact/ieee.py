# SPDX-License-Identifier: MIT
"""Functions whose bits are the same on every processor: exp, sigmoid and log.

`torch.exp` and similar functions differ in their last bits between processors, and so do calls that may use a
fused multiply-add. This module calls only what IEEE 754 defines exactly: operations with one rounding, bit
casts, and integers. Where a call adds a product (``alpha``, ``addcmul``), the product is exact: a factor is a
power of two, or both have few bits. So it does not matter whether the call is fused.

With the integer n nearest to x / ln 2, with r = x − n·ln 2, |r| < 0.3466, and with Padé's quotient of order 3
by 3, which is (Q + P) / (Q − P),

    P = r·(60 + r²), Q = 120 + 12·r²
    exp(x) = 2ⁿ · (1 + (r + r·(P − 10·r²) / (Q − P)))
    sigmoid(x) = N / (N + 2⁻ⁿ·D)          N = Q + P, D = Q − P

The quotient's relative error is r⁷/100800 < 6.1·10⁻⁹, a tenth of a rounding. exp, sigmoid and log have no
gradient: a layer has its own backward pass. The bits hold for eager calls: a compiler may fuse them.

Sources: Cody and Waite, "Software manual for the elementary functions", 1980; Sun's fdlibm, ``e_log.c``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.ops._exact import power_of_two

PIECE = 2**16  # elements to a thread at a time: few calls, whose scratch stays in a core's cache
# ln 2 in two parts of 15 and 16 bits, whose products with |n| < 2⁸ are exact. They leave out 1.3·10⁻¹¹.
LN2_HIGH, LN2_LOW = float.fromhex("0x1.62e4p-1"), float.fromhex("0x1.7f7ep-20")
LOG2_E = 1.4426950408889634
# float32 plus this is an integer, which its lowest bits hold.
INTEGER, INTEGER_BITS = 1.5 * 2**23, 0x4B400000
# P and N are in this unit, with which 2⁻ⁿ·D in sigmoid is a normal number for all n from −29 to 151.
UNIT_EXPONENT = -32
UNIT = 2.0**UNIT_EXPONENT


def _number(x: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(x, dtype=dtype, device="cpu")  # PyTorch takes it on any device, faster than a number


_INTEGER, _BIASED = _number(INTEGER), _number(INTEGER + 127 + UNIT_EXPONENT)
_LOG2_E, _MINUS_LOG2_E = _number(LOG2_E), _number(-LOG2_E)
_1, _10, _12, _60, _120 = map(_number, (1, 10 * UNIT, 12, 60 * UNIT, 120))  # 10 and 60 belong to P
_MANTISSA = _number(23, torch.int32)


def exp(x: Tensor) -> Tensor:
    """Return e^x of float32 ``x`` of any shape, float32 and contiguous, without a gradient.

    The error is less than 1.1 units in the last place, subnormal results included. NaN stays NaN.

    Raises:
        ConfigError: another dtype.
    """
    return _in_pieces(_exp, x)


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + e^−x) of float32 ``x`` of any shape, float32 and contiguous, without a gradient.

    The error is less than 2.7 units in the last place, subnormal results included. NaN stays NaN.

    Raises:
        ConfigError: another dtype.
    """
    return _in_pieces(_sigmoid, x)


def _in_pieces(function: Callable[..., object], x: Tensor) -> Tensor:
    check_dtype("the input", x, torch.float32)
    flat = x.detach().reshape(-1)
    out = torch.empty_like(flat)
    size = PIECE * torch.get_num_threads() if flat.is_cpu else max(len(flat), 1)
    scratch = tuple(flat.new_empty(3, min(size, len(flat))).unbind())
    for piece, into in zip(flat.split(size), out.split(size), strict=True):
        if len(piece) < len(scratch[0]):  # the last one
            scratch = tuple(t[: len(piece)] for t in scratch)
        function(piece, into, *scratch)
    return out.view(x.shape)


def _exp(x: Tensor, out: Tensor, n: Tensor, r: Tensor, u: Tensor) -> None:
    torch.clamp(x, -105, 89, out=r)  # e^−105 rounds to 0 and e^89 to infinity
    torch.mul(r, _LOG2_E, out=n).add_(_INTEGER)
    exponents = n.view(torch.int32) - INTEGER_BITS
    n.sub_(_INTEGER)
    r.sub_(n, alpha=LN2_HIGH).sub_(n, alpha=LN2_LOW)
    p, q = _numerator_parts(r, n, u)
    # The quotient of the formula is small: of all roundings those of r and of the two sums matter.
    torch.mul(r, r, out=out).mul_(_10)
    torch.sub(p, q, alpha=UNIT, out=q)
    p.sub_(out).mul_(r).div_(q)
    torch.sub(r, p, out=out).add_(_1)
    # Two factors, since 2ⁿ may not be a normal number: the first is exact, the second rounds once.
    half = exponents >> 1
    torch.mul(out.mul_(power_of_two(half)), power_of_two(exponents - half), out=out)


def _sigmoid(x: Tensor, out: Tensor, n: Tensor, r: Tensor, u: Tensor) -> None:
    torch.clamp(x, -105, 20, out=r)  # the results round to 0 and 1
    torch.mul(r, _MINUS_LOG2_E, out=n).add_(_BIASED)  # n is −n of the formula
    scale = out.view(torch.int32)
    torch.bitwise_left_shift(n.view(torch.int32), _MANTISSA, out=scale)
    n.sub_(_BIASED)
    r.add_(n, alpha=LN2_HIGH).add_(n, alpha=LN2_LOW)
    p, q = _numerator_parts(r, n, u)
    torch.add(p, q, alpha=UNIT, out=r)
    q.sub_(p, alpha=1 / UNIT)
    torch.addcmul(r, q, out, out=p)
    torch.div(r, p, out=out)


def _numerator_parts(r: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """P times `UNIT` and Q, in ``p`` and ``q``."""
    torch.mul(r, r, out=q)
    torch.add(_60, q, alpha=UNIT, out=p).mul_(r)
    return p, q.mul_(_12).add_(_120)


# ln 2 for float64: a part of 32 bits, whose products with exponents are exact, and the rest.
LN2_32, LN2_REST = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")
SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # from which to √2 the exponent k is 0
LOG_TERMS = 10


def log(x: Tensor) -> Tensor:
    """Return ln x of float64 ``x`` of any shape, float64, without a gradient.

    With x = 2ᵏ·(1 + f), √½ ≤ 1 + f < √2, and s = f / (2 + f), it is k·ln 2 + 2·artanh s, where

        2·artanh s = f − s·(f − 2·(s²/3 + s⁴/5 + … + s²⁰/21))

    The error is less than 1 unit in the last place. Infinity stays infinity. NaN, 0, and what is negative or
    subnormal give NaN.

    Raises:
        ConfigError: another dtype.
    """
    check_dtype("the input", x, torch.float64)
    x = x.detach()
    normal = (x >= 2.0**-1022) & (x < torch.inf)
    bits = torch.where(normal, x, 1.0).view(torch.int64)
    k = (bits - SQRT_HALF_BITS) >> 52
    f = (bits - (k << 52)).view(torch.float64) - 1
    s = f / (f + 2)
    square, series = s * s, torch.zeros_like(s)
    for j in range(LOG_TERMS, 0, -1):
        series = (series + 2 / (2 * j + 1)) * square
    k = k.double()
    result = k * LN2_32 - ((s * (f - series) - k * LN2_REST) - f)
    return torch.where(normal, result, torch.where(x == torch.inf, x, torch.nan))


def check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise ConfigError(f"{name} is {x.dtype}, expected {dtype}; convert it")
