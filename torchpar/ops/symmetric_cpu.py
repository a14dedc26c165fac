# SPDX-License-Identifier: MIT
"""Symmetric matrix products on the CPU: blocks of rows up to the diagonal, and their mirror image.

A block is PyTorch's product, straight into the result, or oneDNN's (`torchpar.ops.linear_cpu`).
"""

import itertools

import torch
from torch import Tensor

from torchpar.ops.linear_cpu import CHAIN, cut, in_chains, mm, takes_onednn
from torchpar.ops.matrix import mean_with_transpose, pad_to_tiles, product
from torchpar.ops.processor import has_amx, has_bfloat16

# From so many rows on, half of a product and its mirror image take less time than all of the
# product and a mirror image, with two threads; below `_HALVED_FROM_NARROW` only with so many
# columns.
_HALVED_FROM, _HALVED_FROM_BFLOAT16 = 384, 768
_HALVED_FROM_NARROW, _COLUMNS = 512, 128
_BLOCK, _BLOCK_BY_ONEDNN = 128, 256  # rows
_CACHE_LINE = 64  # bytes
# From so many rows on, stripes of so many rows are mirrored; smaller matrices are mirrored at once.
_STRIPED_FROM, _STRIPE = 512, 128


def is_halved(x: Tensor) -> bool:
    """Whether X·Xᵀ is computed in blocks up to the diagonal, which compilers should leave alone."""
    rows, columns = x.shape[-2:]
    if x.is_cuda or rows < _HALVED_FROM or (rows < _HALVED_FROM_NARROW and columns < _COLUMNS):
        return False
    # AMX multiplies all rows as fast as half of the result in blocks.
    if computed_in(x.dtype) == torch.bfloat16:
        return rows >= _HALVED_FROM_BFLOAT16 and not has_amx()
    return True


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products: float32 where products in 16 bits take ten times as long or more."""
    slow = dtype == torch.float16 or (dtype == torch.bfloat16 and not has_bfloat16())
    return torch.float32 if slow else dtype


def symmetric_matmul_on_cpu(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """``alpha * a @ b.mT + beta * c``, known to be symmetric.

    ``a`` and ``b`` are ``(*, n, k)``, and ``c`` is ``(*, n, n)``. The result equals its transpose
    bit for bit. ``out`` may be ``c``, and has the dtype of ``a``, or float32.
    """
    c = None if beta == 0 else c
    dtype = computed_in(a.dtype if out is None else out.dtype)
    if dtype != a.dtype:
        wide = a.to(dtype)
        b = wide if b is a else b.to(dtype)
        if out is not None and out.dtype == dtype:
            return symmetric_matmul_on_cpu(wide, b, c, alpha, beta, out)
        found = symmetric_matmul_on_cpu(wide, b, None if c is None else c.to(dtype), alpha, beta)
        return found.to(a.dtype) if out is None else out.copy_(found)
    if not is_halved(a):
        found = product(a, b, c, alpha, beta)
        mirror_(found)
        return found if out is None else out.copy_(found)
    out = a.new_empty(*a.shape[:-1], a.shape[-2]) if out is None else out
    for index in itertools.product(*map(range, a.shape[:-2])):
        a2 = a[index]
        c2 = None if c is None else c[index]
        _halved(a2, a2 if b is a else b[index], c2, alpha, beta, out[index])
    return out


def _halved(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, out: Tensor) -> None:
    """Compute blocks of rows up to the diagonal, and mirror them."""
    a, b = pad_to_tiles(a, b)
    n = len(a)
    terms: list[tuple[Tensor, Tensor]] = []
    if alpha != 0 and a.numel() and takes_onednn(a):
        dense = a.contiguous()  # oneDNN needs contiguous blocks of rows
        terms = cut(dense, dense if b is a else b.contiguous(), -(-a.shape[1] // CHAIN))
    blocks = max(round(n / (_BLOCK_BY_ONEDNN if terms else _BLOCK)), 1)
    for block in range(blocks):
        lo, hi = n * block // blocks, n * (block + 1) // blocks
        out_block, c_block = out[lo:hi, :hi], None if c is None else c[lo:hi, :hi]
        if not terms:
            product(a[lo:hi], b[:hi], c_block, alpha, beta, out=out_block)
            continue
        found = in_chains([(s[lo:hi], t[:hi]) for s, t in terms])
        if c_block is None:
            torch.mul(found, alpha, out=out_block)
        else:
            torch.add(found.mul_(alpha), c_block, alpha=beta, out=out_block)
    mirror_(out)


def mirror_(h: Tensor) -> Tensor:
    """Copy the lower triangle of ``h (*, n, n)`` to the upper one; return ``h``."""
    n = h.shape[-1]
    if type(h) is not Tensor or n < _STRIPED_FROM or not h.is_cpu or h.stride(-1) != 1:
        return _mirror(h)  # also in compilers, for which stripes would fix n
    # Rows lie an odd number of cache lines apart: with a large power of two between rows, the
    # elements of a column share one cache set, and a transposed copy takes up to four times as
    # long.
    lines = -(-n * h.itemsize // _CACHE_LINE) | 1
    space = h.new_empty(_STRIPE, lines * _CACHE_LINE // h.itemsize)
    for index in itertools.product(*map(range, h.shape[:-2])):
        one = h[index]
        for lo in range(0, n, _STRIPE):
            stripe = slice(lo, lo + _STRIPE)
            _mirror(one[stripe, stripe])
            before = space[: n - lo, :lo].copy_(one[stripe, :lo])
            one[:lo, stripe] = before.T
    return h


def _mirror(h: Tensor) -> Tensor:
    upper = h.mT.triu(1)
    return h.tril_().add_(upper)


def symmetrized_product(g: Tensor, x: Tensor) -> Tensor:
    """``(g + g.mT) @ x`` for ``g (*, n, n)`` and ``x (*, n, k)``."""
    if computed_in(x.dtype) != x.dtype:  # with loss scaling, G + Gᵀ would also overflow float16
        return symmetrized_product(g.float(), x.float()).to(x.dtype)
    half = mean_with_transpose(g)
    if x.dim() == 2 and takes_onednn(x):
        # PyTorch's sum of two products has a smaller error than one product, doubled.
        return mm(half, x, CHAIN // 2).mul_(2)
    return product(half, x.mT).mul_(2)
