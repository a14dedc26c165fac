# SPDX-License-Identifier: MIT
"""`check_kernel(equals=…)` tells the same formula from another one, by Triton's FpSan."""

import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl

from nogpu import check_kernel, emulate
from nogpu.check import kernels

needs_fpsan = pytest.mark.skipif(not kernels.has_fpsan(), reason="Triton before 3.8")


@triton.jit
def variance(x, out, N: tl.constexpr, ORDER: tl.constexpr):
    """(a - b)², or a² - ab - ab + b², or with a wrong sign."""
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(x + N + i)
    if ORDER == 0:
        y = (a - b) * (a - b)
    elif ORDER == 1:
        y = a * a - a * b - a * b + b * b
    else:
        y = a * a + a * b + a * b + b * b
    tl.store(out + i, y)


def by(order: int):
    def launch(x, out, N):
        variance[(1,)](x, out, N, order)

    return launch


def row(order: int) -> tuple[str, str]:
    x, out = torch.randn(256), torch.empty(128)
    table = check_kernel(variance, (1,), (x, out, 128), equals=by(order), ORDER=0)
    return table["formula"].outcome, table["formula"].detail


@needs_fpsan
def test_another_order_is_the_same_formula():
    assert row(1) == ("works", "")


@needs_fpsan
def test_another_sign_is_another_formula():
    outcome, detail = row(2)
    assert outcome == "wrong"
    assert detail.startswith("out: another formula in 12")  # of 128; few agree by chance


@needs_fpsan
def test_a_kernel_is_launched_likewise():
    """With the same options; and the reference is judged beside the formula."""
    x, out = torch.randn(256), torch.empty(128)
    table = check_kernel(
        variance, (1,), (x, out, 128), lambda x, out, n: {"out": (x[:n] - x[n:]) ** 2},
        equals=variance, ORDER=0,
    )  # fmt: skip
    assert table.ok
    assert table["values"].outcome == table["formula"].outcome == "works"


def test_what_is_refused():
    with pytest.raises(ValueError, match="no reference"):
        check_kernel(variance, (1,), (torch.ones(256), torch.ones(128), 128))
    with pytest.raises(ValueError, match="equals is an object of type int, expected a kernel"):
        check_kernel(variance, (1,), (torch.ones(256), torch.ones(128), 128), equals=3)
    with (
        patch.object(kernels.triton, "__version__", "3.6.0"),
        pytest.raises(ValueError, match="equals needs FpSan of Triton"),
    ):
        row(1)


@triton.jit
def pair(x, out, WHICH: tl.constexpr, RIGHT: tl.constexpr):
    """The two sides of an equality, of which the page says whether FpSan keeps it."""
    i = tl.arange(0, 32)
    a, b = tl.load(x + i), tl.load(x + 32 + i)
    if WHICH == "exp":
        y = tl.exp(a) * tl.exp(b) if RIGHT else tl.exp(a + b)
    elif WHICH == "reciprocal":
        y = a * (1 / b) if RIGHT else a / b
    elif WHICH == "canceled":
        y = a if RIGHT else (a / b) * b
    elif WHICH == "root":
        y = a if RIGHT else tl.sqrt(a) * tl.sqrt(a)
    else:
        y = tl.where(a > b, a, b) if RIGHT else tl.maximum(a, b)
    tl.store(out + i, y)


@needs_fpsan
@pytest.mark.parametrize(
    "which, outcome",
    [
        ("exp", "works"),
        ("reciprocal", "works"),
        ("canceled", "wrong"),
        ("root", "wrong"),
        ("where", "wrong"),
    ],
)
def test_equalities_that_the_page_names(which, outcome):
    x, out = torch.linspace(1, 2, 64), torch.empty(32)

    def right(x, out):
        pair[(1,)](x, out, which, True)

    table = check_kernel(pair, (1,), (x, out), equals=right, WHICH=which, RIGHT=False)
    assert table["formula"].outcome == outcome


def nothing(x, out, n):
    pass


@needs_fpsan
@pytest.mark.parametrize(
    "grid, other, outcome, detail",
    [
        ((0,), by(0), "not run", "the grid has no programs"),
        ((1,), nothing, "wrong", "equals launches no kernel"),
        ((1,), by(0), "not run", "neither kernel changes a tensor"),
    ],
)
def test_a_comparison_of_nothing_is_no_success(grid, other, outcome, detail):
    x, out = torch.zeros(256), torch.zeros(128)
    table = check_kernel(variance, grid, (x, out, 128), equals=other, ORDER=0)
    assert (table["formula"].outcome, table["formula"].detail) == (outcome, detail)


@triton.jit
def total(x, out, BLOCK: tl.constexpr, FLOATS: tl.constexpr):
    value = tl.sum(tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)))
    if FLOATS:
        tl.atomic_add(out, value)
    else:
        tl.store(out, value)
        tl.atomic_add(out + 1, 1)


@needs_fpsan
@pytest.mark.parametrize(
    "dtype, programs, expected",
    [
        (torch.float32, 4, ("not run", kernels.ATOMICS)),
        (torch.float16, 4, ("not run", kernels.ATOMICS)),
        (torch.int32, 1, ("works", "")),  # of integers, which need no sanitizer
    ],
)
def test_sums_of_floats_by_atomics_are_not_compared(dtype, programs, expected):
    """Their rounding would make one formula look like two, or two like one."""
    x, out = torch.ones(1024, dtype=dtype), torch.zeros(2, dtype=dtype)
    size, floats = 1024 // programs, dtype.is_floating_point

    def in_one(x, out):
        total[(1,)](x, out, 1024, floats)

    table = check_kernel(total, (programs,), (x, out), equals=in_one, BLOCK=size, FLOATS=floats)
    assert (table["formula"].outcome, table["formula"].detail) == expected


def test_gsan_is_refused_in_a_line(tmp_path):
    with (
        patch.dict(os.environ, TRITON_INSTRUMENTATION_MODE="gsan"),
        pytest.raises(ValueError, match="TRITON_INSTRUMENTATION_MODE is gsan"),
        emulate("sm_90"),
    ):
        pass


@needs_fpsan
def test_gsan_of_a_launch_is_refused():
    with (
        patch.object(triton.knobs.compilation, "instrumentation_mode", "gsan"),
        emulate("sm_90") as gpu,
        pytest.raises(NotImplementedError, match="is gsan"),
    ):
        variance[(1,)](torch.ones(256), torch.ones(128), 128, 0)
    assert not gpu.launches


@pytest.mark.slow
def test_the_command_says_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("print('ran')")
    command = [sys.executable, "-m", "nogpu", str(script)]
    environment = os.environ | {"TRITON_INSTRUMENTATION_MODE": "gsan"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "ran" not in done.stdout
    assert "TRITON_INSTRUMENTATION_MODE is gsan" in done.stderr.splitlines()[-1]
