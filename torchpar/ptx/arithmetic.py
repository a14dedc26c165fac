# SPDX-License-Identifier: MIT
"""Arithmetic, comparisons, conversions, moves, and what the threads of a warp exchange.

Sections 9.7.1 to 9.7.8 (arithmetic, comparison, logic, shifts) and 9.7.9 (moves, conversions,
shuffles). Results of approximate instructions differ from the exact ones by most of what their
sections allow, so that nothing relies on their bits. The deviation depends on the operands alone:
all schedules give the same.
"""

from collections.abc import Callable

import numpy as np

from torchpar.ptx.machine import Run, Warp, elementwise, instruction
from torchpar.ptx.parse import Constant, Instruction, Register
from torchpar.ptx.registers import DTYPES, FLOATS, HALVES, LANES, PAIRS, Values, reader, writer


def quotient(a: Values, b: Values) -> Values:
    """The integer quotient, rounded toward zero; 0 for a division by zero, which PTX leaves
    open."""
    return (a - np.fmod(a, b)) // np.where(b == 0, 1, b)


def fused(a: Values, b: Values, c: Values) -> Values:
    """a·b + c by a sum of 64 bits, so that it is rounded once; a float64 is not always the
    nearest."""
    return (a.astype(np.longdouble) * b + c).astype(a.dtype)


def larger(a: Values, b: Values) -> Values:
    """The maximum, where −0 < +0; of a NaN and a number the number."""
    return np.where((a == b) & (a == 0), np.where(np.signbit(a), b, a), np.fmax(a, b))


def larger_or_nan(a: Values, b: Values) -> Values:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), larger(a, b))


def flush(x: Values) -> Values:
    """ ".ftz": subnormal float32 become zeros of the same sign."""
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)


def approximate(function: Callable[..., Values], bound: float) -> Callable[..., Values]:
    """``function`` with most of the relative error ``bound``; the rounding to float32 takes a part
    of it.

    The deviation is a number between −1 and 1 that depends on the bits of x alone. Powers of two
    are exact.
    """

    def run(x: Values, *others: Values) -> Values:
        exact = function(*(one.astype(np.float64) for one in (x, *others)))
        deviation = ((x.view(np.uint32) * np.uint32(2654435761)) >> 8).astype(
            np.float64
        ) / 2**23 - 1
        error = np.where(np.frexp(exact)[0] == 0.5, 0, 0.9 * (bound - 2**-24) * deviation)
        return (exact * (1 + error)).astype(np.float32)

    return run


