# SPDX-License-Identifier: MIT
"""The core in C and the executor in Python do the same: values, faults and counters.

Each case runs twice, from the same memory.
"""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ptx import cases, mutants, tutorials
from ptx.faults import FAULTS
from ptx.launch import Gpu
from ptx.right import RIGHT
from torchpar.ptx import Report, driver, emulate, native
from torchpar.ptx.counters import Counts
from torchpar.ptx.machine import SCHEDULES
from torchpar.ptx.parse import PtxError

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="no C compiler, or TORCHPAR_PTX=python"
)
slow = pytest.mark.slow
# The core executes whole blocks under the first one, and under the others what warps do meanwhile.
TWO = (SCHEDULES[0], SCHEDULES[-1])
# Faults that take Python minutes.
ENDLESS = {"search that stays", "more programs than fit"}


def in_python():
    """Let Python execute all instructions."""
    return patch.object(native, "library", lambda: None)


def said(report: Report) -> list[tuple]:
    """What a report says but for addresses."""
    launches = [
        (one.kernel, one.grid, one.instructions, numbers(one.counts)) for one in report.launches
    ]
    faults = [(one.kind, one.name, one.line, one.source, one.program) for one in report.faults]
    return [*launches, *faults]


def numbers(counts: Counts) -> list:
    """What was counted."""
    both = counts.distinct_read, counts.distinct_written
    return [counts.table.tolist(), counts.distinct.tolist(), *both]


def outside(report: Report) -> set[int]:
    """The lines of accesses out of bounds, beside which any memory may lie."""
    return {one.line for one in report.faults if one.name == "out of bounds"}


def bits(t: Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""


def executed(run: Callable[[], list[tuple[Tensor, ...]]], arch: str) -> tuple[list[Tensor], Report]:
    with patch.object(driver, "SCHEDULES", TWO), emulate(arch, schedules="all") as gpu:
        gpu.limit = 200_000
        results = [pair[0].clone() for pair in run()]
    return results, gpu.report()


def check(run: Callable[[], list[tuple[Tensor, ...]]], arch: str = "sm_90") -> None:
    values, report = executed(run, arch)
    with in_python():
        expected, expected_report = executed(run, arch)
    assert outside(report) == outside(expected_report)
    if not outside(report):
        assert said(report) == said(expected_report)
        assert list(map(bits, values)) == list(map(bits, expected))


@pytest.mark.parametrize(
    "name, arch",
    [
        pytest.param(name, arch, marks=[] if (name[:2], arch) == ("01", 90) else slow)
        for name, case in tutorials.TUTORIALS.items()
        for arch in case.architectures
    ],
)
def test_tutorials(name, arch):
    check(tutorials.TUTORIALS[name].run, f"sm_{arch}")


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in RIGHT])
def test_right_kernels(name):
    check(RIGHT[name])


FEW = ("store without mask", "two programs on one element", "barrier left out")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FEW else slow)
        for name in FAULTS
        if name not in ENDLESS
    ],
)
def test_faults(name):
    check(FAULTS[name].run)


def noted(run: Callable[[Gpu], object]) -> list[object]:
    """The results under each schedule, or the errors, and what was counted."""
    found: list[object] = []
    for schedule in TWO:
        gpu = Gpu(schedule)
        try:
            results = run(gpu)
            found.append([bits(t) for t in results])
        except PtxError as e:
            found.append((e.name, e.line))
        found += map(numbers, gpu.counted)
    return found


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in mutants.CASES])
def test_kernels_of_this_package(name):
    run = mutants.CASES[name].execute
    found = noted(run)
    with in_python():
        assert found == noted(run)


@slow
def test_mutants():
    for mutant in mutants.draw():
        case = mutants.CASES[mutant.kernel]

        def run(gpu: Gpu, case: cases.Case = case, mutant: mutants.Mutant = mutant) -> object:
            gpu.change = mutant.change
            gpu.limit = 200_000
            return case.execute(gpu)

        found = noted(run)
        with in_python():
            assert found == noted(run), mutant.describe()
