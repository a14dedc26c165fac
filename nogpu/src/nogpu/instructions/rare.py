# SPDX-License-Identifier: MIT
"""Rare instructions, which inline assembly uses: 9.7.1 (bmsk, szext), 9.7.6 (slct), 9.7.13
(match.sync) and 9.7.18 (vabsdiff4) of the PTX ISA."""

import numpy as np

from nogpu.instructions.arithmetic import flush, for_all
from nogpu.machine.block import Warp
from nogpu.machine.decode import Run, elementwise, instruction
from nogpu.machine.parse import Instruction
from nogpu.machine.registers import DTYPES, Values, reader, writer


def _ones(count: Values) -> Values:
    """The lowest ``count`` bits, at most 32."""
    return (np.uint64(1) << count.astype(np.uint64)) - np.uint64(1)


def _counted(x: Values, mode: str) -> Values:
    """A number of bits, which is at most 32 or counts modulo 32."""
    assert mode in ("clamp", "wrap")
    return x & np.uint32(31) if mode == "wrap" else np.minimum(x, np.uint32(32))


@instruction("bmsk")
def _mask(i: Instruction) -> Run:
    """``b`` ones from bit ``a`` on."""
    _, mode, kind = i.parts
    assert kind == "b32"
    assert mode in ("clamp", "wrap")

    def run(a: Values, b: Values) -> Values:
        first, count = _counted(a, mode), _counted(b, mode)
        return (_ones(count) << first.astype(np.uint64)).astype(np.uint32)

    return elementwise(i, run, "b32", "u32", "u32")


@instruction("szext")
def _extend(i: Instruction) -> Run:
    """The lowest ``b`` bits of ``a``, extended by their sign or by zeros."""
    _, mode, kind = i.parts
    assert kind in ("u32", "s32")
    assert mode in ("clamp", "wrap")

    def run(a: Values, b: Values) -> Values:
        count = _counted(b, mode)
        inside = _ones(count).astype(np.uint32)
        sign = a >> np.maximum(count, np.uint32(1)) - np.uint32(1) & np.uint32(1)
        is_negative = (sign > 0) & (count > 0) & (kind == "s32")
        return a & inside | np.where(is_negative, ~inside, np.uint32(0))

    return elementwise(i, run, "b32", "u32", "u32")


@instruction("slct")
def _select_by_sign(i: Instruction) -> Run:
    """``a`` where ``c`` is at least 0, and ``b`` elsewhere, also where ``c`` is NaN."""
    *_, kind, of_c = i.parts
    assert of_c in ("s32", "f32")
    ftz = "ftz" in i.parts
    bits = f"b{8 * DTYPES[kind].itemsize}"

    def run(a: Values, b: Values, c: Values) -> Values:
        return np.where((flush(c) if ftz else c) >= 0, a, b)

    return elementwise(i, run, bits, bits, bits, of_c)


@instruction("match.any.sync", whole=True)
def _match_any(i: Instruction) -> Run:
    """The threads that have the same value, as a mask."""
    put, read = writer(i.operands[0], "b32"), reader(i.operands[1], i.parts[-1])

    def run(warp: Warp) -> None:
        x = read(warp)
        same = (x[:, None] == x) & warp.mask
        put(warp, np.packbits(same, axis=1, bitorder="little").view(np.uint32)[:, 0])

    return for_all(i, i.operands[2], run)


@instruction("match.all.sync", results=lambda i: len(i.operands) - 2, whole=True)
def _match_all(i: Instruction) -> Run:
    """The mask of all threads and true, if all have the same value."""
    *targets, source, members = i.operands
    put, read = writer(targets[0], "u32"), reader(source, i.parts[-1])
    is_same = writer(targets[1], "pred") if len(targets) > 1 else None

    def run(warp: Warp) -> None:
        values = read(warp)[warp.mask]
        same = bool((values == values[0]).all())
        here = int(np.packbits(warp.mask, bitorder="little").view(np.uint32)[0])
        put(warp, np.full(32, here if same else 0, np.uint32))
        if is_same is not None:
            is_same(warp, np.full(32, same))

    return for_all(i, members, run)


@instruction("vabsdiff4")
def _differences_of_bytes(i: Instruction) -> Run:
    """|a - b| of four bytes each; with ".add" their sum and c. Limitation: selectors and masks of
    bytes are unknown."""
    _, kind, of_a, of_b, *modifiers = i.parts
    assert {kind, of_a, of_b} <= {"u32", "s32"}
    assert modifiers in ([], ["sat"], ["add"])
    types = {"u32": np.uint8, "s32": np.int8}
    limits = np.iinfo(types[kind])

    def run(a: Values, b: Values, c: Values) -> Values:
        x, y = (
            np.ascontiguousarray(one).view(types[of]).reshape(32, 4).astype(np.int64)
            for one, of in ((a, of_a), (b, of_b))
        )
        difference = np.abs(x - y)
        if modifiers == ["add"]:
            return (difference.sum(1) + c).astype(np.uint32)
        if modifiers == ["sat"]:
            difference = np.clip(difference, limits.min, limits.max)
        return np.ascontiguousarray(difference.astype(np.uint8)).view(np.uint32)[:, 0]

    return elementwise(i, run, "b32", "b32", "b32", "u32")
