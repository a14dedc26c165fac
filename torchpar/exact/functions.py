# SPDX-License-Identifier: MIT
"""Elementwise operators: elementary functions of float32, and sums and products without fusing.

A function is computed in float64, of operations that IEEE 754 defines exactly and that PyTorch
calls one by one: +, −, ×, ÷, √, and bit casts. The result is rounded to float32 once; its error is
below 0.51 units in the last place, unless a docstring says otherwise. No function here has a
gradient: `torchpar.exact.mode` calls them below autograd.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.exact.registry import EXACT_RULES, NARROW, check_dtypes, rule, times, widened
from torchpar.ops.exact_digits import power_of_two

# ln 2 in a part of 32 bits, whose products with exponents are exact, and the rest.
_LN2_HIGH, _LN2_LOW = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # from which to √2 the exponent is 0
# Taylor's series of e^r for |r| < 0.3466: the rest is below 3·10⁻¹⁶.
_EXP_SERIES = [1 / math.factorial(i) for i in range(13)]
# erf(x)/x as a polynomial in u = x²/8 − 1, for |x| ≤ 4: interpolated at Chebyshev's points, error
# 4·10⁻¹⁰.
_ERF_HEX = """
    0x1.6a040781a499cp-2 -0x1.69a0cd301b91ep-3 0x1.0dabaf245a337p-3 -0x1.b92e6d963dfaap-4
    0x1.717eee4e076f7p-4 -0x1.3218984cd195ap-4 0x1.ea99e1ae9780fp-5 -0x1.76bcc6dec6fadp-5
    0x1.0ec5c6e1688d8p-5 -0x1.71aa3a7454ee2p-6 0x1.d73ce53e159ffp-7 -0x1.12ba7628ceb60p-7
    0x1.38ee4f02d9147p-8 -0x1.7d61c3299c579p-9 0x1.71a9bd2a54af3p-10 -0x1.555506765c526p-12
    0x1.6b49f96c0d06fp-13 -0x1.026466e217773p-12 0x1.8a6caab470c6fp-14
"""
_ERF = [*map(float.fromhex, _ERF_HEX.split())]
# Quotients of polynomials for the quantiles of the normal distribution: the centre, the tails, the
# far tails.
_CENTRE = (
    [
        3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4,
        2.5090809287301226727e3,
    ],
    [
        1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
        2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
        5.2264952788528545610e3,
    ],
)  # fmt: skip
_TAIL = (
    [
        1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
        3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
        2.27238449892691845833e-2, 7.74545014278341407640e-4,
    ],
    [
        1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
        1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ],
)  # fmt: skip
_FAR = (
    [
        6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0,
        2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
        2.71155556874348757815e-5, 2.01033439929228813265e-7,
    ],
    [
        1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
        7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ],
)  # fmt: skip
# π/2 in two parts: products of the first, of 33 bits, with integers below 2²⁰ are exact.
_HALF_PI_HIGH, _HALF_PI_LOW = (
    float.fromhex("0x1.921fb5440p+0"),
    float.fromhex("0x1.0b4611a626331p-34"),
)
_TANH = [1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075]  # Taylor's
_MOST_PRODUCTS = 64  # of x, for a power: each rounds
_PIECE = 2**14  # elements to a thread at a time, whose float64 scratch stays in a core's cache


def in_pieces(function: Callable[..., Tensor], *operands: object, **options: object) -> Tensor:
    """``function`` of the elements of float32 tensors, which are broadcast, computed in float64.

    Operands that are not tensors, and options, are passed on.
    """
    tensors = [x for x in operands if isinstance(x, Tensor)]
    check_dtypes(*tensors)
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    flat = [x.expand(shape).reshape(-1) for x in tensors]
    out = torch.empty(shape, dtype=torch.float32, device=flat[0].device).view(-1)
    size = _PIECE * torch.get_num_threads() if out.is_cpu else max(len(out), 1)
    for into, *pieces in zip(out.split(size), *(x.split(size) for x in flat), strict=True):
        into.copy_(
            function(*(piece.double() for piece in pieces), *operands[len(flat) :], **options)
        )
    return out.view(shape)


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """Σ c_i·xⁱ by Horner's rule."""
    result = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        result.mul_(x).add_(c)
    return result


def exp64(x: Tensor) -> Tensor:
    """e^x in float64 for −708 ≤ x ≤ 709; 0 for smaller x, and infinity for larger x.

    With the integer n nearest to x / ln 2 and r = x − n·ln 2, e^x is 2ⁿ·Σ rⁱ/i!.
    """
    too_small, too_large = x < -708.0, x > 709.0
    x = x.clamp(-708.0, 709.0)
    n = (x * (1 / math.log(2))).round()
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    result = _polynomial(r, _EXP_SERIES)
    result *= power_of_two(n.nan_to_num().to(torch.int32), torch.float64)
    return result.masked_fill_(too_small, 0.0).masked_fill_(too_large, math.inf)


