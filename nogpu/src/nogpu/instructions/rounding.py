# SPDX-License-Identifier: MIT
"""Formats of floating point, and the ways to round to them: 9.7.3 and 9.7.10 (cvt) of the PTX ISA.

"rn" is to the nearest, ties to even; "rna" has ties away from zero; "rz" is toward zero, "rm" down,
and "rp" up.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from nogpu.machine.registers import Values

NAN = np.uint32(0x7FFFFFFF).view(np.float32)


class Format(NamedTuple):
    """Bits of the significand with the leading one, the least exponent of a normal number, and the
    largest number."""

    bits: int
    least: int
    largest: float


FORMATS = {
    "f64": Format(53, -1022, float(np.finfo(np.float64).max)),
    "f32": Format(24, -126, float(np.finfo(np.float32).max)),
    "tf32": Format(11, -126, 2.0**128 - 2.0**117),
    "bf16": Format(8, -126, 2.0**128 - 2.0**120),
    "f16": Format(11, -14, 65504.0),
    "e5m2": Format(3, -14, 57344.0),
    "e4m3": Format(4, -6, 448.0),
    "e3m2": Format(3, -2, 28.0),
    "e2m3": Format(4, 0, 7.5),
    "e2m1": Format(2, 0, 6.0),
}
TO_INTEGER: dict[str, Callable[[Values], Values]] = {
    "rn": np.rint,
    "rz": np.trunc,
    "rm": np.floor,
    "rp": np.ceil,
    "rna": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
}


def _float8(exponent_bits: int) -> Values:
    """Return the numbers of all 256 codes: e4m3 has no infinity, and e5m2 has those of IEEE."""
    codes, mantissa_bits = np.arange(256), 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    exponent = codes >> mantissa_bits & (2**exponent_bits - 1)
    fraction = (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
    normal = np.ldexp(1 + fraction, exponent - bias)
    numbers = np.where(exponent == 0, np.ldexp(fraction, 1 - bias), normal)
    if exponent_bits == 4:
        numbers[codes & 127 == 127] = np.nan
    else:
        numbers[codes & 127 == 124] = np.inf
        numbers[codes & 127 > 124] = np.nan
    return np.where(codes > 127, -numbers, numbers)


FLOAT8 = {"e4m3": _float8(4), "e5m2": _float8(5)}


def encode_float8(kind: str, values: Values) -> Values:
    """The codes, uint8, of numbers that ``kind`` has; NaN is 0x7F."""
    positive = FLOAT8[kind][: 127 if kind == "e4m3" else 125]
    codes = np.searchsorted(positive, np.abs(values)).astype(np.uint8)
    codes |= np.signbit(values).astype(np.uint8) << np.uint8(7)
    return np.where(np.isnan(values), np.uint8(127), codes)


def _finite(exponent_bits: int, mantissa_bits: int) -> Values:
    """Return the numbers of all codes of 4 or 6 bits, none of which is an infinity or NaN."""
    codes = np.arange(1 << exponent_bits + mantissa_bits)
    exponent, bias = codes >> mantissa_bits, 2 ** (exponent_bits - 1) - 1
    fraction = (codes & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    numbers = np.ldexp((exponent > 0) + fraction, np.maximum(exponent, 1) - bias)
    return np.concatenate([numbers, -numbers])


NARROW = {"e3m2": _finite(3, 2), "e2m3": _finite(2, 3), "e2m1": _finite(2, 1)}


def encode_narrow(kind: str, values: Values) -> Values:
    """The codes, uint8, of numbers that are rounded to ``kind``; of NaN that of the largest."""
    positive = NARROW[kind][: len(NARROW[kind]) // 2]
    nearest = rounded(np.nan_to_num(values, nan=np.inf), kind, "rn", saturates=True)
    codes = np.searchsorted(positive, np.abs(nearest)).astype(np.uint8)
    return codes | (np.signbit(nearest) & ~np.isnan(values)) * np.uint8(len(positive))


# The exponents of blocks of MXFP8 and MXFP4: a code is 127 more than the exponent, and 255 is NaN.
E8M0 = np.concatenate([np.ldexp(1.0, np.arange(255) - 127), [np.nan]])


def encode_e8m0(values: Values, mode: str, saturates: bool) -> Values:
    """The codes, uint8, of powers of two at most ("rz") or at least ("rp") as large as numbers."""
    size = np.abs(values.astype(np.float64))
    if mode == "rp":
        codes = np.searchsorted(E8M0[:255], size, "left")
    else:
        codes = np.searchsorted(E8M0[:255], size, "right") - 1
    codes = np.where(np.isinf(size), 255, np.clip(codes, 0, 255))
    codes = np.where((codes == 255) & saturates, 254, codes)
    return np.where(np.isnan(size), 255, codes).astype(np.uint8)


def rounded(values: Values, kind: str, mode: str, saturates: bool = False) -> Values:
    """``values``, which may have more bits, rounded to numbers of ``kind``, in a wider type.

    Args:
        saturates: larger numbers, infinities included, become the largest one.
    """
    bits, least, largest = FORMATS[kind]
    exact = values.astype(np.longdouble)
    exponents = np.maximum(np.frexp(exact)[1] - 1, least) - (bits - 1)
    result = np.ldexp(TO_INTEGER[mode](np.ldexp(exact, -exponents)), exponents)
    result = np.copysign(result, exact)
    over = np.abs(result) > largest
    if not saturates:
        stays = {"rz": True, "rm": exact > 0, "rp": exact < 0}.get(mode, False)
        over &= stays & np.isfinite(exact)
        result = np.where(np.abs(result) > largest, np.copysign(np.inf, exact), result)
    return np.where(over, np.copysign(np.longdouble(largest), exact), result)


def to_odd(nearest: Values, error: Values) -> Values:
    """``nearest + error`` rounded to the neighbor with an odd last bit, if it is not exact.

    Rounded once more, to two bits less or still fewer, it is as if rounded once: S. Boldo and
    G. Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    bits = np.ascontiguousarray(nearest).view(f"u{nearest.dtype.itemsize}")
    moves = (error != 0) & np.isfinite(nearest) & np.isfinite(error) & (bits & 1 == 0)
    toward = np.where(error > 0, np.inf, -np.inf).astype(nearest.dtype)
    return np.where(moves, np.nextafter(nearest, toward), nearest)


