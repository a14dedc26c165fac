# SPDX-License-Identifier: MIT
"""Sums over the rows or columns of a matrix: how programs divide it, and add their partial sums.

To sum over rows, a program owns columns and loops over rows. If that would leave multiprocessors
idle, several programs each sum a part of the rows. A second launch adds the partial sums in a fixed
order, so that the bits of a sum are the same on every run. Sums over columns are made likewise.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import device
from .launch import Empty, Plan, Step
from .rule import hint

TILE_BYTES = 2048  # one access of 16 bytes for each of 128 threads
SECTOR_BYTES = 32  # the least that memory transfers
WIDE_BYTES = 256  # of a row, where many rows give enough programs
# One program sums so many rows, or columns, in less time than another launch takes.
FEW_ROWS, FEW_COLUMNS = 256, 4096
# Programs of a multiprocessor: with fewer, it waits for memory; with more, there are more sums.
LEAST_PROGRAMS, MOST_PROGRAMS = 2, 8
# A program sums so many rows, or columns, if that leaves `LEAST_PROGRAMS`: partial sums are few.
ROWS, COLUMNS = 64, 4096
MOST_STEPS = 64  # of a loop: each step adds a rounding error to the sum
STAGES = 4  # of a loop: 3 tiles are loaded while one is summed


class Division(NamedTuple):
    """The rows and columns of a tile, how many rows, or columns, one program sums, and `STAGES`."""

    block_rows: int
    block_cols: int
    each: int
    stages: int


def divide_rows(rows: int, cols: int, t: Tensor) -> Division:
    """How programs on the device of ``t`` sum the rows of a matrix of its dtype.

    A compiled graph keeps the division of the sizes that it was traced with.
    """
    m, n, size, units = hint(rows), hint(cols), t.element_size(), device(t).multiprocessors
    if m <= FEW_ROWS:
        each = FEW_ROWS
        block_rows, block_cols = narrow_tile(m, n, size, LEAST_PROGRAMS * units)
    else:
        block_cols = min(WIDE_BYTES // size, triton.next_power_of_2(n))
        block_rows = TILE_BYTES // size // block_cols
        each = _terms_of_program(m, triton.cdiv(n, block_cols), ROWS, block_rows, units)
    return Division(block_rows, block_cols, each, stages(n, min(m, each), block_rows))


def divide_columns(rows: int, cols: int, t: Tensor) -> Division:
    """How programs on the device of ``t`` sum the columns of a matrix of its dtype."""
    m, n, size, units = hint(rows), hint(cols), t.element_size(), device(t).multiprocessors
    block_cols = min(TILE_BYTES // size, triton.next_power_of_2(n))
    block_rows = TILE_BYTES // size // block_cols
    each = FEW_COLUMNS
    if n > FEW_COLUMNS:
        each = _terms_of_program(n, triton.cdiv(m, block_rows), COLUMNS, block_cols, units)
    return Division(block_rows, block_cols, each, stages(n, min(n, each), block_cols))


def stages(cols: int, terms: int, step: int) -> int:
    """1, which is no pipeline, for a loop of one step, and where elements are loaded singly.

    Triton loads 16 bytes at a time if the length of rows is a multiple of 16 elements. Asynchronous
    copies of single elements take twice the instructions, and have bank conflicts.
    """
    return STAGES if cols % 16 == 0 and terms > step else 1


def _terms_of_program(terms: int, blocks: int, enough: int, step: int, units: int) -> int:
    """How many of the terms of a block of sums one program adds: a multiple of ``step``."""
    work = terms * blocks
    most, least = work // (MOST_PROGRAMS * units), work // (LEAST_PROGRAMS * units)
    each = min(max(most, min(enough, least)), MOST_STEPS * step)
    return step * (max(each // step, 1) if each < terms else triton.cdiv(terms, step))


def narrow_tile(m: int, n: int, size: int, least: int) -> tuple[int, int]:
    """The widest tile by which ``least`` programs divide ``n`` columns, or the narrowest one.

    The narrowest tile has the columns of a sector, and no more than ``m`` rows, rounded up to a
    power of 2.
    """
    elements = TILE_BYTES // size
    narrowest = max(SECTOR_BYTES // size, elements // triton.next_power_of_2(m))
    block_cols = max(WIDE_BYTES // size, narrowest)
    while block_cols > narrowest and triton.cdiv(n, block_cols) < least:
        block_cols //= 2
    block_cols = min(block_cols, triton.next_power_of_2(n))
    return elements // block_cols, block_cols


@triton.jit
def add_partial_sums_kernel(
    partial_ptr, out_ptr, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr
):
    col = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=partial_ptr.dtype.element_ty)
    for start in tl.range(0, m, BLOCK_M, num_stages=STAGES):
        row = start.to(tl.int64) + tl.arange(0, BLOCK_M)
        mask = (row < m)[:, None] & (col < n)[None, :]
        total += tl.load(partial_ptr + ((row * n)[:, None] + col[None, :]), mask=mask, other=0.0)
    sums = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + col, sums, mask=col < n)


def sum_steps(
    plan: Plan, terms: int, sums: int, tensors: tuple[int, ...], out: int, like: Tensor, free: int
) -> tuple[list[Step], list[Empty]]:
    """The steps of a launch that sums ``terms`` terms into each of ``sums`` numbers in a row.

    If several programs share the terms, a second kernel adds the sums of the programs, which are at
    the place ``free``.

    Args:
        plan: the plan of the first kernel, whose third argument is `Division.each`.
        tensors: the places of the kernel's tensors before the sums.
        out: the place of the sums.
        like: a tensor of their dtype and device.

    Returns:
        The steps, and what they allocate.
    """
    each = plan.arguments[2]
    if not isinstance(terms, torch.SymInt) and terms <= each:  # AOTInductor checks no guards
        return [Step(plan, (*tensors, out))], []
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    parts = triton.cdiv(terms, each)
    add = _plan(parts, sums, dtype.itemsize, LEAST_PROGRAMS * device(like).multiprocessors)
    # Of a tensor (parts, sums) PyTorch would guard whether there is one part.
    partial = Empty((parts * sums,), dtype)
    return [Step(plan, (*tensors, free)), Step(add, (free, out))], [partial]


def _plan(m: int, n: int, size: int, least: int) -> Plan:
    block_m, block_n = narrow_tile(hint(m), hint(n), size, least)
    steps = stages(hint(n), hint(m), block_m)
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": steps}
    return Plan(add_partial_sums_kernel, triton.cdiv(n, block_n), (m, n), constants, {})
