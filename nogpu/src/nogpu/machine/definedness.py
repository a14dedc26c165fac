# SPDX-License-Identifier: MIT
"""Undefined bits of registers, followed until they matter.

A bit is undefined in a register that was never written, in the threads that a predicate left out,
and in what a thread has loaded from memory that nobody has written, or that another one writes at
the same time. Kernels compute with undefined bits and discard the results: that is no fault. It is
one where an undefined bit is stored, where it is a part of an address, and where it decides what
is executed. Valgrind's Memcheck follows bits in this way (Seward and Nethercote, "Using Valgrind to
detect undefined value errors with bit-precision", USENIX 2005).

Instructions take NumPy arrays, and a `Tainted` register is none. So one that takes it fails, and is
executed once more, with the bits and without the taint; then the results are tainted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from nogpu.machine.packed_definedness import MOVES, SUMS, of_conversion, of_sum, of_table
from nogpu.machine.parse import Address, Instruction, Register, flat
from nogpu.machine.registers import (
    DTYPES,
    FLOATS,
    NEVER_WRITTEN,
    UNWRITTEN,
    Cause,
    DType,
    Tainted,
    Values,
)

if TYPE_CHECKING:
    from nogpu.machine.block import Warp

# Instructions whose operands matter: they write memory, or send messages.
SINKS = ("st", "atom", "red", "stmatrix", "cp", "call", "mbarrier")


def tainted(warp: Warp, index: int, value: object) -> Tainted | None:
    """Return the content of a register with its undefined bits, or None if it has none."""
    if isinstance(value, Tainted):
        return value
    if value is UNWRITTEN:
        dtype = DTYPES[warp.block.gpu.kernel.registers[index]]
        return Tainted(np.zeros(32, dtype), full(dtype), NEVER_WRITTEN)
    return None


def full(dtype: DType) -> Values:
    """Return a mask of all bits."""
    if dtype == np.bool_:
        return np.ones(32, np.bool_)
    return np.full(32, -1, f"i{dtype.itemsize}").view(f"u{dtype.itemsize}")


def execute(warp: Warp, i: Instruction, step: Callable[[], bool]) -> bool | None:
    """Execute an instruction whose registers have undefined bits, by ``step``.

    Returns:
        What ``step`` returns; None if no register has undefined bits.
    """
    registers = warp.registers
    held = {one.index: registers[one.index] for one in i.registers}
    found = {index: t for index, value in held.items() if (t := tainted(warp, index, value))}
    if not found:
        return None
    for index, t in found.items():
        registers[index] = t.values
    read = {index: t for index, t in found.items() if index not in i.writes or reads(i, index)}
    values = {index: registers[index] for index in held}
    guard = i.guard.index if i.guard is not None else -1
    if guard in found and (found[guard].mask & warp.active).any():
        report(warp, i, found[guard].cause, DECIDES)
    result = step()
    _check_sink(warp, i, read)
    masks = _propagate(warp, i, values, read) if i.writes else {}
    for index, t in found.items():
        if index not in i.writes:
            registers[index] = t
    _taint_results(warp, i, found, masks)
    return result


def _taint_results(
    warp: Warp, i: Instruction, found: dict[int, Tainted], masks: dict[int, tuple[Values, Cause]]
) -> None:
    """Taint what the instruction has written; threads that it left out keep their taint."""
    registers = warp.registers
    for index in i.writes:
        value: Any = registers[index]
        mask, cause = masks.get(index, (None, None))
        if isinstance(value, Tainted):  # such as a load's, or of a thread that is not there
            mask = value.mask if mask is None else mask | value.mask
            value, cause = value.values, cause or value.cause
        if not isinstance(value, np.ndarray):  # of an asynchronous product
            continue
        if mask is not None:
            mask = np.where(warp.mask, mask, mask.dtype.type(0))
        kept = found.get(index)
        if kept is not None and not warp.mask.all():
            others = np.where(warp.mask, kept.mask.dtype.type(0), kept.mask)
            mask = others if mask is None else mask | others
            cause = cause or kept.cause
        if mask is not None and cause is not None and mask.any():
            registers[index] = Tainted(value, mask, cause)


def reads(i: Instruction, index: int) -> bool:
    """Whether an operand is the register, beside those that are written."""
    given = [one for operand in i.operands for one in flat(operand)]
    registers = [one.index for one in given if isinstance(one, Register)]
    return index in registers[len(i.writes) :]  # behind those that it writes


def _check_sink(warp: Warp, i: Instruction, read: dict[int, Tainted]) -> None:
    """Report undefined bits that are stored, or are a part of an address."""
    matter: dict[int, str] = {}
    if i.parts[0] in SINKS:
        given = [one for operand in i.operands for one in flat(operand)]
        matter = {one.index: "is stored" for one in given if isinstance(one, Register)}
    for operand in i.operands:
        if isinstance(operand, Address) and isinstance(operand.base, Register):
            matter[operand.base.index] = "is a part of an address"
    for index, what in matter.items():
        if index not in read or index in i.writes:
            continue
        mask = read[index].mask[warp.mask]
        if what == "is stored" and i.parts[0] == "st" and i.parts[-1] in DTYPES:
            mask = mask & full(DTYPES[i.parts[-1]])[0].astype(mask.dtype)  # bits above stay
        if mask.any():
            report(warp, i, read[index].cause, what)
            return


DECIDES = "decides what is executed"


def report(warp: Warp, i: Instruction, cause: Cause, what: str) -> None:
    is_elsewhere = cause.line and cause.line != i.line
    where = f" ({warp.block.gpu.place_of(i.line)})" if is_elsewhere else ""
    kind = "warning" if cause.is_weak and what == DECIDES else "error"
    message = f"{cause.message}; the value {what}{where}"
    warp.fault(kind, cause.name, cause.line or i.line, message, *cause.events[::-1])


def _propagate(
    warp: Warp, i: Instruction, values: dict[int, Values], read: dict[int, Tainted]
) -> dict[int, tuple[Values, Cause]]:
    """Return the undefined bits of the registers that the instruction writes."""
    if not read:
        return {}
    cause = next(iter(read.values())).cause
    name = i.parts[0]
    if name in MOVES and not any(part in FLOATS for part in i.parts[1:-1]):
        moved = _move(warp, i, values, read)
        if moved is not None:
            return {index: (mask, cause) for index, mask in moved.items()}
    kinds = warp.block.gpu.kernel.registers
    mask = _of_bits(i, values, read, kinds) if len(i.writes) == 1 else None
    if mask is not None:
        return {i.writes[0]: (mask, cause)}
    if name == "selp":
        width = DTYPES[kinds[i.writes[0]]]
        (_, a), (_, b) = (_operand(one, values, read, width) for one in i.operands[1:3])
        choice = i.operands[3]
        if isinstance(choice, Register) and choice.index not in read:
            mask = np.where(values[choice.index], a, b)
            return {i.writes[0]: (mask, cause)}
    if _is_of_pairs(i, kinds, read):
        return {i.writes[0]: (_of_pairs(read), cause)}
    return {index: (mask, cause) for index, mask in _of_threads(warp, i, read).items()}


def _of_threads(warp: Warp, i: Instruction, read: dict[int, Tainted]) -> dict[int, Values]:
    """All bits of a thread's results are undefined where one bit of its operands is."""
    lanes = np.zeros(32, np.bool_)
    for t in read.values():
        lanes |= t.mask != 0
    if i.whole and i.parts[0] != "shfl":  # the threads' values mix
        lanes[:] = lanes.any()
    result = {}
    for index in i.writes:
        mask = full(DTYPES[warp.block.gpu.kernel.registers[index]])
        result[index] = np.where(lanes, mask, mask.dtype.type(0))
    return result


