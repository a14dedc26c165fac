# SPDX-License-Identifier: MIT
"""σ(X·Wᵀ + b): the bias is added and the sigmoid taken before the result is stored.

`linear_sigmoid_kernel` runs on every GPU. `linear_sigmoid_tma_kernel` is persistent and loads tiles
by TMA. If the result has few tiles and k is large, several programs each sum a part of k (split-K),
and `reduce_split_k_kernel` adds the parts in a fixed order, so that the bits are the same on every
run.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Wrap
from .gemm import (
    GROUP,
    by_columns,
    dot_rows,
    dot_tiles,
    empty_by_columns,
    grouped_tile,
    make_descriptor,
)
from .launch import Empty, Plan, PreparedLaunch, Step, prepared
from .matmul_t import SYMMETRIC_MATMUL
from .rule import (
    Product,
    Speed,
    Tiles,
    Variant,
    count_tiles,
    halved,
    resident_programs,
    split_k,
)
from .tiles import Choice, choose_plan, descriptor_layout

_16_BIT = {
    Tiles(128, 256, 64, 8, 4, "tma"): Speed(0.600, 0.627),
    Tiles(128, 128, 64, 4, 3, "tma"): Speed(0.483, 0.320),
    Tiles(128, 128, 64, 8, 4, "tma"): Speed(0.327, 0.342),
    Tiles(64, 64, 128, 4, 3, "tma"): Speed(0.184, 0.313),
    Tiles(128, 128, 64, 8, 3): Speed(0.406, 0.354),
    Tiles(64, 64, 64, 4, 4): Speed(0.200, 0.158),
    Tiles(64, 64, 128, 4, 3): Speed(0.239, 0.313),
    Tiles(32, 32, 64, 4, 4): Speed(0.151, 0.129),
    Tiles(64, 64, 64, 4, 4, "split_k"): Speed(0.200, 0.158),
}
_BY_POINTERS = Variant(5.20, 6.55)


def _smallest(tiles: Iterable[Tiles]) -> Tiles:
    return min(tiles, key=lambda one: one.block_m * one.block_n)


LINEAR_SIGMOID = Product(
    name="linear_sigmoid",
    variants={
        "pointers": _BY_POINTERS,
        "tma": Variant(7.47, 3.93),
        "split_k": _BY_POINTERS,
    },
    tiles={
        "bfloat16": _16_BIT,
        "float16": _16_BIT,
        "tf32": halved(_16_BIT),
        # The sums are those of a symmetric product. The smallest tiles are also split.
        **{
            kind: {**tiles, _smallest(tiles)._replace(variant="split_k"): tiles[_smallest(tiles)]}
            for kind, tiles in SYMMETRIC_MATMUL.tiles.items()
            if kind in ("tf32x3", "float32", "float64")
        },
    },
    unaligned={
        **SYMMETRIC_MATMUL.unaligned,
        **dict.fromkeys(
            ("bfloat16", "float16"), (Tiles(64, 64, 128, 4, 3), Tiles(64, 64, 64, 4, 4))
        ),
    },
    library_passes=2,  # the sigmoid in place
    estimated=("float64",),
    single_stores=64 * 128,
)
REDUCE_TILE = (8, 128)  # the tile of a split product whose parts a program adds

LOG2_E_HIGH = tl.constexpr(1.44269502162933349609375)  # log2(e) rounded to float32
LOG2_E_LOW = tl.constexpr(1.925963033500e-8)  # log2(e) - LOG2_E_HIGH
LN_2 = tl.constexpr(0.693147180559945)


@triton.jit
def sigmoid(z, DTYPE: tl.constexpr):
    """``1/(1 + exp(-z))`` in DTYPE; in float32 without the error of `tl.exp` for z far below 0.

    There exp(-z) = 2^t with a large t = -z·log2(e). The rounding error r of t is a relative error
    of r·ln(2) in the result. `tl.exp` ignores it; here it is computed and corrected. A 16-bit
    result needs no correction: the error is far below its last bit.
    """
    if z.dtype == tl.float64:
        y = 1.0 / (1.0 + tl.exp(-z))
    elif DTYPE.primitive_bitwidth == 16:
        y = 1.0 / (1.0 + tl.exp2(-z * LOG2_E_HIGH))
    else:
        t = -z * LOG2_E_HIGH
        r = tl.fma(-z, LOG2_E_HIGH, -t) - z * LOG2_E_LOW
        # For other t, 2^t is 0 or infinite.
        e = tl.exp2(t) * (1.0 + tl.where(tl.abs(t) < 256, r, 0.0) * LN_2)
        d = 1.0 + e
        y = 1.0 / d  # off by up to 2 ulp; one Newton step corrects it
        y = tl.where(d < 1e38, y + y * tl.fma(-d, y, 1.0), y)
    return y.to(DTYPE)


@triton.jit
def add_bias(z, bias_ptr, bias_stride, j, n, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        bias = tl.load(bias_ptr + j.to(tl.int64) * bias_stride, mask=j < n, other=0.0)
        z += bias.to(z.dtype)[None, :]
    return z


@triton.jit
def store_tile(out_ptr, tile, i, j, m, n):
    out = out_ptr + ((i.to(tl.int64) * n)[:, None] + j[None, :])
    tl.store(out, tile, mask=(i < m)[:, None] & (j < n)[None, :])


@triton.jit
def linear_sigmoid_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    k_per_split,
    x_row,
    x_col,
    weight_row,
    weight_col,
    bias_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """A tile of the result.

    If SPLIT_K > 1, the tile is the product over ``k_per_split`` columns of x, without bias and
    sigmoid.
    """
    # tl.cdiv overflows just below 2³¹.
    tiles_m, tiles_n = (m - 1) // BLOCK_M + 1, (n - 1) // BLOCK_N + 1
    tile = tl.program_id(0)
    if SPLIT_K > 1:
        split = (tile // (tiles_m * tiles_n)).to(tl.int64)
        tile = tile % (tiles_m * tiles_n)
        x_ptr += split * k_per_split * x_col
        weight_ptr += split * k_per_split * weight_col
        out_ptr += split * m * n
        k = tl.minimum(k - split * k_per_split, k_per_split).to(tl.int32)
    tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
    i = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x, weight = (x_ptr, x_row, x_col), (weight_ptr, weight_row, weight_col)
    z = dot_rows(x, weight, i, j, m, n, k, BLOCK_K, EVEN_K, PRECISION)
    if SPLIT_K == 1:
        z = sigmoid(add_bias(z, bias_ptr, bias_stride, j, n, HAS_BIAS), out_ptr.dtype.element_ty)
    store_tile(out_ptr, z, i, j, m, n)


@triton.jit
def reduce_split_k_kernel(
    part_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    bias_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """σ(bias + the sum of SPLIT_K products ``(m, n)``)."""
    col_blocks = (n - 1) // BLOCK_N + 1
    i = (tl.program_id(0) // col_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = (tl.program_id(0) % col_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (i < m)[:, None] & (j < n)[None, :]
    part_ptr += (i * n)[:, None] + j[None, :]
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=part_ptr.dtype.element_ty)
    for split in tl.static_range(SPLIT_K):  # unrolled: the loads do not wait for one another
        z += tl.load(part_ptr + tl.full((), split, tl.int64) * m * n, mask=mask, other=0.0)
    z = add_bias(z, bias_ptr, bias_stride, j, n, HAS_BIAS)
    store_tile(out_ptr, sigmoid(z, out_ptr.dtype.element_ty), i, j, m, n)


@triton.jit
def linear_sigmoid_tma_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    x_row,
    x_col,
    weight_row,
    weight_col,
    bias_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    WEIGHT_LAYOUT: tl.constexpr,
    STORE: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `linear_sigmoid_kernel`, by persistent programs; layouts are as in `make_descriptor`.

    STORE: rows of the result begin at multiples of 16 bytes, so that TMA can store them. A tile is
    stored in two halves, which take fewer registers and less shared memory. FLATTEN merges the
    loops over tiles and over k, so that the next tile is loaded while the last one is stored.
    """
    tl.assume(k > 0)  # without it Triton 3.6 waits for each product before it begins the next
    HALF: tl.constexpr = BLOCK_N // 2
    # A compiler may make a size a constant, which has no method `to`.
    x = x_ptr, tl.cast(m, tl.int64) * x_row, x_row, x_col
    weight = weight_ptr, tl.cast(n, tl.int64) * weight_row, weight_row, weight_col
    x_tiles = make_descriptor(x, 1, m, k, BLOCK_M, BLOCK_K, X_LAYOUT)
    weight_tiles = make_descriptor(weight, 1, n, k, BLOCK_N, BLOCK_K, WEIGHT_LAYOUT)
    if STORE:
        out_tiles = tl.make_tensor_descriptor(out_ptr, [m, n], [n, 1], [BLOCK_M, HALF])
    tiles_m, tiles_n = (m - 1) // BLOCK_M + 1, (n - 1) // BLOCK_N + 1
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        z = dot_tiles(
            x_tiles, weight_tiles, 0, row, col, k, False, X_LAYOUT, WEIGHT_LAYOUT, PRECISION
        )
        if STORE:
            left, right = tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, HALF)), (0, 2, 1)))
            j = col + tl.arange(0, HALF)
            left = add_bias(left, bias_ptr, bias_stride, j, n, HAS_BIAS)
            out_tiles.store([row, col], sigmoid(left, out_tiles.dtype))
            right = add_bias(right, bias_ptr, bias_stride, j + HALF, n, HAS_BIAS)
            out_tiles.store([row, col + HALF], sigmoid(right, out_tiles.dtype))
        else:
            i = row.to(tl.int64) + tl.arange(0, BLOCK_M)
            j = col.to(tl.int64) + tl.arange(0, BLOCK_N)
            z = add_bias(z, bias_ptr, bias_stride, j, n, HAS_BIAS)
            store_tile(out_ptr, sigmoid(z, out_ptr.dtype.element_ty), i, j, m, n)


