# SPDX-License-Identifier: MIT
"""Exact sums of products: float32 matrices as integers, whose sums do not depend on their order.

A row of A ``(m, k)`` is scaled by a power of two, rounded to integers, and cut into four signed 8-bit digits:

    X = round(a · 2^(31 − e))                          e: the row's exponent, such that |X| ≤ 2³¹ − 2²⁴
    X = d₀·2²⁴ + d₁·2¹⁶ + d₂·2⁸ + d₃                   −128 ≤ d ≤ 127

For rows i of A and j of B, with the digits c and the exponents f of B,

    T_ij = Σ_k Σ_{p + q ≤ 3} d_p·c_q · 2^(8·(3 − p − q))
    (A·Bᵀ)_ij ≈ T_ij · 2^(e_i + f_j − 38)

T is an integer: its bits do not depend on the order of the sum, nor on how ranks, threads or a processor's
instructions share it. The products with p + q > 3, of the orders 4 to 6, are left out.

Sources: Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix multiplication by using fast
routines of matrix multiplication and its applications", 2012; Ootomo, Ozaki and Yokota, "DGEMM on integer
matrix multiplication unit", 2024.
"""

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from torchpar.ops._library import Wrap

DIGITS, BITS = 4, 8
SCALE = DIGITS * BITS - 1  # |X| < 2^SCALE
WEIGHT = 2 * SCALE - BITS * (DIGITS - 1)  # T counts units of 2^(e + f − WEIGHT)
MIN_EXPONENT, MAX_EXPONENT = -149, 129  # of rows of finite numbers
# Half of the range of each digit but the first. Added before the cut, it makes the digits signed.
CARRY = sum(2 ** (BITS * p + BITS - 1) for p in range(DIGITS - 1))
CHAIN = 2**14  # terms, for which each order fits in an int32, and T in the 53 bits of a float64
LONG_CHAIN = 2**23  # terms, for which T fits in an int64
_BLOCK = 2**17  # elements that are cut, or put together, at a time: they fit in the processor's cache
_HALVED_BLOCK = 256  # rows of a block on the diagonal, of which all is computed
_MIN_INT8_PRODUCT = 2**20  # multiplications from which int8 is faster than float64


@cache
def has_int8() -> bool:
    """Return True if PyTorch multiplies int8 matrices on this CPU by instructions that add to int32 exactly.

    Elsewhere `torch._int_mm` is a plain loop, or instructions of oneDNN may saturate at 16 bits.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    if "avx512_vnni" not in flags or not torch.backends.mkldnn.is_available():
        return False
    least, largest = (torch.full((32, 64), value, dtype=torch.int8) for value in (-128, 127))
    pairs = ((least, least), (least, largest), (largest, largest))
    return all(torch.equal(torch._int_mm(a, b.T), a.long() @ b.T.long()) for a, b in pairs)


def power_of_two(exponents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return 2^exponents, float32 or float64, for int32 exponents of normal numbers."""
    if dtype == torch.float32:
        return ((exponents + 127) << 23).view(dtype)
    return ((exponents.long() + 1023) << 52).view(dtype)


def row_exponents(x: Tensor) -> Tensor:
    """The exponents e ``(*, m, 1)`` int32 of the rows of ``x``, from `MIN_EXPONENT` to `MAX_EXPONENT`.

    The largest |x| of a row is less than (1 − 2⁻⁷)·2^e, and at least (½ − 2⁻⁸)·2^e unless it is 0. A row
    with a NaN or an infinity has an exponent above `MAX_EXPONENT`.
    """
    if x.shape[-1] == 0:
        return x.new_full((*x.shape[:-1], 1), MIN_EXPONENT, dtype=torch.int32)
    largest = x.abs().amax(-1, keepdim=True)
    # A small number is scaled, since it may be subnormal.
    scale = 32 * (largest < 1).int()
    bits = (largest * power_of_two(scale)).view(torch.int32)
    # The bits of a positive float grow with it, and the upper ones are its exponent.
    exponents = (((bits + 2**17) >> 23) - 126 - scale).clamp(min=MIN_EXPONENT)
    return torch.where(largest < torch.inf, exponents, MAX_EXPONENT + 1)