def exp2_64(x: Tensor) -> Tensor:
    """2^x in float64; 0 for x < −1022, and infinity for x > 1023.

    With the integer n nearest to x, 2^x is 2ⁿ·e^((x − n)·ln 2), by Taylor's series.
    """
    too_small, too_large = x < -1022.0, x > 1023.0
    x = x.clamp(-1022.0, 1023.0)
    n = x.round()
    result = _polynomial((x - n) * math.log(2), _EXP_SERIES)
    result *= power_of_two(n.nan_to_num().to(torch.int32), torch.float64)
    return result.masked_fill_(too_small, 0.0).masked_fill_(too_large, math.inf)


def log64(x: Tensor) -> Tensor:
    """ln x in float64; −∞ for 0, and NaN for negative and subnormal x.

    With x = 2ᵏ·(1 + f), √½ ≤ 1 + f < √2, and s = f / (2 + f), ln x is k·ln 2 + 2·artanh s, where

        2·artanh s = f − s·(f − 2·(s²/3 + s⁴/5 + … + s²⁰/21))

    The error is less than 1 unit in float64's last place. Source: Sun's fdlibm, ``e_log.c``.
    """
    normal = (x >= 2.0**-1022) & (x < math.inf)
    bits = torch.where(normal, x, 1.0).view(torch.int64)
    k = (bits - _SQRT_HALF_BITS) >> 52
    f = (bits - (k << 52)).view(torch.float64) - 1
    s = f / (f + 2)
    square = s * s
    series = square * _polynomial(square, [2 / (2 * j + 1) for j in range(1, 11)])
    k = k.double()
    result = k * _LN2_HIGH - ((s * (f - series) - k * _LN2_LOW) - f)
    special = torch.where(x == 0, -math.inf, torch.where(x == math.inf, x, math.nan))
    return torch.where(normal, result, special)


def sigmoid64(x: Tensor) -> Tensor:
    """1 / (1 + e^−x)."""
    return 1 / (exp64(-x) + 1)


def tanh64(x: Tensor) -> Tensor:
    """(e^2x − 1) / (e^2x + 1), and for |x| < 2⁻³ an odd polynomial, since e^2x − 1 cancels."""
    square = x * x
    series = x * _polynomial(square, _TANH)
    power = exp64(2 * x.clamp(-20.0, 20.0))
    return torch.where(x.abs() < 0.125, series, (power - 1) / (power + 1))


def erf64(x: Tensor) -> Tensor:
    """2/√π · ∫₀ˣ e^(−t²) dt; the relative error is below 4·10⁻¹⁰."""
    z = x.clamp(-4.0, 4.0)
    return torch.where(x.abs() >= 4, x.sign(), z * _polynomial(z * z * 0.125 - 1, _ERF))


def sqrt64(x: Tensor) -> Tensor:
    """√x in float64, rounded as IEEE 754 says.

    A library's root may be off by one unit in the last place.

    With y from the library and its neighbors y + u and y − d, the nearest is y if −y·d < x − y² ≤
    y·u. The remainder is exact: y² has two parts, by Veltkamp's halves of y.

    Source: Dekker, "A floating-point technique for extending the available precision", 1971.
    """
    scale = (
        torch.ones_like(x)
        .masked_fill_(x < 2.0**-500, 2.0**256)
        .masked_fill_(x > 2.0**500, 2.0**-256)
    )
    # The remainder of smaller numbers would be rounded, and y² of larger ones infinite.
    x = x * scale * scale
    y = x.sqrt()
    c = y * (2.0**27 + 1)
    high = c - (c - y)
    low = y - high
    square = y * y
    rest = (high * high - square + high * low * 2) + low * low
    remainder = (x - square) - rest
    above, below = y.nextafter(torch.full_like(y, math.inf)), y.nextafter(torch.zeros_like(y))
    nearest = torch.where(remainder > y * (above - y), above, y)
    nearest = torch.where((remainder <= y * (below - y)) & (y > 0), below, nearest)
    return nearest / scale


