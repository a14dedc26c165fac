# SPDX-License-Identifier: MIT
"""Arithmetic, comparisons, moves, and what the threads of a warp exchange.

Sections 9.7.1 to 9.7.8 (arithmetic, comparison, logic, shifts) and 9.7.9 (moves, shuffles).
`conversions` and `bits` have more of them. Results of approximate instructions differ from the
exact ones by most of what their sections allow, so that nothing relies on their bits. The deviation
depends on the operands alone: all schedules give the same.
"""

import math
from collections.abc import Callable

import numpy as np

from nogpu.instructions.rounding import directed, fused, fused_halves
from nogpu.machine import definedness
from nogpu.machine.block import Warp
from nogpu.machine.decode import Run, elementwise, instruction, unknown
from nogpu.machine.parse import EVERY_THREAD, Constant, Instruction, Register
from nogpu.machine.registers import (
    ALL,
    DTYPES,
    FLOATS,
    HALVES,
    LANES,
    PAIRS,
    Cause,
    Values,
    reader,
    writer,
)
from nogpu.native.warps import elected_lane


def quotient(a: Values, b: Values) -> Values:
    """The integer quotient, rounded toward zero; 0 for a division by zero, which PTX leaves
    open."""
    return (a - np.fmod(a, b)) // np.where(b == 0, 1, b)


def larger(a: Values, b: Values) -> Values:
    """The maximum, where −0 < +0; of a NaN and a number the number."""
    return np.where((a == b) & (a == 0), np.where(np.signbit(a), b, a), np.fmax(a, b))


def larger_or_nan(a: Values, b: Values) -> Values:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), larger(a, b))


def smaller(a: Values, b: Values) -> Values:
    return -larger(-a, -b)


def smaller_or_nan(a: Values, b: Values) -> Values:
    return -larger_or_nan(-a, -b)


# The least normal number, for what instructions flush of float64, too
NORMAL = {"f64": 2.0**-1022, "f16": 2.0**-14, "f16x2": 2.0**-14}


def flush(x: Values, kind: str = "f32") -> Values:
    """ ".ftz": subnormal numbers become zeros of the same sign."""
    least = x.dtype.type(NORMAL.get(kind, 2.0**-126))
    return np.where(np.abs(x) < least, np.copysign(x.dtype.type(0), x), x)


