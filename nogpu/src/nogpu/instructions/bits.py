# SPDX-License-Identifier: MIT
"""Instructions on the bits of integers: 9.7.1 (of integers), 9.7.2 (with a carry), 9.7.8 (logic and
shifts) and 9.7.9.7 (prmt) of the PTX ISA."""

import numpy as np

from nogpu.machine.block import Warp
from nogpu.machine.decode import Run, elementwise, instruction
from nogpu.machine.parse import Constant, Instruction
from nogpu.machine.registers import DTYPES, Values, reader, writer


def _width(kind: str) -> int:
    return 8 * DTYPES[kind].itemsize


def _count(x: Values) -> Values:
    """The number of bits that are set."""
    found = np.unpackbits(np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1), axis=1)
    return found.sum(1, dtype=np.uint32)


def _highest(x: Values) -> Values:
    """The position of the highest bit, or −1."""
    bits = np.unpackbits(
        np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1), axis=1, bitorder="little"
    )
    width = bits.shape[1]
    return np.where(bits.any(1), width - 1 - bits[:, ::-1].argmax(1), -1)


@instruction("popc")
def _population(i: Instruction) -> Run:
    return elementwise(i, _count, "u32", i.parts[1])


@instruction("clz")
def _leading_zeros(i: Instruction) -> Run:
    width = _width(i.parts[1])
    return elementwise(i, lambda x: (width - 1 - _highest(x)).astype(np.uint32), "u32", i.parts[1])


@instruction("brev")
def _reverse(i: Instruction) -> Run:
    kind = i.parts[1]

    def reverse(x: Values) -> Values:
        bits = np.unpackbits(np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1), axis=1)
        # Bytes from the last to the first, and bits likewise
        return np.packbits(bits, axis=1, bitorder="little")[:, ::-1].copy().view(x.dtype)[:, 0]

    return elementwise(i, reverse, kind, kind)


@instruction("bfind")
def _find(i: Instruction) -> Run:
    """The highest bit that differs from the sign's; or how far it is from the first one."""
    kind, is_shift = i.parts[-1], "shiftamt" in i.parts
    width = _width(kind)

    def find(x: Values) -> Values:
        found = _highest(np.where(x < 0, ~x, x) if kind[0] == "s" else x)
        shown = np.where(found < 0, -1, width - 1 - found) if is_shift else found
        return shown.astype(np.int32).view(np.uint32)

    return elementwise(i, find, "u32", kind)


@instruction("fns")
def _find_nth(i: Instruction) -> Run:
    """The position of the n-th bit that is set, from ``base`` on, up or down."""

    def find(mask: Values, base: Values, offset: Values) -> Values:
        found = np.full(32, -1, np.int32)
        for lane, (bits, start, n) in enumerate(zip(mask, base, offset, strict=True)):
            step = -1 if n < 0 else 1
            places = range(int(start), -1 if n < 0 else 32, step)
            taken = [place for place in places if int(bits) >> place & 1]
            if n == 0:
                taken = [int(start)] if int(bits) >> int(start) & 1 else []
            wanted = max(abs(int(n)) - 1, 0)
            if wanted < len(taken):
                found[lane] = taken[wanted]
        return found.view(np.uint32)

    return elementwise(i, find, "u32", "b32", "u32", "s32")


@instruction("bfe")
def _extract(i: Instruction) -> Run:
    """A field of bits; those beyond the number are its sign, or zeros."""
    kind = i.parts[-1]
    width, dtype = _width(kind), DTYPES[kind]
    is_signed = dtype.kind == "i"

    def extract(a: Values, b: Values, c: Values) -> Values:
        start, count = (b & 255).astype(np.int64), (c & 255).astype(np.int64)
        moved = a >> np.minimum(start, width - 1).astype(dtype)
        if not is_signed:
            moved = np.where(start < width, moved, dtype.type(0))
        left = (width - np.clip(count, 1, width)).astype(dtype)
        if not is_signed:
            return np.where(count == 0, dtype.type(0), moved << left >> left)
        # The sign is the last bit of the field, or the number's if the field goes beyond it.
        beyond = start + count > width
        field = np.where(beyond, moved, moved << left >> left)
        return np.where(count == 0, dtype.type(0), field)

    return elementwise(i, extract, kind, kind, "u32", "u32")


@instruction("bfi")
def _insert(i: Instruction) -> Run:
    """Bits of the first operand replace a field of the second one."""
    kind = i.parts[1]
    width = _width(kind)

    def insert(a: Values, b: Values, c: Values, d: Values) -> Values:
        result, size = b.copy(), 1 << width
        lanes = zip(a.tolist(), b.tolist(), (c & 255).tolist(), (d & 255).tolist(), strict=True)
        for lane, (field, into, start, count) in enumerate(lanes):
            mask = ((1 << count) - 1 << start) % size
            result[lane] = into & ~mask | (field << start) & mask
        return result

    return elementwise(i, insert, kind, kind, kind, "u32", "u32")


@instruction("lop3.b32")
def _logic(i: Instruction) -> Run:
    """Any function of three bits, by its table."""
    table = i.operands[4].bits

    def run(a: Values, b: Values, c: Values, _: Values) -> Values:
        result = np.zeros_like(a)
        for n in range(8):
            if table >> n & 1:
                result |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
        return result

    return elementwise(i, run, *["b32"] * 5)