def erfinv64(x: Tensor) -> Tensor:
    """The inverse of erf, by the normal distribution's quantiles.

    The relative error is below 10⁻¹⁵. With q = x/2 the inverse is q·A(0.425² − q²)/√2 for |q| ≤
    0.425. In the tails, with r² = −ln(½ − |q|), it is ±C(r − 1.6)/√2, and ±E(r − 5)/√2 for r > 5.
    A, C and E are quotients of polynomials.

    Source: Wichura, "Algorithm AS 241: the percentage points of the normal distribution", 1988.
    """
    q = x * 0.5
    r = sqrt64(-log64((0.5 - q.abs()).clamp(min=2.0**-60)))
    tail = torch.where(r > 5, _rational(r - 5, _FAR), _rational(r - 1.6, _TAIL))
    y = torch.where(q.abs() <= 0.425, q * _rational(0.180625 - q * q, _CENTRE), x.sign() * tail)
    y = torch.where(x.abs() == 1, x * math.inf, y * math.sqrt(0.5))
    return torch.where(x.abs() > 1, math.nan, y)


def _rational(x: Tensor, coefficients: tuple[list[float], list[float]]) -> Tensor:
    numerator, denominator = coefficients
    return _polynomial(x, numerator) / _polynomial(x, denominator)


def sin64(x: Tensor, quarters: int = 0) -> Tensor:
    """sin(x + quarters·π/2) for |x| < 2²⁰.

    With n the integer nearest to x / (π/2), and r = x − n·π/2, the result is ±sin r or ±cos r, by
    Taylor's series.
    """
    finite = x.abs() < math.inf
    if (x.abs() >= 2.0**20).logical_and_(finite).any():
        raise ConfigError(
            f"an angle is {x.abs()[finite].max():g}, expected below 2²⁰ for exact sin and cos"
        )
    # No −0, which would make sin(−0) 0.
    n = torch.where(finite, x * (2 / math.pi), 0.0).round() + 0.0
    r = torch.where(finite, x, math.nan) - n * _HALF_PI_HIGH - n * _HALF_PI_LOW
    square = r * r
    sine = r * _polynomial(square, [(-1) ** i / math.factorial(2 * i + 1) for i in range(8)])
    cosine = _polynomial(square, [(-1) ** i / math.factorial(2 * i) for i in range(9)])
    quadrant = (n.to(torch.int64) + quarters) & 3
    result = torch.where((quadrant & 1).bool(), cosine, sine)
    return torch.where((quadrant & 2).bool(), -result, result)


cos64 = partial(sin64, quarters=1)


def pow64(x: Tensor, exponent: Tensor) -> Tensor:
    """±e^(exponent·ln |x|): x to a power, with IEEE 754's results for negative, infinite and NaN x.

    The relative error is below 10⁻¹³ where |exponent·ln |x|| < 88.
    """
    is_whole, half = exponent == exponent.round(), exponent * 0.5
    is_odd = is_whole & (half != half.round())
    result = exp64(log64(x.abs()) * exponent)
    result = torch.where(x.signbit() & is_odd, -result, result)
    result = torch.where((x < 0) & (x > -math.inf) & ~is_whole, math.nan, result)
    return torch.where((exponent == 0) | (x == 1) | ((x == -1) & exponent.isinf()), 1.0, result)


def _pow_number(x: Tensor, exponent: float) -> Tensor:
    """x to the power of a number. Products, for small integers, and a root, for ½, round less."""
    if abs(exponent) <= _MOST_PRODUCTS and exponent == int(exponent):
        if exponent < 0:
            return 1 / _pow_number(x, -exponent)
        result, square, rest = torch.ones_like(x), x, int(exponent)
        while rest:
            result = result * square if rest & 1 else result
            square, rest = square * square, rest >> 1
        return result
    if abs(exponent) == 0.5:
        return sqrt64(x) if exponent > 0 else 1 / sqrt64(x)
    return pow64(x, torch.full_like(x, exponent))


def _log1p64(x: Tensor) -> Tensor:
    u = x + 1  # whose rounding error the quotient removes
    return torch.where((u == 1) | (u == math.inf), x, log64(u) * (x / (u - 1)))


def _expm1(x: Tensor) -> Tensor:
    t = tanh64(x * 0.5)
    return torch.where(x.abs() < 0.125, 2 * t / (1 - t), exp64(x) - 1)


def _silu_backward(g: Tensor, x: Tensor) -> Tensor:
    s = sigmoid64(x)
    return g * (s * (x * (1 - s) + 1))


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """ln(1 + e^βx) / β, and x where βx is above the threshold."""
    z = x * beta
    return torch.where(z > threshold, x, (z.clamp(min=0) + _log1p64(exp64(-z.abs()))) / beta)


