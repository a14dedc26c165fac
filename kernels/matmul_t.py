# SPDX-License-Identifier: MIT
"""Symmetric products A·Bᵀ and symmetric sums: kernels that run anywhere, and the launchers.

The kernels for GPUs with TMA are in `matmul_t_tma`.
"""

import math
import struct
from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Wrap
from .gemm import (
    by_columns,
    dot_rows,
    empty_by_columns,
    float_of_words,
    triangle_of_batch,
)
from .launch import Empty, Plan, PreparedLaunch, Step, prepared
from .matmul_t_tma import symmetric_matmul_tma_kernel
from .rule import Product, Speed, Tiles, Variant, count_tiles, halved, resident_programs
from .tiles import Choice, choose_plan, descriptor_layout

_16_BIT = {
    Tiles(128, 256, 64, 8, 4, "tma"): Speed(0.129, 0.613),
    Tiles(128, 256, 64, 8, 3, "flat"): Speed(0.165, 0.624),
    Tiles(128, 128, 64, 8, 4, "tma"): Speed(0.069, 0.322),
    Tiles(64, 128, 64, 4, 4, "tma"): Speed(0.444, 0.227),
    Tiles(64, 128, 64, 4, 3, "flat"): Speed(0.386, 0.214),
    Tiles(64, 64, 128, 4, 3, "tma"): Speed(0.358, 0.288),
    Tiles(128, 128, 64, 8, 3): Speed(0.243, 0.442),
    Tiles(64, 64, 64, 4, 4): Speed(0.236, 0.176),
    Tiles(64, 64, 128, 4, 3): Speed(0.390, 0.330),
    Tiles(32, 32, 64, 4, 4): Speed(0.211, 0.113),
}
_SMALL = Tiles(64, 64, 16, 4, 3)
SYMMETRIC_MATMUL = Product(
    name="symmetric_matmul",
    variants={
        "pointers": Variant(4.73, 4.88, widths=(1,)),
        "tma": Variant(6.41, 5.93, widths=(1, 2)),
        "flat": Variant(6.41, 4.22, widths=(2,)),
    },
    tiles={
        "bfloat16": _16_BIT,
        "float16": _16_BIT,
        "tf32": halved(_16_BIT),
        # Three products of TF32 for each of float32: the operands are split in registers, so that
        # larger tiles would spill.
        "tf32x3": {
            Tiles(128, 128, 32, 8, 3, "tma"): Speed(0.311, 1.599),
            Tiles(64, 128, 32, 4, 3, "tma"): Speed(1.507, 0.892),
            Tiles(128, 128, 32, 8, 3): Speed(0.307, 1.795),
            Tiles(64, 64, 32, 4, 3): Speed(0.871, 0.515),
        },
        # On FMA units. A tile of 64 × 64 by 8 warps took 1.25 times as long as one by 4.
        "float32": {
            Tiles(128, 128, 16, 8, 3): Speed(0.624, 1.485),
            _SMALL: Speed(0.394, 0.395),
        },
        "float64": {_SMALL: Speed(0.398, 0.340)},
    },
    unaligned={
        **dict.fromkeys(("bfloat16", "float16"), (Tiles(64, 64, 32, 8, 3),)),
        **dict.fromkeys(("tf32", "tf32x3", "float32", "float64"), (_SMALL,)),
    },
    library_passes=1,  # the mirror reads half and writes half
    is_symmetric=True,
)
Check = Callable[[Tensor, Tensor, Tensor | None], None]
"""Raises for operands A, B and C that a kernel does not take."""

SUM_BLOCK = 64  # with 128, float32 and float64 spill