def _of_bits(
    i: Instruction, values: dict[int, Values], read: dict[int, Tainted], kinds: list[str]
) -> Values | None:
    """Return the undefined bits of a result where the instruction keeps bits apart, or None."""
    name, dtype = i.parts[0], DTYPES[kinds[i.writes[0]]]
    bitwise = {"and": _and, "or": _or, "xor": _either, "not": _either}
    if name in bitwise:
        return bitwise[name]([_operand(one, values, read, dtype) for one in i.operands[1:4]])
    if name == "lop3":
        sources = [_operand(one, values, read, dtype) for one in i.operands[1:4]]
        return of_table(i.operands[4].bits, sources)
    if name in ("cvt", *SUMS):
        masks = [_mask(one, read, kinds) for one in i.operands[1:]]
        return (of_conversion if name == "cvt" else of_sum)(i.parts, masks, dtype)
    return None


def _mask(operand: object, read: dict[int, Tainted], kinds: list[str]) -> Values:
    """Return the undefined bits of an operand."""
    if isinstance(operand, Register):
        if operand.index in read:
            return read[operand.index].mask
        dtype = DTYPES[kinds[operand.index]]
        return np.zeros(32, np.bool_ if dtype == np.bool_ else f"u{dtype.itemsize}")
    return np.zeros(32, np.uint64)


def _operand(
    operand: object, values: dict[int, Values], read: dict[int, Tainted], dtype: DType
) -> tuple[Values, Values]:
    """Return the bits of an operand, and those that are undefined."""
    unsigned = np.bool_ if dtype == np.bool_ else np.dtype(f"u{dtype.itemsize}")
    zeros = np.zeros(32, unsigned)
    if isinstance(operand, Register):
        bits = values[operand.index]
        bits = bits if bits.dtype == unsigned else bits.view(unsigned)
        mask = read[operand.index].mask if operand.index in read else zeros
        return bits, mask
    number = getattr(operand, "bits", 0)
    if dtype == np.bool_:
        return zeros | bool(number), zeros
    return np.full(32, number % 2 ** (8 * dtype.itemsize), unsigned), zeros


