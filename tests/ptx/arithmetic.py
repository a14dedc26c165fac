# SPDX-License-Identifier: MIT
"""Arithmetic, comparisons, conversions, moves, and what the threads of a warp exchange.

Sections 9.7.1 to 9.7.8 (arithmetic, comparison, logic, shifts) and 9.7.9 (moves, conversions, shuffles).
Results of approximate instructions differ from the exact ones by most of what their sections allow, so that
nothing relies on their bits. The deviation depends on the operands alone: all schedules give the same.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import LANES, SIGNED, UNSIGNED, Run, Warp, dtype_of, instruction, reader, unknown, write
from .parse import Constant, Instruction, Register

Values = Any

# 16-bit floats


def round_to_odd(wide: Values) -> Values:
    """float64 to float32, such that a further rounding to 16 bits is as if from float64."""
    narrow = wide.astype(np.float32)
    error = wide - narrow
    bits = narrow.view(np.uint32)
    toward_zero = np.where((error != 0) & ((error < 0) == (narrow > 0)), bits - 1, bits)
    odd = np.where((error != 0) & np.isfinite(wide), toward_zero | 1, bits)
    return odd.view(np.float32)


def from_bf16(bits: Values) -> Values:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: Values) -> Values:
    """Round float32 to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def decode(kind: str, bits: Values) -> Values:
    """The float32 or float64 that ``bits`` of "bf16", "f16", "f32" or "f64" stand for."""
    if kind == "bf16":
        return from_bf16(bits)
    return bits.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]).astype(
        np.float64 if kind == "f64" else np.float32
    )


def encode(kind: str, values: Values) -> Values:
    """``values`` rounded to ``kind``, as unsigned integers."""
    if kind == "bf16":
        return to_bf16(round_to_odd(values) if values.dtype == np.float64 else values)
    dtype: Any = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]
    return values.astype(dtype).view(UNSIGNED[np.dtype(dtype).itemsize])


FLOATS = ("bf16", "f16", "f32", "f64")
BITS = {"bf16": np.uint16, "f16": np.uint16, "f32": np.uint32, "f64": np.uint64}
PAIRS = {"bf16x2": "bf16", "f16x2": "f16"}


def float_reader(operand: Any, kind: str) -> Callable[[Warp], Values]:
    if kind in ("f32", "f64"):
        return reader(operand, dtype_of(kind))
    read = reader(operand, np.uint16)
    return lambda warp: decode(kind, read(warp))


def operation(i: Instruction, kind: str, function: Callable[..., Values]) -> Run:
    """Apply ``function`` to all operands but the first, each of type ``kind``."""
    put, sources = write(i.operands[0]), i.operands[1:]
    if kind in PAIRS:
        half = PAIRS[kind]
        reads = [reader(one, np.uint32) for one in sources]

        def run_pair(warp: Warp) -> None:
            words = [read(warp) for read in reads]
            halves = [
                [decode(half, (word >> n).astype(np.uint16)).astype(float) for word in words] for n in (0, 16)
            ]
            low, high = (encode(half, function(*one)) for one in halves)
            put(warp, low | high.astype(np.uint32) << 16)

        return run_pair
    if kind in ("bf16", "f16"):
        reads = [float_reader(one, kind) for one in sources]
        return lambda warp: put(warp, encode(kind, function(*(read(warp).astype(float) for read in reads))))
    reads = [reader(one, dtype_of(kind)) for one in sources]
    if len(reads) == 1:
        (only,) = reads
        return lambda warp: put(warp, function(only(warp)))
    if len(reads) == 2:
        first, second = reads
        return lambda warp: put(warp, function(first(warp), second(warp)))
    return lambda warp: put(warp, function(*(read(warp) for read in reads)))


# Functions


def quotient(a: Values, b: Values) -> Values:
    """The integer quotient, rounded toward zero; 0 for a division by zero, which PTX leaves open."""
    return (a - np.fmod(a, b)) // np.where(b == 0, 1, b)


def fused(a: Values, b: Values, c: Values) -> Values:
    """a·b + c, rounded once. Products of float32 are exact in float64, and the sum is rounded to odd."""
    if a.dtype == np.float64:
        wide = a.astype(np.longdouble) * b + c  # 64 bits: not always the nearest
        return wide.astype(np.float64)
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    rounded = total.astype(np.float32)
    if (rounded == total).all():  # then the exact sum is so near to it that it is rounded to it, too
        return rounded
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    even = (bits & 1) == 0
    away = (error > 0) == (total > 0)
    odd = np.where((error != 0) & even & np.isfinite(total), np.where(away, bits + 1, bits - 1), bits)
    return odd.view(np.float64).astype(np.float32)


