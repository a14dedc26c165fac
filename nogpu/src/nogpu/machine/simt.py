# SPDX-License-Identifier: MIT
"""Threads of CUDA C++: execute a warp whose threads take different ways.

Each group of threads that is at one place of the program has a mask. The group with the smallest
program counter runs first, so that groups meet again behind a branch. Instructions that end in
".sync" wait for the threads that their mask names, and barriers for all threads of the warp. Nobody
waits for threads that have ended (9.7.9.6 and 9.7.13 of the PTX ISA).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nogpu.machine import definedness
from nogpu.machine.decode import prepare
from nogpu.machine.gpu_state import BETWEEN_CHECKS
from nogpu.machine.parse import Instruction, PtxError
from nogpu.machine.registers import ALL, Tainted, Values, reader

if TYPE_CHECKING:
    from nogpu.machine.block import Warp

PATIENCE = 4096  # branches backward of a group while others wait behind them
HELD = 512  # instructions that another group then executes
NOBODY = np.zeros(32, np.bool_)
NAMED = ("shfl", "vote", "match", "redux", "elect")  # whose last operand is a mask of threads
DIVERGED = "divergent barrier"


def advance(warp: Warp, budget: int) -> None:
    """Run until the warp waits, ends, or has executed ``budget`` instructions."""
    gpu, instructions = warp.block.gpu, warp.block.gpu.kernel.instructions
    left = budget
    while left > 0 and _choose(warp):
        if warp.native is not None and not warp.native.left[warp.pc]:
            done = warp.native.run(warp, left)
            left -= done
            if left <= 0 or not warp.active.any() or warp.native.left[warp.pc] or done:
                continue
        left -= 1
        if left % BETWEEN_CHECKS == 0:
            gpu.check_limits()
        i, pc = instructions[warp.pc], warp.pc
        warp.count += 1
        try:
            stop = step(warp, i)
        except (TypeError, AttributeError) as e:
            warp.pc = pc
            found = definedness.execute(warp, i, lambda: step(warp, i))  # noqa: B023  # used at once
            if found is None:
                raise e
            stop = found
        if stop and warp.parked and not warp.done and warp.waiting is None:
            warp.patience = 0  # it waits for what another of its threads may do
        elif stop:
            break
    if warp.count > gpu.limit:
        reason = f"does not end after {warp.count:,} instructions; if it would, give it less work"
        raise PtxError(instructions[warp.pc].line, reason, "endless loop")


def _choose(warp: Warp) -> bool:
    """Let the group with the smallest program counter be the active one.

    Returns:
        Whether there is one; otherwise the warp has ended or waits.

    Raises:
        PtxError: threads wait for others that never come.
    """
    if warp.done or warp.waiting is not None:
        return False
    if warp.held > 0 and warp.active.any():
        warp.held -= 1
        return True
    if warp.parked:
        if warp.active.any():
            _park(warp, warp.pc, warp.active)
        if warp.patience <= 0:
            warp.pc, warp.patience, warp.held = max(warp.parked), PATIENCE, HELD
        else:
            warp.pc = min(warp.parked)
        warp.active = warp.parked.pop(warp.pc)
        return True
    if warp.active.any():
        return True
    for pc in sorted(warp.gathered):
        warp.pc = pc
        if converge(warp, warp.block.gpu.kernel.instructions[pc]):
            warp.converged = pc
            return True
    if not warp.gathered:
        return False
    raise _apart(warp)


def step(warp: Warp, i: Instruction) -> bool:
    """Execute an instruction. Return whether another warp may run first."""
    execute = i.run or prepare(i)
    name, registers, mask = i.parts[0], warp.registers, _guarded(warp, i)
    if not mask.any():
        warp.pc += 1
        return False
    if i.whole:
        if warp.converged != warp.pc and not converge(warp, i):
            return False
        warp.converged, mask = -1, warp.active
        if "aligned" in i.parts and not mask.all() and not _is_barrier(i):
            raise _in_part(warp, i, mask)
    mask = ALL if mask.all() else mask
    warp.mask = mask
    if mask is not ALL and any(type(registers[index]) is Tainted for index in i.writes):
        raise TypeError(f"{i.opcode} writes a part of undefined bits")  # to `advance`
    pc = warp.pc
    warp.pc += 1
    stop = False
    if i.target >= 0:
        _branch(warp, i.target, mask)
    elif name == "brx":
        _branch_by_index(warp, i, mask)
    elif name in ("ret", "exit"):
        stop = _end(warp, i, mask)
    else:
        stop = bool(execute(warp))
    warp.block.gpu.counts.execute(pc, int(mask.sum()))
    if warp.block.trace is not None:
        warp.block.trace.execute(warp, pc)
    return stop


def _guarded(warp: Warp, i: Instruction) -> Values:
    """Return the active threads whose predicate lets them execute an instruction."""
    if i.guard is None:
        return warp.active
    guard = warp.registers[i.guard.index]
    if isinstance(guard, Tainted):
        raise TypeError
    mask = warp.active & (~guard if i.negated else guard)
    if i.whole and mask.any() and not np.array_equal(mask, warp.active):
        _park(warp, warp.pc + 1, warp.active & ~mask)
        warp.active = mask
    return mask


def _park(warp: Warp, pc: int, mask: Values) -> None:
    warp.parked[pc] = warp.parked[pc] | mask if pc in warp.parked else mask


def _branch(warp: Warp, target: int, mask: Values) -> None:
    others = warp.active & ~mask
    if others.any():
        _park(warp, warp.pc, others)
    if target < warp.pc and (warp.parked or warp.gathered):
        warp.patience -= 1
    warp.pc, warp.active = target, mask
    if warp.block.gpu.kernel.instructions[target].parts[0] in ("ret", "exit"):
        warp.early = warp.early | mask


def _branch_by_index(warp: Warp, i: Instruction, mask: Values) -> None:
    others = warp.active & ~mask
    if others.any():
        _park(warp, warp.pc, others)
    index = reader(i.operands[0])(warp)
    for number in np.unique(index[mask]).tolist():
        if number >= len(i.table):
            raise PtxError(i.line, f"a branch by the index {number} of {len(i.table)}")
        _park(warp, i.table[number], mask & (index == number))
    warp.active = NOBODY


def _end(warp: Warp, i: Instruction, mask: Values) -> bool:
    """Let the threads of ``mask`` end, and with the last one the warp."""
    warp.alive = warp.alive & ~mask
    warp.active = warp.active & ~mask
    if warp.alive.any():
        return False
    warp.done = True
    if all(one.done for one in warp.block.warps):
        warp.block.cluster.leave(warp.block)
    else:
        warp.block.cluster.complete()
        warp.block.complete_barriers()
    return True


# Threads that wait for each other


def members(warp: Warp, i: Instruction) -> Values | None:
    """Return of each thread the mask of those that it names; None: all of them are meant."""
    name = i.parts[0]
    if name in NAMED or i.opcode == "bar.warp.sync":
        values: Values = reader(i.operands[-1], "u32")(warp)
        if not isinstance(values, np.ndarray):
            raise TypeError
        return values
    return None


def converge(warp: Warp, i: Instruction) -> bool:
    """Let the active threads wait for those that execute the instruction with them.

    Returns:
        Whether all of them are here, and active; otherwise nobody is active.

    Raises:
        PtxError: a thread is not in its own mask.
    """
    named = members(warp, i)
    here = warp.gathered.get(warp.pc, NOBODY) | warp.active
    if named is None:
        ready = here if np.array_equal(here, warp.alive) else NOBODY
    else:
        ready = _ready(warp, i, here, named)
    warp.gathered.pop(warp.pc, None)
    waiting = here & ~ready
    if waiting.any():
        warp.gathered[warp.pc] = waiting
    warp.active = ready
    return bool(ready.any())


def _bits(mask: Values) -> int:
    return int(np.packbits(mask, bitorder="little").view(np.uint32)[0])


def _ready(warp: Warp, i: Instruction, here: Values, named: Values) -> Values:
    """Return the threads of the first mask that has all of its threads here."""
    alive, bits = _bits(warp.alive), _bits(here)
    for mask in dict.fromkeys(named[here].tolist()):
        group = here & (named == mask)
        missing = _bits(group) & ~mask
        if missing:
            lane = (missing & -missing).bit_length() - 1
            message = (
                f"{warp.thread(lane)} executes {i.opcode} with the mask {mask:#010x}, which "
                "does not name it"
            )
            raise PtxError(i.line, message, "wrong mask")
        if not mask & alive & ~bits and not mask & alive & ~_bits(group):
            return group
    return NOBODY


def _apart(warp: Warp) -> PtxError:
    """Say which threads wait where, for others that never come."""
    instructions, gpu = warp.block.gpu.kernel.instructions, warp.block.gpu
    waiting = [instructions[pc] for pc in sorted(warp.gathered)]
    by_mask = [one for one in waiting if not _is_barrier(one)]
    places = [
        f"{warp.threads_of(mask)} at {gpu.place_of(one.line)} ({_call(one)})"
        for one, mask in ((instructions[pc], mask) for pc, mask in sorted(warp.gathered.items()))
    ]
    if not by_mask:
        reason = "__syncthreads is in a branch that not all threads take: "
        return PtxError(waiting[0].line, f"{reason}{'; '.join(places)}", DIVERGED)
    reason = "the mask names threads that do not come here: "
    return PtxError(by_mask[0].line, f"{reason}{'; '.join(places)}", "wrong mask")


def _in_part(warp: Warp, i: Instruction, mask: Values) -> PtxError:
    """Name the threads of an incomplete warp that execute an instruction for whole warps.

    Its result is undefined (PTX ISA, 9.7.15).
    """
    do = "executes" if mask.sum() == 1 else "execute"
    message = (
        f"{warp.threads_of(mask)} {do} {i.opcode}, which all 32 threads of a warp must execute "
        "together"
    )
    return PtxError(i.line, message, "diverged warp")


def _is_barrier(i: Instruction) -> bool:
    return i.parts[0] in ("bar", "barrier") and i.parts[1] != "warp"


def _call(i: Instruction) -> str:
    return "__syncthreads" if _is_barrier(i) else i.opcode
