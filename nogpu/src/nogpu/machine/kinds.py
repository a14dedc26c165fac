# SPDX-License-Identifier: MIT
"""Kinds of instructions, by their opcodes: the memory they access, and the FLOPs they do."""

from nogpu.machine.parse import Instruction, qualifiers
from nogpu.machine.registers import FLOATS, PAIRS

OPERATIONS = {"ld": "load", "st": "store", "atom": "atomic", "red": "atomic", "cp": "copy"}
OPERATIONS |= {"ldmatrix": "ldmatrix", "stmatrix": "stmatrix"}


def operation(i: Instruction) -> str:
    """Name an access to memory."""
    if i.opcode.startswith("cp.reduce"):
        return "atomic"
    if i.parts[:2] == ["cp", "reduce"]:
        return "TMA reduction"
    if i.opcode.startswith("cp.async.bulk"):
        return "TMA store" if i.parts[5:6] == ["global"] else "TMA load"
    return OPERATIONS.get(i.parts[0], i.parts[0])


def spaces(i: Instruction) -> tuple[str, ...]:
    """Return the memories that an instruction accesses."""
    name = i.parts[0]
    if name in ("ldmatrix", "stmatrix"):
        return ("shared",)
    if name == "cp":
        is_copy = i.parts[2:3] in (["cg"], ["ca"]) or "tensor" in i.parts
        return ("global", "shared") if is_copy else ()
    if name not in ("ld", "st", "atom", "red"):
        return ()
    rest, _, in_shared = qualifiers(i)
    if in_shared:
        return ("shared",)
    if "const" in i.parts:
        return ("constant",)
    return (rest[0],) if rest[:1] in (["local"], ["param"]) else ("global",)


KINDS = (
    "tensor cores",
    "floating point",
    "special functions",
    "integers",
    "conversions",
    "moves",
    "exchange",
    "global memory",
    "shared memory",
    "synchronization",
    "control",
)
SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div")
BY_NAME = {
    "mma": "tensor cores",
    "cvt": "conversions",
    **dict.fromkeys(("mov", "cvta", "prmt", "selp"), "moves"),
    **dict.fromkeys(("shfl", "vote", "redux", "elect", "activemask", "match"), "exchange"),
    **dict.fromkeys(("bar", "barrier", "mbarrier", "fence", "membar"), "synchronization"),
    **dict.fromkeys(("bra", "brx", "ret", "call", "exit", "trap"), "control"),
}


def kind_of(i: Instruction) -> str:
    """Return what an instruction works with, one of `KINDS`."""
    name, where = i.parts[0], spaces(i)
    if name in ("wgmma", "tcgen05", "wmma"):
        others = "moves" if name == "wmma" else "synchronization"
        return "tensor cores" if i.parts[1] in ("mma_async", "mma") else others
    if where:
        return f"{where[0]} memory" if where[0] in ("global", "shared") else "moves"
    if name == "cp":
        return "synchronization"
    if name in BY_NAME:
        return BY_NAME[name]
    is_float = any(part in FLOATS or part in PAIRS or part == "f32x2" for part in i.parts[1:])
    if is_float:
        return "special functions" if name in SPECIAL else "floating point"
    return "integers"


RATES = {"f16": "f16", "bf16": "f16", "tf32": "tf32", "f64": "f64"}
RATES |= dict.fromkeys(("s8", "u8"), "int8") | dict.fromkeys(("e4m3", "e5m2"), "fp8")
KINDS_OF_TCGEN05 = {"f16": "f16", "tf32": "tf32", "i8": "int8", "f8f6f4": "fp8"}


def tensor_flops(i: Instruction) -> tuple[str, float]:
    """Return the format and the FLOPs of a warp's product; those of tcgen05 are counted."""
    name = i.parts[0]
    if name == "tcgen05":
        return KINDS_OF_TCGEN05.get(i.parts[3].partition("::")[2], "f16"), 0.0
    shape = next(part for part in i.parts if part[0] == "m" and part[1:2].isdigit())
    m, n, k = (int(one) for one in shape[1:].replace("n", " ").replace("k", " ").split())
    kinds = [part for part in i.parts if part in RATES]
    # The formats are those of D, A, B and perhaps C.
    if name == "wmma" and len(kinds) < 2:  # those of D and C alone: products are of f16
        return "f16", 2.0 * m * n * k
    operand = kinds[0] if name == "wgmma" or len(kinds) == 2 else kinds[1]
    return RATES[operand], 2.0 * m * n * k / (4 if name == "wgmma" else 1)


FLOPS = {"add": 1, "sub": 1, "mul": 1, "fma": 2}


def flops(i: Instruction) -> tuple[str, int]:
    """Return the format and the FLOPs of a thread: those of sums, products, and both at once."""
    count, kind = FLOPS.get(i.parts[0], 0), i.parts[-1]
    if kind == "f32x2":
        return "f32", 2 * count
    if not count or kind not in FLOATS:
        return "", 0
    return ("f16", 2 * count) if kind in PAIRS else (PAIRS_OF.get(kind, kind), count)


PAIRS_OF = {"bf16": "f16", "f16": "f16"}