def digits(x: Tensor, e: Tensor) -> Tensor:
    """The digits ``(*, m, 4, k)`` int8 of the rows of ``x (*, m, k)``, of exponents ``e (*, m, 1)``.

    ``x`` is finite. |x| < (1 − 2⁻⁷)·2^e holds for all its elements.
    """
    *batch, m, k = x.shape
    if x.dim() == 2 and x.stride(0) == 1 != x.stride(1):  # columns are contiguous, also those of the digits
        planes = x.new_empty(DIGITS, k, m, dtype=torch.int8)
        out, source, exponents = planes.permute(2, 0, 1), x.T, e.T.expand(k, m)
    else:
        out = x.new_empty(*batch, m, DIGITS, k, dtype=torch.int8)
        planes, source, exponents = out.movedim(-2, 0), x, e
    for block in _blocks(len(source), source[:1].numel()):
        integers = scaled(source[block], SCALE - exponents[block]).round_().to(torch.int32).add_(CARRY)
        for p in range(DIGITS):
            planes[p, block].copy_(integers >> BITS * (DIGITS - 1 - p))  # int8 keeps the lowest 8 bits
    planes[1:].bitwise_xor_(-(2 ** (BITS - 1)))
    return out


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Blocks of rows of about `_BLOCK` elements."""
    step = max(_BLOCK // max(columns, 1), 1)
    return (slice(first, first + step) for first in range(0, rows, step))


def scaled(x: Tensor, exponents: Tensor) -> Tensor:
    """``2^exponents · x`` in float32, a new tensor; exact where the result is a normal number."""
    normal = exponents.clamp(-126, 127)  # other powers of two are not normal float32 numbers
    result = x * power_of_two(normal)
    if x.is_cuda or not torch.equal(normal, exponents):  # on a GPU the comparison would synchronise
        result *= power_of_two(exponents - normal)
    return result


def product(a: Tensor, b: Tensor, wrap: Wrap) -> Tensor:
    """``a @ b.mT`` for ``a (*, m, k)`` and ``b (*, n, k)``; if ``b is a``, half of it is computed."""
    e = row_exponents(a)
    f = e if b is a else row_exponents(b)
    if a.is_cuda or wrap is not None:
        from torchpar.kernels.exact_matmul import exact_product

        shape, k = (*a.shape[:-1], b.shape[-2]), a.shape[-1]
        if isinstance(k, torch.SymInt) or k <= LONG_CHAIN:
            return exact_product(a, b, e, f, wrap, out=a.new_empty(shape))
        total = a.new_zeros(shape, dtype=torch.float64)
        for x, y in zip(a.split(LONG_CHAIN, -1), b.split(LONG_CHAIN, -1), strict=True):
            total += exact_product(x, y, e, f, wrap, out=a.new_empty(shape, dtype=torch.int64))
        return _with_limits(rounded(total, e, f), a, b, e, f)
    if (e > MAX_EXPONENT).any() or (f > MAX_EXPONENT).any():
        finite = [torch.where(t.isfinite(), t, 0) for t in (a, b)]
        out = _product(finite[0], finite[1], e.clamp(max=MAX_EXPONENT), f.clamp(max=MAX_EXPONENT))
        return _with_limits(out, a, b, e, f)
    return _halved(a, e) if b is a else _product(a, b, e, f)


def product_of_exponents(a: Tensor, b: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """``a @ b.mT`` of rows with the exponents ``e (*, m, 1)`` and ``f (*, n, 1)``.

    ``b`` is finite. A row of ``a`` that is not gives NaN.
    """
    if a.is_cuda:
        from torchpar.kernels.exact_matmul import exact_product

        return exact_product(a, b, e, f, None, out=a.new_empty(*a.shape[:-1], b.shape[-2]))
    finite = torch.where(e > MAX_EXPONENT, 0.0, a)
    return Sums(digits(finite, e.clamp(max=MAX_EXPONENT)), digits(b, f)).rounded(e, f)


def _with_limits(out: Tensor, a: Tensor, b: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """``out``, but NaN and infinities where rows of ``a`` or ``b`` have them."""
    # Whether the result is NaN, and which infinity, depends on the signs of the factors alone.
    signs = [torch.where(t.isfinite(), t.sign(), t) for t in (a, b)]
    return torch.where((e > MAX_EXPONENT) | (f > MAX_EXPONENT).mT, signs[0] @ signs[1].mT, out)


def _product(a: Tensor, b: Tensor, e: Tensor, f: Tensor) -> Tensor:
    return Sums(digits(a, e), digits(b, f)).rounded(e, f)


def _halved(x: Tensor, e: Tensor) -> Tensor:
    n, cut = x.shape[-2], digits(x, e)
    if x.dim() > 2 or n < 2 * _HALVED_BLOCK:
        return Sums(cut, cut).rounded(e, e)
    out = x.new_empty(n, n)
    for lo in range(0, n, _HALVED_BLOCK):
        hi = min(lo + _HALVED_BLOCK, n)
        out[lo:hi, :hi] = Sums(cut[lo:hi], cut[:hi]).rounded(e[lo:hi], e[:hi])
        out[:lo, lo:hi] = out[lo:hi, :lo].T
    return out


class Sums:
    """T ``(*, m, n)`` of the digits ``a (*, m, 4, k)`` and ``b (*, n, 4, k)``."""

    def __init__(self, a: Tensor, b: Tensor):
        self.shape = (*a.shape[:-2], b.shape[-3])
        self._like = a
        self._total: Tensor | None = None  # T, of several chains
        self._orders: list[Tensor] = []  # of one chain: the sums of each order, or T
        if a.shape[-1] <= CHAIN:
            self._orders = _orders(a, b)
            return
        # The T of a chain of more than LONG_CHAIN terms is added in float64, in order and with rounding.
        length, dtype = (LONG_CHAIN, torch.float64) if a.shape[-1] > LONG_CHAIN else (CHAIN, torch.int64)
        self._total = a.new_zeros(self.shape, dtype=dtype)
        for chain in zip(a.split(length, -1), b.split(length, -1), strict=True):
            for block, part in Sums(*chain).blocks():
                self._total[block] += part.to(dtype)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of T along its first dimension, as float64 or int64."""
        if self._total is not None:
            yield slice(None), self._total
        elif len(self._orders) == 1:
            yield slice(None), self._orders[0]
        else:
            for block in _blocks(self.shape[0], math.prod(self.shape[1:])):
                total = self._orders[0][block].double()
                for order in self._orders[1:]:
                    torch.add(order[block], total, alpha=2**BITS, out=total)
                yield block, total

    def long(self) -> Tensor:
        """T as int64."""
        total = self._like.new_empty(self.shape, dtype=torch.int64)
        for block, part in self.blocks():
            total[block] = part
        return total

    def rounded(self, e: Tensor, f: Tensor) -> Tensor:
        """`rounded` of T."""
        out = self._like.new_empty(self.shape, dtype=torch.float32)
        for block, part in self.blocks():
            out[block] = rounded(part, e[block], f if f.dim() == 2 else f[block])
        return out


