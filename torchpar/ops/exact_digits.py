# SPDX-License-Identifier: MIT
"""Exact sums of products: matrices as integers, whose sums do not depend on their order.

A row of A ``(m, k)`` is scaled by a power of two, rounded to integers, and cut into n signed 8-bit
digits: four of float32, and three of bfloat16 and float16.

    X = round(a · 2^(8n − 1 − e))         e: the row's exponent; |X| ≤ 2^(8n − 1) − 2^(8n − 8)
    X = Σ_p d_p · 2^(8·(n − 1 − p))       −128 ≤ d ≤ 127

For rows i of A and j of B, with the digits c and the exponents f of B,

    T_ij = Σ_k Σ_{p + q < n} d_p·c_q · 2^(8·(n − 1 − p − q))
    (A·Bᵀ)_ij ≈ T_ij · 2^(e_i + f_j − 8n − 6)

T is an integer: its bits do not depend on the order of the sum, nor on how ranks, threads or a
processor's instructions divide the sum. The products with p + q ≥ n are left out.

The error of a sum of k terms is at most k·2⁻²⁷·max|a_i|·max|b_j| for four digits, and
k·2⁻²⁰·max|a_i|·max|b_j| for three, before the result is rounded. Digit p stands for at most
2^(e − 8p). Rounding to the integer changes a number by at most 2^(e − 8n). Each of the n − 1
products of order n, which are left out, is at most 2^(e + f − 8n), and the higher orders add less
than a hundredth of them. Since 2^e < 2.02·max|a_i|, a term's error is less than
4.1·n·2^(−8n)·max|a_i|·max|b_j|, which is less than the bound.

Sources: Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix multiplication by using
fast routines of matrix multiplication and its applications", 2012; Ootomo, Ozaki and Yokota, "DGEMM
on integer matrix multiplication unit", 2024.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.kernels import Wrap
from torchpar.ops._operator import runs_kernels
from torchpar.ops.environment import cpuinfo

BITS = 8
DIGITS = {torch.float32: 4, torch.bfloat16: 3, torch.float16: 3}
"""The number of digits of a number, and of orders of their products, by the operands' dtype."""
MIN_EXPONENT, MAX_EXPONENT = -149, 129  # of rows of finite numbers
CHAIN = 2**14  # terms, for which each order fits in an int32, and T in the 53 bits of a float64
_FLOAT_CHAIN = 2**9  # terms, of two products of digits each, whose sum float32 holds
LONGEST = 2**23  # terms, for which T fits in an int64
_BELOW_16_BITS = 2 ** (53 - 16) - 1  # of a float64
# The elements that a thread cuts, or puts together, at a time: they fit in a core's cache.
_BLOCK = 2**16
# The least rows of a block: each block rearranges or converts all of the other operand.
_LEAST_ROWS, _LEAST_FLOAT_ROWS = 128, 512
# Multiplications from which int8 is faster than floats: of one product, and of each in a batch.
# From the second on half of X·Xᵀ is faster than all of it.
_MIN_PRODUCT, _MIN_LARGE_PRODUCT = 1, 2**20


@functools.cache
def has_int8() -> bool:
    """Return True if PyTorch multiplies int8 matrices exactly, by this CPU's instructions for it.

    These instructions add to int32. Elsewhere `torch._int_mm` is a plain loop, or instructions of
    oneDNN may saturate at 16 bits.
    """
    if "avx512_vnni" not in cpuinfo("flags") or not torch.backends.mkldnn.is_available():
        return False
    make = functools.partial(torch.full, (32, 64), dtype=torch.int8, device="cpu")
    least, largest = make(-128), make(127)
    pairs = ((least, least), (least, largest), (largest, largest))
    return all(torch.equal(torch._int_mm(a, b.T), a.long() @ b.T.long()) for a, b in pairs)


