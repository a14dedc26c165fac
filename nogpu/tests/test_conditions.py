# SPDX-License-Identifier: MIT
"""Assumptions on scalar arguments are evaluated for each launch, without a second compile."""

import math

import pytest
import torch
import triton
import triton.language as tl

from nogpu import emulate
from nogpu.triton import assumptions
from nogpu.triton.conditions import conditions_of


@triton.jit
def conditions_kernel(out, m, n, large, x, B: tl.constexpr):
    tl.assume(m > 0)  # FIRST
    tl.assume((m + 3 * n) % 7 == large // 2 - 8 and n <= m)
    if n > 100:
        tl.assume(m < 50)  # BRANCH
    tl.assume(x > 0.1)
    tl.store(out + tl.arange(0, B), m)


@triton.jit
def program_kernel(out, m, B: tl.constexpr):
    tl.assume(tl.program_id(0) < m)
    tl.store(out + tl.program_id(0) * B + tl.arange(0, B), m)


@pytest.fixture
def compiled(monkeypatch):
    """The paths that are compiled as a second kernel."""
    paths, compile_it = [], triton.compile

    def counted(path, **options):
        paths.append(path)
        return compile_it(path, **options)

    monkeypatch.setattr(assumptions.triton, "compile", counted)
    conditions_kernel.device_caches.clear()
    return paths


def launched(*arguments: float) -> list[tuple[str, str]]:
    """The faults of a launch: names, and whether the source's line has a word."""
    out = torch.zeros(128)
    with emulate() as gpu:
        conditions_kernel[(1,)](out, *arguments, 128)
    assert (out == arguments[0]).all()
    return [
        (fault.name, next((word for word in ("FIRST", "BRANCH") if word in str(fault)), ""))
        for fault in gpu.faults
    ]


def test_only_a_false_condition_and_other_assumptions_are_compiled_again(compiled):
    assert launched(9, 5, 22, 0.5) == []  # 24 % 7 = 3
    assert launched(8, 5, 2**40 + 2, 0.5) == [("false assumption", "")]  # negative control
    assert len(compiled) == 1
    compiled.clear()
    out = torch.zeros(256)
    with emulate() as gpu:
        program_kernel[(2,)](out, 5, 128)
    assert (gpu.faults, len(compiled)) == ([], 1)


@pytest.mark.slow
def test_a_condition_in_a_branch_that_no_program_takes(compiled):
    """It is evaluated all the same, so that the assertions say whether a program takes it."""
    assert launched(60, 5, 26, 0.5) == []  # 75 % 7 = 5
    assert len(compiled) == 1
    assert launched(116, 101, 28, 0.5) == [("false assumption", "BRANCH")]  # 419 % 7 = 6


HEAD = """
  tt.func public @k(%p: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("p"(#loc)), \
%a: i32 {tt.divisibility = 16 : i32} loc("a"(#loc)), %b: i32 loc("b"(#loc)), \
%x: f32 loc("x"(#loc))) attributes {noinline = false} {
    %zero = arith.constant 0 : i32 loc(#loc1)
    %minus = arith.constant -3 : i32 loc(#loc1)
    %tenth = arith.constant 1.000000e-01 : f32 loc(#loc1)
    %nan = arith.constant 0x7FC00000 : f32 loc(#loc1)
    %true = arith.constant true loc(#loc1)
"""
ASSUMED = "    llvm.intr.assume %c : i1 loc(#loc2)\n"


def holds(lines: str, a: int = 7, b: int = 2, x: float = 0.5) -> bool | None:
    """Whether what ``lines`` make of a, b and x holds; None if it is not known."""
    found = conditions_of(HEAD + lines + ASSUMED, ["p", "N", "a", "b", "x"])
    return None if found is None else found.hold([None, 128, a, b, x])


def equals(operation: str, value: int, kind: str = "i32") -> str:
    return (
        f"    %r = {operation} loc(#loc3)\n    %v = arith.constant {value} : {kind} loc(#loc1)\n"
        f"    %c = arith.cmpi eq, %r, %v : {kind} loc(#loc3)\n"
    )


@pytest.mark.parametrize(
    "operation, a, b, value",
    [
        ("arith.addi %a, %b overflow<nsw> : i32", 2**31 - 1, 1, -(2**31)),
        ("arith.subi %a, %b : i32", 0, 1, -1),
        ("arith.muli %a, %b : i32", 2**20, 2**12 + 1, 2**20),
        ("arith.divsi %a, %b : i32", -7, 2, -3),
        ("arith.remsi %a, %b : i32", -7, 2, -1),
        ("arith.remsi %a, %b : i32", 7, -2, 1),
        ("arith.divui %a, %b : i32", -1, 2, 2**31 - 1),
        ("arith.remui %a, %b : i32", -1, 10, 5),
        ("arith.minsi %a, %b : i32", -1, 1, -1),
        ("arith.minui %a, %b : i32", -1, 1, 1),
        ("arith.maxsi %a, %b : i32", -1, 1, 1),
        ("arith.maxui %a, %b : i32", -1, 1, -1),
        ("arith.andi %a, %b : i32", -1, 5, 5),
        ("arith.ori %a, %b : i32", 8, 5, 13),
        ("arith.xori %a, %b : i32", 9, 5, 12),
    ],
)
def test_operations_have_the_results_of_a_gpu(operation, a, b, value):
    assert holds(equals(operation, value), a, b) is True
    assert holds(equals(operation, value + 1 if value < 2**31 - 1 else 0), a, b) is False


def test_widths_and_signs():
    assert holds(equals("arith.extsi %a : i32 to i64", -7, "i64"), -7)
    assert holds(equals("arith.extui %a : i32 to i64", 2**32 - 7, "i64"), -7)
    assert holds(equals("arith.trunci %a : i32 to i8", -1, "i8"), 0x1FF)
    for how, signs in (("slt", True), ("ult", False), ("sge", False), ("uge", True)):
        assert holds(f"    %c = arith.cmpi {how}, %a, %b : i32 loc(#loc3)\n", -1, 2) is signs


def test_what_divides_by_zero_is_not_known_to_hold():
    assert holds(equals("arith.divsi %a, %b : i32", 0), 0, 0) is False


def test_floats():
    for how, x, expected in (
        ("ogt", 0.5, True),
        ("ogt", 0.1, False),  # which is rounded to float32, as the constant is
        ("oge", 0.1, True),
        ("oge", math.nan, False),
        ("une", math.nan, True),
    ):
        assert holds(f"    %c = arith.cmpf {how}, %x, %tenth : f32\n", x=x) is expected
    assert holds("    %c = arith.cmpf oeq, %nan, %nan : f32\n") is False
    assert holds("    %c = arith.cmpf ugt, %x, %tenth : f32\n") is None


@pytest.mark.parametrize(
    "lines",
    [
        "    %c = tt.load %p : !tt.ptr<i1> loc(#loc3)\n",
        "    %i = tt.get_program_id x : i32\n    %c = arith.cmpi slt, %i, %a : i32\n",
        "    %c = arith.cmpi slt, %a, %b : i32\n    %c:2 = scf.if %true -> (i1, i1) {\n",
        "    %r:2 = scf.for %b = %zero to %a step %b iter_args(%q = %a) -> (i32)  : i32 {\n"
        "    %c = arith.cmpi slt, %b, %a : i32\n",
        "    ^bb0(%a: i32 loc(#loc)):\n    %c = arith.cmpi slt, %b, %a : i32\n",
        "    %c = arith.constant true loc(#loc1)\n  tt.func private @other(%a: i32) {\n",
    ],
)
def test_other_assumptions_are_left_to_assertions(lines):
    assert holds(lines) is None


def test_a_name_that_is_used_again_is_another_term():
    once = equals("arith.addi %a, %b : i32", 9)
    assert holds(once + ASSUMED + equals("arith.subi %a, %b : i32", 5)) is True
    assert holds(equals("arith.addi %a, %b : i32", 8) + ASSUMED + once) is False