@triton.jit(do_not_specialize=["alpha_low", "alpha_high", "beta_low", "beta_high"])
def symmetric_matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    alpha_low,
    alpha_high,
    beta_low,
    beta_high,
    n,
    k,
    a_batch,
    a_row,
    a_col,
    b_batch,
    b_row,
    b_col,
    c_batch,
    c_row,
    c_col,
    HAS_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store a tile of the lower triangle of ``alpha·A·Bᵀ + beta·C``, and its transpose."""
    batch, tile_row, tile_col = triangle_of_batch(n, BLOCK)
    i, j = tile_row * BLOCK + tl.arange(0, BLOCK), tile_col * BLOCK + tl.arange(0, BLOCK)
    a_ptr += batch * a_batch
    b_ptr += batch * b_batch
    a, b = (a_ptr, a_row, a_col), (b_ptr, b_row, b_col)
    acc = dot_rows(a, b, i, j, n, n, k, BLOCK_K, EVEN_K, PRECISION)
    i, j = i.to(tl.int64), j.to(tl.int64)
    mask = (i < n)[:, None] & (j < n)[None, :]
    acc *= float_of_words(alpha_low, alpha_high).to(acc.dtype)
    if HAS_C:
        c_ptr += batch * c_batch
        c = tl.load(c_ptr + ((i * c_row)[:, None] + (j * c_col)[None, :]), mask=mask, other=0.0)
        acc += float_of_words(beta_low, beta_high).to(acc.dtype) * c.to(acc.dtype)
    out = acc.to(out_ptr.dtype.element_ty)
    # A diagonal tile is made symmetric and stored once. In all other tiles i > j.
    diagonal = tile_row == tile_col
    if diagonal:
        out = tl.where(i[:, None] >= j[None, :], out, tl.trans(out))
    out_ptr += batch * n * n
    # The masks are constant along a row, so that the stores stay vectorized.
    tl.store(out_ptr + (i[:, None] * n + j[None, :]), out, mask=mask)
    mirror_mask = (j < n)[:, None] & (i < tl.where(diagonal, 0, n))[None, :]
    tl.store(out_ptr + (j[:, None] * n + i[None, :]), tl.trans(out), mask=mirror_mask)


@triton.jit
def symmetric_sum_kernel(
    g_ptr, out_ptr, n, g_batch, g_row, g_col, MIRROR: tl.constexpr, BLOCK: tl.constexpr
):
    """``(G + Gᵀ)/2``; with MIRROR, G's lower triangle, transposed, in ``out``'s upper triangle."""
    batch, tile_row, tile_col = triangle_of_batch(n, BLOCK)
    i = tile_row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tile_col.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g_ptr += batch * g_batch
    out_ptr += batch * n * n
    mask = (i < n)[:, None] & (j < n)[None, :]
    mirror_mask = (j < n)[:, None] & (i < n)[None, :]
    total = tl.load(g_ptr + ((i * g_row)[:, None] + (j * g_col)[None, :]), mask=mask)
    if MIRROR:
        if tile_row == tile_col:  # a mask that varied along a row would split the stores
            total = tl.where(i[:, None] >= j[None, :], total, tl.trans(total))
    else:
        upper = tl.load(g_ptr + ((j * g_row)[:, None] + (i * g_col)[None, :]), mask=mirror_mask)
        dtype: tl.constexpr = tl.float64 if g_ptr.dtype.element_ty == tl.float64 else tl.float32
        total = (0.5 * total.to(dtype) + 0.5 * tl.trans(upper).to(dtype)).to(
            out_ptr.dtype.element_ty
        )
        tl.store(out_ptr + (i[:, None] * n + j[None, :]), total, mask=mask)
    tl.store(out_ptr + (j[:, None] * n + i[None, :]), tl.trans(total), mask=mirror_mask)


def matmul_t(
    x: Tensor,
    precision: str,
    wrap: Wrap,
    *,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
    tma: bool = True,
    only_if_faster: bool = False,
    check: Check | None = None,
) -> Tensor | None:
    """``x @ x.mT`` for ``x (*, n, k)``: `symmetric_matmul` of ``x`` and ``x``."""
    options = precision, tiles, tma, only_if_faster, wrap is not None, check
    launch = prepared(_prepare, wrap, (x, None, None, out), options)
    return None if launch is None else launch.run(wrap, (x, None, None, out), _PRODUCT_ALONE)


def _bits(alpha: float, beta: float) -> tuple[int, ...]:
    """The factors as the kernel takes them, see `float_of_words`."""
    return struct.unpack("<4i", struct.pack("<2d", alpha, beta))


_PRODUCT_ALONE = _bits(1.0, 0.0)


def symmetric_matmul(
    a: Tensor,
    b: Tensor,
    precision: str,
    wrap: Wrap,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    *,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
    tma: bool = True,
    only_if_faster: bool = False,
    check: Check | None = None,
) -> Tensor | None:
    """Half of ``alpha·a @ b.mT + beta·c``, and its mirror image, for a symmetric product.

    ``a`` and ``b`` are ``(*, n, k)``. Of the symmetric ``c (*, n, n)`` the lower triangle is read,
    unless ``beta`` is 0.

    Args:
        precision: of float32 products: "ieee", "tf32", or "tf32x3". The last one makes three
            products of TF32, whose sum is about as exact as "ieee".
        out: ``(*, n, n)``, contiguous; by default a new tensor.
        tiles: by default the tiles that the rule chooses, or `autotune` measures.
        tma: whether the kernel may make TMA descriptors.
        only_if_faster: launch nothing where PyTorch's library is expected to be faster.
        check: ``check(a, b, c)`` raises for wrong operands. It is called for new layouts alone.

    Returns:
        ``out``, exactly symmetric; None if nothing was launched, as for operands
            without columns.

    Raises:
        ValueError: ``tiles`` of a variant that cannot take these operands.
    """
    operands = a, None if b is a else b, None if beta == 0 else c, out
    options = precision, tiles, tma, only_if_faster, wrap is not None, check
    launch = prepared(_prepare, wrap, operands, options)
    return None if launch is None else launch.run(wrap, operands, factors=_bits(alpha, beta))


def symmetric_matmul_launch(
    a: Tensor, b: Tensor, c: Tensor | None, out: Tensor
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor, float, float], None] | None:
    """A launch of `symmetric_matmul` for 16-bit tensors of these layouts, to be called repeatedly.

    The launch takes a, b, c, out, alpha and beta. The tensors have at most one batch dimension, and
    ``out`` is none of the others. None where PyTorch's product, which is not made exactly
    symmetric, is expected to be faster.
    """
    options = "ieee", None, True, True, False, None, False  # see `_prepare`
    operands = a, None if b is a else b, c, out
    launch = prepared(_prepare, None, operands, options)
    if launch is None:
        return None

    def launch_again(
        a: Tensor, b: Tensor, c: Tensor | None, out: Tensor, alpha: float, beta: float
    ) -> None:
        launch.run(None, (a, b, c, out), _bits(alpha, beta))

    return launch_again


def _prepare(
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    out: Tensor | None,
    precision: str,
    tiles: Tiles | None,
    tma: bool,
    only_if_faster: bool,
    traced: bool,
    check: Check | None = None,
    exact: bool = True,
) -> PreparedLaunch | None:
    if check is not None:
        check(a, a if b is None else b, c)
    given = a, b, c
    shape = *a.shape[:-1], a.shape[-2]
    if a.shape[-1] == 0:
        return None
    a = _few_dims(a)
    b, c = (t if t is None else _few_dims(t) for t in (b, c))
    if precision == "ieee" and a.dtype == torch.float32:
        a = empty_by_columns(a, precision)
        b = None if b is None else empty_by_columns(b, precision)
    operands = [t for t in (a, b, c) if t is not None]
    *_, n, k = a.shape
    sizes = n, n, k, a.shape[0] if a.dim() == 3 else 1
    choice = Choice(SYMMETRIC_MATMUL, precision, sizes, operands, tma, c is not None, exact)
    plan = choose_plan(partial(_plan_tiles, a, b, c), choice, tiles, only_if_faster, traced)
    if plan is None:
        return None
    result = 3 if out is not None else 4
    # The kernel takes a tensor for each operand, also for an operand that it does not read.
    step = Step(plan, (0, 0 if b is None else 1, 0 if c is None else 2, result))
    is_converted = any(t is not one for t, one in zip((a, b, c), given, strict=True))
    return PreparedLaunch(
        (*given, out),
        [step] if math.prod(shape) else [],
        [Empty(shape, a.dtype)] if out is None else [],
        (result,),
        partial(_converted, precision) if is_converted else None,
    )


def _converted(
    precision: str, a: Tensor, b: Tensor | None, c: Tensor | None, out: Tensor | None
) -> Sequence[Tensor | None]:
    """The operands with at most one batch dimension, and by columns for FMA units."""
    a = by_columns(_few_dims(a), precision)
    b = None if b is None else by_columns(_few_dims(b), precision)
    return a, b, None if c is None else _few_dims(c), out


def _plan_tiles(
    a: Tensor, b: Tensor | None, c: Tensor | None, choice: Choice, tiles: Tiles
) -> Plan:
    same = b is None
    b = a if b is None else b
    _, n, k, batch = choice.sizes
    strides = [stride for t in (a, b, a if c is None else c) for stride in _strides(t)]
    programs = batch * count_tiles(tiles, n, n, symmetric=True)
    if tiles.variant == "pointers":
        constants = {
            "HAS_C": c is not None,
            "BLOCK": tiles.block_m,
            "BLOCK_K": tiles.block_k,
            "EVEN_K": bool(k % tiles.block_k == 0),
            "PRECISION": choice.precision,
        }
        return Plan(symmetric_matmul_kernel, programs, (n, k, *strides), constants, tiles.options)
    constants = {
        "BLOCK": tiles.block_m,
        "WIDE": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "SAME": same,
        "A_LAYOUT": descriptor_layout(a),
        "B_LAYOUT": descriptor_layout(b),
        "C_LAYOUT": "" if c is None else descriptor_layout(c),
        "FLATTEN": tiles.variant == "flat",
        "PRECISION": choice.precision,
    }
    resident = torch.sym_min(programs, resident_programs(tiles, choice.device))
    arguments = batch, n, k, *strides
    return Plan(
        symmetric_matmul_tma_kernel, resident, arguments, constants, tiles.options, descriptors=True
    )


def half_sum(g: Tensor, wrap: Wrap, *, out: Tensor | None = None) -> Tensor:
    """``(g + g.mT) / 2`` for ``g (*, n, n)``, contiguous.

    Unlike ``g + g.mT``, it cannot overflow.
    """
    return _symmetric_sum(g, out, False, wrap)


def mirror(c: Tensor, wrap: Wrap) -> Tensor:
    """Copy the lower triangle of the contiguous ``c (*, n, n)`` to the upper; return ``c``."""
    return _symmetric_sum(c, c, True, wrap)


def _symmetric_sum(g: Tensor, out: Tensor | None, in_place: bool, wrap: Wrap) -> Tensor:
    launch = prepared(_prepare_sum, wrap, (g, out), (in_place,))
    assert launch is not None
    return launch.run(wrap, (g, out))  # type: ignore[no-any-return]


def _prepare_sum(g: Tensor, out: Tensor | None, in_place: bool) -> PreparedLaunch:
    result = 1 if out is not None else 2
    return PreparedLaunch(
        (g, out),
        [Step(_plan_sum(_few_dims(g), in_place), (0, result))] if g.numel() else [],
        [Empty(g.shape, g.dtype)] if out is None else [],
        (result,),
        None if g.dim() <= 3 else lambda g, out: (_few_dims(g), out),
    )


def _plan_sum(g: Tensor, in_place: bool) -> Plan:
    n = g.shape[-1]
    tile_rows = triton.cdiv(n, SUM_BLOCK)
    programs = (g.shape[0] if g.dim() == 3 else 1) * (tile_rows * (tile_rows + 1) // 2)
    constants = {"MIRROR": in_place, "BLOCK": SUM_BLOCK}
    return Plan(symmetric_sum_kernel, programs, (n, *_strides(g)), constants, {})


def _few_dims(t: Tensor) -> Tensor:
    """``t`` with at most one batch dimension; a view where the strides allow."""
    return t.flatten(0, -3) if t.dim() > 3 else t


def _strides(t: Tensor) -> tuple[int, ...]:
    """Strides of batch, rows and columns.

    A batch of one matrix gets a stride that suits TMA if the strides of rows and columns do.
    """
    *batch, row, col = t.stride()
    return (batch[0] if batch and t.shape[0] != 1 else t.shape[-2] * row), row, col
