# SPDX-License-Identifier: MIT
"""The corpus of Triton kernels compiles to PTX without a GPU, and each fault is marked once.

`test_emulated_corpus` executes the tutorials for all their architectures, and the others for sm_90.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import packages
import pytest
import torch
import tutorials
from faults import FAULTS, VALUES, Fault
from right import RIGHT
from triton.runtime.jit import JITFunction

from nogpu import emulate

FIRST, *OTHERS = (90, 80, 100)
LAUNCH = JITFunction.run
slow = pytest.mark.slow


def check_compiled(run: Callable[[], object], architecture: int) -> None:
    """Check that the launches of ``run`` compile to PTX of an architecture; none is executed."""
    texts: list[str] = []

    def compile_alone(kernel, *args, grid, warmup, **options):
        compiled = LAUNCH(kernel, *args, grid=grid, warmup=True, **options)
        texts.append(compiled.asm["ptx"])

    with (
        emulate(f"sm_{architecture}") as gpu,
        patch.object(JITFunction, "run", compile_alone),
    ):
        run()
    assert texts
    assert not gpu.launches
    for text in texts:
        assert f".target sm_{architecture}" in text


@slow
@pytest.mark.parametrize("name", FAULTS)
def test_fault_compiles(name: str) -> None:
    for architecture in OTHERS:
        if architecture >= FAULTS[name].needs_arch:
            check_compiled(FAULTS[name].run, architecture)


@slow
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernel_compiles(name: str) -> None:
    for architecture in OTHERS:
        check_compiled(RIGHT[name], architecture)


@slow
@pytest.mark.parametrize("name", packages.CASES)
def test_package_compiles(name: str) -> None:
    if packages.missing():
        pytest.skip(packages.missing())
    if packages.CASES[name].asks:
        pytest.skip(f"asks torch.cuda: {packages.CASES[name].asks}")
    check_compiled(packages.CASES[name].run, FIRST)


@pytest.mark.parametrize("name", packages.CASES)
def test_package_reference(name: str) -> None:
    """The references run in the dtypes that are compared, and have gradients by all operands."""
    case = packages.CASES[name]
    exact = case.values(case.reference, torch.float64)
    single = case.values(case.reference, torch.float32)
    assert len(exact) > len(case.operands)
    for one, other in zip(exact, single, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(other.double(), one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_marked_once(name: str) -> None:
    fault = FAULTS[name]
    assert len(fault.marked("FAULT")) == 1
    if fault.kind == VALUES:
        assert not fault.marked("NAMED"), "nothing but a comparison of values can name it"
    # A report names a line of a kernel, not one of the launch.
    for path, line in fault.named() if fault.kind != VALUES else []:
        assert Path(path).name == "faults.py"
        assert any(line in lines_of(kernel.fn) for kernel in fault.kernels)


def lines_of(function: Callable[..., object]) -> range:
    lines, first = inspect.getsourcelines(function)
    return range(first, first + len(lines))


def test_two_marks_are_counted() -> None:
    """The negative control: a launch whose kernel has a mark, and which has one itself."""

    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return []  # FAULT

    one = FAULTS["load without mask"]
    assert len(Fault(run, one.kind, one.kernels, 80).marked("FAULT")) == 2


def test_philox_is_seeded_by_both_words() -> None:
    """The reference of `tl.rand`: 64 bits of seed, numbers of [0, 1)."""
    some = tutorials.philox_uniform(123, 1000)
    assert 0 <= some.min() < 0.01
    assert 0.99 < some.max() < 1
    assert not torch.equal(some, tutorials.philox_uniform(123 + 2**32, 1000))
