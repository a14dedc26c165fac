# SPDX-License-Identifier: MIT
"""Comparison of what a kernel writes with what is right, and a likely cause where they differ."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.testing import assert_close

ALIKE = 1e-3  # relative difference up to which numbers are equal when a cause is named
LARGEST_CHAIN_ERROR = 5e-5  # so that a relative error of 1e-4 is always found


class OutcomeException(Exception):
    """An outcome, such as "wrong" or "not run", and what happened."""


REFUSALS = (RuntimeError, NotImplementedError, ValueError)  # errors with a message for the user


def outcome_of(attempt: Callable[[], None]) -> tuple[str, str]:
    """The outcome of a row, and what happened in one line."""
    try:
        attempt()
    except OutcomeException as e:
        outcome, message = e.args
        return outcome, message.strip().partition("\n")[0]
    except REFUSALS as e:
        return "refuses", f"{e}".strip().partition("\n")[0]
    except Exception as e:
        return "crashes", f"{type(e).__name__}: {e}".strip().partition("\n")[0]
    return "works", ""


def close(actual: Tensor, expected: Tensor, exact: Tensor, operands: Sequence[Tensor] = ()) -> None:
    """Compare numbers by the tolerances of `torch.testing.assert_close`.

    These tolerances do not grow with the length of sums. ``exact`` is ``expected`` in float64. With
    a larger error a result is also right if it is at most twice the error of ``expected`` plus two
    roundings of the largest number, or an error of a sum of ``operands`` in one chain: see
    `chain_error`. Results of float64 are compared by the tolerances alone.

    Raises:
        OutcomeException: with "wrong", and where and how they differ.
    """
    try:
        assert_close(actual, expected, equal_nan=True)
    except AssertionError as error:
        if actual.dtype != torch.float64 and actual.shape == expected.shape:
            mine, limit = _errors(actual, expected, exact)
            limit = max(limit, chain_error(operands) * float(real(exact).abs().max()))
            if mine <= limit < math.inf:
                return
        raise OutcomeException("wrong", difference(actual, expected)) from error


def chain_error(operands: Sequence[Tensor]) -> float:
    """The largest error of a float32 sum in one chain, relative to the largest number.

    A chain adds term after term, as a plain loop does. Its errors were measured with products of
    100, 784 and 2000 terms k: √k/2·ε of the largest result, and k/8·ε if all terms are equal, whose
    roundings do not cancel. k is at most the longest dimension of an operand, and for equal terms
    the longest one along which an operand repeats. Sums of 16-bit numbers are sums of float32, too:
    their own ε would excuse a sum in 16 bits. No more than `LARGEST_CHAIN_ERROR` is accepted.
    """
    longest = max((size for t in operands for size in t.shape), default=0)
    numbers = (t for t in operands if t.is_floating_point() or t.is_complex())
    repeated = max(map(_longest_repeat, numbers), default=0)
    eps = torch.finfo(torch.float32).eps
    return min(eps * max(math.sqrt(longest) / 2, repeated / 8), LARGEST_CHAIN_ERROR)


def _longest_repeat(t: Tensor) -> int:
    """The longest dimension along which all numbers are equal; 0 if there is none."""
    if t.layout != torch.strided or t.is_meta or not t.numel():
        return 0
    repeats = [
        size
        for dim, size in enumerate(t.shape)
        if size > 1 and bool((t == t.narrow(dim, 0, 1)).all())
    ]
    return max(repeats, default=0)


def _errors(actual: Tensor, native: Tensor, exact: Tensor) -> tuple[float, float]:
    """The error of ``actual``, and the largest error that is accepted."""
    exactly = real(exact.detach()).double()
    error, theirs = (
        float((real(t.detach()).double() - exactly).abs().max()) for t in (actual, native)
    )
    return error, 2 * theirs + 2 * torch.finfo(actual.dtype).eps * float(exactly.abs().max())


def farthest(actual: Tensor, expected: Tensor) -> str:
    """Name the element of ``actual`` that is farthest from ``expected``, and its value.

    Returns:
        Such as "[3, 4] of shape (37, 5) is 2.5, expected -1"; "" if there is no element.
    """
    if not actual.numel():
        return ""
    found, right = (t.detach().cpu() for t in (actual, expected))
    kind = torch.complex128 if found.is_complex() or right.is_complex() else torch.float64
    # Equal infinities, or two NaN, have the distance 0; NaN and a number have an infinite distance.
    a, e = found.to(kind), right.to(kind)
    # Different integers beyond 2⁵³ may be the same number in float64.
    differs = (found != right) if found.dtype == right.dtype else (a != e)
    differs &= ~(a.isnan() & e.isnan())
    apart = (a - e).abs().clamp(min=1e-300).where(differs, 0.0).nan_to_num(math.inf)
    at = [int(i) for i in torch.unravel_index(apart.argmax(), apart.shape)]
    values = [t[tuple(at)].item() + 0 for t in (found, right)]  # 0 in the place of −0
    texts = next(
        texts
        for digits in (4, 8, 17)
        if len({*(texts := tuple(f"{one:.{digits}g}" for one in values))}) == 2 or digits == 17
    )
    if len({*texts}) == 1:
        texts = tuple(map(str, values))
    place = f"{at} of shape {tuple(actual.shape)}" if at else "the number"
    return f"{place} is {texts[0]}, expected {texts[1]}"


def difference(actual: Tensor, expected: Tensor) -> str:
    """Where two tensors of one shape differ, by how much, and a likely cause."""
    a, e = (real(t).double() for t in (actual, expected))
    if not torch.equal(a.isnan(), e.isnan()):
        return (
            f"NaN at {int(a.isnan().sum())} of {a.numel()} places, expected at "
            f"{int(e.isnan().sum())}"
        )
    size = float(e.nan_to_num(0, math.inf, -math.inf).abs().max())
    at_infinity = bool((a != e)[a.isinf() | e.isinf()].any())
    a, e = a.nan_to_num(0), e.nan_to_num(0)  # infinities count as the largest numbers
    if not a.any():
        return f"0, of {size:.1e}"
    apart = (actual.conj() - expected).abs() if actual.is_complex() else None
    is_conjugate = apart is not None and bool((apart <= ALIKE * size).all())
    cause = "conjugated" if is_conjugate else likely_cause(a, e)
    off = math.inf if at_infinity else float((a - e).abs().max())
    message = f"off by {off:.1e}, of {size:.1e}: {farthest(actual, expected)}"
    return f"{message}; {cause}" if cause else message


def real(t: Tensor) -> Tensor:
    """A real tensor, or the real and imaginary parts of a complex one."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def likely_cause(a: Tensor, e: Tensor) -> str:
    """The frequent mistake that would turn the right numbers ``e`` into ``a``, or ""."""
    size = float(e.abs().max())
    if not 0 < size < math.inf:
        return ""

    def is_(other: Tensor) -> bool:
        return float((a - other).abs().max()) <= ALIKE * size

    factor = float((a * e).sum() / e.square().sum())
    # A single number is a multiple of any other number.
    simple = min(abs(factor - one) for one in (-1.0, 2.0, 0.5)) <= ALIKE
    if (simple or a.count_nonzero() > 2) and abs(factor - 1) > ALIKE and is_(factor * e):
        return "the sign is flipped" if abs(factor + 1) <= ALIKE else f"a factor of {factor:.4g}"
    if a.dim() > 1 and a.shape[-1] == a.shape[-2] and is_(e.mT):
        return "transposed"
    return ""


def same_bits(actual: Tensor, expected: Tensor) -> None:
    if not torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (actual, expected))):
        raise OutcomeException("wrong", f"other bits: {difference(actual, expected)}")