def larger(a: Values, b: Values) -> Values:
    """The maximum, where −0 < +0; of a NaN and a number the number."""
    return np.where((a == b) & (a == 0), np.where(np.signbit(a), b, a), np.fmax(a, b))


def smaller(a: Values, b: Values) -> Values:
    return np.where((a == b) & (a == 0), np.where(np.signbit(a), a, b), np.fmin(a, b))


def flush(x: Values) -> Values:
    """ ".ftz": subnormal float32 become zeros of the same sign."""
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)


def deviation(x: Values) -> Values:
    """A number between −1 and 1 for each operand, which depends on its bits alone."""
    return ((x.view(np.uint32) * np.uint32(2654435761)) >> 8).astype(np.float64) / 2**23 - 1


def approximate(function: Callable[..., Values], bound: float) -> Callable[..., Values]:
    """``function`` with most of the relative error ``bound``; the rounding to float32 takes a part of it.

    Powers of two are exact.
    """

    def run(x: Values, *others: Values) -> Values:
        exact = function(*(one.astype(np.float64) for one in (x, *others)))
        mantissa = np.frexp(exact)[0]
        error = np.where(mantissa == 0.5, 0, 0.9 * (bound - 2**-24) * deviation(x))
        return (exact * (1 + error)).astype(np.float32)

    return run


# "ex2.approx.ftz.f32", "sqrt.approx", "rcp.approx", "div.full": 9.7.3.
APPROXIMATE = {
    "ex2.approx.ftz.f32": (np.exp2, 2**-22),
    "ex2.approx.f32": (np.exp2, 2**-22),
    "sqrt.approx.ftz.f32": (np.sqrt, 2**-23),
    "sqrt.approx.f32": (np.sqrt, 2**-23),
    "rcp.approx.ftz.f32": (np.reciprocal, 2**-23),
    "div.full.f32": (np.divide, 2**-22),  # 2 ulp
}


@instruction("rcp.approx.ftz.f64")
def _reciprocal(i: Instruction) -> Run:
    """A float64 of 20 bits: the lower 32 bits of memory are zero."""
    return operation(i, "f64", lambda x: (1 / x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000))


@instruction(*APPROXIMATE)
def _approximate(i: Instruction) -> Run:
    function = approximate(*APPROXIMATE[i.opcode])
    if "ftz" in i.parts:
        return operation(i, "f32", lambda *x: flush(function(*map(flush, x))))
    return operation(i, "f32", function)


INTEGER = {
    "add": np.add,
    "sub": np.subtract,
    "mul.lo": np.multiply,
    "mad.lo": lambda a, b, c: a * b + c,
    "div": quotient,
    "rem": np.fmod,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}
FLOAT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": fused,
    "mad": fused,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.abs,
    "min": smaller,
    "max": larger,
    "max.NaN": lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.nan, larger(a, b)).astype(a.dtype),
    "sqrt": np.sqrt,
}


@instruction(*INTEGER, *FLOAT)
def _arithmetic(i: Instruction) -> Run:
    *parts, kind = i.parts
    if kind in FLOATS or kind in PAIRS:
        name = ".".join(one for one in parts if one not in ("rn", "ftz"))
        function = FLOAT[name]
        if "ftz" in parts:
            return operation(i, kind, lambda *x: flush(function(*map(flush, x))))
        return operation(i, kind, function)
    return operation(i, kind, INTEGER[".".join(parts)])


@instruction("mul.wide", "mad.wide")
def _wide(i: Instruction) -> Run:
    """The product of numbers has twice their width, and so has what is added."""
    narrow = dtype_of(i.parts[-1])
    wide = np.dtype(f"{np.dtype(narrow).kind}{2 * np.dtype(narrow).itemsize}")
    put, a, b = write(i.operands[0]), reader(i.operands[1], narrow), reader(i.operands[2], narrow)
    if i.opcode.startswith("mul"):
        return lambda warp: put(warp, a(warp).astype(wide) * b(warp))
    c = reader(i.operands[3], wide)
    return lambda warp: put(warp, a(warp).astype(wide) * b(warp) + c(warp))


@instruction("mul.hi")
def _high(i: Instruction) -> Run:
    kind = np.dtype(dtype_of(i.parts[-1]))
    assert kind.itemsize == 4
    return operation(i, i.parts[-1], lambda a, b: (a.astype(f"{kind.kind}8") * b >> 32).astype(kind))