def power_of_two(exponents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return 2^exponents, float32 or float64, for int32 exponents of normal numbers."""
    if dtype == torch.float32:
        return ((exponents + 127) << 23).view(dtype)
    return ((exponents.long() + 1023) << 52).view(dtype)


def bits_of(count: int) -> int:
    """The bits of ``count`` digits beside the sign: |X| is less than 2 to this power."""
    return BITS * count - 1


def unit(count: int) -> int:
    """The exponent of T's unit: T counts units of 2^(e + f − unit)."""
    return 2 * bits_of(count) - BITS * (count - 1)


def rounded_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 ``x`` in a dtype of floats, rounded once, to the nearest number, ties to even.

    PyTorch rounds to float32 before it rounds to 16 bits. So x is first rounded to odd, to 16
    significant bits: if it changes, the last of them is 1. Then float32 holds it, and it is in the
    middle of two numbers of the dtype only if x is.
    """
    if dtype.itemsize > 2:
        return x.to(dtype)
    bits = x.view(torch.int64)
    odd = (bits & _BELOW_16_BITS).add_(_BELOW_16_BITS).bitwise_or_(bits)
    return odd.bitwise_and_(~_BELOW_16_BITS).view(torch.float64).to(dtype)


def row_exponents(x: Tensor) -> Tensor:
    """The exponents e ``(*, m, 1)`` int32 of the rows of ``x``.

    The exponents lie from `MIN_EXPONENT` to `MAX_EXPONENT`. The largest |x| of a row is less than
    (1 − 2⁻⁷)·2^e, and at least (½ − 2⁻⁸)·2^e unless it is 0. A row with a NaN or an infinity has an
    exponent above `MAX_EXPONENT`.
    """
    if x.shape[-1] == 0:
        return x.new_full((*x.shape[:-1], 1), MIN_EXPONENT, dtype=torch.int32)
    # In float64 none of these numbers is subnormal, and a positive number's upper bits are its
    # exponent.
    # A NaN has any sign and fraction.
    largest = x.abs().amax(-1, keepdim=True).double().nan_to_num_(math.inf, math.inf)
    bits = largest.view(torch.int64)
    return ((bits + 2**46) >> 52).sub_(1022).clamp_(MIN_EXPONENT, MAX_EXPONENT + 1).to(torch.int32)


def exponents_of_both(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The exponents of the rows of ``a`` and of ``b``; small operands take the calls of one."""
    if b is a:
        return (e := row_exponents(a)), e
    if not _are_small(a, b):
        return row_exponents(a), row_exponents(b)
    e, f = row_exponents(torch.cat([a, b], -2)).split([a.shape[-2], b.shape[-2]], -2)
    return e, f


def _are_small(a: Tensor, b: Tensor) -> bool:
    """Whether operands can be put together, and the time of calls matters more than a copy's.

    On a GPU they are not: a graph of a compiler serves all sizes there.
    """
    return not a.is_cuda and a.numel() + b.numel() <= _BLOCK and a.shape[:-2] == b.shape[:-2]


def digits(x: Tensor, e: Tensor) -> Tensor:
    """The digits ``(*, m, n, k)`` int8 of ``x (*, m, k)`` with exponents ``e (*, m, 1)``.

    |x| < (1 − 2⁻⁷)·2^e holds for all elements. The digits of rows that are not finite mean nothing.
    """
    if x.numel() <= _BLOCK:
        return _cut(x, e).to(torch.int8)  # which keeps the lowest 8 bits
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], DIGITS[x.dtype], x.shape[-1], dtype=torch.int8)
    for block in _blocks(len(x), x[:1].numel()):
        out[block] = _cut(x[block], e[block])
    return out


def _cut(x: Tensor, e: Tensor) -> Tensor:
    """The digits of ``x`` as the lowest 8 bits of int32."""
    count = DIGITS[x.dtype]
    shifts = torch.arange(BITS * (count - 1), -1, -BITS, dtype=torch.int32, device=x.device)
    # Half of the range of each digit but the first. It is added before the cut, so that the digits
    # are signed.
    carry = sum(2 ** (BITS * p + BITS - 1) for p in range(count - 1))
    # Float64 has any power of two that a row needs; the numbers are then below 2³¹.
    integers = (x * power_of_two(bits_of(count) - e, torch.float64)).round_().to(torch.int32)
    # To flip the sign bit of each byte but the first makes digits of the bytes.
    integers.add_(carry).bitwise_xor_(carry)
    return integers.unsqueeze(-2) >> shifts[:, None]


