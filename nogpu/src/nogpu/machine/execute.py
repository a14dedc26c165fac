# SPDX-License-Identifier: MIT
"""Execute the instructions of a warp, in Python those that the core in C leaves.

Each warp has a program counter of its own. Where the 32 threads of a warp diverge, those with the
smallest program counter run first, so that they meet again behind the branch.
"""

from typing import TYPE_CHECKING

import numpy as np

from nogpu.machine import definedness
from nogpu.machine.decode import prepare
from nogpu.machine.gpu_state import BETWEEN_CHECKS
from nogpu.machine.parse import Constant, Instruction, PtxError, Register
from nogpu.machine.registers import (
    ALL,
    DTYPES,
    UNWRITTEN,
    Tainted,
    Unready,
    Values,
    left_out,
    left_out_values,
)

if TYPE_CHECKING:
    from nogpu.machine.block import Warp

ALL_BYTES, NO_BYTES = ALL.tobytes(), bytes(32)


def advance(warp: "Warp", budget: int) -> None:
    """Run until the warp waits, ends, or has executed ``budget`` instructions."""
    gpu, instructions = warp.block.gpu, warp.block.gpu.kernel.instructions
    left = budget
    while left > 0:
        if warp.parked:
            _park(warp, warp.pc, warp.active)
            warp.pc = min(warp.parked)
            warp.active = warp.parked.pop(warp.pc)
        if warp.native is not None and not warp.native.left[warp.pc]:
            done = warp.native.run(warp, left)
            left -= done
            if left == 0 or (done and warp.parked):
                continue
        left -= 1
        if left % BETWEEN_CHECKS == 0:
            gpu.check_limits()
        i, pc = instructions[warp.pc], warp.pc
        warp.count += 1
        try:
            stop = step(warp, i)
        except (TypeError, AttributeError) as e:
            stop = _step_tainted(warp, i, pc, e)
        if stop:
            break
    if warp.count > gpu.limit:
        reason = f"does not end after {warp.count:,} instructions; if it would, give it less work"
        raise PtxError(instructions[warp.pc].line, reason, "endless loop")


def step(warp: "Warp", i: Instruction) -> bool:
    """Execute an instruction. Return whether another warp may run first."""
    execute = i.run or prepare(i)
    if i.whole and warp.active is not ALL and not _gather(warp, i):
        return False
    registers, mask = warp.registers, warp.active
    if i.guard is not None:
        mask = ~registers[i.guard.index] if i.negated else registers[i.guard.index]
        mask = mask if warp.active is ALL else mask & warp.active
        bits = mask.tobytes()
        mask = ALL if bits == ALL_BYTES else mask
        if bits == NO_BYTES:
            _fill(warp, i.writes, i.opcode)
            warp.mask = mask
            warp.pc += 1
            return False
    warp.mask = mask
    if mask is not ALL:
        _fill(warp, i.writes, i.opcode)
        if i.whole:
            raise PtxError(i.line, f"a part of {warp.name} executes {i.opcode}")
        if any(type(registers[index]) is Tainted for index in i.writes):
            raise TypeError(f"{i.opcode} writes a part of undefined bits")  # to `advance`
    pc, threads = warp.pc, 32 if mask is ALL else mask.tobytes().count(1)
    warp.pc += 1
    stop = False
    if i.target >= 0:
        _branch(warp, i.target)
    else:
        stop = bool(execute(warp))
    warp.block.gpu.counts.execute(pc, threads)
    if warp.block.trace is not None:
        warp.block.trace.execute(warp, pc)
    return stop


def _gather(warp: "Warp", i: Instruction) -> bool:
    """Wait with an instruction of all threads for those that have diverged.

    Where a branch's blocks lie behind their join, those with the smallest program counter
    reach it first.

    Returns:
        Whether all threads are here; otherwise others have become active.
    """
    here = warp.gathered.pop(warp.pc, False) | warp.active
    if here.all():
        warp.active = ALL
        return True
    warp.gathered[warp.pc] = here
    if not warp.parked and not _shuffle_apart(warp):
        first = warp.block.gpu.kernel.instructions[min(warp.gathered)]
        reason = f"a part of {warp.name} executes {first.opcode}"
        raise PtxError(first.line, reason, "diverged warp")
    warp.pc = min(warp.parked)
    warp.active = warp.parked.pop(warp.pc)
    return False


