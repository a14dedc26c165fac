# SPDX-License-Identifier: MIT
"""Numbers of PTX are read as 4.5 of its ISA says, and what is not known is an error of the report.

An error of the executor's own is a fault of the report, too: a report without errors means that all
instructions were executed.
"""

from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from test_instructions import executed, integers, same

from nogpu import emulate
from nogpu.machine.parse import PtxError, integer

NUMBERS = {
    "0b101": 5, "0B101U": 5, "017": 15, "017U": 15, "0": 0, "0U": 0, "10": 10, "10U": 10,
    "0x1f": 31, "0X1FU": 31, "-1": -1, "-0x10": -16, "-0b11": -3, "-017": -15,
}  # fmt: skip
NO_INTEGERS = ("08", "0b12", "0xg", "1f", "0b", "U", "", "0x1fu", "1.5", "%tid", "--1")


def test_integers():
    assert {text: integer(text) for text in NUMBERS} == NUMBERS
    assert {integer(text) for text in NO_INTEGERS} == {None}


@pytest.mark.parametrize("text", ["0b1101", "017", "0xFU", "13U", "-017"])
def test_integers_of_instructions(text):
    x = integers(np.int32)
    assert same(executed(f"and.b32 y, x0, {text};", x, out=np.int32), x & integer(text))


def test_offsets_of_addresses():
    """Of 8 bytes, in each notation; the whole kernel is one warp whose threads take 4 bytes."""
    x = integers(np.int64)
    for offset in ("4", "04", "0x4", "0b100"):
        code = f"""ld.param.b64 %at, [k_param_0]; mad.wide.u32 %at, %lane, 8, %at;
            ld.global.b32 y, [%at+{offset}];"""
        assert same(executed(code, x, out=np.int32), (x >> 32).astype(np.int32)), offset


def test_floats_by_their_bits():
    for text in ("0f3FC00000", "0F3FC00000"):
        found = executed(f"mov.f32 y, {text};", out=np.float32)
        assert found.tolist() == [1.5] * 32


@triton.jit
def mask(x, out, N: tl.constexpr, A: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.inline_asm_elementwise(A, "=r,r", [tl.load(x + i)], tl.int32, is_pure=True, pack=1)
    tl.store(out + i, y)


def faults_of(code: str) -> list[str]:
    x, out = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    with emulate("sm_90") as gpu:
        mask[(1,)](x, out, 32, code, num_warps=1)
    assert str(gpu.report()).endswith(f"{len(gpu.faults)} error, 0 warnings, 0 notes")
    return [f"{one.name}: {one.message}" for one in gpu.faults]


def test_an_unknown_operand_is_an_error():
    (found,) = faults_of("mov.u32 $0, %envreg3; and.b32 $0, $0, $1;")
    assert "the operand %envreg3 of mov.u32" in found
    x = integers(np.int32)
    for code, message in (
        ("and.b32 y, x0, 08;", "does not know the operand 08 of and.b32"),
        ("and.b32 y, x0, 15; ~~;", "cannot parse '~~'"),
    ):
        with pytest.raises(PtxError, match=message):
            executed(code, x, out=np.int32)


@pytest.mark.parametrize("what", ["execute.step", "gpu._decoded"])
def test_an_error_of_the_executor_is_an_error(what):
    def fail(*args: object) -> None:
        raise KeyError("its own")

    with patch(f"nogpu.machine.{what}", fail):
        (found,) = faults_of("szext.clamp.s32 $0, $1, 8;")
    assert found.startswith("error of the executor: the executor ends with KeyError: 'its own' (")
    assert "test_numbers.py:" in found
