# SPDX-License-Identifier: MIT
"""Matrix products on the CPU: PyTorch's, or oneDNN's where `processor.prefers_onednn`.

`torch.ops.mkldnn._linear_pointwise`, a private name that Inductor uses too, is oneDNN's product. It
sums all terms in one chain, and the error grows with the chain's length: 784 terms have 1.5 times
the error of PyTorch's product, and 2048 have 2.1 times. Therefore sums are cut into chains of at
most `CHAIN` terms.

The lower triangle of a symmetric product is computed in parts, and mirrored.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from torchpar.library.private import count_dispatch_modes
from torchpar.library.rules import Context
from torchpar.library.transforms import is_plain
from torchpar.ops import processor
from torchpar.ops.matrix import mean_with_transpose, of_rows_alone, pad_to_tiles, product, rows
from torchpar.ops.processor import has_amx, has_bfloat16

CHAIN = 264
# Multiplications per chain and thread above which oneDNN saves more time than its call and the call
# of a `Function` take.
_MIN_PRODUCT = 4_000_000
_LEAST_ROWS = 64  # from which on chains save more time than copying the other matrix takes
_BLOCK = 512  # rows; the result that the chains add to stays in the cache
_onednn_is_enabled = torch._C._get_mkldnn_enabled  # by `torch.backends.mkldnn.flags`
# From so many rows on, half of a product and its mirror image take less time than all of the
# product and a mirror image, with one thread and with two. With few columns this takes more rows,
# and with many columns fewer.
_HALVED_FROM = 384
_FEW_COLUMNS, _HALVED_FROM_NARROW = 128, 512
_MANY_COLUMNS, _HALVED_FROM_WIDE = 2048, 192
_HALF_BLOCK, _HALF_BLOCK_BY_ONEDNN = 128, 256  # rows
# More blocks are taken in squares, for which the libraries read each number less often. Blocks
# begin at multiples of so many rows, which are whole tiles of their kernels.
_MOST_BLOCKS, _ALIGNED = 4, 32
_CACHE_LINE = 64  # bytes
# From so many rows on, stripes of so many rows are mirrored; smaller matrices are mirrored at once.
_STRIPED_FROM, _STRIPE = 512, 128


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether no compiler, transform, tensor subclass or autocast must intercept the calls."""
    return is_plain(*tensors) and not torch.is_autocast_enabled("cpu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, differentiable."""
    if not _is_for_onednn(weight, x, bias) or (bias is not None and bias.shape != weight.shape[:1]):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        return LinearFunction.apply(x, weight, bias)  # type: ignore[no-any-return]
    return _linear(x, weight, bias)


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx = mm(rows(g), weight).view(x.shape) if need_x else None
        dw = mm(rows(g).mT, rows(x)) if need_weight else None
        return dx, dw, rows(g).sum(0) if need_bias else None


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` for ``x (*, in)``, ``weight (out, in)``; not differentiable."""
    if _is_for_onednn(weight, x, bias):
        return _linear(x, weight, bias)
    return of_rows_alone(lambda x, weight: F.linear(x, weight, bias), x, weight)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_forward` for operands that `_is_for_onednn` accepts."""
    chains = _chains(weight, x)
    if not chains:
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()  # oneDNN reads it as if it were contiguous
    y = _blocked_product(rows(x), weight, chains, bias)
    if x.dim() == 2:
        return y
    # No view: autograd refuses to change a view that a Function returns.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(weight)))  # type: ignore[no-any-return]


def mm(a: Tensor, b: Tensor, most: int = CHAIN) -> Tensor:
    """``a @ b`` for matrices, differentiable; oneDNN multiplies in chains of ``most`` terms."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return a.mm(b)
    chains = _chains(b.mT, a, most) if _is_for_onednn(b.mT, a) else 0
    return _blocked_product(a, b.mT, chains) if chains else a.mm(b)


def _is_for_onednn(b: Tensor, a: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN is preferred for ``a (*, k)``, ``b (n, k)`` and ``bias``, by size, too."""
    # A compiler would refuse `processor.prefers_onednn`, which is cached. A mode may have no rule
    # for oneDNN's products, and keep results that blocks are then written to.
    if (
        torch.compiler.is_compiling()
        or not processor.prefers_onednn()
        or count_dispatch_modes()
        or not is_eager(b, a, bias)
    ):
        return False
    if b.dim() != 2 or a.numel() * len(b) < _MIN_PRODUCT * torch.get_num_threads():
        return False
    fits = a.shape[-1] == b.shape[1] and takes_onednn(a) and takes_onednn(b)
    return fits and (bias is None or takes_onednn(bias))


def takes_onednn(t: Tensor) -> bool:
    """Whether oneDNN is preferred, and takes ``t``."""
    fits = t.dtype == torch.float32 and t.is_cpu and t.layout == torch.strided
    return fits and processor.prefers_onednn() and _onednn_is_enabled()


def _chains(b: Tensor, a: Tensor, most: int = CHAIN) -> int:
    """The number of chains for ``a (*, k)`` and ``b (n, k)``; 0 where PyTorch's is faster."""
    n, k = b.shape
    chains, threads = -(-k // most), torch.get_num_threads()
    is_large = a.numel() * n >= _MIN_PRODUCT * chains * threads
    if chains > 1 and b.stride(0) != 1:  # parts of its rows are copied
        is_large = is_large and a.numel() >= k * _LEAST_ROWS
    return chains if is_large else 0


def _blocked_product(a: Tensor, b: Tensor, chains: int, bias: Tensor | None = None) -> Tensor:
    """``a @ b.T + bias``."""
    terms = cut(a, b, chains)
    if chains == 1 or len(a) <= _BLOCK:
        return in_chains(terms, bias)
    y = a.new_empty(len(a), len(b))
    for lo in range(0, len(a), _BLOCK):
        block = slice(lo, lo + _BLOCK)
        y[block] = in_chains([(s[block], t) for s, t in terms], bias)
    return y


def cut(a: Tensor, b: Tensor, chains: int) -> list[tuple[Tensor, Tensor]]:
    """Matrices ``a`` and ``b`` cut into ``chains`` groups of columns, for `in_chains`.

    Each group of columns of ``b``, or its transpose, is contiguous. With other strides oneDNN takes
    a thousand times as long.
    """
    parts = [
        t if t.is_contiguous() or t.mT.is_contiguous() else t.contiguous()
        for t in b.chunk(chains, 1)
    ]
    return list(zip(parts if a is b else a.chunk(chains, 1), parts, strict=True))


def in_chains(terms: list[tuple[Tensor, Tensor]], bias: Tensor | None = None) -> Tensor:
    """``a @ b.T + bias`` for matrices that `cut` has cut into ``terms``, chain after chain."""
    pointwise = torch.ops.mkldnn._linear_pointwise
    out: Tensor = pointwise(*terms[0], bias, "none", [], "")
    for a, b in terms[1:]:
        out = pointwise.binary(a, out, b, None, "add")
    return out


def _is_halved_from(rows: int, columns: int) -> bool:
    if columns >= _MANY_COLUMNS:
        return rows >= _HALVED_FROM_WIDE
    return rows >= _HALVED_FROM and (columns >= _FEW_COLUMNS or rows >= _HALVED_FROM_NARROW)


def is_halved(x: Tensor) -> bool:
    """Whether X·Xᵀ is computed by its lower triangle, which compilers should leave alone."""
    # A compiler guards each answer, so that each question may cost another graph.
    if x.is_cuda or not _is_halved_from(*x.shape[-2:]):
        return False
    # AMX multiplies all rows as fast as half of the result in blocks.
    return computed_in(x.dtype) != torch.bfloat16 or not has_amx()


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products: float32 where products in 16 bits take ten times as long or more."""
    slow = dtype == torch.float16 or (dtype == torch.bfloat16 and not has_bfloat16())
    return torch.float32 if slow else dtype


def symmetric_matmul(
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
            return symmetric_matmul(wide, b, c, alpha, beta, out)
        found = symmetric_matmul(wide, b, None if c is None else c.to(dtype), alpha, beta)
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
    """Compute the lower triangle in parts, and mirror it."""
    a, b = pad_to_tiles(a, b)
    n = len(a)
    terms: list[tuple[Tensor, Tensor]] = []
    if alpha != 0 and a.numel() and takes_onednn(a):
        dense = a.contiguous()  # oneDNN needs contiguous blocks of rows
        terms = cut(dense, dense if b is a else b.contiguous(), -(-a.shape[1] // CHAIN))
    blocks = max(round(n / (_HALF_BLOCK_BY_ONEDNN if terms else _HALF_BLOCK)), 1)
    for part, columns in _lower_triangle(0, n, blocks):
        out_block, c_block = out[part, columns], None if c is None else c[part, columns]
        if not terms:
            product(a[part], b[columns], c_block, alpha, beta, out=out_block)
            continue
        found = in_chains([(s[part], t[columns]) for s, t in terms])
        if c_block is None:
            torch.mul(found, alpha, out=out_block)
        else:
            torch.add(found.mul_(alpha), c_block, alpha=beta, out=out_block)
    mirror_(out)


def _lower_triangle(lo: int, hi: int, blocks: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the products that make up a lower triangle with its diagonal.

    Each of up to `_MOST_BLOCKS` blocks is a block of rows, up to the diagonal. A triangle of more
    blocks is divided into the square below the diagonal and two smaller triangles.
    """

    def begin(block: int) -> int:
        nearest = lo + round((hi - lo) * block / blocks / _ALIGNED) * _ALIGNED
        return nearest if block < blocks else hi

    if blocks <= _MOST_BLOCKS:
        for block in range(blocks):
            end = begin(block + 1)
            yield slice(begin(block), end), slice(lo, end)
        return
    middle = begin(blocks // 2)
    yield slice(middle, hi), slice(lo, middle)
    yield from _lower_triangle(lo, middle, blocks // 2)
    yield from _lower_triangle(middle, hi, blocks - blocks // 2)


def symmetric_flops(shape: tuple[int, ...]) -> int:
    """The floating-point operations of X·Xᵀ, or of another symmetric product, by X's shape alone.

    For ``(*, n, k)`` they are 2·k for each element that is computed: for all n² of them, or for
    those of the blocks of `_HALF_BLOCK` rows on and below the diagonal, from the sizes on from
    which a CPU computes the lower triangle in blocks. oneDNN's blocks are larger, and a kernel's
    tiles have other sizes.
    """
    n, k = shape[-2:]
    computed = n * n
    if _is_halved_from(n, k):
        parts = _lower_triangle(0, n, max(round(n / _HALF_BLOCK), 1))
        computed = sum((rows.stop - rows.start) * (to.stop - to.start) for rows, to in parts)
    return 2 * math.prod(shape[:-2]) * computed * k


def mirror_(h: Tensor) -> Tensor:
    """Copy the lower triangle of ``h (*, n, n)`` to the upper one; return ``h``."""
    n = h.shape[-1]
    if type(h) is not Tensor or n < _STRIPED_FROM or not h.is_cpu or h.stride(-1) != 1:
        return _mirror_lower(h)  # also in compilers, for which stripes would fix n
    # Rows lie an odd number of cache lines apart: with a large power of two between rows, the
    # elements of a column share one cache set, and a transposed copy takes up to four times as
    # long.
    lines = -(-n * h.itemsize // _CACHE_LINE) | 1
    space = h.new_empty(_STRIPE, lines * _CACHE_LINE // h.itemsize)
    for index in itertools.product(*map(range, h.shape[:-2])):
        one = h[index]
        for lo in range(0, n, _STRIPE):
            stripe = slice(lo, lo + _STRIPE)
            _mirror_lower(one[stripe, stripe])
            before = space[: n - lo, :lo].copy_(one[stripe, :lo])
            one[:lo, stripe] = before.T
    return h


def _mirror_lower(h: Tensor) -> Tensor:
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
