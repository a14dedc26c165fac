# SPDX-License-Identifier: MIT
"""The transposes of docs/ptx.md."""

import triton
import triton.language as tl


@triton.jit
def by_rows(x, out, n, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(out + column * n + row, tl.load(x + row * n + column))


@triton.jit
def by_tiles(x, out, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + column * n + row, tl.load(x + row * n + column))