def _upper(x: Values) -> Values:
    return (x.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


FUNCTIONS: dict[str, Callable[..., Values]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mul.lo": np.multiply,
    "mad.lo": lambda a, b, c: a * b + c,
    "fma": fused,
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
INTEGER_PAIRS = {"s16x2": "i2", "u16x2": "u2"}
OF_FLOATS: dict[str, Callable[..., Values]] = {
    "div": np.divide,
    "max": larger,
    "max.NaN": larger_or_nan,
}
OF_FLOATS |= {
    "min": lambda a, b: -larger(-a, -b),
    "min.NaN": lambda a, b: -larger_or_nan(-a, -b),
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
}
OF_FLOAT64: dict[str, Callable[..., Values]] = {  # 9.7.3: of the upper 32 bits; others are 0
    "rcp.approx": lambda x: _upper(1 / x),
    "rsqrt.approx": lambda x: _upper(1 / np.sqrt(x)),
}
OF_FLOAT32: dict[str, Callable[..., Values]] = {  # with their bounds by 9.7.3
    "ex2.approx": approximate(np.exp2, 2**-22),
    "sqrt.approx": approximate(np.sqrt, 2**-23),
    "div.full": approximate(np.divide, 2**-22),
    "div.approx": approximate(np.divide, 2**-22),
    "rcp.approx": approximate(np.reciprocal, 2**-23),
    "rsqrt.approx": approximate(lambda x: 1 / np.sqrt(x), 2**-22.4),
    "tanh.approx": approximate(np.tanh, 2**-11),
    "lg2.approx": lambda x: np.log2(x.astype(np.float64)).astype(np.float32),
    "sin.approx": lambda x: np.sin(x.astype(np.float64)).astype(np.float32),
    "cos.approx": lambda x: np.cos(x.astype(np.float64)).astype(np.float32),
}
# Of float32, which is rounded once more. That makes no difference: it has more than twice the bits
# of a half.
OF_HALVES: dict[str, Callable[..., Values]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": fused,
    "neg": np.negative,
    "abs": np.abs,
    "max": larger,
    "min": lambda a, b: -larger(-a, -b),
    "max.NaN": larger_or_nan,
    "min.NaN": lambda a, b: -larger_or_nan(-a, -b),
}


@instruction(*FUNCTIONS, *OF_FLOATS, *OF_FLOAT32)
def _arithmetic(i: Instruction) -> Run:
    *parts, kind = i.parts
    name = ".".join(part for part in parts if part not in ("rn", "ftz"))
    of_kind = {"f32": OF_FLOAT32 | OF_FLOATS, "f64": OF_FLOATS | OF_FLOAT64}.get(kind, {})
    kinds = [kind] * len(i.operands)
    if kind == "f32x2":  # sm_100
        return _of_float_pairs(i, FUNCTIONS[name], "ftz" in parts)
    function = OF_HALVES[name] if kind in HALVES else (FUNCTIONS | of_kind)[name]
    if len(kinds) == 4 and name.partition(".")[0] in ("max", "min"):  # of three operands
        two = function

        def of_three(a: Values, b: Values, c: Values) -> Values:
            return two(two(a, b), c)

        function = of_three
    if kind in INTEGER_PAIRS:

        def of_pairs(*x: Values) -> Values:
            halves = [np.ascontiguousarray(one).view(INTEGER_PAIRS[kind]) for one in x]
            return function(*halves).view(np.uint32)

        return elementwise(i, of_pairs, *["b32"] * len(kinds))
    if "ftz" in parts:
        return elementwise(i, lambda *x: flush(function(*map(flush, x))), *kinds)
    return elementwise(i, function, *kinds)


def _of_float_pairs(i: Instruction, function: Callable[..., Values], ftz: bool) -> Run:
    """Apply ``function`` to both float32 of each operand."""

    def run(*x: Values) -> Values:
        numbers = [np.ascontiguousarray(one).view(np.float32) for one in x]
        numbers = [flush(one) for one in numbers] if ftz else numbers
        result = function(*numbers)
        return np.ascontiguousarray(flush(result) if ftz else result).view(np.uint64)

    return elementwise(i, run, *["b64"] * len(i.operands))


@instruction("mul.hi", "mad.hi")
def _high(i: Instruction) -> Run:
    """The upper half of the product, of twice the width."""
    kind = i.parts[-1]
    bits = 8 * DTYPES[kind].itemsize

    def high(a: Values, b: Values, c: Values | int = 0) -> Values:
        if bits < 64:
            wide = DTYPES[f"{kind[0]}{2 * bits}"]
            return ((a.astype(wide) * b.astype(wide)) >> bits).astype(a.dtype) + c
        products = [int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]
        return np.array([p % 2**64 for p in products], np.uint64).view(a.dtype) + c

    return elementwise(i, high, *[kind] * len(i.operands))


@instruction("mul.wide", "mad.wide")
def _wide(i: Instruction) -> Run:
    """The product of numbers has twice their width, and so has what is added."""
    kind = i.parts[-1]
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    added = [wide] * (i.parts[0] == "mad")
    return elementwise(
        i, lambda a, b, c=0: a.astype(DTYPES[wide]) * b + c, wide, kind, kind, *added
    )


@instruction("shl", "shr")
def _shift(i: Instruction) -> Run:
    """Shifts by more than the width are as by the width."""
    name, kind = i.parts
    dtype, width = DTYPES[kind], 8 * DTYPES[kind].itemsize

    def shift(a: Values, n: Values) -> Values:
        amount = np.minimum(n, width - 1).astype(dtype)
        moved = a << amount if name == "shl" else a >> amount
        return moved if dtype.kind == "i" else np.where(n < width, moved, dtype.type(0))

    return elementwise(i, shift, kind, kind, "u32")


@instruction("bfe")
def _extract_bits(i: Instruction) -> Run:
    kind = i.parts[-1]
    bits = 8 * DTYPES[kind].itemsize
    start, count = (one.bits for one in i.operands[2:])
    assert 0 < count <= bits - start
    left, right = (DTYPES[kind].type(n) for n in (bits - start - count, bits - count))
    return elementwise(i, lambda a, *_: a << left >> right, *[kind] * 4)


@instruction("prmt.b32")
def _permute_bytes(i: Instruction) -> Run:
    """Each nibble of the selector takes a byte of b:a, or repeats the sign of one."""
    nibbles = [i.operands[3].bits >> 4 * position & 15 for position in range(4)]
    take, repeat = [nibble & 7 for nibble in nibbles], [nibble > 7 for nibble in nibbles]

    def permute(a: Values, b: Values, _: Values) -> Values:
        both = np.empty((32, 2), np.uint32)
        both[:, 0], both[:, 1] = a, b
        taken = both.view(np.int8).take(take, 1)
        return np.where(repeat, taken >> 7, taken).view(np.uint32)[:, 0]

    return elementwise(i, permute, *["b32"] * 4)


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@instruction("setp")
def _compare(i: Instruction) -> Run:
    """Of floats the comparisons ending in "u" hold for NaN, and the others do not, "ne"
    included."""
    _, name, kind = (part for part in i.parts if part != "ftz")
    if kind not in FLOATS:
        return elementwise(i, COMPARE[UNSIGNED.get(name, name)], "pred", kind, kind)
    if name in ("nan", "num"):
        wanted = name == "nan"
        return elementwise(
            i, lambda a, b: (np.isnan(a) | np.isnan(b)) == wanted, "pred", kind, kind
        )
    compare, for_nan = COMPARE[name[:2]], name[2:] == "u"

    def run(a: Values, b: Values) -> Values:
        return np.where(np.isnan(a) | np.isnan(b), for_nan, compare(a, b))

    assert name[2:] in ("", "u")
    return elementwise(i, run, "pred", kind, kind)


@instruction("selp")
def _select(i: Instruction) -> Run:
    kind = i.parts[1]
    return elementwise(i, lambda a, b, choice: np.where(choice, a, b), kind, kind, kind, "pred")


@instruction("mov", "cvta")
def _move(i: Instruction) -> Run:
    """A copy, for `wgmma.fence` tells registers that were written by their identity.

    A copy of a register that was there at the last fence counts as such: LLVM moves zeros into the
    registers of a sum, and ptxas takes the first register for the second one.
    """
    if list in map(type, i.operands):  # whose parts are packed or taken anew
        return elementwise(i, lambda x: x, i.parts[-1], i.parts[-1])
    copy = elementwise(i, np.array, i.parts[-1], i.parts[-1])
    to, source = i.operands

    def run(warp: Warp) -> None:
        held = isinstance(source, Constant) or (
            isinstance(source, Register)
            and warp.fence is not None
            and warp.registers.is_unchanged(source.index, warp.fence)
        )
        copy(warp)
        if held and warp.fence is not None and isinstance(to, Register):
            warp.registers.restamp(to.index, warp.fence)

    return run


@instruction("cvt")
def _convert(i: Instruction) -> Run:
    _, *modifiers, to, source = i.parts
    to_integer = source in FLOATS and to not in FLOATS
    assert modifiers == ["rzi"] if to_integer else modifiers in ([], ["rn"])
    assert to not in HALVES or source == "f32" or (to == "f16" and source[0] in "su")
    if to in PAIRS:  # the first source becomes the upper half
        return elementwise(i, lambda high, low: np.stack([low, high]), to, source, source)
    if to_integer:
        limits = np.iinfo(DTYPES[to])

        def truncate(x: Values) -> Values:
            whole = np.trunc(np.where(np.isnan(x), 0, x).astype(np.longdouble))
            return np.clip(whole, limits.min, limits.max).astype(DTYPES[to])

        return elementwise(i, truncate, to, source)
    # Through a wider format, so that it is rounded once.
    if to in ("f16", "f32") and source[0] in "su":
        return elementwise(i, lambda x: x.astype(np.longdouble), to, source)
    return elementwise(i, lambda x: x, to, source)


# Among the threads of a warp: 9.7.9.6 (shfl.sync), 9.7.13 (elect.sync, redux.sync)


@instruction("shfl.sync", results=1, whole=True)
def _shuffle(i: Instruction) -> Run:
    """Each thread takes the value of another one of its segment; its own, if that is outside."""
    mode = i.parts[2]
    to, source, lane, clamp, members = i.operands[0], *i.operands[-4:]
    assert members == Constant(-1)
    assert mode in ("up", "down", "bfly", "idx")
    targets = to if isinstance(to, list) else [to, *i.operands[1:-4]]
    put = writer(targets[0], "u32")
    is_valid = writer(targets[1], "pred") if len(targets) > 1 else None
    value, other, limit = reader(source, "u32"), reader(lane, "u32"), reader(clamp, "u32")

    def run(warp: Warp) -> None:
        bits, control = other(warp).astype(np.int64) & 31, limit(warp).astype(np.int64)
        last, segment = control & 31, control >> 8 & 31
        least, most = LANES & segment, (LANES & segment) | (last & ~segment)
        taken = {
            "up": LANES - bits,
            "down": LANES + bits,
            "bfly": LANES ^ bits,
            "idx": least | (bits & ~segment),
        }[mode]
        valid = taken >= most if mode == "up" else taken <= most
        put(warp, value(warp)[np.where(valid, taken, LANES)])
        if is_valid is not None:
            is_valid(warp, valid)

    return run


@instruction("vote.sync", whole=True)
def _vote(i: Instruction) -> Run:
    name, kind = i.parts[2:]
    put, read = writer(i.operands[0], kind), reader(i.operands[1], "pred")
    assert name in ("all", "any", "uni", "ballot")

    def run(warp: Warp) -> None:
        votes = read(warp)
        if name == "ballot":
            put(warp, np.full(32, int(np.packbits(votes, bitorder="little").view(np.uint32)[0])))
            return
        all_or_none = votes.all() or not votes.any()
        outcome = {"all": votes.all(), "any": votes.any(), "uni": all_or_none}[name]
        put(warp, np.full(32, bool(outcome)))

    return run


REDUCTIONS: dict[str, Callable[[Values], Values]] = {
    "add": lambda x: x.sum(dtype=x.dtype),
    "min": lambda x: x.min(),
    "max": lambda x: x.max(),
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


@instruction("redux.sync", whole=True)
def _reduce(i: Instruction) -> Run:
    """A reduction over all threads of a warp. Of floats NaN counts only with ".NaN"."""
    _, _, name, *modifiers, kind = i.parts
    function = REDUCTIONS[name]
    if kind == "f32":
        assert modifiers in ([], ["NaN"])
        ignoring = {"min": np.fmin.reduce, "max": np.fmax.reduce}[name]
        function = REDUCTIONS[name] if modifiers else ignoring
    else:
        assert not modifiers

    def reduce(values: Values, members: Values) -> Values:
        assert (members == 0xFFFFFFFF).all()
        return np.full_like(values, function(values))

    return elementwise(i, reduce, kind, kind, "u32")


@instruction("elect.sync", results=2, whole=True)
def _elect(i: Instruction) -> Run:
    """One thread is chosen, the same one each time. Which one is left open: it depends on the
    schedule."""
    put_lane, put = writer(i.operands[0], "u32"), writer(i.operands[1], "pred")
    assert i.operands[2] == Constant(-1)

    def run(warp: Warp) -> None:
        chosen = {"early": 0, "late": 31}.get(
            warp.block.gpu.schedule.completion, 7 * warp.index % 32
        )
        put_lane(warp, np.full(32, chosen, np.uint32))
        put(warp, chosen == LANES)

    return run