def _softplus_backward(g: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    z = x * beta
    return torch.where(z > threshold, g, g * sigmoid64(z))


def _lerp(x: Tensor, y: Tensor, weight: Tensor | float) -> Tensor:
    """x + weight·(y − x), computed from x for weights below ½, else from y: weight 1 gives y."""
    from_x, from_y = x + (y - x) * weight, y - (y - x) * (1 - weight)
    if isinstance(weight, Tensor):
        return torch.where(weight.abs() < 0.5, from_x, from_y)
    return from_x if abs(weight) < 0.5 else from_y


_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715
_ROOT_HALF, _DENSITY = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return x * 0.5 * (tanh64((x + x * x * x * _TANH_CUBE) * _TANH_SCALE) + 1)
    return x * 0.5 * (erf64(x * _ROOT_HALF) + 1)


def _gelu_backward(g: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        t = tanh64((x + x * x * x * _TANH_CUBE) * _TANH_SCALE)
        inner = (x * x * (3 * _TANH_CUBE) + 1) * _TANH_SCALE
        return g * ((t + 1) * 0.5 + x * 0.5 * (1 - t * t) * inner)
    return g * ((erf64(x * _ROOT_HALF) + 1) * 0.5 + x * exp64(x * x * -0.5) * _DENSITY)


# Functions of elements in float64, whose results are rounded once
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "exp": exp64,
    "exp2": exp2_64,
    "expm1": _expm1,
    "log": log64,
    "log2": lambda x: log64(x) * (1 / math.log(2)),
    "log1p": _log1p64,
    "sigmoid": sigmoid64,
    "sigmoid_backward": lambda g, y: g * (y * (1 - y)),
    "tanh": tanh64,
    "tanh_backward": lambda g, y: g * (1 - y * y),
    "sin": sin64,
    "cos": cos64,
    "erf": erf64,
    "erfinv": erfinv64,
    "rsqrt": lambda x: 1 / sqrt64(x),
    "silu": lambda x: x * sigmoid64(x),
    "silu_backward": _silu_backward,
    "softplus": _softplus,
    "softplus_backward": _softplus_backward,
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
}
# One operation at a time: a processor may fuse a product and a sum, which rounds once
_STEPS: dict[str, Callable[..., Tensor]] = {
    "add": lambda x, y, alpha=1: x + times(y, alpha),
    "sub": lambda x, y, alpha=1: x - times(y, alpha),
    "rsub": lambda x, y, alpha=1: y - times(x, alpha),
    "addcmul": lambda x, a, b, *, value=1: x + times(a, value) * b,
    "addcdiv": lambda x, a, b, *, value=1: x + times(a, value) / b,
    "lerp": _lerp,
}
for _name, _function in _FUNCTIONS.items():
    EXACT_RULES[_name] = widened(partial(in_pieces, _function))
EXACT_RULES.update({name: widened(steps) for name, steps in _STEPS.items()})


@rule("sqrt", any_dtype=True)
def _sqrt(x: Tensor) -> Tensor:
    """A library's root in float64 rounds to the right float32.

    No exact root of a float32 number is near the middle of two float32 numbers.
    """
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    if x.dtype == torch.float64:
        return sqrt64(x)
    return in_pieces(torch.sqrt, x) if x.dtype == torch.float32 else x.sqrt()


@rule("pow", any_dtype=True)
def _pow(x: Any, exponent: Any) -> Tensor:
    dtype = torch.result_type(x, exponent)
    if not dtype.is_floating_point:
        return torch.pow(x, exponent)
    check_dtypes(torch.empty(0, dtype=dtype, device="cpu"))
    if not isinstance(exponent, Tensor):
        return in_pieces(_pow_number, x.to(dtype), float(exponent))
    base = x.to(dtype) if isinstance(x, Tensor) else torch.full_like(exponent, x, dtype=dtype)
    return in_pieces(pow64, base, exponent.to(dtype))


@rule("linspace", "logspace", any_dtype=True)  # also of integers, which PyTorch computes in floats
def _linspace(*bounds: object, **options: object) -> Tensor:
    raise ConfigError("exact arithmetic has no linspace or logspace; scale an arange")


@rule("arange", any_dtype=True)
def _arange(*bounds: float, **options: Any) -> Tensor:
    if any(bound != int(bound) for bound in bounds):
        raise ConfigError(
            f"arange{bounds} in exact arithmetic expects whole numbers; scale their range"
        )
    numbers: Tensor = torch.arange(*bounds, **options)
    if numbers.dtype not in NARROW:
        return numbers
    # PyTorch rounds the first number of each vector, and counts from it.
    return torch.arange(*bounds, **options | {"dtype": torch.float32}).to(numbers.dtype)