def fused_to_odd(a: Values, b: Values, c: Values) -> Values:
    """a·b + c of float32, in float64 and rounded to odd."""
    product = a.astype(np.float64) * b  # exact
    total = product + c
    of_c = total - product
    return to_odd(total, (product - (total - of_c)) + (c - of_c))


# Results that are rounded from exact ones, by fractions

EXACT: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "rcp": lambda a: 1 / a,
    "fma": lambda a, b, c: a * b + c,
}
NEAREST: dict[str, Callable[..., Values]] = {  # of zeros, infinities and NaN
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    # A finite product does not overflow before the sum.
    "fma": lambda a, b, c: np.where(np.isfinite(a) & np.isfinite(b) & np.isinf(c), c, a * b + c),
}
SUMS = {"add": (-1, -1), "sub": (-1, -1), "fma": (-1, 1, -1)}  # signs that give the opposite


def _square_root(x: Fraction) -> Fraction:
    """The root of a float, with enough bits and one more that tells whether it is exact."""
    if x < 0:
        raise ZeroDivisionError  # a NaN
    shift = 2 * (128 + max(x.denominator.bit_length() - x.numerator.bit_length(), 0))
    scaled = (x.numerator << shift) // x.denominator  # exact: a power of two divides it
    root = math.isqrt(scaled)
    twice = 2 * root + (root * root != scaled)
    return Fraction(twice, 2 << shift // 2)


def round_fraction(exact: Fraction, kind: str, mode: str) -> float:
    """A number that is not zero, rounded to ``kind``."""
    bits, least, largest = FORMATS[kind]
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = max(exponent, least) - (bits - 1)
    scaled = size / Fraction(2) ** unit
    whole = int(scaled)
    rest = scaled - whole
    is_away = {"rz": False, "rm": exact < 0, "rp": exact > 0}.get(mode)
    is_beyond_half = (rest, whole % 2) > (Fraction(1, 2), 0)
    whole += is_beyond_half if is_away is None else is_away and rest > 0
    sign = -1.0 if exact < 0 else 1.0
    if whole * Fraction(2) ** unit > largest:
        return sign * (largest if is_away is False else math.inf)
    return sign * math.ldexp(whole, unit)


def directed(name: str, kind: str, mode: str) -> Callable[..., Values]:
    """An operation of float32 or float64 whose result is rounded once, in any mode."""
    exact_of, nearest = EXACT.get(name, _square_root), NEAREST[name]

    def run(*x: Values) -> Values:
        result = nearest(*x)
        if mode == "rm" and name in SUMS:  # where a sum is zero, it is −0 but of two +0
            opposite = nearest(*(sign * one for sign, one in zip(SUMS[name], x, strict=True)))
            result = np.where(result == 0, -opposite, result)
        for lane, given in enumerate(zip(*(one.tolist() for one in x), strict=True)):
            if not all(map(math.isfinite, given)):
                continue
            try:
                exact = exact_of(*map(Fraction, given))
            except ZeroDivisionError:
                continue
            if exact:
                result[lane] = round_fraction(exact, kind, mode)
        return result

    return run


def _fused_float64(a: Values, b: Values, c: Values) -> Values:
    fused = getattr(math, "fma", None)  # of Python 3.13
    if fused is None:
        return _fused_by_fractions(a, b, c)
    try:
        lanes = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
        return np.array([fused(*one) for one in lanes], np.float64)
    except (OverflowError, ValueError):  # where C gives an infinity or NaN
        return _fused_by_fractions(a, b, c)


_fused_by_fractions = directed("fma", "f64", "rn")


def fused(a: Values, b: Values, c: Values) -> Values:
    """a·b + c, rounded once. NaN has one form."""
    if a.dtype == np.float64:
        result = _fused_float64(a, b, c)
        return np.where(np.isnan(result), np.nan, result)
    result = fused_to_odd(a, b, c).astype(np.float32)
    return np.where(np.isnan(result), NAN, result)


def fused_halves(a: Values, b: Values, c: Values) -> Values:
    """a·b + c of halves as float32, so that it can be rounded to halves."""
    exact = fused_to_odd(a, b, c)
    nearest = exact.astype(np.float32)
    return to_odd(nearest, exact - nearest)