@instruction("shf")
def _funnel(i: Instruction) -> Run:
    """A half of b:a, shifted."""
    _, side, mode, kind = i.parts
    assert kind == "b32"
    assert side in ("l", "r")
    assert mode in ("wrap", "clamp")

    def run(a: Values, b: Values, c: Values) -> Values:
        n = (c & np.uint32(31) if mode == "wrap" else np.minimum(c, np.uint32(32))).astype(
            np.uint64
        )
        both = b.astype(np.uint64) << np.uint64(32) | a
        moved = both << n >> np.uint64(32) if side == "l" else both >> n
        return moved.astype(np.uint32)

    return elementwise(i, run, *["b32"] * 3, "u32")


@instruction("prmt.b32")
def _permute_bytes(i: Instruction) -> Run:
    """Each nibble of the selector takes a byte of b:a, or repeats the sign of one."""
    modes = {
        "f4e": lambda n: [n, n + 1, n + 2, n + 3],
        "b4e": lambda n: [n, n + 7, n + 6, n + 5],
        "rc8": lambda n: [n] * 4,
        "ecl": lambda n: [max(n, k) for k in range(4)],
        "ecr": lambda n: [min(n, k) for k in range(4)],
        "rc16": lambda n: [n % 2 * 2, n % 2 * 2 + 1] * 2,
    }
    mode = i.parts[2] if len(i.parts) > 2 else ""

    def taken_by(selector: int) -> list[int]:
        if not mode:
            return [selector >> 4 * place & 15 for place in range(4)]
        return [place % 8 for place in modes[mode](selector & 3)]

    assert not mode or mode in modes
    given = i.operands[3]
    fixed = np.array(taken_by(given.bits)) if isinstance(given, Constant) else None

    def permute(a: Values, b: Values, c: Values) -> Values:
        both = np.empty((32, 2), np.uint32)
        both[:, 0], both[:, 1] = a, b
        if fixed is None:
            nibbles = np.array([taken_by(one) for one in c.tolist()])
            taken = np.take_along_axis(both.view(np.int8), nibbles & 7, 1)
        else:
            nibbles = fixed
            taken = both.view(np.int8).take(nibbles & 7, 1)
        return np.where(nibbles > 7, taken >> 7, taken).astype(np.int8).view(np.uint32)[:, 0]

    return elementwise(i, permute, *["b32"] * 4)


@instruction("sad")
def _sum_of_differences(i: Instruction) -> Run:
    kind = i.parts[1]
    return elementwise(i, lambda a, b, c: c + np.where(a < b, b - a, a - b), *[kind] * 4)


@instruction("mul24", "mad24")
def _of_24_bits(i: Instruction) -> Run:
    """Products of the lower 24 bits: their lower, or upper, 32 bits of 48."""
    _, half, kind = i.parts
    assert half in ("lo", "hi")

    def run(a: Values, b: Values, c: Values | int = 0) -> Values:
        left, right = (one << 8 >> 8 for one in (a, b))
        product = left.astype(np.int64) * right.astype(np.int64)
        return (product if half == "lo" else product >> 16).astype(DTYPES[kind]) + c

    return elementwise(i, run, *[kind] * len(i.operands))


@instruction("dp4a")
def _dot_of_bytes(i: Instruction) -> Run:
    _, left, right = i.parts
    kind = "s32" if "s32" in (left, right) else "u32"
    types = {"s32": np.int8, "u32": np.uint8}

    def run(a: Values, b: Values, c: Values) -> Values:
        x, y = (
            np.ascontiguousarray(one).view(types[of]).reshape(32, 4).astype(np.int64)
            for one, of in ((a, left), (b, right))
        )
        return ((x * y).sum(1) + c).astype(DTYPES[kind])

    return elementwise(i, run, kind, "b32", "b32", kind)


@instruction("add.cc", "addc", "sub.cc", "subc", "mad.lo.cc", "mad.hi.cc", "madc")
def _with_carry(i: Instruction) -> Run:
    """Sums of long integers, by parts: the carry, or borrow, is a bit of each thread."""
    name, kind = i.parts[0], i.parts[-1]
    width, takes, gives = _width(kind), name.endswith("c"), "cc" in i.parts
    is_upper, dtype = "hi" in i.parts, DTYPES[kind]
    put, reads = writer(i.operands[0], kind), [reader(one, kind) for one in i.operands[1:]]

    def run(warp: Warp) -> None:
        numbers = [read(warp).astype(object) for read in reads]
        carry = warp.carry.astype(object) if takes else 0
        size = 1 << width
        if name.startswith("sub"):
            total = numbers[0] % size - numbers[1] % size - carry
        elif name.startswith("add"):
            total = numbers[0] % size + numbers[1] % size + carry
        else:
            product = numbers[0] * numbers[1]
            part = (product >> width if is_upper else product) % size
            total = part + numbers[2] % size + carry
        put(warp, (total % size).astype(f"u{dtype.itemsize}").view(dtype))
        if gives:
            over = np.array([not 0 <= one < size for one in total])
            warp.carry = np.where(warp.mask, over, warp.carry)

    return run
