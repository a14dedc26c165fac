# SPDX-License-Identifier: MIT
"""Branches, the end of a warp, and barriers of a block.

Sections 9.7.12 and 9.7.13 of the PTX ISA.
"""

from collections.abc import Callable

import numpy as np

from nogpu.machine.block import Warp
from nogpu.machine.decode import Run, action, instruction
from nogpu.machine.parse import (
    Instruction,
    PtxError,
)
from nogpu.machine.registers import (
    ALL,
    Values,
    reader,
    writer,
)
from nogpu.native.layout import EARLY, TRIGGERED, WAIT_ADDRESS, WAITED


@action("ret", "exit", whole=True)
def _return(warp: Warp, i: Instruction) -> bool:
    warp.done = True
    if all(one.done for one in warp.block.warps):
        warp.block.cluster.leave(warp.block)
    else:
        warp.block.cluster.complete()
    return True


@action("bar.sync", "barrier.sync", "barrier.cta.sync", whole=True)
def _synchronize(warp: Warp, i: Instruction, number: Values, count: Values | None = None) -> bool:
    if warp.block.gpu.kernel.block is not None:
        warp.block.arrive_threads(warp, i, int(number[0]), _warps(count))
        return True
    warps = len(warp.block.warps) if count is None else int(count[0]) // 32
    warp.block.arrive(warp, int(number[0]), warps)
    return True


def _warps(count: Values | None) -> int | None:
    """Return how many warps a number of threads is; None for all of the block."""
    return None if count is None else -(-int(count[0]) // 32)


REDUCTIONS: dict[str, Callable[[Values], int]] = {
    "popc": lambda votes: int(votes.sum()),
    "and": lambda votes: int(votes.all()),
    "or": lambda votes: int(votes.any()),
}


@instruction("bar.red", "barrier.red", "barrier.cta.red", whole=True)
def _reduce_at_barrier(i: Instruction) -> Run:
    """A barrier at which each thread gets the sum, or another reduction, of all predicates."""
    (name,) = (part for part in i.parts if part in REDUCTIONS)
    to, number, *count, source = i.operands
    put, barrier, read = writer(to, i.parts[-1]), reader(number), reader(source, "pred")
    counts = reader(count[0]) if count else None

    def run(warp: Warp) -> bool:
        block, which = warp.block, int(barrier(warp)[0])
        votes, results = read(warp)[warp.mask], block.results.setdefault(which, [])
        block.votes.setdefault(which, []).append(votes)

        def end() -> None:
            found = REDUCTIONS[name](np.concatenate(block.votes[which]))
            mask, warp.mask = warp.mask, warp.alive if not warp.alive.all() else ALL
            put(warp, np.full(32, found, np.bool_ if name != "popc" else np.uint32))
            warp.mask = mask

        results.append(end)
        block.arrive_threads(warp, i, which, _warps(counts(warp) if counts else None))
        if which not in block.results:
            block.votes.pop(which, None)
        return True

    return run


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
def _pass(i: Instruction) -> Run:
    """`execute` follows a branch."""
    return lambda warp: None


@instruction("bar.warp.sync", results=0, whole=True)
def _synchronize_warp(i: Instruction) -> Run:
    """Accesses before it are ordered with those behind it, of other threads of the warp.

    Limitation: they are also where its mask does not name all threads.
    """

    def run(warp: Warp) -> None:
        warp.clocks.times[warp.index, warp.index] += 1

    return run
