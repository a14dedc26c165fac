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

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.library import Wrap
from torchpar.ops.processor import cpuinfo

DIGITS, BITS = 4, 8
SCALE = DIGITS * BITS - 1  # |X| < 2^SCALE
WEIGHT = 2 * SCALE - BITS * (DIGITS - 1)  # T counts units of 2^(e + f − WEIGHT)
MIN_EXPONENT, MAX_EXPONENT = -149, 129  # of rows of finite numbers
# Half of the range of each digit but the first. Added before the cut, it makes the digits signed.
CARRY = sum(2 ** (BITS * p + BITS - 1) for p in range(DIGITS - 1))
_SHIFTS = torch.arange(BITS * (DIGITS - 1), -1, -BITS, dtype=torch.int32, device="cpu")
CHAIN = 2**14  # terms, for which each order fits in an int32, and T in the 53 bits of a float64
LONGEST = 2**23  # terms, for which T fits in an int64
_FLOAT_CHAIN = 2**10  # products of two digits, whose sum float32 holds
_BLOCK = 2**16  # elements to a thread that are cut, or put together, at a time: they fit in a core's cache
# The least rows of a block: each block rearranges or converts the whole other operand.
_LEAST_ROWS, _LEAST_FLOAT_ROWS = 128, 512
# Multiplications from which int8 is faster than floats, and half of X·Xᵀ faster than all of it.
_MIN_LARGE_PRODUCT = 2**20


@functools.cache
def has_int8() -> bool:
    """Return True if PyTorch multiplies int8 matrices on this CPU by instructions that add to int32 exactly.

    Elsewhere `torch._int_mm` is a plain loop, or instructions of oneDNN may saturate at 16 bits.
    """
    if "avx512_vnni" not in cpuinfo("flags") or not torch.backends.mkldnn.is_available():
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
    # In float64 no such number is subnormal, and the upper bits of a positive one are its exponent.
    bits = x.abs().amax(-1, keepdim=True).double().view(torch.int64)
    return ((bits + 2**46) >> 52).sub_(1022).clamp_(MIN_EXPONENT, MAX_EXPONENT + 1).to(torch.int32)


def digits(x: Tensor, e: Tensor) -> Tensor:
    """The digits ``(*, m, 4, k)`` int8 of the rows of ``x (*, m, k)``, of exponents ``e (*, m, 1)``.

    ``x`` is finite. |x| < (1 − 2⁻⁷)·2^e holds for all its elements.
    """
    *batch, m, k = x.shape
    if x.dim() == 2 and x.stride(0) == 1 != x.stride(1):  # columns are contiguous, also those of the digits
        planes = x.new_empty(DIGITS, k, m, dtype=torch.int8)
        out, into = planes.permute(2, 0, 1), planes.movedim(0, 1)
        source, exponents = x.T, e.T.expand(k, m)
    else:
        out = into = x.new_empty(*batch, m, DIGITS, k, dtype=torch.int8)
        source, exponents = x, e
    for block in _blocks(len(source), source[:1].numel()):
        _write_digits(into[block], source[block], exponents[block])
    return out


def _write_digits(into: Tensor, x: Tensor, e: Tensor) -> None:
    integers = scaled(x, SCALE - e).round_().to(torch.int32)
    # Flipping the sign bit of each byte but the first makes digits of them; int8 keeps the lowest 8 bits.
    integers.add_(CARRY).bitwise_xor_(CARRY)
    into.copy_(integers.unsqueeze(-2) >> _SHIFTS.to(x.device)[:, None])