def _both_digits(a: Tensor, b: Tensor, e: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    if b is a:
        return (x := digits(a, e)), x
    if not (_are_small(a, b) and e.shape[:-2] == f.shape[:-2]):
        return digits(a, e), digits(b, f)
    both = digits(torch.cat([a, b], -2), torch.cat([e, f], -2))
    x, y = both.split([a.shape[-2], b.shape[-2]], -3)
    return x, y


def _blocks(rows: int, columns: int, least: int = 1) -> Iterator[slice]:
    """Blocks of rows of about `_BLOCK` elements for each thread, and of at least ``least`` rows."""
    step = _rows_of_block(columns, least)
    return (slice(first, first + step) for first in range(0, rows, step))


def _rows_of_block(columns: int, least: int) -> int:
    return max(_BLOCK * torch.get_num_threads() // max(columns, 1), least)


def scaled(x: Tensor, exponents: Tensor) -> Tensor:
    """``2^exponents · x`` in float32, a new tensor; exact where the result is a normal number."""
    normal = exponents.clamp(-126, 127)  # other powers of two are not normal float32 numbers
    return (x * power_of_two(normal)).mul_(power_of_two(exponents - normal))


def product_of_exponents(
    a: Tensor,
    b: Tensor,
    e: Tensor,
    f: Tensor,
    wrap: Wrap = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``a @ b.mT`` for ``a (*, m, k)`` and ``b (*, n, k)`` of one dtype by exact sums.

    ``e (*, m, 1)`` and ``f (*, n, 1)`` are the exponents of the rows. If ``b is a``, half of the
    product is computed. It is rounded once, to ``dtype``, by default to that of the operands.
    """
    dtype = a.dtype if dtype is None else dtype
    if runs_kernels(a, b) or wrap is not None:
        return _by_kernel(a, b, e, f, wrap, dtype)
    out = rounded(_sums(a, b, e, f), e, f, a.dtype, dtype)
    if not (torch.cat([e.flatten(), f.flatten()]) > MAX_EXPONENT).any():
        return out
    # Whether the result is NaN, and which infinity, depends on the signs of the factors alone.
    signs = [torch.where(t.isfinite(), t.sign(), t).float() for t in (a, b)]
    limits = (signs[0] @ signs[1].mT).to(dtype)
    return torch.where((e > MAX_EXPONENT) | (f > MAX_EXPONENT).mT, limits, out)


def sums(a: Tensor, b: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """T ``(m, n)`` int64 of matrices, whose rows have the exponents ``e (m, 1)`` and ``f (n, 1)``.

    The entries of T for rows that are not finite mean nothing.
    """
    return (
        _by_kernel(a, b, e, f, None, torch.int64)
        if runs_kernels(a, b)
        else _sums(a, b, e, f).long()
    )


def _by_kernel(
    a: Tensor,
    b: Tensor,
    e: Tensor,
    f: Tensor,
    wrap: Wrap,
    dtype: torch.dtype,
) -> Tensor:
    from torchpar.kernels.exact_matmul import exact_product

    return exact_product(a, b, e, f, wrap, out=a.new_empty(*a.shape[:-1], b.shape[-2], dtype=dtype))


def _sums(a: Tensor, b: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """T ``(*, m, n)``, float64 or int64; if ``b is a``, half of a large T is computed."""
    k = a.shape[-1]
    if k > LONGEST:
        raise ConfigError(f"an exact sum has {k} terms, expected at most {LONGEST}; split it")
    x, y = _both_digits(a, b, e, f)
    m, n = a.shape[-2], b.shape[-2]
    by_int8 = has_int8() and torch.backends.mkldnn.enabled
    least = _MIN_PRODUCT if by_int8 and a.dim() == 2 else _MIN_LARGE_PRODUCT
    if m * n * k < least or not (by_int8 or b is a):
        return _chained(_float_sums, x, y)
    of_block, least = (_int8_sums, _LEAST_ROWS) if by_int8 else (_float_sums, _LEAST_FLOAT_ROWS)
    if a.dim() == 2 and m <= _rows_of_block(n, least):
        return _chained(of_block, x, y)
    total = a.new_empty(*a.shape[:-2], m, n, dtype=torch.float64 if k <= CHAIN else torch.int64)
    for i in itertools.product(*map(range, a.shape[:-2])):
        whole, left, right = total[i], x[i], y[i]
        for rows in _blocks(m, n, least):
            columns = slice(rows.stop if b is a else n)
            part, operands = whole[rows, columns], (left[rows], right[columns])
            if by_int8 and k <= CHAIN:
                _int8_sums(*operands, total=part)
            else:
                part.copy_(_chained(of_block, *operands))
            if b is a:
                done = slice(rows.start)
                whole[done, rows] = whole[rows, done].T
    return total


def _chained(of_chain: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """``of_chain(a, b)`` for any number of terms; ``of_chain`` itself takes at most `CHAIN`."""
    if a.shape[-1] <= CHAIN:
        return of_chain(a, b)
    pairs = zip(a.split(CHAIN, -1), b.split(CHAIN, -1), strict=True)
    return functools.reduce(Tensor.add_, (of_chain(x, y).long() for x, y in pairs))


def _int8_sums(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """T ``(m, n)`` in float64, by products of int8; written into ``total`` if that is given."""
    (m, _, k), n = a.shape, len(b)
    # Order s: Σ_p d_(s − p)·c_p is one product, over the leading digits of A, reversed, and the
    # leading digits of B.
    left, right = a.flip(1).flatten(1), b.flatten(1)
    order = a.new_empty(m, n, dtype=torch.int32)
    torch._int_mm(left[:, -k:], right[:, :k].T, out=order)
    total = order.double() if total is None else total.copy_(order)
    # In place: the first use of new memory takes longer than these sums.
    for s in range(2, a.shape[1] + 1):
        torch._int_mm(left[:, -s * k :], right[:, : s * k].T, out=order)
        torch.add(order, total, alpha=2**BITS, out=total)
    return total


def _float_sums(a: Tensor, b: Tensor) -> Tensor:
    """T ``(*, m, n)`` in float64, by products of floats whose sums are exact.

    Of four digits T = Σ_k (d₀·2⁸ + d₁)·(c₀·2¹⁶ + c₁·2⁸ + c₂) + (d₂·2⁸ + d₃)·c₀ in float64, plus
    d₀·c₃ + d₂·c₁ in float32. Of three digits T = Σ_k (d₀·2⁸ + d₁)·(c₀·2⁸ + c₁) in float64, plus
    d₀·c₂ + d₂·c₀ in float32.
    """
    even, odd = slice(0, None, 2), slice(1, None, 2)
    if a.shape[-2] == 3:
        left, right = (
            torch.add(t[..., 1, :], t[..., 0, :].double(), alpha=2**BITS) for t in (a, b)
        )
        odd = even
    else:
        left = torch.add(a[..., odd, :], a[..., even, :].double(), alpha=2**BITS).flatten(-2)
        first = b[..., 0, :].double()
        leading = torch.add(b[..., 1, :], first, alpha=2**BITS).mul_(2**BITS).add_(b[..., 2, :])
        right = torch.stack([leading, first], -2).flatten(-2)
    total = left @ right.mT
    chains = (t.float().split(_FLOAT_CHAIN, -1) for t in (a[..., even, :], b[..., odd, :].flip(-2)))
    for x, y in zip(*chains, strict=True):
        total += x.flatten(-2) @ y.flatten(-2).mT
    return total.add_(0.0)  # makes 0 of −0, the product of 0 and a negative number


def rounded(
    total: Tensor, e: Tensor, f: Tensor, like: torch.dtype, dtype: torch.dtype | None = None
) -> Tensor:
    """The product ``(*, m, n)``, from T and the exponents of the rows of operands in ``like``.

    It has ``dtype``, by default that of the operands. The exponents are ``e (*, m, 1)`` and
    ``f (*, n, 1)``. T is rounded once; above 2⁵³ it is rounded to float64 before. Rows that are not
    finite make results NaN. T in float64 is overwritten.
    """
    both = e if f is e else torch.cat([e, f], -2)
    powers = power_of_two(both - unit(DIGITS[like]) // 2, torch.float64)
    powers = torch.where(both > MAX_EXPONENT, torch.nan, powers)
    m, n = e.shape[-2], f.shape[-2]
    left, right = powers[..., :m, :], powers[..., both.shape[-2] - n :, :].mT
    return rounded_to(total.double().mul_(left).mul_(right), dtype or like)
