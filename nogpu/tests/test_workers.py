# SPDX-License-Identifier: MIT
"""Blocks of several workers give the results, faults and counters of one worker."""

from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from test_core import bits, numbers, said

from nogpu import Report, emulate
from nogpu.machine import gpu, workers
from nogpu.native import core as native

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="no C compiler, or NOGPU_EXECUTOR=python"
)


@triton.jit
def double_rows_kernel(x, out, SHIFT: tl.constexpr, EVERY: tl.constexpr, BLOCK: tl.constexpr):
    """Each program stores a row. SHIFT and EVERY let programs meet."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * BLOCK + column)
    tl.store(out + (row + SHIFT) % EVERY * BLOCK + column, 2 * values)


def executed(count: int, shift: int, every: int, in_place: bool) -> tuple[bytes, Report, int]:
    """The result of ``count`` workers, what was found, and how often all workers were taken."""
    x = torch.arange(64 * 128, dtype=torch.float32)
    out = x if in_place else torch.zeros(64 * 128)
    done = []

    def run(*args):
        done.append(workers.run_by_workers(*args))
        return done[-1]

    with (
        emulate() as emulator,
        patch.object(workers, "worker_count", lambda: count),
        patch.object(gpu, "least_seconds", lambda places: 0.0),
        patch.object(gpu, "run_by_workers", run),
    ):
        emulator.launches.clear()
        double_rows_kernel[(64,)](x, out, shift, every, 128)
    return bits(out), emulator.report(), done.count(True)


@pytest.mark.parametrize(
    "shift, every, in_place, is_independent",
    [
        (0, 64, False, True),
        (0, 64, True, True),
        (40, 64, False, True),
        (0, 32, False, False),  # two programs store a row
        (1, 64, True, False),  # a program stores the row that another one loads
        pytest.param(40, 64, True, False, marks=pytest.mark.slow),  # on another core
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
            patch.object(workers, "worker_count", lambda count=count: count),
            patch.object(gpu, "least_seconds", lambda places: 0.0),
        ):
            load_row_kernel[(64,)](x, out, 128)
        assert torch.equal(out, torch.ones(64 * 128))
        counted.append(numbers(emulator.launches[0].counts))
    assert counted[0] == counted[1]


@triton.jit
def load_row_kernel(x, out, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * BLOCK + column, tl.load(x + column))


@triton.jit
def count_kernel(counts, EVERY: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    tl.atomic_add(counts + row % EVERY * BLOCK + column, row + 1)


@pytest.mark.parametrize("every, is_independent", [(32, True), (3, False)])
def test_atomics_of_several_cores(every, is_independent):
    found, done = [], []

    def run(*args):
        done.append(workers.run_by_workers(*args))
        return done[-1]

    for count in (1, 3):
        counts = torch.zeros(every * 32, dtype=torch.int32)
        with (
            emulate() as emulator,
            patch.object(workers, "worker_count", lambda count=count: count),
            patch.object(gpu, "least_seconds", lambda places: 0.0),
            patch.object(gpu, "run_by_workers", run),
        ):
            count_kernel[(32,)](counts, every, 32)
        found.append((counts.tolist(), said(emulator.report())))
    assert found[0] == found[1]
    assert sum(found[0][0]) == 32 * sum(range(1, 33))
    assert done == [None, is_independent]


@triton.jit
def wait_for_next_kernel(flags, data, out, BLOCK: tl.constexpr):
    """Program 0 waits for program 1, and then loads what a later one stores without order."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    if row == 0:
        while tl.atomic_add(flags, 0) == 0:
            pass
        tl.store(out + column, tl.load(data + 20 * BLOCK + column))
    elif row == 1:
        tl.atomic_xchg(flags, 1)
    else:
        tl.store(data + row * BLOCK + column, column)


def test_a_race_with_a_waiting_program_is_found_on_several_cores():
    found = []
    for count in (1, 2):
        flags, data, out = torch.zeros(1, dtype=torch.int32), torch.zeros(40 * 32), torch.zeros(32)
        with (
            emulate() as emulator,
            patch.object(workers, "worker_count", lambda count=count: count),
            patch.object(gpu, "least_seconds", lambda places: 0.0),
        ):
            wait_for_next_kernel[(40,)](flags, data, out, 32)
        found.append(said(emulator.report()))
    assert found[0] == found[1]
    assert "race between programs" in {fault.name for fault in emulator.faults}


@triton.jit
def late_kernel(x, out, n, BLOCK: tl.constexpr):
    """The second half of the programs loads where the first half stores, and stores far away."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    if row < n // 2:
        tl.store(x + row * BLOCK + column, column + 1.0)
    else:
        values = tl.load(x + (row - n // 2) * BLOCK + column)
        tl.store(out + (values * 100).to(tl.int32) + row, values)


def test_what_is_undone_is_not_counted():
    counted = []
    for count in (1, 2):
        x, out = torch.zeros(32 * 32), torch.zeros(20_000)
        with (
            emulate() as emulator,
            patch.object(workers, "worker_count", lambda count=count: count),
            patch.object(gpu, "least_seconds", lambda places: 0.0),
        ):
            late_kernel[(64,)](x, out, 64, 32)
        counted.append(numbers(emulator.launches[0].counts))
    assert counted[0] == counted[1]