def _blocks(rows: int, columns: int, least: int = 1) -> Iterator[slice]:
    """Blocks of rows of about `_BLOCK` elements for each thread, and of at least ``least`` rows."""
    step = max(_BLOCK * torch.get_num_threads() // max(columns, 1), least)
    return (slice(first, first + step) for first in range(0, rows, step))


def scaled(x: Tensor, exponents: Tensor) -> Tensor:
    """``2^exponents · x`` in float32, a new tensor; exact where the result is a normal number."""
    normal = exponents.clamp(-126, 127)  # other powers of two are not normal float32 numbers
    result = x * power_of_two(normal)
    # On a GPU the comparison would synchronise.
    if x.is_cuda or not torch.equal(normal, exponents):
        result *= power_of_two(exponents - normal)
    return result


def product(a: Tensor, b: Tensor, wrap: Wrap) -> Tensor:
    """``a @ b.mT`` for ``a (*, m, k)`` and ``b (*, n, k)``; if ``b is a``, half of it is computed."""
    e = row_exponents(a)
    f = e if b is a else row_exponents(b)
    if a.is_cuda or wrap is not None:
        return _by_kernel(a, b, e, f, wrap)
    if (torch.cat([e.flatten(), f.flatten()]) > MAX_EXPONENT).any():
        finite = [torch.where(t.isfinite(), t, 0) for t in (a, b)]
        return _with_limits(product(finite[0], finite[1], None), a, b, e, f)
    cut = digits(a, e)
    return Sums(cut, cut if b is a else digits(b, f)).rounded(e, f)


def product_of_exponents(a: Tensor, b: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """``a @ b.mT`` of rows with the exponents ``e (*, m, 1)`` and ``f (*, n, 1)``.

    ``b`` is finite. A row of ``a`` that is not gives NaN.
    """
    if a.is_cuda:
        return _by_kernel(a, b, e, f)
    finite = torch.where(e > MAX_EXPONENT, 0.0, a)
    return Sums(digits(finite, e.clamp(max=MAX_EXPONENT)), digits(b, f)).rounded(e, f)


def sums(a: Tensor, b: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """T ``(m, n)`` int64 of matrices, whose rows have the exponents ``e (m, 1)`` and ``f (n, 1)``.

    Those of rows that are not finite mean nothing.
    """
    return _by_kernel(a, b, e, f, None, torch.int64) if a.is_cuda else Sums(digits(a, e), digits(b, f)).long()


def _by_kernel(
    a: Tensor, b: Tensor, e: Tensor, f: Tensor, wrap: Wrap = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    from torchpar.kernels.exact_matmul import exact_product

    return exact_product(a, b, e, f, wrap, out=a.new_empty(*a.shape[:-1], b.shape[-2], dtype=dtype))


def _with_limits(out: Tensor, a: Tensor, b: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """``out``, but NaN and infinities where rows of ``a`` or ``b`` have them."""
    # Whether the result is NaN, and which infinity, depends on the signs of the factors alone.
    signs = [torch.where(t.isfinite(), t.sign(), t) for t in (a, b)]
    return torch.where((e > MAX_EXPONENT) | (f > MAX_EXPONENT).mT, signs[0] @ signs[1].mT, out)


class Sums:
    """T ``(*, m, n)`` of the digits ``a (*, m, 4, k)`` and ``b (*, n, 4, k)``; half of it if ``b is a``.

    Raises:
        ConfigError: more than `LONGEST` terms.
    """

    def __init__(self, a: Tensor, b: Tensor):
        if a.shape[-1] > LONGEST:
            raise ConfigError(f"an exact sum has {a.shape[-1]} terms, expected at most {LONGEST}; split it")
        self.shape = (*a.shape[:-2], b.shape[-3])
        self.a = a.flatten(0, -4) if a.dim() > 3 else a[None]
        self.b = self.a if b is a else b.flatten(0, -4) if b.dim() > 3 else b[None]

    def blocks(self) -> Iterator[tuple[tuple[slice | int, ...], Tensor]]:
        """The parts of T, float64 or int64, with their indices.

        If ``b is a``, they may end at the diagonal; `_mirror` completes the result.
        """
        (batch, m, _, _), n = self.a.shape, self.b.shape[1]
        if not self._is_large():
            for block in _blocks(batch, m * n):
                yield (block,), _chained(_float_sums, self.a[block], self.b[block])
            return
        is_square = self.a is self.b
        if has_int8() and torch.backends.mkldnn.enabled:
            sums, least = _int8_sums, _LEAST_ROWS
        else:
            sums, least = _float_sums, _LEAST_FLOAT_ROWS if is_square else m
        for i in range(batch):
            for rows in _blocks(m, n, least):
                columns = slice(min(rows.stop, m) if is_square else n)
                yield (i, rows, columns), _chained(sums, self.a[i, rows], self.b[i, columns])

    def _is_large(self) -> bool:
        return self.a.shape[1] * self.b.shape[1] * self.a.shape[-1] >= max(_MIN_LARGE_PRODUCT, 1)

    def _mirror(self, out: Tensor, index: Any) -> None:
        if self.b is self.a and len(index) > 1:
            i, rows, _ = index
            left = slice(rows.start)
            out[i, left, rows] = out[i, rows, left].T

    def long(self) -> Tensor:
        """T as int64."""
        total = self.a.new_empty(len(self.a), *self.shape[-2:], dtype=torch.int64)
        for index, part in self.blocks():
            total[index] = part
            self._mirror(total, index)
        return total.view(self.shape)

    def rounded(self, e: Tensor, f: Tensor) -> Tensor:
        """`rounded` of T."""
        out = self.a.new_empty(len(self.a), *self.shape[-2:], dtype=torch.float32)
        rows, columns = (
            t.expand(self.shape).view_as(out) if t.dim() == 2 else t.flatten(0, -3).expand_as(out)
            for t in (finite_power(e), finite_power(f.mT, -WEIGHT))
        )
        for index, part in self.blocks():
            out[index] = (part.double() * rows[index]).mul_(columns[index])
            self._mirror(out, index)
        return out.view(self.shape)


def _chained(sums: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """``sums(a, b)``, which is for at most `CHAIN` terms, of any number of terms."""
    if a.shape[-1] <= CHAIN:
        return sums(a, b)
    pairs = zip(a.split(CHAIN, -1), b.split(CHAIN, -1), strict=True)
    return functools.reduce(Tensor.add_, (sums(x, y).long() for x, y in pairs))


def _int8_sums(a: Tensor, b: Tensor) -> Tensor:
    """T ``(m, n)`` in float64, by products of int8."""
    (m, _, k), n = a.shape, len(b)
    # Order s: Σ_p d_(s − p)·c_p is one product over the leading digits of A, reversed, and those of B.
    left, right = _concatenated(a, reverse=True), _concatenated(b)
    orders = a.new_empty(DIGITS, m, n, dtype=torch.int32)
    for s, order in enumerate(orders, 1):
        torch._int_mm(left[:, -s * k :], right[:, : s * k].T, out=order)
    total = orders[0].double()
    for order in orders[1:]:
        total = torch.add(order.double(), total, alpha=2**BITS)
    return total


def _float_sums(a: Tensor, b: Tensor) -> Tensor:
    """T ``(*, m, n)`` in float64, by products of floats whose sums are exact.

    T = Σ_k (d₀·2⁸ + d₁)·(c₀·2¹⁶ + c₁·2⁸ + c₂) + (d₂·2⁸ + d₃)·c₀ in float64, plus d₀·c₃ + d₂·c₁ in float32.
    """
    even, odd = slice(0, None, 2), slice(1, None, 2)
    left = a[..., even, :].double().mul_(2**BITS).add_(a[..., odd, :])
    first = b[..., 0, :].double()
    leading = torch.add(b[..., 1, :], first, alpha=2**BITS).mul_(2**BITS).add_(b[..., 2, :])
    total = left.flatten(-2) @ torch.stack([leading, first], -2).flatten(-2).mT
    x, y = a[..., even, :].float().flatten(-2), b[..., odd, :].flip(-2).float().flatten(-2)
    for x_part, y_part in zip(x.split(_FLOAT_CHAIN, -1), y.split(_FLOAT_CHAIN, -1), strict=True):
        total += x_part @ y_part.mT
    return total.add_(0.0)  # makes 0 of −0, the product of 0 and a negative number


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
