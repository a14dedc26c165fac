# SPDX-License-Identifier: MIT
"""The files that a launch of a common kernel passes: a reader of the emulator opens few of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import entered_files

pytest.importorskip("triton", reason="the kernel is written in Triton")

import triton
import triton.language as tl

from torchpar import ptx
from torchpar.ptx.native import core as native

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="no C compiler, or TORCHPAR_PTX=python"
)

ROOM = "torchpar/ptx"
MOST_FILES = {"launch": 14, "report": 6}
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


def test_a_launch_and_its_report_enter_few_files():
    with ptx.emulate() as gpu:
        launch()  # at first, files of what is done once for a kernel are entered, too
        entered = files(launch)
        of_report = files(lambda: str(gpu.report()))
    assert len(entered) <= MOST_FILES["launch"], entered
    # It goes from Triton to the machine, and from there to the core in C.
    rooms = dict.fromkeys(Path(name).parts[0] for name in entered)
    assert [one for one in rooms if one != "report"] == ["triton", "machine", "native"], entered
    assert len(of_report) <= MOST_FILES["report"], of_report
    assert {Path(name).parts[0] for name in of_report} == {"triton", "report"}, of_report


def test_a_launch_that_python_executes_enters_more():
    """So the number can be exceeded."""
    with ptx.emulate(traces=True):
        entered = files(launch)
    assert {"machine/trace.py", "instructions/arithmetic.py"} <= {*entered}
    assert len(entered) > MOST_FILES["launch"], entered