@instruction("shl", "shr")
def _shift(i: Instruction) -> Run:
    """Shifts by more than the width are as by the width."""
    kind = dtype_of(i.parts[-1])
    width = 8 * np.dtype(kind).itemsize
    put, value, amount = write(i.operands[0]), reader(i.operands[1], kind), reader(i.operands[2], np.uint32)

    def run(warp: Warp) -> None:
        a, n = value(warp), amount(warp)
        shift = np.minimum(n, width - 1).astype(kind)
        moved = a << shift if i.parts[0] == "shl" else a >> shift
        put(warp, np.where(n < width, moved, moved if kind in SIGNED.values() else np.zeros_like(moved)))

    return run


@instruction("bfe")
def _extract_bits(i: Instruction) -> Run:
    kind = i.parts[-1]
    bits = 8 * np.dtype(dtype_of(kind)).itemsize
    start, count = (one.bits for one in i.operands[2:])
    assert 0 < count <= bits - start
    put, read = write(i.operands[0]), reader(i.operands[1], dtype_of(kind))
    left, right = (np.dtype(dtype_of(kind)).type(n) for n in (bits - start - count, bits - count))
    return lambda warp: put(warp, read(warp) << left >> right)


def joined(*parts: Values) -> Values:
    """``(32, len(parts))``, so that a view of a row has the bits of all parts, the first one lowest."""
    result = np.empty((32, len(parts)), parts[0].dtype)
    for n, part in enumerate(parts):
        result[:, n] = part
    return result


@instruction("prmt.b32")
def _permute_bytes(i: Instruction) -> Run:
    """Each nibble of the selector takes a byte of b:a; its top bit replicates that byte's sign."""
    put = write(i.operands[0])
    a, b, selector = (reader(one, np.uint32) for one in i.operands[1:])
    if isinstance(i.operands[3], Constant) and not i.operands[3].bits & 0x8888:
        take = [i.operands[3].bits >> 4 * position & 15 for position in range(4)]
        return lambda warp: put(
            warp, joined(a(warp), b(warp)).view(np.uint8).take(take, 1).view(np.uint32)[:, 0]
        )

    def run(warp: Warp) -> None:
        both = a(warp).astype(np.uint64) | b(warp).astype(np.uint64) << 32
        select, result = selector(warp), np.zeros(32, np.uint32)
        for position in range(4):
            nibble = select >> 4 * position & 15
            byte = (both >> (8 * (nibble & 7)).astype(np.uint64) & 0xFF).astype(np.uint32)
            sign = np.where(byte >> 7, np.uint32(0xFF), np.uint32(0))
            result |= np.where(nibble & 8, sign, byte) << 8 * position
        put(warp, result)

    return run


# Comparisons

COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def comparison(name: str, kind: str) -> Callable[[Values, Values], Values]:
    """A comparison; of floats those ending in "u" hold for NaN, and the others do not, "ne" included."""
    if kind in FLOATS:
        if name in ("nan", "num"):
            return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
        plain = COMPARE[name[:2]]
        if len(name) == 3:
            return lambda a, b: plain(a, b) | np.isnan(a) | np.isnan(b)
        if name == "ne":
            return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
        return plain
    return COMPARE[name]


@instruction("setp")
def _compare(i: Instruction) -> Run:
    _, name, *boolean, kind = i.parts
    compare, put = comparison(name, kind), write(i.operands[0])
    read = float_reader if kind in FLOATS else lambda operand, kind: reader(operand, dtype_of(kind))
    a, b = (read(one, kind) for one in i.operands[1:3])
    if not boolean:
        assert len(i.operands) == 3
        return lambda warp: put(warp, compare(a(warp), b(warp)))
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[boolean[0]]
    other = reader(i.operands[3], np.bool_)
    return lambda warp: put(warp, combine(compare(a(warp), b(warp)), other(warp)))


@instruction(*(f"setp.{name}.{pair}" for name in COMPARE for pair in PAIRS), results=2)
def _compare_pairs(i: Instruction) -> Run:
    _, name, pair = i.parts
    compare, puts = comparison(name, PAIRS[pair]), [write(one) for one in i.operands[:2]]
    a, b = (reader(one, np.uint32) for one in i.operands[2:])

    def run(warp: Warp) -> None:
        for put, shift in zip(puts, (0, 16), strict=True):
            halves = [(read(warp) >> shift).astype(np.uint16) for read in (a, b)]
            put(warp, compare(*(decode(PAIRS[pair], half) for half in halves)))

    return run


@instruction("selp")
def _select(i: Instruction) -> Run:
    kind = dtype_of(i.parts[1])
    put, choice = write(i.operands[0]), reader(i.operands[3], np.bool_)
    a, b = (reader(one, kind) for one in i.operands[1:3])
    return lambda warp: put(warp, np.where(choice(warp), a(warp), b(warp)))


# Moves and conversions


