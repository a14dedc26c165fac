# SPDX-License-Identifier: MIT
"""Symmetric matrix products on the CPU, at half the arithmetic.

Where a table says so, float32 goes to oneDNN (`torchpar.ops.linear_cpu`), in chains of `_CHAIN` terms: the
error is then MKL's.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from torchpar.ops.cpu_table import CHOSEN_FROM, Choice, choice, remembered
from torchpar.ops.linear_cpu import onednn, prefers_onednn
from torchpar.ops.matrix import DTYPES, half_sum, lower_mask, mirrored, pad_to_even, product
from torchpar.ops.processor import has_bfloat16

_CHAIN = 128
_CPU = torch.device("cpu")
_ONEDNN_BACKWARD_FROM = 256  # rows
_BLOCK = 256  # rows of G and its transpose that are added at a time
_BLOCKED_SUM_FROM = 1024  # rows; above, G and its transpose do not fit in the cache
_CACHE_LINE = 64  # bytes
_STRIPED_FROM = 256  # rows; smaller matrices are mirrored at once
_STRIPE, _WIDE_STRIPE, _WIDE_FROM = 64, 128, 1024  # rows that are mirrored at a time; 128 from 1024 rows on


def is_opaque(t: Tensor) -> bool:
    """Whether products of ``t``'s rows may be computed in blocks, which compilers should leave alone."""
    return not t.is_cuda and t.shape[-2] >= CHOSEN_FROM


def small_product(x: Tensor) -> Tensor | None:
    """X·Xᵀ if it takes two calls of PyTorch only: each costs about as much as the product; else None."""
    mask = _mask_of_whole(x.dtype, x.shape, torch.get_num_threads())
    if mask is None:
        return None
    c = torch.mm(x, x.t())
    return torch.where(mask, c, c.t())


@remembered
def _mask_of_whole(dtype: torch.dtype, shape: torch.Size, threads: int) -> Tensor | None:
    """The mask of the lower triangle, if X·Xᵀ for X of this shape is computed whole, and mirrored at once."""
    if dtype not in DTYPES or computed_in(dtype) != dtype or len(shape) != 2 or 0 in shape:
        return None
    if dtype.itemsize == 2 and shape[1] % 2:
        return None
    return None if choice(dtype, *shape).rows else lower_mask(shape[0], _CPU)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products: float32 where PyTorch's 16-bit ones take ten times as long, or more."""
    slow = dtype == torch.float16 or (dtype == torch.bfloat16 and not has_bfloat16())
    return torch.float32 if slow else dtype


def symmetric_product(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    chosen: Choice | None = None,
) -> Tensor:
    """``alpha * a @ b.mT + beta * c``, known to be symmetric, for ``a, b (*, n, k)`` and ``c (*, n, n)``.

    The result equals its transpose bit for bit. ``chosen`` is the way to it, by default the table's.
    """
    if computed_in(a.dtype) != a.dtype:
        wide = a.float()
        c = None if c is None or beta == 0 else c.float()
        return symmetric_product(wide, wide if b is a else b.float(), c, alpha, beta).to(a.dtype)
    n, k = a.shape[-2:]
    if not is_opaque(a):
        return mirrored(product(a, b, c, alpha, beta))
    chosen = chosen or choice(a.dtype, n, k)
    if not chosen.rows:
        return mirrored(product(a, b, c, alpha, beta))
    out = a.new_empty(*a.shape[:-1], n)
    for index in itertools.product(*map(range, a.shape[:-2])):
        a2 = a[index]
        c2 = None if c is None else c[index]
        _halved(a2, a2 if b is a else b[index], c2, alpha, beta, out[index], chosen)
    return out


def symmetric_addmm_(h: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> None:
    """``h ← alpha * a @ b.mT + beta * h`` in place, for ``h`` of the operands' dtype, or float32."""
    if h.dtype != a.dtype:
        wide = a.to(h.dtype)
        a, b = wide, wide if b is a else b.to(h.dtype)
    if computed_in(a.dtype) != a.dtype or not is_opaque(a):
        h.copy_(symmetric_product(a, b, h, alpha, beta))
        return
    chosen = choice(a.dtype, *a.shape[-2:])
    for index in itertools.product(*map(range, a.shape[:-2])):
        a2, own = a[index], h[index]
        b2 = a2 if b is a else b[index]
        if chosen.rows:
            _halved(a2, b2, own, alpha, beta, own, chosen)
        else:
            product(a2, b2, own, alpha, beta, out=own)
            mirror_(own)


def mirror_(h: Tensor) -> None:
    """Copy the lower triangle of ``h (*, n, n)`` to the upper one."""
    if h.is_cpu and h.shape[-1] >= _STRIPED_FROM and h.stride(-1) == 1:
        for index in itertools.product(*map(range, h.shape[:-2])):
            _mirror_stripes(h[index])
    else:
        h.copy_(mirrored(h))


def _mirror_stripes(h: Tensor) -> None:
    """Mirror a matrix stripe by stripe, so that what is transposed fits in the cache."""
    n, step = len(h), h.stride(0)
    width = _STRIPE if n < _WIDE_FROM else _WIDE_STRIPE
    count = n // width
    shape, strides = (count, width, width), (width * (step + 1), step, 1)
    squares = h.as_strided(shape, strides, h.storage_offset())  # on the diagonal
    squares.copy_(mirrored(squares))
    if count * width < n:
        last = h[count * width :, count * width :]
        last.copy_(mirrored(last))
    space = _spread_rows(width, n, h)
    for lo in range(width, n, width):
        stripe = slice(lo, lo + width)
        before = space[: n - lo, :lo].copy_(h[stripe, :lo])
        h[:lo, stripe] = before.T


def symmetrized_product(g: Tensor, x: Tensor) -> Tensor:
    """``(g + g.mT) @ x`` for ``g (*, n, n)`` and ``x (*, n, k)``."""
    if computed_in(x.dtype) != x.dtype:  # with loss scaling, G + Gᵀ would also overflow float16
        return symmetrized_product(g.float(), x.float()).to(x.dtype)
    if x.shape[-2] >= _ONEDNN_BACKWARD_FROM and g.dim() == 2 and x.numel() and prefers_onednn(x):
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


def _halved(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, out: Tensor, chosen: Choice
) -> None:
    n = len(a)
    a, b = pad_to_even(a, b)
    blocks = max(round(n / chosen.rows), 1)
    chains = None
    if chosen.library == "onednn" and alpha != 0 and a.numel() and prefers_onednn(a):
        parts = _chains(a)
        chains = list(zip(parts, parts if b is a else _chains(b), strict=True))
    for block in range(blocks):
        lo, hi = n * block // blocks, n * (block + 1) // blocks
        rows, c_rows = out[lo:hi, :hi], None if c is None else c[lo:hi, :hi]
        if chains:
            rows.copy_(_onednn_product([(s[lo:hi], t[:hi]) for s, t in chains], c_rows, alpha, beta))
        else:
            product(a[lo:hi], b[:hi], c_rows, alpha, beta, out=rows)
    mirror_(out)


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