def linear_sigmoid(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    precision: str,
    wrap: Wrap,
    *,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
    tma: bool = True,
    only_if_faster: bool = False,
    check: Callable[[Tensor, Tensor, Tensor | None], None] | None = None,
) -> Tensor | None:
    """``sigmoid(x @ weight.T + bias)`` for ``x (m, k)``, ``weight (n, k)`` and ``bias (n)``.

    Args:
        precision: of float32 products: "ieee", "tf32", or "tf32x3". The last one makes three
            products of TF32, whose sum is about as exact as "ieee".
        out: ``(m, n)``, contiguous; by default a new tensor.
        tiles: by default the tiles that the rule chooses, or `autotune` measures.
        tma: whether the kernel may make TMA descriptors.
        only_if_faster: launch nothing where PyTorch's library is expected to be faster.
        check: ``check(x, weight, bias)`` raises for wrong operands. It is called for new layouts
            alone.

    Returns:
        ``out``; None if nothing was launched, as for operands without columns.

    Raises:
        ValueError: ``tiles`` of a variant that cannot take these operands.
    """
    operands = x, weight, bias, out
    options = precision, tiles, tma, only_if_faster, wrap is not None, check
    launch = prepared(_prepare, wrap, operands, options)
    return None if launch is None else launch.run(wrap, operands)


