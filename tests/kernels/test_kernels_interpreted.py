# SPDX-License-Identifier: MIT
"""Launches by Triton's interpreter, of sizes that take too long or too much memory to execute as
PTX.

Each check poisons the output, so that an element which no program writes fails. bfloat16 needs a
GPU: the interpreter computes it wrongly.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from torchpar.kernels import linear_sigmoid, matmul_t, maximum, sigmoid_backward
from torchpar.kernels.gemm import triangle_tile

pytestmark = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="run-time loops fail in the interpreter of Triton < 3.7 beside NumPy >= 2.4",
)


def check_far_apart() -> None:
    """Rows 2³⁰ elements apart, of which an int32 counts two. Memory that is not touched costs
    nothing."""
    step = 2**30
    torch.manual_seed(0)
    far = torch.empty(2 * step + 8, dtype=torch.float16).as_strided((3, 8), (step, 1))
    far.copy_(torch.randint(-4, 5, (3, 8)))
    for x in (far, far.mT):  # small integers: every result is exact
        n, k = x.shape
        near = x.clone()
        c, y, dz = (x.new_full(shape, torch.nan) for shape in ((n, n), (n, n), (n, k)))
        matmul_t.symmetric_matmul(x, x, "ieee", None, out=c)
        product = (near.double() @ near.double().mT).half()
        assert torch.equal(c, product)
        linear_sigmoid.linear_sigmoid(x, x, None, "ieee", None, out=y)
        assert torch.equal(y, product.double().sigmoid().half())
        sigmoid_backward.sigmoid_backward(x, x, dz, None)
        assert torch.equal(dz, near * near * (1 - near))
        out, da, db = (x.new_full(x.shape, torch.nan) for _ in range(3))
        maximum.maximum(x, -x.flip(0), out, None)
        assert torch.equal(out, torch.maximum(near, -near.flip(0)))
        maximum.maximum_backward(x, x, x, da, db, None)
        assert torch.equal(da, near / 2)
        assert torch.equal(db, near / 2)
        for repeated, dim in ((near[:1], 0), (near[:, :1], 1)):
            da, total = (x.new_full(shape, torch.nan) for shape in (x.shape, repeated.shape))
            maximum.maximum_backward(x, x, repeated.expand(x.shape), da, total, None)
            ties = torch.where(near == repeated, near / 2, near)
            assert torch.equal(da, ties.masked_fill(near < repeated, 0))
            assert torch.equal(total, ties.masked_fill(repeated < near, 0).sum(dim, True))
    for g in (far[:, :3], far[:, :3].mT):
        assert torch.equal(matmul_t.half_sum(g, None), (g + g.mT) / 2)


@triton.jit
def triangle_tile_kernel(
    tile_ptr, row_ptr, col_ptr, tile_rows, BLOCK: tl.constexpr, GROUP: tl.constexpr
):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, col = triangle_tile(tl.load(tile_ptr + offsets), tile_rows, GROUP)
    tl.store(row_ptr + offsets, row)
    tl.store(col_ptr + offsets, col)


def check_ends_of_rows() -> None:
    """The first and the last tile of each row that an int32 counts to its end, in groups of one
    row.

    The float estimate of the row rises with the tile, so a row is right throughout if its ends are.
    """
    rows = torch.arange(2**16 - 1).repeat(2).view(2, -1)
    tiles = rows * (rows + 1) // 2 + torch.tensor([[0], [1]]) * rows
    row, col = (torch.full((2**17,), -1) for _ in range(2))
    padded = torch.cat((tiles.flatten(), tiles.new_zeros(2))).int()
    triangle_tile_kernel[(2,)](padded, row, col, rows.shape[1], BLOCK=2**16, GROUP=1)
    assert torch.equal(row[:-2].view_as(rows), rows)
    assert torch.equal(col[:-2].view_as(rows), torch.tensor([[0], [1]]) * rows)


@pytest.mark.parametrize("check", [check_far_apart, check_ends_of_rows])
def test_many_elements(interpreter, check):
    interpreter(check)
