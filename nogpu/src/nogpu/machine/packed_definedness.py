# SPDX-License-Identifier: MIT
"""Undefined bits of results of instructions that move, pack, unpack and add numbers.

Inline assembly with ``pack=4`` computes with four numbers of a register, some of which a thread may
not have. So a number of a result is undefined only where the same number of an operand is.
"""

import numpy as np

from nogpu.machine.registers import DTYPES, DType, Values

# The bits of one of two numbers in a register, by the end of an opcode; of others they are 8.
BITS_OF_PAIRS = {"f16x2": 16, "bf16x2": 16, "e2m1x2": 4}
SUMS = ("add", "sub", "mul", "mad")
# Instructions that move bits, which they move of a mask, too; and which operands are moved.
MOVES = {
    **{"mov": (1,), "prmt": (1, 2), "shfl": (-4,), "shl": (1,), "shr": (1,), "cvta": (1,)},
    **{"bfe": (1,), "bfi": (1, 2), "brev": (1,), "shf": (1, 2)},
}


def of_table(table: int, sources: list[tuple[Values, Values]]) -> Values:
    """``lop3``: a bit is undefined where the undefined bits of the operands decide it.

    Args:
        table: of the function of three bits.
        sources: the bits of the operands, and those that are undefined.
    """
    zeros = np.zeros_like(sources[0][1])
    may_be = [zeros.copy(), zeros.copy()]
    for n in range(8):
        possible = ~zeros
        for place, (bits, undefined) in zip((4, 2, 1), sources, strict=True):
            possible = possible & ((bits if n & place else ~bits) | undefined)
        may_be[table >> n & 1] |= possible
    return may_be[0] & may_be[1]


def is_sum(parts: list[str]) -> bool:
    """Whether an instruction adds or multiplies integers, and keeps the lowest bits."""
    kind = parts[-1]
    is_plain = kind[0] in "sub" and kind in DTYPES and not {"sat", "cc", "hi"} & set(parts)
    return parts[0] in SUMS and is_plain


def converts_integers(parts: list[str]) -> bool:
    """Whether an instruction converts one integer to another, of whose bits it keeps the lowest."""
    kinds = parts[-2:]
    are_integers = all(kind in DTYPES and kind[0] in "su" for kind in kinds)
    return parts[0] == "cvt" and are_integers and "sat" not in parts


def of_sum(parts: list[str], masks: list[Values], result: DType) -> Values | None:
    """Sums and products of integers: bits below the lowest undefined one are defined; or None."""
    if not is_sum(parts):
        return None
    of_result = np.dtype(f"u{result.itemsize}")
    together = np.zeros(32, of_result)
    for mask in masks:
        if mask.dtype == np.bool_:
            return None
        together |= mask.astype(of_result)
    return together | (of_result.type(0) - together)


def of_conversion(parts: list[str], masks: list[Values], result: DType) -> Values | None:
    """``cvt`` of integers, and of pairs of numbers; or None.

    Args:
        masks: of the operands, in their order.
        result: the type of the register that is written.
    """
    to, source = parts[-2:]
    of_result = np.dtype(f"u{result.itemsize}")
    if converts_integers(parts):
        # Undefined signs are extended, as signs are.
        held = masks[0].astype(f"u{DTYPES[source].itemsize}").view(DTYPES[source])
        return held.astype(DTYPES[to]).astype(result.str.replace("f", "u")).view(of_result)
    if not to.endswith("x2"):
        return None
    bits = BITS_OF_PAIRS.get(to, 8)
    if source == "f32" and len(masks) == 2:
        upper, lower = (mask != 0 for mask in masks)
    elif source.endswith("x2") and len(masks) == 1:
        of_source = BITS_OF_PAIRS.get(source, 8)
        lower = (masks[0] & masks[0].dtype.type(2**of_source - 1)) != 0
        upper = (masks[0] >> masks[0].dtype.type(of_source)) != 0
    else:
        return None
    each = 2**bits - 1
    return (upper * (each << bits) + lower * each).astype(of_result)
