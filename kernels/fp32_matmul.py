# SPDX-License-Identifier: MIT
"""A·Bᵀ of float32, in a precision that PyTorch's flag does not name at the moment."""

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from . import Wrap
from .gemm import GROUP, by_columns, dot_rows, empty_by_columns, grouped_tile
from .launch import Empty, Plan, PreparedLaunch, Step, prepared
from .linear_sigmoid import LINEAR_SIGMOID, store_tile
from .rule import count_tiles
from .tiles import Choice, library_is_faster

# A split product would need a second launch.
FP32_MATMUL = LINEAR_SIGMOID._replace(
    name="fp32_matmul",
    tiles={
        kind: {one: speed for one, speed in tiles.items() if one.variant == "pointers"}
        for kind, tiles in LINEAR_SIGMOID.tiles.items()
    },
)


@triton.jit
def fp32_matmul_kernel(
    a_ptr,
    b_ptr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of a product of a batch."""
    tiles_m, tiles_n = (m - 1) // BLOCK_M + 1, (n - 1) // BLOCK_N + 1  # tl.cdiv may overflow
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    batch = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
    i = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    a = (a_ptr + batch * a_batch, a_row, a_col)
    b = (b_ptr + batch * b_batch, b_row, b_col)
    acc = dot_rows(a, b, i, j, m, n, k, BLOCK_K, EVEN_K, PRECISION)
    store_tile(out_ptr + batch * m * n, acc, i, j, m, n)


def fp32_matmul(
    a: Tensor, b: Tensor, precision: str, wrap: Wrap, *, only_if_faster: bool = False
) -> Tensor | None:
    """``a @ b.mT`` for float32 ``a (batch, m, k)`` and ``b (batch, n, k)``, none of them empty.

    Args:
        precision: as in `symmetric_matmul`.
        only_if_faster: launch nothing where PyTorch's library is expected to be faster.

    Returns:
        None if nothing was launched.
    """
    launch = prepared(_prepare, wrap, (a, b), (precision, only_if_faster))
    return None if launch is None else launch.run(wrap, (a, b))


def _prepare(a: Tensor, b: Tensor, precision: str, only_if_faster: bool) -> PreparedLaunch | None:
    given = a, b
    a, b = empty_by_columns(a, precision), empty_by_columns(b, precision)
    batch, m, k = a.shape
    n = b.shape[-2]
    choice = Choice(FP32_MATMUL, precision, (m, n, k, batch), (a, b), tma=False, exact=False)
    if only_if_faster and library_is_faster(choice):
        return None
    tiles = choice.tiles
    constants = {
        **tiles.blocks,
        "EVEN_K": bool(k % tiles.block_k == 0),
        "PRECISION": precision,
    }
    plan = Plan(
        fp32_matmul_kernel,
        batch * count_tiles(tiles, m, n, symmetric=False),
        (m, n, k, *a.stride(), *b.stride()),
        constants,
        tiles.options,
    )
    is_copied = a is not given[0] or b is not given[1]
    convert = partial(_by_columns, precision) if is_copied else None
    return PreparedLaunch(
        given, [Step(plan, (0, 1, 2))], [Empty((batch, m, n), a.dtype)], (2,), convert
    )


def _by_columns(precision: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return by_columns(a, precision), by_columns(b, precision)