def _orders(a: Tensor, b: Tensor) -> list[Tensor]:
    k = a.shape[-1]
    is_large = k > 0 and a.shape[-3] * b.shape[-3] * k >= _MIN_INT8_PRODUCT
    if is_large and has_int8() and torch.backends.mkldnn.enabled:
        if a.dim() > 3:
            pairs = zip(a.flatten(0, -4), b.flatten(0, -4), strict=True)
            by_order = zip(*(_orders(x, y) for x, y in pairs), strict=True)
            return [torch.stack(order).view(*a.shape[:-2], b.shape[-3]) for order in by_order]
        # Order s: Σ_p d_p·c_(s − p) is one product over the leading digits of A and those of B, reversed.
        left, right = _concatenated(a), _concatenated(b, reverse=True)
        return [torch._int_mm(left[:, : n * k], right[:, -n * k :].T) for n in range(1, DIGITS + 1)]
    # Products of float64, whose terms add up to less than 2⁵³: Σ_p d_p · (the first 4 − p digits of B).
    leading = b.select(-2, 0).double()
    total = a.select(-2, DIGITS - 1).double() @ leading.mT
    for q in range(1, DIGITS):
        leading.mul_(2**BITS).add_(b.select(-2, q))
        total += a.select(-2, DIGITS - 1 - q).double() @ leading.mT
    return [total.add_(0.0)]  # makes 0 of −0, the product of 0 and a negative number


def _concatenated(digits: Tensor, reverse: bool = False) -> Tensor:
    """``digits (m, 4, k)`` as ``(m, 4·k)``: all first digits, then all second ones, …, or in reverse."""
    if digits.stride(-1) == 1:
        return (digits.flip(1) if reverse else digits).flatten(1)
    planes = digits.permute(1, 2, 0)
    return (planes.flip(0) if reverse else planes).flatten(0, 1).T


def rounded(total: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """The product in float32 ``(*, m, n)``, from T and the exponents ``e (*, m, 1)`` and ``f (*, n, 1)``.

    T is rounded once; above 2⁵³, to float64 before. Rows that are not finite make results NaN.
    """
    return (total.double() * finite_power(e)).mul_(finite_power(f.mT, -WEIGHT)).float()


def finite_power(e: Tensor, more: int = 0) -> Tensor:
    """2^(e + more) in float64; NaN for rows that are not finite."""
    return torch.where(e > MAX_EXPONENT, torch.nan, power_of_two(e + more, torch.float64))