def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    precision: str,
    tiles: Tiles | None,
    tma: bool,
    only_if_faster: bool,
    traced: bool,
    check: Callable[[Tensor, Tensor, Tensor | None], None] | None,
) -> PreparedLaunch | None:
    if check is not None:
        check(x, weight, bias)
    if x.shape[1] == 0:
        return None
    given = x, weight, bias, out
    x, weight = (empty_by_columns(t, precision) for t in (x, weight))
    m, n = x.shape[0], weight.shape[0]
    choice = Choice(LINEAR_SIGMOID, precision, (m, n, x.shape[1], 1), (x, weight), tma)
    make = partial(_plan_tiles, x, weight, bias)
    plan = choose_plan(make, choice, tiles, only_if_faster, traced)
    if plan is None:
        return None
    empties = [Empty((m, n), x.dtype)] if out is None else []
    result = 3 if out is not None else 4
    # The kernels take a pointer even where they read no bias.
    added = 1 if bias is None else 2
    steps = [Step(plan, (0, 1, added, result))]
    count = plan.constants.get("SPLIT_K", 1)  # by TMA nothing is split
    if count > 1:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        parts = len(given) + len(empties)
        empties.append(Empty((count, m, n), dtype))
        reduce = _plan_reduce(count, m, n, bias)
        steps = [Step(plan, (0, 1, added, parts)), Step(reduce, (parts, added, result))]
    is_copied = x is not given[0] or weight is not given[1]
    convert = partial(_by_columns, precision) if is_copied else None
    return PreparedLaunch(given, steps if m * n else [], empties, (result,), convert)


def _by_columns(
    precision: str, x: Tensor, weight: Tensor, *others: Tensor | None
) -> Sequence[Tensor | None]:
    return by_columns(x, precision), by_columns(weight, precision), *others


def _plan_tiles(
    x: Tensor, weight: Tensor, bias: Tensor | None, choice: Choice, tiles: Tiles
) -> Plan:
    m, n, k, _ = choice.sizes
    programs = count_tiles(tiles, m, n, symmetric=False)
    strides = *x.stride(), *weight.stride(), 0 if bias is None else bias.stride(0)
    blocks: dict[str, int | str] = {"HAS_BIAS": bias is not None, **tiles.blocks}
    if tiles.by_tma:
        stores = bool(n * x.element_size() % 16 == 0)
        constants = blocks | {
            "X_LAYOUT": descriptor_layout(x),
            "WEIGHT_LAYOUT": descriptor_layout(weight),
            "STORE": stores,
            # Programs of 4 warps run in pairs on a multiprocessor: one multiplies while the other
            # stores.
            "FLATTEN": stores and tiles.num_warps == 8,
            "PRECISION": choice.precision,
        }
        kernel, arguments = linear_sigmoid_tma_kernel, (m, n, k, *strides)
        resident = torch.sym_min(programs, resident_programs(tiles, choice.device))
        return Plan(kernel, resident, arguments, constants, tiles.options, descriptors=True)
    count, k_per_split = split_k(tiles, choice.device, m, n, k)
    constants = blocks | {
        "EVEN_K": bool(k % tiles.block_k == 0),
        "PRECISION": choice.precision,
        "SPLIT_K": count,
    }
    return Plan(
        linear_sigmoid_kernel,
        count * programs,
        (m, n, k, k_per_split, *strides),
        constants,
        tiles.options,
    )


def _plan_reduce(count: int, m: int, n: int, bias: Tensor | None) -> Plan:
    constants = {
        "HAS_BIAS": bias is not None,
        "BLOCK_M": REDUCE_TILE[0],
        "BLOCK_N": REDUCE_TILE[1],
        "SPLIT_K": count,
    }
    programs = triton.cdiv(m, REDUCE_TILE[0]) * triton.cdiv(n, REDUCE_TILE[1])
    return Plan(
        reduce_split_k_kernel,
        programs,
        (m, n, 0 if bias is None else bias.stride(0)),
        constants,
        {},
    )
