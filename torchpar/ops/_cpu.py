# SPDX-License-Identifier: MIT
"""Matrix products on the CPU: half of a symmetric one, and float32 by the faster of PyTorch's two libraries.

PyTorch gives bfloat16 products to oneDNN and float32 ones to its BLAS, and MKL keeps to AVX2 on processors
of other makers: two cores of an AMD EPYC multiply float32 by oneDNN at 440 GFLOP/s, by MKL at 205. The one
private name used here is `torch.ops.mkldnn._linear_pointwise`, by which Inductor calls oneDNN. oneDNN adds
the terms of a float32 product in one chain, whose error grows with its length; cut into chains of `_CHAIN`
terms, its error is MKL's.
"""

import itertools
from functools import cache, lru_cache

import torch
from torch import Tensor

from torchpar.ops._matrix import mirrored, product

_HALVED_FROM = 256  # rows
# Rows computed together: with more, more is computed in vain; with fewer, the library works less well. Of up
# to one and a half times as many all is computed, and the lower half kept.
_BLOCK = 256
_BLOCK_FLOAT64 = 128
_CHAIN = 128
_ONEDNN_FROM = 384  # rows, from which its calls' number is made up for
_CACHE_LINE = 64  # bytes


def is_halved(t: Tensor) -> bool:
    """Whether `symmetric_product` computes a product of ``t``'s rows block by block."""
    return not t.is_cuda and t.shape[-2] >= _HALVED_FROM


def symmetric_product(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """``alpha * a @ b.mT + beta * c``, known to be symmetric, for ``a, b (*, n, k)`` and ``c (*, n, n)``.

    The result equals its transpose bit for bit.
    """
    if a.dtype == torch.float16:  # whose products take PyTorch ten times as long as float32's
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


def symmetrized_product(g: Tensor, x: Tensor) -> Tensor:
    """``(g + g.mT) @ x`` for ``g (*, n, n)`` and ``x (*, n, k)``."""
    if x.dtype == torch.float16:  # as above; and G + Gᵀ could overflow where a scaled loss fills its range
        return symmetrized_product(g.float(), x.float()).half()
    if g.dim() > 2 or not is_halved(x) or not _prefers_onednn(x):
        return _transposed(g).add_(g) @ x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    terms = [_transposed(part) for part in x.split(_CHAIN)]
    space = _spread_rows(len(g), _BLOCK, g)
    for lo in range(0, len(g), _BLOCK):
        block = slice(lo, lo + _BLOCK)
        columns = space[:, : len(g[block])].copy_(g[:, block])
        rows = _transposed(columns).add_(g[block])  # of G + Gᵀ, which is never whole
        out[block] = _onednn_product(list(zip(_chains(rows), terms, strict=True)))
    return out


def _halved(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, out: Tensor) -> None:
    n = len(a)
    blocks = max(round(n / (_BLOCK_FLOAT64 if a.dtype == torch.float64 else _BLOCK)), 1)
    chains = None
    if n >= _ONEDNN_FROM and alpha and _prefers_onednn(a):
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
        torch.where(_lower(hi - lo, out.device), diagonal, diagonal.mT, out=out[lo:hi, lo:hi])


def _spread_rows(n: int, columns: int, like: Tensor) -> Tensor:
    """``(n, columns)``, an odd number of cache lines from row to row.

    Elements of a column that lie a large power of two apart fall into one cache set, and a transposed copy
    takes up to four times as long.
    """
    lines = -(-columns * like.itemsize // _CACHE_LINE) | 1
    return like.new_empty(n, lines * _CACHE_LINE // like.itemsize)[:, :columns]


@lru_cache(maxsize=8)
def _lower(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


def _transposed(t: Tensor) -> Tensor:
    # Adding one transposed matrix to another takes PyTorch longer than copying it first.
    return t.mT.clone(memory_format=torch.contiguous_format)


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _prefers_onednn(t: Tensor) -> bool:
    usable = t.is_cpu and bool(torch.backends.mkldnn.enabled) and _has_onednn()
    return usable and t.dtype == torch.float32 and t.numel() > 0


def _chains(t: Tensor) -> list[Tensor]:
    return [part.contiguous() for part in t.split(_CHAIN, 1)]


def _onednn(a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
    """``a @ b.T``, added to ``onto``, in one chain, for contiguous float32 matrices."""
    linear = torch.ops.mkldnn._linear_pointwise
    if onto is None:
        return linear(a, b, None, "none", [], "")  # type: ignore[no-any-return]
    return linear.binary(a, onto, b, None, "add")  # type: ignore[no-any-return]


def _onednn_product(
    chains: list[tuple[Tensor, Tensor]], c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    out = _onednn(*chains[0])
    for a, b in chains[1:]:
        out = _onednn(a, b, out)
    if alpha != 1:
        out *= alpha
    return out if c is None or beta == 0 else out.add_(c, alpha=beta)
