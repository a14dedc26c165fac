# SPDX-License-Identifier: MIT
"""Blocks on several cores give the results, faults and counters of one core."""

from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl

from ptx.test_core import bits, numbers, said
from torchpar.ptx import Report, cores, emulate, gpu, native

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="no C compiler, or TORCHPAR_PTX=python"
)


@triton.jit
def add_rows_kernel(x, out, SHIFT: tl.constexpr, EVERY: tl.constexpr, BLOCK: tl.constexpr):
    """Each program stores the sum of a row. SHIFT and EVERY let programs meet."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * BLOCK + column)
    tl.store(out + (row + SHIFT) % EVERY * BLOCK + column, values + tl.sum(values, 0))


def executed(count: int, shift: int, every: int, in_place: bool) -> tuple[bytes, Report, int]:
    """The result on ``count`` cores, what was found, and how often all cores were taken."""
    x = torch.arange(64 * 128, dtype=torch.float32)
    out = x if in_place else torch.zeros(64 * 128)
    done = []

    def run(*args):
        done.append(cores.run_on_all_cores(*args))
        return done[-1]

    with (
        emulate() as emulator,
        patch.object(cores, "core_count", lambda: count),
        patch.object(gpu, "LEAST_SECONDS", 0.0),
        patch.object(gpu, "run_on_all_cores", run),
    ):
        emulator.launches.clear()
        add_rows_kernel[(64,)](x, out, shift, every, 128)
    return bits(out), emulator.report(), done.count(True)


@pytest.mark.parametrize(
    "shift, every, in_place, is_independent",
    [
        (0, 64, False, True),
        (0, 64, True, True),
        (40, 64, False, True),
        (0, 32, False, False),  # two programs store a row
        (1, 64, True, False),  # a program stores the row that another one loads
        (40, 64, True, False),  # on another core
    ],
)
def test_cores_do_what_one_core_does(shift, every, in_place, is_independent):
    expected, report, _ = executed(1, shift, every, in_place)
    assert bool(report.faults) != is_independent
    for count in (2, 3):
        found, other, taken = executed(count, shift, every, in_place)
        assert taken == is_independent
        assert found == expected
        assert said(other) == said(report)


def test_what_was_loaded_by_all_is_counted_once():
    x, out = torch.ones(128), torch.empty(64 * 128)
    counted = []
    for count in (1, 3):
        with (
            emulate() as emulator,
            patch.object(cores, "core_count", lambda count=count: count),
            patch.object(gpu, "LEAST_SECONDS", 0.0),
        ):
            load_row_kernel[(64,)](x, out, 128)
        assert torch.equal(out, torch.ones(64 * 128))
        counted.append(numbers(emulator.launches[0].counts))
    assert counted[0] == counted[1]


@triton.jit
def load_row_kernel(x, out, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * BLOCK + column, tl.load(x + column))
