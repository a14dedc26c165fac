# SPDX-License-Identifier: MIT
"""Overflows of int32 in the computation of an address, found when it is out of bounds.

An address is followed back through the instructions that have computed it. Each of their results is
computed once more, without a limit of bits. The difference to the content of its register is what
the register has lost: from the first overflow on a multiple of 2³².

Limitation: of what a loop adds up, only the beginning is followed back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nogpu.machine.parse import Address, Constant, Instruction, Kernel, Register, flat
from nogpu.machine.registers import DTYPES, reader

if TYPE_CHECKING:
    from nogpu.machine.block import Warp

DEPTH = 200  # of instructions, up to which an address is followed
SUMS = ("add", "sub", "or")
PRODUCTS = ("mul", "mad", "shl")
MOVES = ("mov", "cvta")


class Lost(NamedTuple):
    """The bytes that an address has lost by overflows, and whether no other bytes are lost."""

    bytes: int
    is_known: bool


NOT_FOLLOWED = Lost(0, False)


def lost(warp: Warp, address: int) -> Lost:
    """Return what an address of the instruction that is executed has lost."""
    for operand in warp.block.gpu.kernel.instructions[warp.pc - 1].operands:
        if not isinstance(operand, Address) or not isinstance(operand.base, Register):
            continue
        held = warp.registers[operand.base.index]
        if not isinstance(held, np.ndarray):
            continue
        lanes = np.flatnonzero((held.astype(np.int64) + operand.offset == address) & warp.mask)
        if len(lanes):
            computation = _Computation(warp, int(lanes[0]))
            found = computation.lost_by(operand.base)
            return Lost(found or 0, computation.is_known)
    return NOT_FOLLOWED


def _definitions(kernel: Kernel) -> dict[int, list[Instruction]]:
    """Return the instructions that write each register."""
    if kernel.definitions is None:
        kernel.definitions = {}
        for i in kernel.instructions:
            for one in flat(i.operands[0]) if i.operands else []:
                if isinstance(one, Register):
                    kernel.definitions.setdefault(one.index, []).append(i)
    return kernel.definitions


class _Computation:
    """The instructions that have computed a register of a thread.

    Attributes:
        is_known: whether nothing had to be left out.
    """

    def __init__(self, warp: Warp, lane: int):
        self.warp, self.lane = warp, lane
        self.definitions = _definitions(warp.block.gpu.kernel)
        self.found: dict[int, int | None] = {}
        self.changing: set[int] = set()  # registers to which a loop adds
        self.depth, self.is_known = 0, True

    def lost_by(self, operand: object) -> int | None:
        """Return what an operand has lost; None: a loop adds to the operand."""
        if not isinstance(operand, Register):
            return 0
        if operand.index not in self.found:
            self.found[operand.index] = None
            self.found[operand.index] = self._lost_by_register(operand.index)
        return self.found[operand.index]

    def _lost_by_register(self, index: int) -> int | None:
        writers = self.definitions.get(index, [])
        if self.depth == DEPTH:
            self.is_known = False
            return 0
        self.depth += 1
        losses = [self._lost_by_result(i) for i in writers]
        if None in losses:  # a loop adds to it: its first value counts
            self.changing.add(index)
            writers = [i for i, one in zip(writers, losses, strict=True) if one is not None]
            losses = [self._lost_by_result(i) for i in writers]
        self.depth -= 1
        found = set(losses)
        if index in self.changing or len(found) > 1:
            self.is_known = False
        if index in self.changing and not found:
            return None
        return found.pop() if len(found) == 1 else 0

    def _lost_by_result(self, i: Instruction) -> int | None:
        name, kind = i.parts[0], i.parts[-1]
        if not isinstance(i.operands[0], Register) or i.guard is not None:
            return 0
        if name in MOVES:
            return self.lost_by(i.operands[1])
        if name == "selp":
            choice = self._value(i.operands[3], "pred")
            return 0 if choice is None else self.lost_by(i.operands[1 if choice else 2])
        is_computed = name in (*SUMS, *PRODUCTS) and "hi" not in i.parts
        if (is_computed and kind[1:] in ("32", "64")) or (name == "cvt" and kind[1:] == "32"):
            return self._lost_by_computing(i, kind)
        return 0

    def _lost_by_computing(self, i: Instruction, kind: str) -> int | None:
        """Return what the result of an addition, a multiplication or a conversion has lost."""
        name, to, operands = i.parts[0], i.operands[0], i.operands[1:]
        given = [self.lost_by(one) for one in operands]
        losses = [one for one in given if one is not None]
        if len(losses) < len(given):
            return None
        signed = to.kind.replace("u", "s")
        of_factors = kind if name == "cvt" or "wide" in i.parts else f"s{kind[1:]}"
        kinds = [of_factors, "u32" if name == "shl" else of_factors, signed]
        values = [self._value(one, of) for one, of in zip(operands, kinds, strict=False)]
        result = self._result(i, _exact(name, values), signed)
        if result is None:
            self.is_known = False
            return _linear(name, losses, operands)
        pairs = zip(values, losses, kinds, strict=False)
        exact = _exact(name, [_unlimited(*pair) for pair in pairs])
        if exact is None:
            return 0
        is_short = DTYPES[signed].itemsize == 4
        return exact - result if is_short else _wrapped(exact - result, 64)

    def _result(self, i: Instruction, exact: int | None, kind: str) -> int | None:
        """Return the result that an instruction had, or None if its operands are now others."""
        if exact is None:
            return None
        to, *operands = i.operands
        result = _wrapped(exact, 8 * DTYPES[kind].itemsize)
        if to.index not in self.changing:
            return result if result == self._value(to, kind) else None
        is_changed = any(getattr(one, "index", None) in self.changing for one in operands)
        return None if is_changed else result

    def _value(self, operand: object, kind: str) -> int | None:
        """Return what an operand holds in the thread, or None if it is not ready."""
        held = self.warp.registers[operand.index] if isinstance(operand, Register) else None
        if held is not None and not isinstance(held, np.ndarray):
            return None
        return int(reader(operand, kind)(self.warp)[self.lane])


def _wrapped(number: int, bits: int) -> int:
    """Return the integer of so many bits, with a sign."""
    half = 1 << bits - 1
    return (number + half) % (2 * half) - half


def _exact(name: str, values: list[int | None]) -> int | None:
    """Return a result without a limit of bits, or None if it is not known."""
    known = [one for one in values if one is not None]
    if len(known) < len(values):
        return None
    first, *others = known
    if name == "cvt":
        return first
    if name == "sub":
        return first - others[0]
    if name == "shl":
        return first << others[0] if others[0] < 64 else None
    if name in SUMS:  # a part of a sum may be joined to the other one by "or"
        return None if name == "or" and first & others[0] else first + others[0]
    return first * others[0] + sum(others[1:])


def _linear(name: str, losses: list[int], operands: Sequence[object]) -> int:
    """Return what a result loses by its operands, where these are no longer what they were."""
    if name == "cvt":
        return losses[0]
    if name in SUMS:
        return losses[0] + (-losses[1] if name == "sub" else losses[1])
    factor = operands[1]
    if not isinstance(factor, Constant):
        return 0
    scale = 1 << factor.bits if name == "shl" else factor.bits
    return losses[0] * scale + sum(losses[2:])


def _unlimited(value: int | None, loss: int, kind: str) -> int | None:
    """Return an operand with what it has lost; one without a sign takes only what is positive."""
    if value is None or not loss or kind.startswith("s"):
        return None if value is None else value + loss
    exact = _wrapped(value, 32) + loss
    return exact if exact >= 0 else value