@instruction("mov", "cvta.global", "cvta.to.global")
def _move(i: Instruction) -> Run:
    to, source = i.operands
    kind = dtype_of(i.parts[-1])
    if isinstance(source, tuple):  # the first one becomes the lowest bits
        whole, part = np.dtype(kind), UNSIGNED[np.dtype(kind).itemsize // len(source)]
        put, reads = write(to), [reader(one, part) for one in source]
        return lambda warp: put(warp, joined(*(read(warp) for read in reads)).view(whole)[:, 0])
    if isinstance(to, tuple):
        part = UNSIGNED[np.dtype(kind).itemsize // len(to)]
        puts, read = [write(one) for one in to], reader(source, kind)

        def split(warp: Warp) -> None:
            parts = np.ascontiguousarray(read(warp)).view(part).reshape(32, -1)
            for n, put in enumerate(puts):
                put(warp, parts[:, n])

        return split
    if isinstance(source, Register) and source.dtype == to.dtype:
        return lambda warp: warp.registers.__setitem__(
            to.index,
            +warp.registers[source.index] if source.dtype != np.bool_ else warp.registers[source.index],
        )
    put, read = write(to), reader(source, kind)
    return lambda warp: put(warp, read(warp))


@instruction("cvt")
def _convert(i: Instruction) -> Run:
    _, *modifiers, to, source = i.parts
    put = write(i.operands[0])
    if to in PAIRS:  # the first source becomes the upper half
        assert modifiers == ["rn"]
        assert source == "f32"
        high, low = (reader(one, np.float32) for one in i.operands[1:])
        half = PAIRS[to]
        return lambda warp: put(warp, encode(half, joined(low(warp), high(warp))).view(np.uint32)[:, 0])
    if to == "tf32":  # rounds away from zero at ties
        assert modifiers == ["rna"]
        read = reader(i.operands[1], np.uint32)
        return lambda warp: put(warp, (read(warp) + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    if source in FLOATS:
        read = float_reader(i.operands[1], source)
        if to in FLOATS:
            assert modifiers in ([], ["rn"])
            return lambda warp: put(warp, encode(to, read(warp)))
        round_ = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        return _to_integer(put, read, dtype_of(to), round_[modifiers[0]])
    read = reader(i.operands[1], dtype_of(source))
    if to in FLOATS:
        assert modifiers == ["rn"]
        if to == "f32":  # from 64 bits through a wider format, so that it is rounded once
            return lambda warp: put(warp, read(warp).astype(np.longdouble).astype(np.float32))
        return lambda warp: put(warp, encode(to, read(warp).astype(np.float64)))
    assert not modifiers
    kind = dtype_of(to)
    return lambda warp: put(warp, read(warp).astype(kind))


def _to_integer(put: Any, read: Any, kind: Any, round_: Any) -> Run:
    limits = np.iinfo(kind)

    def run(warp: Warp) -> None:
        values = round_(read(warp).astype(np.longdouble))
        clipped = np.clip(np.where(np.isnan(values), 0, values), limits.min, limits.max)
        put(warp, clipped.astype(kind))

    return run


# Among the threads of a warp: 9.7.9.6 (shfl.sync), 9.7.13 (elect.sync, redux.sync)


@instruction("shfl.sync.idx.b32", "shfl.sync.bfly.b32", whole=True)
def _shuffle(i: Instruction) -> Run:
    to, source, lane, clamp, members = i.operands
    if clamp != Constant(31) or members != Constant(-1):
        raise unknown(i)
    put, value, lane = write(to), reader(source, np.uint32), reader(lane, np.uint32)
    if "idx" in i.parts:
        return lambda warp: put(warp, value(warp)[lane(warp) & 31])
    return lambda warp: put(warp, value(warp)[LANES ^ (lane(warp) & 31)])


@instruction("redux.sync", whole=True)
def _reduce(i: Instruction) -> Run:
    function = {"min": np.min, "max": np.max, "add": np.sum}[i.parts[2]]
    put, kind = write(i.operands[0]), dtype_of(i.parts[3])
    value, members = reader(i.operands[1], kind), reader(i.operands[2], np.uint32)

    def run(warp: Warp) -> None:
        assert (members(warp) == 0xFFFFFFFF).all()
        put(warp, np.full(32, function(value(warp)), kind))

    return run


@instruction("elect.sync", results=2, whole=True)
def _elect(i: Instruction) -> Run:
    """One thread is chosen, the same one each time. Which one is left open: it depends on the schedule."""
    put_lane, put = (write(one) for one in i.operands[:2])
    assert i.operands[2] == Constant(-1)

    def run(warp: Warp) -> None:
        chosen = {"early": 0, "late": 31}.get(warp.block.launch.schedule.completion, 7 * warp.index % 32)
        put_lane(warp, np.full(32, chosen, np.uint32))
        put(warp, chosen == LANES)

    return run