def _and(sources: list[tuple[Values, Values]]) -> Values:
    """A bit is defined where one operand is a defined 0."""
    (a, of_a), (b, of_b) = sources
    return (of_a | of_b) & (of_a | a) & (of_b | b)


def _or(sources: list[tuple[Values, Values]]) -> Values:
    """A bit is defined where one operand is a defined 1."""
    (a, of_a), (b, of_b) = sources
    return (of_a | of_b) & (of_a | ~a) & (of_b | ~b)


def _either(sources: list[tuple[Values, Values]]) -> Values:
    mask = sources[0][1]
    for _, of_other in sources[1:]:
        mask = mask | of_other
    return mask


def _is_of_pairs(i: Instruction, kinds: list[str], read: dict[int, Tainted]) -> bool:
    """Whether the instruction computes the halves of its result from the same halves of
    operands."""
    if i.parts[0] in (*SINKS, "cvt", "set", "setp") or len(i.writes) != 1:
        return False
    size = DTYPES[kinds[i.writes[0]]].itemsize
    alike = all(t.mask.dtype.itemsize == size for t in read.values())  # and no predicate
    return alike and any(part.endswith("x2") for part in i.parts[1:])


def _of_pairs(read: dict[int, Tainted]) -> Values:
    """The undefined halves of a pair of numbers; each is computed of the operands' same halves."""
    masks = [t.mask for t in read.values()]
    whole = masks[0].dtype
    half = np.dtype(f"u{whole.itemsize // 2}")
    halves = np.any([mask.view(half).reshape(32, 2) for mask in masks], axis=0)
    return np.where(halves, half.type(np.iinfo(half).max), half.type(0)).view(whole)[:, 0]


def _moved(i: Instruction) -> tuple[set[int], set[int]]:
    """Return the registers whose bits an instruction moves, and the others that it reads."""
    places = [n % len(i.operands) for n in MOVES[i.parts[0]]]
    found = [
        (one.index, n in places)
        for n, operand in enumerate(i.operands)
        for one in flat(operand)
        if isinstance(one, Register)
    ][len(i.writes) :]  # behind those that it writes
    moved = {index for index, is_moved in found if is_moved}
    return moved, {index for index, is_moved in found if not is_moved}


def _move(
    warp: Warp, i: Instruction, values: dict[int, Values], read: dict[int, Tainted]
) -> dict[int, Values] | None:
    """Execute a move on the masks of its operands, or return None if another operand is undefined.

    A predicate that it writes, such as that of a shuffle, is defined.
    """
    moved, others = _moved(i)
    if not set(read) <= moved or moved & others:
        return None
    registers, kinds = warp.registers, warp.block.gpu.kernel.registers
    before = {index: registers[index] for index in (*moved, *i.writes)}
    for index in moved:
        dtype = DTYPES[kinds[index]]
        mask = read[index].mask if index in read else np.zeros(32, full(dtype).dtype)
        registers[index] = mask.view(dtype)
    for index in i.writes:
        if index in others:  # such as the amount of a shift, as it was
            registers[index] = values[index]
        elif index not in moved:
            registers[index] = np.zeros(32, DTYPES[kinds[index]])
    assert i.run is not None
    i.run(warp)
    found = {}
    for index in i.writes:
        result = registers[index]
        if isinstance(result, Tainted):
            result = result.values.view(result.mask.dtype) | result.mask
        if kinds[index] == "pred":
            found[index] = np.zeros(32, np.bool_)
        else:
            found[index] = np.ascontiguousarray(result).view(f"u{result.dtype.itemsize}")
    for index, value in before.items():
        registers[index] = value
    return found


def mark(warp: Warp, index: int, lanes: Values, undefined: Values, cause: Cause) -> None:
    """Taint a register that has just been loaded.

    Args:
        undefined: bytes ``(len(lanes), width)`` that have no defined value.
    """
    value = warp.registers[index]
    if not isinstance(value, np.ndarray):
        return
    size = value.dtype.itemsize
    mask = np.zeros((32, size), np.uint8)
    width = min(undefined.shape[1], size)
    mask[lanes, :width] = undefined[:, :width] * np.uint8(0xFF)
    if width < size and undefined[:, -1].any():  # extended by the sign
        mask[lanes, width:] = (undefined[:, -1:] * np.uint8(0xFF)).repeat(size - width, 1)
    if mask.any():
        warp.registers[index] = Tainted(value, mask.view(f"u{size}")[:, 0], cause)
