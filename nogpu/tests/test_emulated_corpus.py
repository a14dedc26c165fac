# SPDX-License-Identifier: MIT
"""Others' kernels on the emulator: right ones have right values and no error, wrong ones are named.

The kernels are those of the corpus: tutorials, right kernels that look faulty, kernels with one
fault each, and those of packages.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from unittest.mock import patch

import interpreted
import packages
import pytest
import table
import torch
import tutorials
from faults import FAULTS, VALUES
from right import RIGHT

from nogpu import Fault, emulate
from nogpu.cuda.stand_in import cuda_is_cpu
from nogpu.triton import emulator

slow = pytest.mark.slow
# Faults of no access and no order: PTX leaves the quotient open. A fence of shared memory counts
# for global memory, too.
NOT_NAMED = {"empty group", "copy reads what was stored"}
# Slow tests, since another tutorial's kernel is almost the same, or the same for another dtype.
ALIKE = {
    "03 matmul, float8 e5m2",
    "06 attention",
    "06 attention, causal",
    "06 attention by tensor descriptors",
    "08 grouped matmul",
    "09 persistent matmul by pointers",
    "09 persistent matmul by the program's descriptors",
}
# Triton 3.8 makes no fence between cp.async and products that read what was copied.
WITHOUT_FENCE = ("06 attention, backward", 100)


def errors(faults: Sequence[Fault]) -> list[Fault]:
    return [fault for fault in faults if fault.kind == "error"]


def architectures() -> list:
    return [
        pytest.param(name, arch, marks=[] if arch == 90 and name not in ALIKE else slow)
        for name, case in tutorials.TUTORIALS.items()
        for arch in case.architectures
    ]


@pytest.mark.parametrize("name, arch", architectures())
def test_tutorials_have_right_values_and_no_errors(name, arch):
    case = tutorials.TUTORIALS[name]
    with emulate(f"sm_{arch}") as gpu:
        results = case.run()
    for found, expected, bound in results:
        assert ((found.double() - expected).abs() <= bound).all()
    if (name, arch) == WITHOUT_FENCE:
        assert {fault.name for fault in errors(gpu.faults)} <= {"missing fence"}
    elif case.finding:
        assert {fault.name for fault in errors(gpu.faults)} == {"race"}
    else:
        assert errors(gpu.faults) == []


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_that_look_faulty_have_no_errors(name):
    with emulate("sm_90", schedules="all") as gpu:
        results = RIGHT[name]()
    for found, expected, bound in results:
        assert ((found.double() - expected).abs() <= bound).all()
    assert errors(gpu.faults) == []


@pytest.mark.parametrize(
    "name",
    [name for name, fault in FAULTS.items() if fault.kind != VALUES and name not in NOT_NAMED],
)
def test_a_fault_is_named_at_its_line(name):
    """And docs/ptx.md says so. Programs that must not fit wait on a twelfth of an H100."""
    few = {90: 11} if name == "more programs than fit" else {}
    with patch.dict(emulator.MULTIPROCESSORS, few):
        found, is_at_line = table.emulated(name)
    assert is_at_line, found
    assert table.rows()[name][0] == table.cell(found, is_at_line)


def test_faults_that_only_values_show_have_no_errors():
    found = {}
    for name, fault in FAULTS.items():
        if fault.kind == VALUES:
            with emulate("sm_90") as gpu:
                results = fault.run()
            assert not all(torch.equal(a, b) for a, b in results), name
            found[name] = errors(gpu.faults)
            assert table.rows()[name][0] == table.cell(gpu.faults, False)
    assert not any(found.values()), found


def test_the_table_has_all_faults():
    assert set(table.rows()) == set(FAULTS)


@slow
@pytest.mark.parametrize("name", ["load without mask", "barrier left out", "atomic left out"])
def test_the_table_says_what_the_interpreter_says(name):
    """Of some; each takes a process of its own."""
    assert table.rows()[name][1] == table.short(interpreted.interpret(name))


@slow
@pytest.mark.parametrize("name", packages.CASES)
def test_kernels_of_packages(name):
    if reason := packages.missing():
        pytest.skip(reason)
    with emulate("sm_90") as gpu, cuda_is_cpu(gpu) if packages.CASES[name].asks else nullcontext():
        for found, expected, bound in packages.CASES[name].run():
            assert ((found.double() - expected).abs() <= bound).all()
    assert errors(gpu.faults) == []
