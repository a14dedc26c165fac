# SPDX-License-Identifier: MIT
"""Operands of float32 products on FMA units, whose columns must be contiguous.

Triton keeps a tile in shared memory in the order that it has in global memory. A warp on FMA units
reads up to 16 rows of B at one column. Where rows are contiguous, these numbers lie in one or two
banks, and are read one after the other. Where columns are contiguous, there are no bank conflicts.
A copy takes one pass through memory.
"""

import torch
from torch import Tensor

_PITCH = 16  # columns begin at multiples of 16 elements, the divisor that Triton asks for


def empty_by_columns(t: Tensor, precision: str) -> Tensor:
    """Memory for a copy of ``t (*, rows, cols)`` by columns; ``t`` itself if it needs no copy."""
    if t.dtype != torch.float32 or precision != "ieee" or t.stride(-2) == 1:
        return t
    *batch, rows, cols = t.shape
    pitch = (rows + _PITCH - 1) // _PITCH * _PITCH
    return t.new_empty(*batch, cols, pitch)[..., :rows].mT


def by_columns(t: Tensor, precision: str) -> Tensor:
    """``t``, or a copy of it whose columns are contiguous, if FMA units multiply it."""
    empty = empty_by_columns(t, precision)
    return t if empty is t else empty.copy_(t)