def _shuffle_apart(warp: "Warp") -> bool:
    """Execute shfl.sync that the threads have reached at several places of the program.

    They may, as all of them execute it with the same mask: LLVM copies it into both sides of a
    branch.

    Returns:
        Whether that was it.
    """
    instructions = warp.block.gpu.kernel.instructions
    places = [(pc, instructions[pc], mask) for pc, mask in sorted(warp.gathered.items())]
    _, first, _ = places[0]
    # Of the operands all but the result, the value and the lane are the same constants.
    is_same = first.opcode.startswith("shfl.sync.") and all(
        i.opcode == first.opcode
        and i.guard is None
        and isinstance(i.operands[0], Register)
        and i.operands[3:] == first.operands[3:]
        for _, i, _ in places
    )
    is_whole = np.any([mask for *_, mask in places], 0).all()
    if not is_same or not is_whole:
        return False
    given = [_given(warp, n, places) for n in (1, 2)]
    if given[0] is None or given[1] is None:
        return False
    warp.gathered.clear()
    warp.mask = warp.active = ALL
    for pc, i, mask in places:
        _shuffle_at(warp, i, mask, [given[0], given[1]])
        warp.block.gpu.counts.execute(pc, int(mask.sum()))
        if warp.block.trace is not None:
            warp.block.trace.execute(warp, pc)
        _park(warp, pc + 1, mask)
    return True


def _given(warp: "Warp", n: int, places: list[tuple[int, Instruction, Values]]) -> Values | None:
    """Return the threads' values of an operand at several places; None if one is undefined."""
    given = np.zeros(32, np.uint32)
    for _, i, mask in places:
        operand = i.operands[n]
        held: object = None
        if isinstance(operand, Constant):
            held = np.full(32, operand.bits % 2**32, np.uint32)
        elif isinstance(operand, Register):
            held = warp.registers[operand.index]
        if isinstance(held, Tainted) and not held.mask[mask].any():
            held = held.values
        if not isinstance(held, np.ndarray):
            return None
        given = np.where(mask, held.view(np.uint32), given)
    return given


def _shuffle_at(warp: "Warp", i: Instruction, mask: Values, given: list[Values]) -> None:
    """Give the threads of ``mask`` what they take of the values ``given`` by all threads."""
    execute = i.run or prepare(i)
    to = i.operands[0].index
    _fill(warp, [to], i.opcode)
    sources = {
        one.index: values
        for one, values in zip(i.operands[1:3], given, strict=True)
        if isinstance(one, Register)
    }
    kept = {
        index: held.copy() if isinstance(held := warp.registers[index], np.ndarray) else held
        for index in (*sources, to)
    }
    for index, values in sources.items():
        warp.registers[index] = values.view(DTYPES[warp.block.gpu.kernel.registers[index]])
    execute(warp)
    taken, before = warp.registers[to].copy(), kept.pop(to)
    for index, held in kept.items():
        warp.registers[index] = held
    if isinstance(before, Tainted):
        undefined = np.where(mask, 0, before.mask).astype(before.mask.dtype)
        values = np.where(mask, taken, before.values)
        warp.registers[to] = Tainted(values, undefined, before.cause)
    else:
        warp.registers[to] = np.where(mask, taken, before)


def _step_tainted(warp: "Warp", i: Instruction, pc: int, error: Exception) -> bool:
    """Execute an instruction that has failed, if its registers are not ready.

    They have undefined bits, or an asynchronous product will write them.
    """
    warp.pc = pc
    has_waited = _wait_for_products(warp, i, error)
    stop = definedness.execute(warp, i, lambda: step(warp, i))
    if stop is not None:
        return stop
    if not has_waited:
        raise error
    return step(warp, i)


def _wait_for_products(warp: "Warp", i: Instruction, error: Exception) -> bool:
    """Wait for the products whose sums the instruction reads, and return whether there is one.

    PTX wants a `wgmma.wait_group` first. ptxas injects the wait where there is none (its remark
    C7517), and Triton relies on that for sums in float16, and for float8 with the option
    ``max_num_imprecise_acc``.

    Raises:
        PtxError: the instruction writes such a register in a part of the threads, or multiplies it.
    """
    held = {one.index: warp.registers[one.index] for one in i.registers}
    pending = {n: one for n, one in held.items() if _is_pending(one)}
    if pending and i.parts[0] == "wgmma":
        message = f"{i.opcode} takes a register of an asynchronous product"
        raise PtxError(i.line, message) from error
    for n, one in pending.items():
        if n in i.writes and not definedness.reads(i, n):
            message = f"{i.opcode} changes a register of an asynchronous product in some threads"
            raise PtxError(i.line, message) from error
        one.operation.wait_early(warp)
    return bool(pending)


def _is_pending(held: object) -> bool:
    return isinstance(held, Unready) and held.operation is not None


def _branch(warp: "Warp", target: int) -> None:
    others = warp.active & ~warp.mask
    if others.any():
        _park(warp, warp.pc, others)
    warp.pc, warp.active = target, warp.mask


def _park(warp: "Warp", pc: int, mask: Values) -> None:
    both = warp.parked.get(pc, False) | mask
    warp.parked[pc] = ALL if both.all() else both


def _fill(warp: "Warp", registers: list[int], what: str) -> None:
    """Give undefined bits to registers that were not written, in the threads left out now."""
    for index in registers:
        if warp.registers[index] is UNWRITTEN:
            block, dtype = warp.block, DTYPES[warp.block.gpu.kernel.registers[index]]
            seed = block.gpu.schedule.seed
            values = left_out_values(seed, block.number, warp.index, index, dtype)
            warp.registers[index] = Tainted(values, definedness.full(dtype), left_out(what))
