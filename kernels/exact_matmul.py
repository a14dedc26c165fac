# SPDX-License-Identifier: MIT
"""Exact sums of products: rows become integers, whose 8-bit digits tensor cores multiply.

A row is scaled by a power of two and rounded to integers X. Those of float32, |X| ≤ 2³¹ − 2²⁴, are
cut into four signed digits, X = d₀·2²⁴ + d₁·2¹⁶ + d₂·2⁸ + d₃. Those of bfloat16 and float16, |X| ≤
2²³ − 2¹⁶, are cut into three. For rows i of A, with exponents e, and rows j of B, with digits c and
exponents f, the kernel sums the products of each order s = p + q ≤ 3 in int32:

    S_s = Σ_k Σ_{p + q = s} d_p·c_q
    T_ij = ((S₀·2⁸ + S₁)·2⁸ + S₂)·2⁸ + S₃
    (A·Bᵀ)_ij ≈ T_ij · 2^(e_i + f_j − 38)

Of three digits s ≤ 2, T_ij = (S₀·2⁸ + S₁)·2⁸ + S₂, and the unit is 2^(e_i + f_j − 30).

T is an integer, so that neither the tiles nor the order of the sums change its bits. Where int8 is
slow, digits are float16, which holds them exactly, and S_s is float32, a sum of so few terms that
it is not rounded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Wrap
from .device import device
from .gemm import GROUP, grouped_tile, triangle_tile
from .launch import Plan, PreparedLaunch, Step, prepared
from .rule import Tiles, count_tiles
from .tiles import aligned

# Terms: with more, the four products of order 3, of up to 2¹⁴ each, could overflow int32.
CHAIN = 2**14
FLOAT_CHAIN = 2**8  # terms: with more, sums could exceed 2²⁴, where float32 rounds
# The capability of a B300. It multiplies int8 at 0.15 POPS, dense, and a B200 at 4.5 (NVIDIA's data
# sheets); float16 is as fast on both.
SLOW_INT8 = 103
LONGEST = 2**23  # terms, for which T fits in an int64

LIMIT_K = tl.constexpr(16)  # columns of signs at a time; tensor cores need at least 16
MAX_EXPONENT = tl.constexpr(129)  # A greater exponent marks a row that has a NaN or an infinity.
DIGITS = {torch.float32: 4, torch.bfloat16: 3, torch.float16: 3}
BELOW_16_BITS = tl.constexpr(2**37 - 1)  # of a float64
# Added to |x| < 2²², ROUND leaves no bits for a fraction: the sum is rounded to an integer, ties to
# even, whose bits are ROUND_BITS plus the rounded x.
ROUND = tl.constexpr(12582912.0)  # 1.5·2²³
ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def powers(exponents):
    """Two float32 whose product is 2^exponents, for exponents from −126 to 254."""
    first = tl.minimum(exponents, 127)
    return (
        ((first + 127) << 23).to(tl.float32, bitcast=True),
        ((exponents - first + 127) << 23).to(tl.float32, bitcast=True),
    )


@triton.jit
def power(exponents):
    """2^exponents in float64."""
    return ((exponents.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def digits(x, first, second, COUNT: tl.constexpr, FLOAT: tl.constexpr):
    """The digits of ``X = round(x·first·second·2ᵇ)`` for ``|x·first·second| < 2²²``.

    b is 9 for four digits, and 1 for three, where a fourth is 0. X = 2ᵇ·h + l, where h is the
    integer next to the scaled x. The rest is exact, and l is the integer next to it. A compiler may
    fuse these products and sums: all products are exact, or so small that X is 0.
    """
    SHIFT: tl.constexpr = 8 * COUNT - 23
    HALVES: tl.constexpr = 0x00808080 if COUNT == 4 else 0x8080  # of each digit but the first
    x = x.to(tl.float32) * first * second
    h = x + ROUND
    l = (x - (h - ROUND)) * 2.0**SHIFT + ROUND  # noqa: E741  # the formula's name
    # Adding the halves and flipping the sign bit of each byte turns the bytes into digits from
    # −128 to 127.
    offset: tl.constexpr = (HALVES - ROUND_BITS - (ROUND_BITS << SHIFT)) % 2**32
    x = (h.to(tl.int32, bitcast=True) << SHIFT) + l.to(tl.int32, bitcast=True)
    x = (x + offset) ^ HALVES
    if COUNT == 3:
        x = x << 8
    return digit(x >> 24, FLOAT), digit(x >> 16, FLOAT), digit(x >> 8, FLOAT), digit(x, FLOAT)


@triton.jit
def digit(x, FLOAT: tl.constexpr):
    """The lowest byte of x as a signed number, float16 or int8."""
    # The bits of 1024 + u are 0x6400 + u; u is the number + 128. A conversion takes longer.
    if FLOAT:
        return ((x & 0xFF) ^ 0x6480).to(tl.int16).to(tl.float16, bitcast=True) - 1152.0
    else:
        return x.to(tl.int8)


@triton.jit
def chain(
    a_tile,
    b_tile,
    a_inside,
    b_inside,
    e,
    f,
    k,
    a_col,
    b_col,
    COUNT: tl.constexpr,
    EVEN_K: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """T of at most CHAIN terms of COUNT digits, int64.

    Rows where ``a_inside`` or ``b_inside`` is false count as 0.
    """
    a_first, a_second = powers(22 - e)
    b_first, b_second = powers(22 - f)
    BLOCK_K: tl.constexpr = a_tile.shape[1]
    cols = tl.arange(0, BLOCK_K)
    step = tl.full((), BLOCK_K, tl.int64)
    SUM: tl.constexpr = tl.float32 if FLOAT else tl.int32
    zeros = tl.zeros((e.shape[0], f.shape[0]), dtype=SUM)
    s0, s1, s2, s3 = zeros, zeros, zeros, zeros
    tl.assume(k > 0)  # without it Triton 3.6 waits for each product before it begins the next
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            a_mask = a_inside[:, None]
            b_mask = b_inside[None, :]
        else:
            a_mask = a_inside[:, None] & (cols < k - start)[None, :]
            b_mask = b_inside[None, :] & (cols < k - start)[:, None]
        a = tl.load(a_tile, mask=a_mask, other=0.0)
        b = tl.load(b_tile, mask=b_mask, other=0.0)
        a0, a1, a2, a3 = digits(a, a_first[:, None], a_second[:, None], COUNT, FLOAT)
        b0, b1, b2, b3 = digits(b, b_first[None, :], b_second[None, :], COUNT, FLOAT)
        s0 = tl.dot(a0, b0, s0, out_dtype=SUM)
        s1 = tl.dot(a0, b1, s1, out_dtype=SUM)
        s1 = tl.dot(a1, b0, s1, out_dtype=SUM)
        s2 = tl.dot(a0, b2, s2, out_dtype=SUM)
        s2 = tl.dot(a1, b1, s2, out_dtype=SUM)
        s2 = tl.dot(a2, b0, s2, out_dtype=SUM)
        if COUNT == 4:
            s3 = tl.dot(a0, b3, s3, out_dtype=SUM)
            s3 = tl.dot(a1, b2, s3, out_dtype=SUM)
            s3 = tl.dot(a2, b1, s3, out_dtype=SUM)
            s3 = tl.dot(a3, b0, s3, out_dtype=SUM)
        a_tile += step * a_col
        b_tile += step * b_col
    s0, s1, s2, s3 = s0.to(tl.int32), s1.to(tl.int32), s2.to(tl.int32), s3.to(tl.int32)
    total = ((s0.to(tl.int64) << 8) + s1 << 8) + s2
    if COUNT == 4:
        total = (total << 8) + s3
    return total


@triton.jit
def rounded_to(x, dtype: tl.constexpr):
    """Float64 in another dtype, rounded once.

    On the way to 16 bits x is rounded to odd, to 16 significant bits, which float32 holds: if it
    changes, the last of them is 1.
    """
    if dtype != tl.float32:
        bits = x.to(tl.int64, bitcast=True)
        bits = (((bits & BELOW_16_BITS) + BELOW_16_BITS) | bits) & ~BELOW_16_BITS
        x = bits.to(tl.float64, bitcast=True)
    return x.to(tl.float32).to(dtype)


@triton.jit
def sign(x):
    """−1, 0 or 1 for finite x, else x; float16."""
    x = x.to(tl.float32)
    finite = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))
    return tl.where(tl.abs(x) < float("inf"), finite, x).to(tl.float16)


@triton.jit
def products_of_signs(
    a_ptr, b_ptr, i, j, m, n, k, a_row, a_col, b_row, b_col, BLOCK_K: tl.constexpr
):
    """The entries of the product that are NaN or infinite.

    Only the signs of the finite values matter.
    """
    cols = tl.arange(0, BLOCK_K)
    wide = cols.to(tl.int64)
    step = tl.full((), BLOCK_K, tl.int64)
    a_tile = a_ptr + ((i * a_row)[:, None] + (wide * a_col)[None, :])
    b_tile = b_ptr + ((j * b_row)[None, :] + (wide * b_col)[:, None])
    acc = tl.zeros((i.shape[0], j.shape[0]), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        a = tl.load(a_tile, mask=(i < m)[:, None] & (cols < k - start)[None, :], other=0.0)
        b = tl.load(b_tile, mask=(j < n)[None, :] & (cols < k - start)[:, None], other=0.0)
        acc = tl.dot(sign(a), sign(b), acc)
        a_tile += step * a_col
        b_tile += step * b_col
    return acc


@triton.jit
def exact_product_kernel(
    a_ptr,
    b_ptr,
    e_ptr,
    f_ptr,
    out_ptr,
    m,
    n,
    k,
    a_batch,
    a_row,
    a_col,
    b_batch,
    b_row,
    b_col,
    SYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    COUNT: tl.constexpr,
    CHAIN: tl.constexpr,
    ONE_CHAIN: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """A tile of T, int64, or of the product, rounded once.

    SYMMETRIC says that B is A: the tile is on or below the diagonal, and its transpose is stored
    with it. T is symmetric. The product made of T is symmetric, too, since products by powers of
    two are exact.
    """
    # tl.cdiv overflows just below 2³¹.
    tiles_m, tiles_n = (m - 1) // BLOCK_M + 1, (n - 1) // BLOCK_N + 1
    if SYMMETRIC:
        tiles = tiles_m * (tiles_m + 1) // 2
        tile_m, tile_n = triangle_tile(tl.program_id(0) % tiles, tiles_m, GROUP)
    else:
        tiles = tiles_m * tiles_n
        tile_m, tile_n = grouped_tile(tl.program_id(0) % tiles, tiles_m, tiles_n, GROUP)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    i = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.load(e_ptr + (batch * m + i), mask=i < m, other=0)
    f = tl.load(f_ptr + (batch * n + j), mask=j < n, other=0)
    e_finite, f_finite = e <= MAX_EXPONENT, f <= MAX_EXPONENT
    e, f = tl.minimum(e, MAX_EXPONENT), tl.minimum(f, MAX_EXPONENT)
    cols = tl.arange(0, BLOCK_K).to(tl.int64)
    a_ptr += batch * a_batch
    b_ptr += batch * b_batch
    a_tile = a_ptr + ((i * a_row)[:, None] + (cols * a_col)[None, :])
    b_tile = b_ptr + ((j * b_row)[None, :] + (cols * b_col)[:, None])
    a_inside, b_inside = (i < m) & e_finite, (j < n) & f_finite
    if ONE_CHAIN:
        total = chain(
            a_tile, b_tile, a_inside, b_inside, e, f, k, a_col, b_col, COUNT, EVEN_K, FLOAT
        )
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int64)
        step = tl.full((), CHAIN, tl.int64)
        for start in range(0, k, CHAIN):
            terms = tl.minimum(k - start, CHAIN)
            total += chain(
                a_tile, b_tile, a_inside, b_inside, e, f, terms, a_col, b_col, COUNT, EVEN_K, FLOAT
            )
            a_tile += step * a_col
            b_tile += step * b_col
    if out_ptr.dtype.element_ty == tl.int64:
        out = total
    else:
        # T counts units of 2^(e + f − 8·COUNT − 6).
        wide = total.to(tl.float64) * power(e)[:, None] * power(f - (8 * COUNT + 6))[None, :]
        out = rounded_to(wide, out_ptr.dtype.element_ty)
        if tl.min(e_finite.to(tl.int32)) + tl.min(f_finite.to(tl.int32)) < 2:
            limit = products_of_signs(
                a_ptr, b_ptr, i, j, m, n, k, a_row, a_col, b_row, b_col, LIMIT_K
            )
            limit = limit.to(out_ptr.dtype.element_ty)
            out = tl.where(e_finite[:, None] & f_finite[None, :], out, limit)
    out_ptr += batch * m * n
    tl.store(out_ptr + (i[:, None] * n + j[None, :]), out, mask=(i < m)[:, None] & (j < n)[None, :])
    if SYMMETRIC:
        # The mask is constant along a row, so that the stores stay vectorized.
        mirror_mask = (j < n)[:, None] & (i < tl.where(tile_m == tile_n, 0, n))[None, :]
        tl.store(out_ptr + (j[:, None] * n + i[None, :]), tl.trans(out), mask=mirror_mask)


def exact_product(a: Tensor, b: Tensor, e: Tensor, f: Tensor, wrap: Wrap, *, out: Tensor) -> Tensor:
    """``a @ b.mT`` of ``a (*, m, k)`` and ``b (*, n, k)`` by exact sums.

    If ``b is a``, half of the product is computed.

    Args:
        a, b: float32, bfloat16 or float16, of one dtype.
        e, f: int32 exponents ``(*, m)`` and ``(*, n)`` of the rows, contiguous: |x| < (1 −
            2⁻⁷)·2^e, and from −149 to 129. A greater exponent marks a row that has a NaN or an
            infinity.
        out: ``(*, m, n)``, contiguous. In int64 it becomes T, whose marked rows and columns mean
            nothing; in a dtype of floats it becomes the product, whose marked rows and columns are
            NaN or infinite.

    Returns:
        ``out``; exactly symmetric if ``b is a``.

    Raises:
        ValueError: k is above `LONGEST`.
    """
    if a.shape[-1] > LONGEST:
        raise ValueError(
            f"exact_product sums at most {LONGEST} terms in int64, got k = {a.shape[-1]}; split k, "
            "add int64"
        )
    if a.shape[-1] == 0:
        return out.zero_()
    if out.numel() > 0:
        first = _three_dims(a)
        second = None if b is a else _three_dims(b)
        operands = first, second, e, f, out
        launch = prepared(_prepare, wrap, operands)
        assert launch is not None
        launch.run(wrap, operands)
    return out


def _prepare(a: Tensor, b: Tensor | None, e: Tensor, f: Tensor, out: Tensor) -> PreparedLaunch:
    step = Step(_plan(a, b), (0, 0 if b is None else 1, 2, 3, 4))
    return PreparedLaunch((a, b, e, f, out), [step], [], (4,))


def _plan(a: Tensor, b: Tensor | None) -> Plan:
    symmetric = b is None
    b = a if b is None else b
    (batch, m, k), n = a.shape, b.shape[1]
    tiles = _tiles(a, b, symmetric)
    floats = device(a).capability == SLOW_INT8
    terms = FLOAT_CHAIN if floats else CHAIN
    constants = {
        "SYMMETRIC": symmetric,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "EVEN_K": bool(k % tiles.block_k == 0),
        "COUNT": DIGITS[a.dtype],
        "CHAIN": terms,
        "ONE_CHAIN": bool(k <= terms),
        "FLOAT": floats,
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    programs = batch * count_tiles(tiles, m, n, symmetric)
    return Plan(
        exact_product_kernel, programs, (m, n, k, *a.stride(), *b.stride()), constants, options
    )


def _tiles(a: Tensor, b: Tensor, symmetric: bool) -> Tiles:
    """The largest tiles whose loop keeps its four sums in registers.

    Each tile cuts all its elements into digits again, so large tiles cut less. Small tiles have
    registers for an address per element, and for T beside the sums of a chain. They also fill more
    of the processor where there are few large tiles.
    """
    (batch, m, k), n = a.shape, b.shape[1]
    present = device(a)
    if present.capability == SLOW_INT8:
        return Tiles(64, 64, 32, 8, 3)  # larger tiles spill, since T stands beside the four sums
    by_rows = a.stride(-1) == b.stride(-1) == 1
    # On other devices tensor cores read int8 from registers, and several warps cut the same
    # elements.
    from_shared_memory = present.capability in (90, 100)
    if symmetric:
        large, small = (
            Tiles(64, 64, 32, 4 if by_rows and from_shared_memory else 8, 3),
            Tiles(32, 32, 32, 4, 3),
        )
    else:
        # The products of 128 × 64 would take all of an sm_100's tensor memory, and with some
        # compilers more.
        rows = 64 if present.capability == 100 else 128
        large, small = Tiles(rows, 64, 32, 8, 3), Tiles(64, 32, 32, 8, 3)
    fits = k <= CHAIN and aligned(a, 16) and aligned(b, 16)
    fits = fits and (from_shared_memory or (by_rows and n % 16 == 0))
    count = batch * count_tiles(large, m, n, symmetric=False) // (1 + symmetric)
    return large if fits and count >= present.multiprocessors else small


def _three_dims(t: Tensor) -> Tensor:
    """``t`` with one batch dimension; a view where the strides allow."""
    return t.flatten(0, -3) if t.dim() > 2 else t.unsqueeze(0)
