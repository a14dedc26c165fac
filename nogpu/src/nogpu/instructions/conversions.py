# SPDX-License-Identifier: MIT
"""Conversions between kinds of numbers: 9.7.9 of the PTX ISA (cvt)."""

from collections.abc import Callable

import numpy as np

from nogpu.instructions.arithmetic import flush, positive, saturate
from nogpu.instructions.rounding import (
    E8M0,
    FLOAT8,
    NAN,
    NARROW,
    TO_INTEGER,
    encode_e8m0,
    encode_float8,
    encode_narrow,
    rounded,
)
from nogpu.machine.decode import Run, elementwise, instruction
from nogpu.machine.parse import Instruction
from nogpu.machine.registers import DTYPES, FLOATS, HALVES, PAIRS, Values, encode

MODES = ("rn", "rz", "rm", "rp", "rna")
INTEGER_MODES = {f"{mode}i": mode for mode in ("rn", "rz", "rm", "rp")}
OTHERS = ("ftz", "sat", "satfinite", "relu")
FLOAT8_PAIRS = {"e4m3x2": "e4m3", "e5m2x2": "e5m2"}
NARROW_PAIRS = {"e2m1x2": "e2m1", "e2m3x2": "e2m3", "e3m2x2": "e3m2"}


@instruction("cvt")
def _convert(i: Instruction) -> Run:  # noqa: C901, PLR0911  # by kinds
    _, *modifiers, to, source = i.parts
    assert set(modifiers) <= {*MODES, *INTEGER_MODES, *OTHERS}
    mode = next((part for part in modifiers if part in MODES), "rn")
    to_whole = next((INTEGER_MODES[part] for part in modifiers if part in INTEGER_MODES), "")
    if to in FLOAT8_PAIRS:
        return _to_float8(i, to, source, modifiers)
    if source in FLOAT8_PAIRS:
        return _of_float8(i, to, source, modifiers)
    if to in NARROW_PAIRS or source in NARROW_PAIRS:
        return _of_narrow(i, to, source, modifiers)
    if "ue8m0x2" in (to, source):
        return _of_e8m0(i, to, source, mode, modifiers)
    if to == "tf32":
        return _to_tf32(i, mode, modifiers)
    ftz = "ftz" in modifiers and source == "f32"
    if to not in FLOATS:
        assert (source in FLOATS) == bool(to_whole)
        convert = _to_integer(to, to_whole, ftz) if to_whole else _between_integers(to, modifiers)
        return elementwise(i, convert, to, source)
    assert source not in PAIRS
    finish = _finish(to, source, modifiers)
    # Through a wider format, so that it is rounded once.
    is_nearest = mode == "rn" and "satfinite" not in modifiers
    is_short = is_nearest and (
        source in ("f32", "f16", "bf16") or to == "f64" or (to, source) == ("f32", "f64")
    )

    def convert_float(x: Values) -> Values:
        x = flush(x) if ftz else x
        if to_whole:
            whole = TO_INTEGER[to_whole](x)
            return finish(np.copysign(whole, x))
        if is_short:
            return finish(x)
        dtype = np.float64 if to == "f64" else np.float32
        return finish(rounded(x, PAIRS.get(to, to), mode, "satfinite" in modifiers).astype(dtype))

    if to in PAIRS:  # the first source becomes the upper half
        assert len(i.operands) == 3
        return elementwise(
            i,
            lambda high, low: np.stack([convert_float(low), convert_float(high)]),
            to,
            source,
            source,
        )
    return elementwise(i, convert_float, to, source)


def _finish(to: str, source: str, modifiers: list[str]) -> Callable[[Values], Values]:
    """What modifiers make of a float, which is encoded then."""
    ftz = "ftz" in modifiers and to == "f32"

    def finish(x: Values) -> Values:
        if to == "f32" and x.dtype != np.float32:
            x = x.astype(np.float32)
        if (to, source) == ("f32", "f16"):
            x = np.where(np.isnan(x), NAN, x)
        x = flush(x) if ftz else x
        x = saturate(x) if "sat" in modifiers else x
        x = positive(x) if "relu" in modifiers else x
        # What is no longer float32 has been rounded to a half, or will be.
        return x.astype(np.float32) if to in HALVES and x.dtype == np.longdouble else x

    return finish


def _to_integer(to: str, mode: str, ftz: bool) -> Callable[[Values], Values]:
    """NaN becomes 0, and what is too large the largest integer."""
    limits, round_it = np.iinfo(DTYPES[to]), TO_INTEGER[mode]

    def convert(x: Values) -> Values:
        x = flush(x) if ftz else x
        whole = round_it(np.where(np.isnan(x), 0, x).astype(np.longdouble))
        return np.clip(whole, limits.min, limits.max).astype(DTYPES[to])

    return convert


