# SPDX-License-Identifier: MIT
"""Registers of a warp, one NumPy vector each, and the kinds of numbers that instructions take from
them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from nogpu.machine.parse import SHARED_BASE as SHARED_BASE
from nogpu.machine.parse import Address, Constant, Register, Symbol

LANES = np.arange(32)
ALL = np.ones(32, np.bool_)  # the mask of a warp whose threads all execute an instruction
WINDOW_BITS = 24  # of the addresses of a block's shared memory; above them is its rank

DTYPES = {
    f"{kind}{8 * size}": np.dtype(f"{code}{size}")
    for kind, code in ("si", "uu", "bu", "ff")
    for size in (1, 2, 4, 8)
    if (kind, size) != ("f", 1)
} | {"pred": np.dtype(np.bool_)}
PAIRS = {"bf16x2": "bf16", "f16x2": "f16"}
HALVES = {"bf16": "b16", "f16": "b16", "bf16x2": "b32", "f16x2": "b32"}  # and their bits
FLOATS = ("f32", "f64", *HALVES)

Values = npt.NDArray[Any]
DType = np.dtype[Any]
Read = Callable[[Any], Values]  # of a warp


def all_true(mask: Values) -> bool:
    return b"\0" not in mask.tobytes()  # for short arrays several times as fast as their method


class Cause(NamedTuple):
    """Why bits are undefined: a fault's name, its message, and its line; 0 for the line of use.

    Attributes:
        is_weak: Triton keeps copies of small tensors in several warps. A warp may read what another
            one overwrites in place, compute with it, and discard the result.
        events: of a launch that is traced the load, and what it conflicts with; 0: nothing.
    """

    name: str
    message: str
    line: int
    is_weak: bool = False
    events: tuple[int, int] = (0, 0)

    def between(self, event: int, other: int) -> "Cause":
        """Return the cause with the events of a load, and of what it conflicts with."""
        return self._replace(events=(event, other))


NO_CAUSE = Cause("", "", 0)
NEVER_WRITTEN = Cause("uninitialised register", "a register that was never written", 0)


def unsigned(dtype: DType) -> DType:
    """Return the type of the undefined bits of values of a type; of predicates booleans."""
    return dtype if dtype == np.bool_ else np.dtype(f"u{dtype.itemsize}")


def left_out(opcode: str) -> Cause:
    """Return why a result is undefined in threads that have not executed an instruction."""
    message = f"the result of {opcode} in a thread whose mask is false"
    return Cause("undefined value", message, 0)


def left_out_values(seed: int, block: int, warp: int, register: int, dtype: DType) -> Values:
    """Return any values for a register that threads have left out, always the same ones.

    They do not depend on what is executed before, so that both executors have them (`fill` of
    definedness.c). The last steps are those of SplitMix64 (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014).
    """
    key, step = seed, 0x9E3779B97F4A7C15
    for part in (block, warp, register):
        key = ((key ^ part) * step + 1) % 2**64
    words = np.uint64(key) + LANES.astype(np.uint64) * np.uint64(step)
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    raw = (words ^ words >> np.uint64(31)).view(np.uint8)
    return raw[:32] > 127 if dtype == np.bool_ else raw.view(dtype)[:32]


class Unready:
    """The content of a register that was not written, or that an asynchronous ``operation`` will
    write."""

    def __init__(self, operation: object = None):
        self.operation = operation

    def __array__(self, *args: object, **kwargs: object) -> Values:
        raise TypeError

    __array_ufunc__ = None


class Tainted:
    """The content of a register some of whose bits are undefined.

    Args:
        values: with any bits in their place.
        mask: the undefined bits, as unsigned integers; of a predicate, booleans.
        cause: why they are undefined.
    """

    def __init__(self, values: Values, mask: Values, cause: Cause):
        self.values, self.mask, self.cause = values, mask, cause

    def __array__(self, *args: object, **kwargs: object) -> Values:
        raise TypeError

    __array_ufunc__ = None


UNWRITTEN = Unready()


def content(held: object) -> object:
    """Return what a register holds, so that it can be compared."""
    if isinstance(held, np.ndarray):
        return held.tobytes()
    if isinstance(held, Tainted):
        return held.values.tobytes(), held.mask.tobytes()
    return held


class RegisterFile(Protocol):
    """The registers of a warp: `registers.Registers`, or those of the core in C."""

    def __getitem__(self, index: int, /) -> Any: ...

    def __setitem__(self, index: int, value: object, /) -> None: ...

    def content(self) -> tuple[object, ...]: ...

    def get_many(self, indices: Sequence[int]) -> list[Any]: ...

    def set_many(self, indices: Sequence[int], values: Values) -> None: ...

    def set_same(self, indices: Sequence[int], value: object) -> None: ...

    def stamp(self) -> Any: ...

    def is_unchanged(self, index: int, stamp: Any) -> bool: ...

    def restamp(self, index: int, stamp: Any) -> None: ...


class Registers(list[Any]):
    """The registers of a warp, by their numbers."""

    def content(self) -> tuple[object, ...]:
        """Return what the registers hold, so that it can be compared."""
        return tuple(map(content, self))

    def get_many(self, indices: Sequence[int]) -> list[Any]:
        return [self[index] for index in indices]

    def set_many(self, indices: Sequence[int], values: Values) -> None:
        """Put rows of 32 values of 32 bits into registers."""
        for index, row in zip(indices, values, strict=True):
            self[index] = row

    def set_same(self, indices: Sequence[int], value: object) -> None:
        """Let all of these registers hold the same object."""
        for index in indices:
            self[index] = value

    def stamp(self) -> list[Any]:
        """Return what tells later which registers have been written since."""
        return list(self)

    def is_unchanged(self, index: int, stamp: list[Any]) -> bool:
        return self[index] is stamp[index]

    def restamp(self, index: int, stamp: list[Any]) -> None:
        """Let a register count as unchanged."""
        stamp[index] = self[index]


def decode(kind: str, bits: Values) -> Values:
    """The numbers that ``bits`` stand for. Halves become float32, and pairs two rows, the lower one
    first."""
    if kind in PAIRS:
        return np.stack(
            [decode(PAIRS[kind], (bits >> shift).astype(np.uint16)) for shift in (0, 16)]
        )
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if kind == "f16" else bits.view(DTYPES[kind])


def encode(kind: str, values: Values) -> Values:
    """``values`` rounded to the nearest number of ``kind``, ties to even; of halves the bits."""
    if kind in PAIRS:
        low, high = (encode(PAIRS[kind], half) for half in values)
        return low | high.astype(np.uint32) << 16
    if kind == "bf16":
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)
    if kind == "f16":
        bits = values.astype(np.float16).view(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), bits)
    return values.astype(DTYPES[kind])


def reader(operand: object, kind: str = "u32") -> Read:  # noqa: PLR0911  # a case for each kind of operand
    """A function that gives the operand's value in each thread of a warp; of an address that,
    int64."""
    if isinstance(operand, Address):
        is_wide = isinstance(operand.base, Symbol) and operand.base.name != "global_smem"
        base = reader(operand.base, getattr(operand.base, "kind", "u64" if is_wide else "u32"))
        return lambda warp: base(warp).astype(np.int64) + operand.offset
    if kind in HALVES:
        bits = reader(operand, HALVES[kind])
        return lambda warp: decode(kind, bits(warp))
    dtype = DTYPES[kind]
    if isinstance(operand, list):  # the first one has the lowest bits
        parts = [reader(one, f"b{8 * dtype.itemsize // len(operand)}") for one in operand]

        def join(warp: Any) -> Values:
            return np.stack([read(warp) for read in parts], 1).view(dtype)[:, 0]

        return join
    if isinstance(operand, Register):
        index, own = operand.index, DTYPES[operand.kind]
        if own == dtype:
            return lambda warp: warp.registers[index]
        if own.itemsize == dtype.itemsize:
            return lambda warp: warp.registers[index].view(dtype)
        narrow = DTYPES[f"u{8 * dtype.itemsize}"]
        return lambda warp: warp.registers[index].astype(narrow).view(dtype)
    if isinstance(operand, Constant):
        bits = operand.bits % 2 ** (8 * dtype.itemsize)
        value = np.full(32, bits, f"u{dtype.itemsize}")
        value = value != 0 if kind == "pred" else value.view(dtype)
        return lambda warp: value
    assert isinstance(operand, Symbol), operand
    if operand.name == "global_smem":
        value = np.full(32, SHARED_BASE + operand.offset, dtype)
        return lambda warp: value | dtype.type(warp.block.window) if warp.block.rank else value
    bits_of_it = DTYPES[f"u{8 * dtype.itemsize}"] if dtype.kind == "f" else dtype
    return lambda warp: warp.special(operand.name).astype(bits_of_it).view(dtype)


def writer(
    operand: object, kind: str
) -> Callable[[Any, Values], None]:  # a case for each kind of operand
    """A function that puts values into a register, extended to its width by their sign.

    Threads that do not execute the instruction keep theirs.
    """
    if isinstance(operand, list):
        part = f"b{8 * DTYPES[kind].itemsize // len(operand)}"
        puts = [writer(one, part) for one in operand]

        def split(warp: Any, values: Values) -> None:
            columns = np.ascontiguousarray(values).view(DTYPES[part]).reshape(32, -1).T
            for put, column in zip(puts, columns, strict=True):
                put(warp, column)

        return split
    if not isinstance(operand, Register):
        return lambda warp, values: None  # "_"
    index, own = operand.index, DTYPES[operand.kind]
    dtype = DTYPES[HALVES.get(kind, kind)]
    wide = own if dtype.kind != "i" else np.dtype(f"i{own.itemsize}")

    def put(warp: Any, values: Values) -> None:
        if kind in HALVES or values.dtype != dtype:
            values = encode(kind, values)
        if dtype.itemsize < own.itemsize:
            values = values.astype(wide)
        if values.dtype != own:
            values = values.view(own)
        if warp.mask is not ALL:
            values = np.where(warp.mask, values, warp.registers[index])
        warp.registers[index] = values

    return put