def saturate(x: Values) -> Values:
    """ ".sat": to [0, 1]; NaN and −0 become +0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def positive(x: Values) -> Values:
    """ ".relu": negative numbers become +0, and NaN stays."""
    return np.where((x > 0) | np.isnan(x), x, x.dtype.type(0))


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


def _saturated(x: Values) -> Values:
    return np.clip(x, -(2**31), 2**31 - 1).astype(np.int32)


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
    "add.sat": lambda a, b: _saturated(a.astype(np.int64) + b),
    "sub.sat": lambda a, b: _saturated(a.astype(np.int64) - b),
}
INTEGER_PAIRS = {"s16x2": "i2", "u16x2": "u2"}
OF_FLOATS: dict[str, Callable[..., Values]] = {
    "div": np.divide,
    "max": larger,
    "max.NaN": larger_or_nan,
}
OF_FLOATS |= {
    "min": smaller,
    "min.NaN": smaller_or_nan,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "copysign": lambda a, b: np.copysign(b, a),
}
# 9.7.3: with ".ftz" of the upper 32 bits; the others of the result are 0.
OF_FLOAT64: dict[str, Callable[..., Values]] = {
    "rcp.approx.ftz": lambda x: _upper(1 / _upper(x)),
    "rsqrt.approx.ftz": lambda x: _upper(1 / np.sqrt(_upper(x))),
    "rsqrt.approx": lambda x: 1 / np.sqrt(x),
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
# Of float32, which is rounded once more. That makes no difference to sums and products of two: it
# has more than twice the bits of a half.
OF_HALVES: dict[str, Callable[..., Values]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": fused_halves,
    "neg": np.negative,
    "abs": np.abs,
    "max": larger,
    "min": smaller,
    "max.NaN": larger_or_nan,
    "min.NaN": smaller_or_nan,
    "ex2.approx": np.exp2,
    "tanh.approx": np.tanh,
}
MODES = ("rz", "rm", "rp")  # but for "rn"


@instruction(*FUNCTIONS, *OF_FLOATS, *OF_FLOAT32)
def _arithmetic(i: Instruction) -> Run:
    *parts, kind = (part for part in i.parts if part != "rn")
    modifiers = [part for part in parts if part in (*MODES, "ftz", "sat", "relu")]
    name = ".".join(part for part in parts if part not in modifiers)
    kinds = [kind] * len(i.operands)
    if parts[0] in ("add", "sub", "fma") and kind in ("f16", "bf16") and parts[-1] == "f32":
        # sm_100: the last operand is a float32, as is the result.
        name, kinds = parts[0], ["f32", *kinds[2:], "f32"]
        modifiers = [part for part in parts[1:-1] if part in (*MODES, "sat")]
        return elementwise(
            i, _modified(_function(name, "f32", modifiers), "f32", modifiers), *kinds
        )
    if kind == "f32x2":  # sm_100
        assert set(modifiers) <= {"ftz"}
        return _of_float_pairs(i, FUNCTIONS[name], "ftz" in parts)
    function = _function(name, kind, modifiers)
    if len(kinds) == 4 and parts[0] in ("max", "min"):  # of three operands
        two = function

        def of_three(a: Values, b: Values, c: Values) -> Values:
            return two(two(a, b), c)

        function = of_three
    if kind in INTEGER_PAIRS:

        def of_pairs(*x: Values) -> Values:
            halves = [np.ascontiguousarray(one).view(INTEGER_PAIRS[kind]) for one in x]
            return _modified(function, kind, modifiers)(*halves).view(np.uint32)

        return elementwise(i, of_pairs, *["b32"] * len(kinds))
    return elementwise(i, _modified(function, kind, modifiers), *kinds)


def _function(name: str, kind: str, modifiers: list[str]) -> Callable[..., Values]:
    """The operation of an opcode without modifiers of its result."""
    mode = next((part for part in modifiers if part in MODES), "")
    if mode:
        assert kind in ("f32", "f64")
        return directed(name, kind, mode)
    if name.partition(".")[0] in ("max", "min") and "abs" in name:
        return _of_sizes(name)
    if kind in HALVES:
        return OF_HALVES[name]
    if kind == "f64" and "ftz" in modifiers:
        name += ".ftz"
    if "sat" in modifiers and kind == "s32":
        name += ".sat"
    of_kind = {"f32": OF_FLOAT32 | OF_FLOATS, "f64": OF_FLOATS | OF_FLOAT64}.get(kind, {})
    return (FUNCTIONS | of_kind)[name]


def _of_sizes(name: str) -> Callable[..., Values]:
    """The maximum or minimum of absolute values; with ".xorsign" negative if one operand is."""
    what, *others = name.split(".")
    assert set(others) <= {"NaN", "xorsign", "abs"}
    choose = OF_HALVES[f"{what}.NaN" if "NaN" in others else what]

    def run(a: Values, b: Values) -> Values:
        size = choose(np.abs(a), np.abs(b))
        if "xorsign" not in others:
            return size
        sign = np.signbit(a) ^ np.signbit(b)
        return np.where(sign & ~np.isnan(size), -size, size)

    return run


def _modified(
    function: Callable[..., Values], kind: str, modifiers: list[str]
) -> Callable[..., Values]:
    """``function`` with ".ftz", ".sat" and ".relu"."""
    is_integer = kind not in FLOATS
    steps: list[Callable[[Values], Values]] = []
    if "ftz" in modifiers:
        steps.append(lambda x: flush(x, kind))
    if "sat" in modifiers and not is_integer:
        steps.append(saturate)
    if "relu" in modifiers:
        steps.append((lambda x: np.maximum(x, x.dtype.type(0))) if is_integer else positive)
    if not steps:
        return function

    def run(*x: Values) -> Values:
        if "ftz" in modifiers:
            x = tuple(flush(one, kind) for one in x)
        result = function(*x)
        for step in steps:
            result = step(result)
        return result

    return run


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
    assert "sat" not in i.parts

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


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, kind: str, ftz: bool) -> Callable[[Values, Values], Values]:
    """Of floats the comparisons ending in "u" hold for NaN, and the others do not, "ne"
    included."""
    if kind not in FLOATS:
        return COMPARE[UNSIGNED.get(name, name)]
    if name in ("nan", "num"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    compare, for_nan = COMPARE[name[:2]], name[2:] == "u"
    assert name[2:] in ("", "u")

    def run(a: Values, b: Values) -> Values:
        if ftz:
            a, b = flush(a, kind), flush(b, kind)
        return np.where(np.isnan(a) | np.isnan(b), for_nan, compare(a, b))

    return run


def _results_of_setp(i: Instruction) -> int:
    sources = 3 if set(i.parts[2:-1]) & set(BOOLEAN) else 2
    return len(i.operands) - sources


@instruction("setp", results=_results_of_setp)
def _compare(i: Instruction) -> Run:
    """A second predicate gets the opposite; of a pair the comparison of the upper half."""
    _, name, *others, kind = (part for part in i.parts if part != "ftz")
    count = _results_of_setp(i)
    assert len(others) == (len(i.operands) - count == 3)
    compare = _comparison(name, kind, "ftz" in i.parts)
    puts = [writer(one, "pred") for one in i.operands[:count]]
    a, b = (reader(one, kind) for one in i.operands[count : count + 2])
    combine = BOOLEAN[others[0]] if others else None
    third = reader(i.operands[-1], "pred") if others else None
    assert kind not in PAIRS or count == 2

    def run(warp: Warp) -> None:
        found = compare(a(warp), b(warp))
        both = [*found] if kind in PAIRS else [found, ~found]
        if combine is not None and third is not None:
            given = third(warp)
            both = [combine(one, given) for one in both]
        for put, values in zip(puts, both, strict=False):
            put(warp, values)

    return run


@instruction("set")
def _compare_to_number(i: Instruction) -> Run:
    """All bits, or 1.0, where the comparison holds."""
    _, name, to, kind = (part for part in i.parts if part != "ftz")
    compare = _comparison(name, kind, "ftz" in i.parts)
    if to in ("f32", "f16", "bf16"):
        return elementwise(i, lambda a, b: compare(a, b).astype(np.float32), to, kind, kind)
    assert to in ("u32", "s32")
    dtype = DTYPES[to]
    return elementwise(
        i,
        lambda a, b: np.where(compare(a, b), np.uint32(2**32 - 1), 0).astype(dtype),
        to,
        kind,
        kind,
    )


@instruction("testp")
def _test(i: Instruction) -> Run:
    _, name, kind = i.parts
    normal = NORMAL.get(kind, 2.0**-126)
    tests: dict[str, Callable[[Values], Values]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= normal),
        "subnormal": lambda x: (np.abs(x) < normal) & (x != 0),
    }
    return elementwise(i, tests[name], "pred", kind)


@instruction("selp")
def _select(i: Instruction) -> Run:
    kind = i.parts[1]

    def select(a: Values, b: Values, choice: Values) -> Values:
        return np.where(choice, a, b)

    return elementwise(i, select, kind, kind, kind, "pred")


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


# Among the threads of a warp: 9.7.9.6 (shfl.sync), 9.7.13 (elect.sync, redux.sync)


@instruction("shfl.sync", results=lambda i: len(i.operands) - 4, whole=True)
def _shuffle(i: Instruction) -> Run:
    """Each thread takes the value of another one of its segment; its own, if that is outside."""
    mode = i.parts[2]
    to, source, lane, clamp, members = i.operands[0], *i.operands[-4:]
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
        taken = np.where(valid, taken, LANES)
        put(warp, value(warp)[taken])
        if is_valid is not None:
            is_valid(warp, valid)
        if warp.mask is not ALL:
            _mark_absent(warp, i, targets[0], taken)

    return for_all(i, members, run)


def for_all(i: Instruction, members: object, run: Run) -> Run:
    """Refuse a mask of some threads in a kernel whose warps execute the instruction as a whole."""
    read = None if members in EVERY_THREAD else reader(members, "u32")

    def checked(warp: Warp) -> object:
        is_whole = warp.block.gpu.kernel.block is None
        if read is not None and is_whole and not (read(warp) == 2**32 - 1).all():
            return unknown(i)(warp)
        return run(warp)

    return checked


def _mark_absent(warp: Warp, i: Instruction, to: object, taken: Values) -> None:
    """Let what threads take from others that do not execute a shuffle be undefined."""
    absent = np.flatnonzero(warp.mask & ~warp.mask[taken])
    if not len(absent) or not isinstance(to, Register):
        return
    lane = int(absent[0])
    other, block = int(taken[lane]), warp.block.gpu.kernel.block
    whose = f"{warp.thread(other)}, which does not execute it"
    if block is not None and warp.first_thread + other >= math.prod(block):
        whose = "a thread that the block does not have"
    message = f"{warp.thread(lane)} takes by a shuffle the value of {whose}"
    cause = Cause("undefined value", message, i.line)
    definedness.mark(warp, to.index, absent, np.ones((len(absent), 4), np.bool_), cause)


@instruction("vote.sync", whole=True)
def _vote(i: Instruction) -> Run:
    name, kind = i.parts[2:]
    put, read = writer(i.operands[0], kind), reader(i.operands[1], "pred")
    assert name in ("all", "any", "uni", "ballot")

    def run(warp: Warp) -> None:
        given = read(warp)
        votes, given = given & warp.mask, given[warp.mask]
        if name == "ballot":
            put(warp, np.full(32, int(np.packbits(votes, bitorder="little").view(np.uint32)[0])))
            return
        all_or_none = given.all() or not given.any()
        outcome = {"all": given.all(), "any": given.any(), "uni": all_or_none}[name]
        put(warp, np.full(32, bool(outcome)))

    return for_all(i, i.operands[2], run) if len(i.operands) > 2 else run


@instruction("activemask.b32")
def _active(i: Instruction) -> Run:
    put = writer(i.operands[0], "u32")
    return lambda warp: put(warp, np.full(32, warp.active_bits(), np.uint32))


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

    put, read = writer(i.operands[0], kind), reader(i.operands[1], kind)

    def run(warp: Warp) -> None:
        values = read(warp)
        put(warp, np.full_like(values, function(values[warp.mask])))

    return for_all(i, i.operands[2], run)


@instruction("elect.sync", results=2, whole=True)
def _elect(i: Instruction) -> Run:
    """One thread is chosen, the same one each time. Which one is left open: it depends on the
    schedule."""
    put_lane, put = writer(i.operands[0], "u32"), writer(i.operands[1], "pred")

    def run(warp: Warp) -> None:
        chosen = elected_lane(warp.block.gpu.schedule.completion, warp.number)
        if not warp.mask[chosen]:
            chosen = int(warp.lanes()[0])
        put_lane(warp, np.full(32, chosen, np.uint32))
        put(warp, np.equal(LANES, chosen))

    return for_all(i, i.operands[2], run)