def _between_integers(to: str, modifiers: list[str]) -> Callable[[Values], Values]:
    limits = np.iinfo(DTYPES[to])
    if "sat" not in modifiers:
        return lambda x: x

    def convert(x: Values) -> Values:
        return np.clip(x.astype(np.longdouble), limits.min, limits.max).astype(DTYPES[to])

    return convert


def _to_tf32(i: Instruction, mode: str, modifiers: list[str]) -> Run:
    """A float32 whose last 13 bits are zeros."""

    def convert(x: Values) -> Values:
        x = rounded(x, "tf32", mode, "satfinite" in modifiers).astype(np.float32)
        x = positive(x) if "relu" in modifiers else x
        return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), x.view(np.uint32))

    return elementwise(i, convert, "b32", "f32")


def _to_float8(i: Instruction, to: str, source: str, modifiers: list[str]) -> Run:
    """Two codes, of which the upper one is of the first operand, or of the upper half."""
    kind = FLOAT8_PAIRS[to]
    assert "satfinite" in modifiers

    def code(x: Values) -> Values:
        x = positive(x) if "relu" in modifiers else x
        return encode_float8(kind, rounded(x, kind, "rn", saturates=True)).astype(np.uint16)

    if source in PAIRS:
        return elementwise(i, lambda x: code(x[0]) | code(x[1]) << np.uint16(8), "b16", source)
    assert source == "f32"
    return elementwise(
        i, lambda high, low: code(low) | code(high) << np.uint16(8), "b16", source, source
    )


def _of_float8(i: Instruction, to: str, source: str, modifiers: list[str]) -> Run:
    assert to == "f16x2"  # which has all numbers of both
    table = FLOAT8[FLOAT8_PAIRS[source]].astype(np.float32)
    table = positive(table) if "relu" in modifiers else table
    codes = encode("f16", table).astype(np.uint32)
    return elementwise(i, lambda x: codes[x & 255] | codes[x >> 8] << np.uint32(16), "b32", "b16")


def _of_narrow(i: Instruction, to: str, source: str, modifiers: list[str]) -> Run:
    """Two codes of 4 bits in a byte, or of 6 bits in two bytes; the upper one is the first
    operand's."""
    relu = "relu" in modifiers
    assert set(modifiers) <= {"rn", "satfinite", "relu"}
    if to in NARROW_PAIRS:
        assert source == "f32"
        assert "satfinite" in modifiers
        kind = NARROW_PAIRS[to]
        held, shift = ("b8", np.uint16(4)) if kind == "e2m1" else ("b16", np.uint16(8))

        def encode_both(high: Values, low: Values) -> Values:
            x, y = (positive(one) if relu else one for one in (high, low))
            both = encode_narrow(kind, x).astype(np.uint16) << shift | encode_narrow(kind, y)
            return both.astype(DTYPES[held])

        return elementwise(i, encode_both, held, "f32", "f32")
    assert to == "f16x2"  # which has all numbers of them
    kind = NARROW_PAIRS[source]
    table = NARROW[kind].astype(np.float32)
    table = positive(table) if relu else table
    codes, last = encode("f16", table).astype(np.uint32), len(table) - 1
    held = "b8" if kind == "e2m1" else "b16"
    place = np.uint16(4 if kind == "e2m1" else 8)
    return elementwise(
        i, lambda x: codes[x & last] | codes[x >> place & last] << np.uint32(16), "b32", held
    )


def _of_e8m0(i: Instruction, to: str, source: str, mode: str, modifiers: list[str]) -> Run:
    """Two powers of two. The sign of a number is dropped."""
    if source == "ue8m0x2":
        assert (to, modifiers) == ("bf16x2", ["rn"])
        codes = encode("bf16", E8M0.astype(np.float32)).astype(np.uint32)
        return elementwise(
            i, lambda x: codes[x & 255] | codes[x >> 8] << np.uint32(16), "b32", "b16"
        )
    assert mode in ("rz", "rp")
    assert set(modifiers) <= {mode, "satfinite"}

    def code(x: Values) -> Values:
        return encode_e8m0(x, mode, "satfinite" in modifiers).astype(np.uint16)

    if source == "bf16x2":
        return elementwise(i, lambda x: code(x[0]) | code(x[1]) << np.uint16(8), "b16", source)
    assert source == "f32"
    return elementwise(
        i, lambda high, low: code(low) | code(high) << np.uint16(8), "b16", source, source
    )
