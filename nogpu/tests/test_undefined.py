# SPDX-License-Identifier: MIT
"""Undefined bits of numbers that share a register, and copies of one number in several warps."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from test_instructions import executed

from nogpu import emulate
from nogpu.machine.packed_definedness import of_conversion, of_sum, of_table

TABLE = 0xCA  # of lop3: a ? b : c
RULES = {
    "lop3": (f"lop3.b32 y, x0, x1, x2, {TABLE};", 3, np.uint32),
    "add": ("add.s32 y, x0, x1;", 2, np.uint32),
    "mad": ("mad.lo.u32 y, x0, x1, x2;", 3, np.uint32),
    "narrower": ("cvt.u16.u32 y, x0;", 1, np.uint16),
    "signed": ("cvt.s64.s32 y, x0;", 1, np.uint64),
    "pair": ("cvt.rn.satfinite.e4m3x2.f32 y, x0, x1;", 2, np.uint16),
    "halves": ("cvt.rn.f16x2.f32 y, x0, x1;", 2, np.uint32),
}


def rule(name: str, code: str, values: list[np.ndarray], masks: list[np.ndarray], out: type):
    parts = code.split(" ", 1)[0].split(".")
    if name == "lop3":
        return of_table(TABLE, list(zip(values, masks, strict=True)))
    return (of_conversion if parts[0] == "cvt" else of_sum)(parts, masks, np.dtype(out))


@pytest.mark.parametrize("name", RULES)
def test_only_undefined_bits_change_a_result(name):
    """Whatever the undefined bits of operands are; and fewer bits than these would not do."""
    code, count, out = RULES[name]
    rng = np.random.default_rng(0)
    most, shifts = (2**30, 9) if ".f32" in code else (2**32, 17)  # no NaN, which have many bits
    values = [rng.integers(most, size=32, dtype=np.uint32) for _ in range(count)]
    masks = [
        np.uint32(0xFF00) << rng.integers(shifts, size=32, dtype=np.uint32) for _ in range(count)
    ]
    for one in masks:
        one[rng.integers(2, size=32) == 0] = 0
    mask = rule(name, code, values, masks, out)
    first, changed = executed(code, *values, out=out), np.zeros(32, out)
    for _ in range(12):
        noise = [rng.integers(2**32, size=32, dtype=np.uint32) & one for one in masks]
        other = [a ^ b for a, b in zip(values, noise, strict=True)]
        changed |= executed(code, *other, out=out) ^ first
    assert not (changed & ~mask).any()
    assert changed.any()
    assert (mask == 0)[np.all([one == 0 for one in masks], axis=0)].all()


FP8 = tl.constexpr(
    "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; "
    "cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; mov.b32 $0, {a, b}; }"
)
SHIFTED = tl.constexpr("shr.b32 $0, $1, 8;")  # takes the next number, which may not be there


@triton.jit
def packed_kernel(x, out, N: tl.constexpr, CODE: tl.constexpr, OPERANDS: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.inline_asm_elementwise(CODE, OPERANDS, [tl.load(x + i)], tl.int8, True, 4)
    tl.store(out + i, value)


@pytest.mark.parametrize("n", [128, pytest.param(256, marks=pytest.mark.slow)])
def test_numbers_of_a_pack_that_a_thread_does_not_have(n):
    x, out = torch.randn(n), torch.empty(n, dtype=torch.int8)
    with emulate() as gpu:
        packed_kernel[(1,)](x, out, n, FP8.value, "=r,r,r,r,r")
    assert gpu.faults == []
    assert torch.equal(out, x.to(torch.float8_e4m3fn).view(torch.int8))


def test_a_number_that_a_thread_does_not_have_matters_where_it_is_stored():
    x, out = torch.ones(128, dtype=torch.int8), torch.empty(128, dtype=torch.int8)
    with emulate() as gpu:
        packed_kernel[(1,)](x, out, 128, SHIFTED.value, "=r,r")
    assert {fault.name for fault in gpu.faults} == {"uninitialised register"}


@triton.jit
def dots_kernel(x, y, out, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + tl.program_id(0), tl.sum(tl.load(x + i) * tl.load(y + i)))


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8),
    reason="warps have no copies of this sum",
)
def test_copies_near_zero_in_several_warps_are_a_note():
    """Warps 2 and 3 have copies of 64 products; another order of sums changes more than the last
    bits of a sum near zero."""
    torch.manual_seed(0)
    x, y, out = torch.randn(400, 64), torch.randn(400, 64), torch.empty(400)
    with emulate() as gpu:
        dots_kernel[(400,)](x, y, out, 64)
    torch.testing.assert_close(out, (x * y).sum(1), atol=1e-4, rtol=0)
    assert {fault.kind for fault in gpu.faults} == {"note"}
    warps = [one for one in gpu.faults if one.message.startswith("warps store")]
    assert ["rounded differently" in one.message for one in warps] == [True]
