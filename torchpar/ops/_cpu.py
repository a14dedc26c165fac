# SPDX-License-Identifier: MIT
"""Symmetric matrix products on the CPU, at half the arithmetic.

float32 goes to oneDNN (`torchpar.ops._onednn`), in chains of `_CHAIN` terms: the error is then MKL's.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from torchpar.ops._matrix import half_sum, lower_mask, mirrored, pad_to_even, product
from torchpar.ops._onednn import onednn, prefers_onednn

_HALVED_FROM = 256  # rows
# Rows per block. Larger blocks compute more above the diagonal; in smaller ones the library is slower.
_BLOCK = 256
_BLOCK_FLOAT64 = 128
_CHAIN = 128
_ONEDNN_FROM = 384  # rows; below, the calls for many chains take longer than oneDNN gains
_BLOCKED_SUM_FROM = 1024  # rows; above, G and its transpose do not fit in the cache
_CACHE_LINE = 64  # bytes


def is_halved(t: Tensor) -> bool:
    """Whether the products of ``t``'s rows are computed in blocks, the lower half only."""
    return not t.is_cuda and t.shape[-2] >= _HALVED_FROM


def symmetric_product(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """``alpha * a @ b.mT + beta * c``, known to be symmetric, for ``a, b (*, n, k)`` and ``c (*, n, n)``.

    The result equals its transpose bit for bit.
    """
    if a.dtype == torch.float16:  # PyTorch's float16 products take ten times as long as float32 ones
        wide = a.float()
        c = None if c is None or beta == 0 else c.float()
        return symmetric_product(wide, wide if b is a else b.float(), c, alpha, beta).half()
    if not is_halved(a):
        return mirrored(product(a, b, c, alpha, beta))
    n = a.shape[-2]
    out = a.new_empty(*a.shape[:-1], n)
    for index in itertools.product(*map(range, a.shape[:-2])):
        a2 = a[index]
        _halved(a2, a2 if b is a else b[index], None if c is None else c[index], alpha, beta, out[index])
    return out


def symmetric_addmm_(h: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> None:
    """``h ← alpha * a @ b.mT + beta * h`` in place, for ``h`` of the operands' dtype, or float32."""
    if h.dtype != a.dtype:
        wide = a.to(h.dtype)
        a, b = wide, wide if b is a else b.to(h.dtype)
    if a.dtype == torch.float16 or not is_halved(a):
        h.copy_(symmetric_product(a, b, h, alpha, beta))
        return
    for index in itertools.product(*map(range, a.shape[:-2])):
        # Each block reads rows of H that those before it have not written.
        a2 = a[index]
        _halved(a2, a2 if b is a else b[index], h[index], alpha, beta, h[index])


def mirror_(h: Tensor) -> None:
    """Copy the lower triangle of ``h`` to the upper one."""
    h.copy_(mirrored(h))


def symmetrized_product(g: Tensor, x: Tensor) -> Tensor:
    """``(g + g.mT) @ x`` for ``g (*, n, n)`` and ``x (*, n, k)``."""
    if x.dtype == torch.float16:  # as above; with loss scaling, G + Gᵀ would also overflow float16
        return symmetrized_product(g.float(), x.float()).half()
    if is_halved(x) and g.dim() == 2 and x.numel() and prefers_onednn(x):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        terms = [_transposed(part) for part in x.split(_CHAIN)]
        for block, half_sums in _half_sums(g):
            out[block] = _onednn_product(list(zip(_chains(half_sums), terms, strict=True)), alpha=2)
        return out
    if g.shape[-1] < _BLOCKED_SUM_FROM:
        return product(half_sum(g), x.mT).mul_(2)
    total = torch.empty_like(g, memory_format=torch.contiguous_format)
    for index in itertools.product(*map(range, g.shape[:-2])):
        for block, half_sums in _half_sums(g[index]):
            total[index][block] = half_sums
    return product(total, x.mT).mul_(2)


def _half_sums(g: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of ``(g + g.T) / 2``, with their indices. Each is computed in the cache."""
    space = _spread_rows(len(g), _BLOCK, g)
    for lo in range(0, len(g), _BLOCK):
        block = slice(lo, lo + _BLOCK)
        columns = torch.mul(g[:, block], 0.5, out=space[:, : len(g[block])])
        yield block, _transposed(columns).add_(g[block], alpha=0.5)


def _halved(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, out: Tensor) -> None:
    n = len(a)
    a, b = pad_to_even(a, b)
    blocks = max(round(n / (_BLOCK_FLOAT64 if a.dtype == torch.float64 else _BLOCK)), 2)
    chains = None
    if n >= _ONEDNN_FROM and alpha != 0 and a.numel() and prefers_onednn(a):
        parts = _chains(a)
        chains = list(zip(parts, parts if b is a else _chains(b), strict=True))
    space = _spread_rows(-(-n // blocks), n, a)
    for block in range(blocks):
        lo, hi = n * block // blocks, n * (block + 1) // blocks
        rows, c_rows = space[: hi - lo, :hi], None if c is None else c[lo:hi, :hi]
        if chains:
            rows.copy_(_onednn_product([(s[lo:hi], t[:hi]) for s, t in chains], c_rows, alpha, beta))
        else:
            product(a[lo:hi], b[:hi], c_rows, alpha, beta, out=rows)
        if block:
            before = rows[:, :lo]
            out[lo:hi, :lo] = before
            out[:lo, lo:hi] = before.mT
        diagonal = rows[:, lo:]
        torch.where(lower_mask(hi - lo, out.device), diagonal, diagonal.mT, out=out[lo:hi, lo:hi])


def _spread_rows(n: int, columns: int, like: Tensor) -> Tensor:
    """An uninitialised ``(n, columns)`` tensor, whose rows are an odd number of cache lines apart.

    With a large power of two between rows, the elements of a column share one cache set, and a transposed
    copy takes up to four times as long.
    """
    lines = -(-columns * like.itemsize // _CACHE_LINE) | 1
    return like.new_empty(n, lines * _CACHE_LINE // like.itemsize)[:, :columns]


def _transposed(t: Tensor) -> Tensor:
    return t.mT.clone(memory_format=torch.contiguous_format)


def _chains(t: Tensor) -> list[Tensor]:
    """``t`` cut into `_CHAIN` columns each."""
    return [part.contiguous() for part in t.split(_CHAIN, 1)]


def _onednn_product(
    chains: list[tuple[Tensor, Tensor]], c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """``alpha * a @ b.T + beta * c`` for ``a`` and ``b`` cut into chains."""
    out = onednn(*chains[0])
    for a, b in chains[1:]:
        out = onednn(a, b, out)
    if alpha != 1:
        out *= alpha
    return out if c is None or beta == 0 else out.add_(c, alpha=beta)
