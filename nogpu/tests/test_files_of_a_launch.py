# SPDX-License-Identifier: MIT
"""The folders that a launch of a common kernel passes, in their order."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import entered_files

pytest.importorskip("triton", reason="the kernel is written in Triton")

import triton
import triton.language as tl

import nogpu
from nogpu.native import core as native

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="no C compiler, or NOGPU_EXECUTOR=python"
)

ROOM = "src/nogpu"
N = 1500
X, Y = torch.rand(N), torch.rand(N)


@triton.jit
def add(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(z + i, tl.load(x + i, mask) + tl.load(y + i, mask), mask)


def files(call: Callable[[], object]) -> list[str]:
    """The files of the emulator that ``call`` enters."""
    return [name.removeprefix(f"{ROOM}/") for name in entered_files(call, ROOM)]


def launch() -> None:
    """Three programs, so that one core of the CPU executes them."""
    z = torch.empty(N)
    add[(3,)](X, Y, z, N, BLOCK=512)
    assert torch.equal(z, X + Y)


def test_a_launch_goes_from_triton_to_the_machine_to_the_core():
    with nogpu.emulate() as gpu:
        launch()  # at first, files of what is done once for a kernel are entered, too
        entered = files(launch)
        of_report = files(lambda: str(gpu.report()))
    rooms = dict.fromkeys(Path(name).parts[0] for name in entered if "/" in name)
    assert [one for one in rooms if one != "record"] == ["triton", "machine", "native"], entered
    assert not {Path(name).parts[0] for name in of_report} & {"machine", "native"}, of_report


def test_a_launch_that_python_executes_enters_more():
    with nogpu.emulate(traces=True):
        entered = files(launch)
    assert {"machine/trace.py", "instructions/arithmetic.py"} <= {*entered}
