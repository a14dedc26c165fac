# SPDX-License-Identifier: MIT
"""Rare instructions have the results that the PTX ISA defines."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_instructions import executed, floats, halves, integers, of_integers, same


def ones(count: int) -> int:
    return (1 << count) - 1


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_masks_and_extensions(mode):
    a, b = integers(np.uint32), integers(np.uint32, 1) % 40
    a[:8], b[:8] = 5, (0, 1, 31, 32, 33, 39, 8, 16)

    def count(n: int) -> int:
        return n % 32 if mode == "wrap" else min(n, 32)

    first = a % 40
    of_integers(f"bmsk.{mode}.b32 y, x0, x1;", lambda p, n: ones(count(n)) << count(p), first, b)
    of_integers(f"szext.{mode}.u32 y, x0, x1;", lambda x, n: x & ones(count(n)), a, b)

    def extended(x: int, n: int) -> int:
        n = count(n)
        low = x & ones(n)
        return low - (1 << n) if n and low >> (n - 1) else low

    of_integers(f"szext.{mode}.s32 y, x0, x1;", extended, a, b)


def test_selection_by_sign():
    a, b, c = integers(np.int32), integers(np.int32, 1), integers(np.int32, 2)
    found = executed("slct.b32.s32 y, x0, x1, x2;", a, b, c, out=np.int32)
    assert same(found, np.where(c >= 0, a, b))
    x = floats(np.float32)
    x[:2] = -1e-40, -0.0
    for ftz, sign in (("", x), (".ftz", np.where(np.abs(x) < 2.0**-126, 0, x))):
        found = executed(f"slct{ftz}.s32.f32 y, x0, x1, x2;", a, b, x, out=np.int32)
        assert same(found, np.where(sign >= 0, a, b)), ftz


def test_matches():
    x = integers(np.int32) % 3
    expected = [sum(1 << n for n in range(32) if x[n] == one) for one in x]
    for members in ("-1", "0xffffffff"):
        found = executed(f"match.any.sync.b32 y, x0, {members};", x, out=np.uint32)
        assert found.tolist() == expected
    wide = x.astype(np.int64) << 40
    assert executed("match.any.sync.b64 y, x0, -1;", wide, out=np.uint32).tolist() == expected
    code = "match.all.sync.b32 y|p, x0, -1; @p add.u32 y, y, 7;"
    assert executed(code, x, out=np.uint32).tolist() == [0] * 32
    assert executed(code, 0 * x + 3, out=np.uint32).tolist() == [6] * 32


def test_shuffles_whose_mask_is_hexadecimal():
    x = integers(np.int32)
    found = executed("shfl.sync.bfly.b32 y, x0, 1, 0x1f, 0xffffffff;", x, out=np.int32)
    assert same(found, x[np.arange(32) ^ 1])


def test_differences_of_bytes():
    a, b, c = (integers(np.uint32, seed) for seed in range(3))

    def differences(x: int, y: int, signed: bool) -> list[int]:
        pairs = zip(x.to_bytes(4, "little"), y.to_bytes(4, "little"), strict=True)
        return [abs((p ^ 128) - (q ^ 128)) if signed else abs(p - q) for p, q in pairs]

    def packed(values: list[int]) -> int:
        return sum((value & 255) << 8 * n for n, value in enumerate(values))

    for kind in ("u32", "s32"):
        s = kind == "s32"
        code = f"vabsdiff4.{kind}.{kind}.{kind}"
        of_integers(f"{code} y, x0, x1, x2;", lambda x, y, z: packed(differences(x, y, s)), a, b, c)  # noqa: B023
        of_integers(
            f"{code}.add y, x0, x1, x2;",
            lambda x, y, z: sum(differences(x, y, s)) + z,  # noqa: B023
            a,
            b,
            c,
        )
        limit = 127 if s else 255
        of_integers(
            f"{code}.sat y, x0, x1, x2;",
            lambda x, y, z: packed([min(d, limit) for d in differences(x, y, s)]),  # noqa: B023
            a, b, c,
        )  # fmt: skip


# By the Open Compute Project's "Microscaling formats", 1.0
NUMBERS = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e2m3": [n / 8 for n in (*range(16), *range(16, 32, 2), *range(32, 64, 4))],
    "e3m2": [n / 16 for n in range(4)]
    + [(4 + n) * 2**e / 16 for e in range(7) for n in range(4)],
}  # fmt: skip


def nearest(x: float, table: list[float]) -> int:
    """The code of the nearest number, an even one of two; of NaN that of the largest."""
    size = table[-1] if np.isnan(x) else min(abs(x), table[-1])
    code = min(range(len(table)), key=lambda n: (abs(table[n] - size), n % 2))
    return code + len(table) * bool(np.signbit(x) and not np.isnan(x))


@pytest.mark.parametrize("kind", NUMBERS)
def test_conversions_of_narrow_floats(kind):
    table = NUMBERS[kind]
    x, y = floats(np.float32, 1, 3.0), floats(np.float32, 2, 3.0)
    middles = [(a + b) / 2 for a, b in pairwise(table)][-8:]
    x[: len(middles)] = middles
    shift, out = (4, np.uint8) if kind == "e2m1" else (8, np.uint16)
    narrow = ".reg .b8 t;" if kind == "e2m1" else ".reg .b16 t;"
    code = f"{narrow} cvt.rn.satfinite.{kind}x2.f32 t, x0, x1; cvt.u16.u{shift * 2} y, t;"
    found = executed(code, x, y, out=np.uint16).astype(out)
    expected = [nearest(p, table) << shift | nearest(q, table) for p, q in zip(x, y, strict=True)]
    assert found.tolist() == expected
    code = f".reg .b32 z; {code} cvt.rn.f16x2.{kind}x2 z, t; mov.b32 {{y, _}}, z;"
    pairs = executed(code, x, y, out=np.uint16)
    signed = [*table, *(-one for one in table)]
    assert halves(pairs, "f16").tolist() == [signed[nearest(q, table)] for q in y]


@pytest.mark.parametrize("mode", ["rz", "rp"])
def test_conversions_of_exponents(mode):
    x, y = floats(np.float32, 1, 30.0), floats(np.float32, 2, 0.01)
    x[:6] = 1, 2.0**-127, 2.0**-130, 1.5 * 2.0**-127, 2.0**127, 1.5 * 2.0**127

    def code(value: float, saturates: bool) -> int:
        size = abs(float(value))
        if np.isnan(size):
            return 255
        if np.isinf(size):
            return 254 if saturates else 255
        exponent = -128 if size == 0 else int(np.frexp(size)[1]) - 1
        up = mode == "rp" and size > 0 and size > np.ldexp(1.0, exponent)
        found = max(exponent + up + 127, 0)
        return min(found, 254) if saturates else min(found, 255)

    for form, saturates in (("", False), (".satfinite", True)):
        found = executed(f"cvt.{mode}{form}.ue8m0x2.f32 y, x0, x1;", x, y, out=np.uint16)
        expected = [code(p, saturates) << 8 | code(q, saturates) for p, q in zip(x, y, strict=True)]
        assert found.tolist() == expected
    every = np.arange(32, dtype=np.uint16) * 0x0807 + np.uint16(0xFF00)
    pairs = executed("cvt.rn.bf16x2.ue8m0x2 y, x0;", every, out=np.uint32)
    for shift in (0, 8):
        codes = (every >> shift & 255).astype(np.uint8)
        exact = torch.from_numpy(codes).view(torch.float8_e8m0fnu).double().numpy()
        assert same(halves((pairs >> 2 * shift).astype(np.uint16), "bf16"), exact)
