# SPDX-License-Identifier: MIT
"""Products of tiles that a warp loads and stores itself: 9.7.14.4 of the PTX ISA (wmma).

The ISA leaves open which thread has which element of a tile. Here thread n has those from
n times its number of elements on, and where threads have more than the tile, it is repeated.
Limitation: integers of 4 and 1 bits, and sparse tiles, are unknown.
"""

from collections.abc import Callable

import numpy as np

from nogpu.instructions.copies import _space_of
from nogpu.machine.block import Warp
from nogpu.machine.decode import Run, instruction
from nogpu.machine.memory import Space
from nogpu.machine.parse import Instruction, flat
from nogpu.machine.registers import DTYPES, HALVES, LANES, Values, decode, encode, reader, writer

SPACES = ("global", "shared", "shared::cta")
BYTES = {"f16": 2, "bf16": 2, "f32": 4, "tf32": 4, "f64": 8, "s8": 1, "u8": 1, "s32": 4}


def _shape(i: Instruction) -> tuple[int, int, int]:
    text = next(part for part in i.parts if part[0] == "m" and part[1:2].isdigit())
    m, n, k = (int(one) for one in text[1:].replace("n", " ").replace("k", " ").split())
    return m, n, k


def _sizes(i: Instruction, what: str) -> tuple[int, int]:
    m, n, k = _shape(i)
    return {"a": (m, k), "b": (k, n)}.get(what, (m, n))


def _places(rows: int, columns: int, count: int) -> tuple[Values, Values]:
    """Return the row and the column of each element ``(32, count)`` that threads have."""
    numbers = (LANES[:, None] * count + np.arange(count)) % (rows * columns)
    return numbers // columns, numbers % columns


def _elements(i: Instruction, registers: list[object], kind: str) -> int:
    """Return how many elements of a tile a thread has."""
    each = {2: 2, 1: 4}.get(BYTES[kind], 1)
    return len(registers) * each


def _addresses(
    i: Instruction, what: str, operand: object, stride: list[object], count: int
) -> Callable[[Warp], tuple[Values, Space]]:
    """Return a function that gives the addresses of a tile's numbers, and their memory.

    Args:
        count: the numbers that a thread has.
    """
    order, width = i.parts[5], BYTES[i.parts[-1]]
    assert order in ("row", "col")
    rows, columns = _sizes(i, what)
    row, column = _places(rows, columns, count)
    address = reader(operand)
    leading = reader(stride[0], "u32") if stride else None
    space = next((part for part in i.parts if part in SPACES), "")

    def find(warp: Warp) -> tuple[Values, Space]:
        at = address(warp).astype(np.int64)
        default = columns if order == "row" else rows
        step = leading(warp).astype(np.int64)[:, None] if leading else default
        offsets = row * step + column if order == "row" else column * step + row
        return at[:, None] + offsets * width, _memory(warp, space, at)

    return find


@instruction("wmma.load", results=1, whole=True)
def _load(i: Instruction) -> Run:
    what, kind = i.parts[2], i.parts[-1]
    assert i.parts[3:5] == ["sync", "aligned"]
    to, source, *stride = i.operands
    registers, width = flat(to), BYTES[kind]
    count = _elements(i, registers, kind)
    find = _addresses(i, what, source, stride, count)
    puts = [writer(one, "b64" if width == 8 else "b32") for one in registers]

    def run(warp: Warp) -> None:
        places, memory = find(warp)
        found = np.zeros((32, count, width), np.uint8)
        for n in range(count):
            found[:, n] = memory.load(warp, places[:, n], width, i.line)[0]
        words = np.ascontiguousarray(found).reshape(32, len(registers), -1)
        for n, put in enumerate(puts):
            raw = np.ascontiguousarray(words[:, n])
            put(warp, raw.view(np.uint64 if width == 8 else np.uint32)[:, 0])

    return run


def _memory(warp: Warp, space: str, at: Values) -> Space:
    if space == "global":
        return warp.block.space
    return warp.block.shared if space else _space_of(warp, at)


def _tile(warp: Warp, reads: list[object], kind: str, sizes: tuple[int, int]) -> Values:
    """Return the numbers of a tile that the threads have in registers."""
    words = np.stack([np.ascontiguousarray(read(warp)) for read in reads], 1)  # type: ignore[operator]
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(32, -1)
    if kind == "tf32":
        numbers = (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    elif kind in HALVES:
        bits = np.ascontiguousarray(raw).view(np.uint16)
        numbers = decode(kind, bits.reshape(-1)).reshape(bits.shape)
    else:
        numbers = raw.view(DTYPES[kind])
    rows, columns = sizes
    row, column = _places(rows, columns, numbers.shape[1])
    tile = np.zeros(sizes, np.int64 if kind in ("s8", "u8", "s32") else np.float64)
    tile[row, column] = numbers
    return tile


@instruction("wmma.mma", results=1, whole=True)
def _multiply(i: Instruction) -> Run:
    parts = [part for part in i.parts if part not in ("sync", "aligned", "satfinite", "rn")]
    assert set(parts[2:4]) <= {"row", "col"}
    kinds = parts[5:]
    m, n, k = _shape(i)
    if len(kinds) == 2:  # of D and C, whose products are those of f16
        kinds = [kinds[0], "f16", "f16", kinds[1]]
    of_d, of_a, of_b, of_c = kinds
    to, *sources = (flat(one) for one in i.operands)
    wide = "b64" if of_d == "f64" else "b32"
    reads = [[reader(one, wide) for one in source] for source in sources]
    puts = [writer(one, wide) for one in to]
    count = _elements(i, to, of_d)
    row, column = _places(m, n, count)

    def run(warp: Warp) -> None:
        a = _tile(warp, list(reads[0]), of_a, (m, k))
        b = _tile(warp, list(reads[1]), of_b, (k, n))
        c = _tile(warp, list(reads[2]), of_c, (m, n))
        d = (a @ b + c)[row, column]
        if of_d in HALVES:
            flat_d = encode(of_d, np.ascontiguousarray(d.reshape(-1)).astype(np.float32))
            raw = np.ascontiguousarray(flat_d.reshape(32, -1)).view(np.uint8)
        else:
            raw = np.ascontiguousarray(d.astype(DTYPES[of_d])).view(np.uint8)
        words = raw.reshape(32, len(to), -1)
        for number, put in enumerate(puts):
            one = np.ascontiguousarray(words[:, number])
            put(warp, one.view(np.uint64 if wide == "b64" else np.uint32)[:, 0])

    return run


@instruction("wmma.store", results=0, whole=True)
def _store(i: Instruction) -> Run:
    kind = i.parts[-1]
    assert i.parts[2:5] == ["d", "sync", "aligned"]
    target, source, *stride = i.operands
    registers, width = flat(source), BYTES[kind]
    count = _elements(i, registers, kind)
    find = _addresses(i, "d", target, stride, count)
    reads = [reader(one, "b64" if width == 8 else "b32") for one in registers]

    def run(warp: Warp) -> None:
        places, memory = find(warp)
        words = np.stack([np.ascontiguousarray(read(warp)) for read in reads], 1)
        raw = np.ascontiguousarray(words).view(np.uint8).reshape(32, count, width)
        for n in range(count):
            memory.store(warp, places[:, n], np.ascontiguousarray(raw[:, n]), i.line)

    return run
