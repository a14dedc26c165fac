# SPDX-License-Identifier: MIT
"""Conversions of NaN, infinities and zeros have the same bits in C as in Python."""

import numpy as np
import pytest
from test_instructions import executed

from nogpu.machine import registers

# Zero, infinity, the least and the largest number, 1, and a quiet NaN, signaling ones, and one of
# all bits.
CODES = {
    "f64": [one << 48 for one in (0, 0x7FF0, 1, 0x7FEF, 0x3FF0, 0x7FF8, 0x7FF4, 0x7FFF)],
    "f32": [
        0,
        0x7F800000,
        1,
        0x7F7FFFFF,
        0x3F800000,
        0x7FC00000,
        0x7FA00000,
        0x7F802000,
        0x7F800001,
        0x7FFFFFFF,
    ],
    "f16": [0, 0x7C00, 1, 0x7BFF, 0x3C00, 0x7E00, 0x7D00, 0x7C01, 0x7FFF],
    "bf16": [0, 0x7F80, 1, 0x7F7F, 0x3F80, 0x7FC0, 0x7FA0, 0x7F81, 0x7FFF],
}
CANONICAL = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}
TO_HALVES = [
    (f"{mode}{others}", to, source)
    for to in ("f16", "bf16")
    for mode in ("rn", "rz")
    for others in ("", ".relu", ".satfinite", ".relu.satfinite")
    for source in ("f32", "f64", "f16", "bf16")
    if (source == "f32" or not others) and source != to
]


def bits_of(kind: str) -> int:
    return int(kind.removeprefix("b")[1:])


def special(kind: str, turn: int = 0) -> np.ndarray:
    """32 numbers, with both signs."""
    size = bits_of(kind)
    codes = [*CODES[kind], *(code | 1 << (size - 1) for code in CODES[kind])]
    return np.roll(np.resize(np.array(codes, f"u{size // 8}"), 32), turn)


def is_nan(x: np.ndarray, kind: str) -> np.ndarray:
    return (x & x.dtype.type(2 ** (bits_of(kind) - 1) - 1)) > x.dtype.type(CODES[kind][1])


@pytest.mark.parametrize("modifiers, to, source", TO_HALVES, ids=".".join)
def test_nan_becomes_the_nan_of_halves(modifiers, to, source):
    x = special(source)
    y = executed(f"cvt.{modifiers}.{to}.{source} y, x0;", x, out=np.uint16)
    assert is_nan(x, source).any()
    assert (y[is_nan(x, source)] == CANONICAL[to]).all()
    if (modifiers, source) == ("rn", "f32"):
        assert not is_nan(y, to)[~is_nan(x, source)].any()
    if source == "f32":  # also of two, of which the first operand becomes the upper half
        other = special(source, 5)
        pairs = executed(f"cvt.{modifiers}.{to}x2.f32 y, x0, x1;", x, other, out=np.uint32)
        low = executed(f"cvt.{modifiers}.{to}.f32 y, x0;", other, out=np.uint16)
        assert np.array_equal(pairs, y.astype(np.uint32) << np.uint32(16) | low)


@pytest.mark.parametrize(
    "to, source",
    [
        ("f32", "f16"),
        ("f32", "bf16"),
        ("f64", "f16"),
        ("f64", "bf16"),
        ("f64", "f32"),
        ("rn.f32", "f64"),
        ("rni.f16", "f16"),
        ("rni.f32", "f32"),
        ("rzi.f64", "f64"),
    ],
)
def test_other_conversions_of_nan_have_the_same_bits(to, source):
    kind = to.rpartition(".")[2]
    x = special(source)
    y = executed(f"cvt.{to}.{source} y, x0;", x, out=f"u{bits_of(kind) // 8}")
    assert np.array_equal(is_nan(y, kind), is_nan(x, source))
    if (to, source) == ("f32", "f16"):
        assert (y[is_nan(x, source)] == CANONICAL["f32"]).all()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "f16x2", "bf16x2"])
@pytest.mark.parametrize("name", ["max", "min"])
def test_a_signaling_nan_is_no_maximum(name, kind):
    half = kind.removesuffix("x2")
    x, one = special(half), np.full(32, CODES[half][4], special(half).dtype)
    if half != kind:
        x, one = (y.astype(np.uint32) << np.uint32(16) | y for y in (x, one))
    for given in ((x, one), (one, x)):
        y = executed(f"{name}.{kind} y, x0, x1;", *given, out=x.dtype)
        assert np.array_equal(y[is_nan(special(half), half)], one[is_nan(special(half), half)])


def test_a_difference_of_executors_is_noticed(monkeypatch):
    """As if Python kept the bits of a NaN."""
    encode = registers.encode
    monkeypatch.setattr(
        registers,
        "encode",
        lambda kind, x: x.astype(np.float16).view(np.uint16) if kind == "f16" else encode(kind, x),
    )
    with pytest.raises(AssertionError, match="cvt"):
        executed("cvt.rn.f16.f32 y, x0;", special("f32"), out=np.uint16)
