# SPDX-License-Identifier: MIT
"""The core in C and the executor in Python of nogpu do the same with this package's kernels."""

from collections.abc import Callable, Sequence

import kernel_cases as cases
import mutants
import pytest
from launching import Gpu
from test_core import LIMIT, TWO, bits, in_python, numbers

from nogpu.machine.gpu_state import Schedule
from nogpu.machine.parse import PtxError

slow = pytest.mark.slow


def noted(run: Callable[[Gpu], object], schedules: Sequence[Schedule] = TWO) -> list[object]:
    """The results under each schedule, or the errors, and what was counted."""
    found: list[object] = []
    for schedule in schedules:
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
    # About one of each kind, by turns whole blocks and what warps do meanwhile.
    for number, mutant in enumerate(mutants.draw()[:: mutants.OF_A_KIND]):
        schedule = TWO[number % 2 : number % 2 + 1]
        case = mutants.CASES[mutant.kernel]

        def run(gpu: Gpu, case: cases.Case = case, mutant: mutants.Mutant = mutant) -> object:
            gpu.change = mutant.change
            gpu.limit = LIMIT
            return case.execute(gpu)

        found = noted(run, schedule)
        with in_python():
            assert found == noted(run, schedule), mutant.describe()
