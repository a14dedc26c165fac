# SPDX-License-Identifier: MIT
"""Branches, the end of a warp, and barriers of a block.

Sections 9.7.12 and 9.7.13 of the PTX ISA.
"""

from nogpu.machine.block import Warp
from nogpu.machine.decode import Run, action, instruction
from nogpu.machine.parse import (
    Instruction,
    PtxError,
)
from nogpu.machine.registers import (
    Values,
    reader,
)
from nogpu.native.layout import EARLY, TRIGGERED, WAIT_ADDRESS, WAITED


@action("ret", whole=True)
def _return(warp: Warp, i: Instruction) -> bool:
    warp.done = True
    if all(one.done for one in warp.block.warps):
        warp.block.cluster.leave(warp.block)
    else:
        warp.block.cluster.complete()
    return True


@action("bar.sync", "barrier.sync", whole=True)
def _synchronize(warp: Warp, i: Instruction, number: Values, count: Values | None = None) -> bool:
    warps = len(warp.block.warps) if count is None else int(count[0]) // 32
    warp.block.arrive(warp, int(number[0]), warps)
    return True


@action("bar.arrive", "barrier.arrive", whole=True)
def _arrive(warp: Warp, i: Instruction, number: Values, count: Values) -> None:
    warp.block.arrive(warp, int(number[0]), int(count[0]) // 32, waits=False)


@action("griddepcontrol.wait")
def _wait_for_grids(warp: Warp, i: Instruction) -> None:
    """From now on the warp knows what the grids before this one have done."""
    warp.acquire(WAIT_ADDRESS)
    warp.has_waited = True
    _note_control(warp, WAITED)


@action("griddepcontrol.launch_dependents")
def _let_next_grid_begin(warp: Warp, i: Instruction) -> None:
    _note_control(warp, TRIGGERED if warp.has_waited else TRIGGERED | EARLY)


def _note_control(warp: Warp, what: int) -> None:
    controls = warp.block.gpu.controls
    assert controls is not None
    controls[warp.block.number] |= what


@instruction("brx.idx", results=0)
def _branch_by_index(i: Instruction) -> Run:
    index = reader(i.operands[0])

    def run(warp: Warp) -> None:
        chosen = set(index(warp)[warp.lanes()].tolist())
        if len(chosen) > 1:
            raise PtxError(i.line, "threads of a warp branch by different indices", "diverged warp")
        warp.pc = i.table[chosen.pop()]

    return run


@instruction("bra", results=0)
@instruction("bar.warp.sync", results=0, whole=True)
def _pass(i: Instruction) -> Run:
    """`execute` follows a branch. Limitation: a missing `bar.warp.sync` is not detected."""
    return lambda warp: None
