# SPDX-License-Identifier: MIT
"""Details of reports: the work of a kernel whose counts are given, words, and pictures."""

from unittest.mock import MagicMock

import numpy as np
import pytest

from nogpu import Launch, Report
from nogpu.machine.instruction_counts import BANKS, SECTOR, Column, Counts
from nogpu.machine.parse import parse
from nogpu.machine.trace import Request
from nogpu.record.time import Work, work_of
from nogpu.report import page, text

PIPELINE = """
.version 8.4
.target sm_90a
.visible .entry k(.param .u64 k_param_0)
.reqntid 128
{
.reg .b32 r; .reg .b64 a, b;
cp.async.cg.shared.global [a], [b], 16;
cp.async.wait_group 1;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {r, r, r, r}, a, b, 1, 1, 1, 0, 0;
wgmma.wait_group.sync.aligned 0;
st.global.b32 [b], r;
ret;
}
"""
PROGRAMS, WARPS, STEPS, OF_STEP = 6, 4, 8, 2**14


def pipeline(multiplies: bool = True) -> Launch:
    """A loop of 8 steps, each of which copies 16 KiB and multiplies."""
    lines = PIPELINE.splitlines()
    ptx = "\n".join(one for one in lines if multiplies or not one.startswith("wgmma"))
    launch = Launch("k", "sm_90", (PROGRAMS, 1, 1), WARPS, 5 * OF_STEP // 2, ptx=ptx)
    launch.counts = Counts(parse(ptx))
    each = PROGRAMS * WARPS
    counted = {
        "cp.async.cg.shared.global": {
            Column.REQUESTS: each * STEPS * 8,
            Column.SECTORS: PROGRAMS * STEPS * OF_STEP // SECTOR,
        },
        "cp.async.wait_group": {Column.WAITS: each * (STEPS + 1), Column.MOST_IN_FLIGHT: 3},
        "st.global.b32": {Column.REQUESTS: each, Column.SECTORS: 100},
    }
    for i, row in zip(launch.counts.kernel.instructions, launch.counts.table, strict=True):
        row[Column.EXECUTIONS] = each
        for column, value in counted.get(i.opcode, {}).items():
            row[column] = value
    launch.counts.end([])
    return launch


def test_work_is_that_of_what_was_counted():
    work: Work = work_of(pipeline())
    assert (work.programs, work.tiles, work.steps) == (PROGRAMS, PROGRAMS, STEPS)
    assert work.copies == PROGRAMS * WARPS * STEPS * 8
    assert work.loaded == PROGRAMS * STEPS * OF_STEP
    assert work.stored == 100 * SECTOR
    assert work.has_wgmma
    assert not work_of(pipeline(multiplies=False)).has_wgmma
    # Shared memory has room for the copies of two steps.
    assert work.buffers == 2


def test_lines_end_behind_a_comma_alone():
    first, second = "BLOCK=1024, " * 6, "launched at my-folder/a-script-with-a-long-name.py:15"
    lines = text.wrapped(f"{first}{second}; 2 warps")
    assert [line.strip() for line in lines] == [first.strip(), f"{second}; 2 warps"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_times_are_those_of_the_first_of_several_launches(count):
    said = f"k[{PROGRAMS}×1×1]: 4 warps, 40,960 bytes of shared memory"
    said += f"; the first of {count} launches" if count > 1 else ""
    launches = [pipeline() for _ in range(count)]
    assert Report(launches, []).timed().splitlines()[0] == said


@pytest.fixture
def axes(monkeypatch) -> MagicMock:
    """Axes that take notes, and draw nothing."""
    drawing = MagicMock()
    monkeypatch.setattr(page, "Drawing", drawing)
    drawing.return_value.__enter__.return_value.axes = (MagicMock(),)
    return drawing.return_value.__enter__.return_value.axes[0]


def test_the_picture_of_banks_has_the_turns_of_threads(axes):
    """Threads that are two words apart take two turns in each even bank."""
    lanes = np.arange(32)
    page.draw_banks({0: Request("shared", lanes, 8 * lanes, 4)})
    expected = np.full((BANKS, 32), np.nan)
    expected[2 * lanes % BANKS, lanes] = 1 + lanes // 16
    np.testing.assert_array_equal(axes.imshow.call_args.args[0], expected)


def test_the_picture_of_sectors_has_the_threads_of_each_warp(axes):
    """Two warps, whose threads take 8 bytes side by side, which is a quarter of a sector."""
    lanes = np.arange(32)
    found = {warp: Request("global", lanes, 8 * (lanes + 32 * warp), 8) for warp in (0, 1)}
    page.draw_sectors(found)
    threads = np.arange(64)
    expected = np.full((64 // 4, 64), np.nan)
    expected[threads // 4, threads] = 8
    np.testing.assert_array_equal(axes.imshow.call_args.args[0], expected)
    assert list(axes.set_xticks.call_args.args[0]) == [0, 32]
