# SPDX-License-Identifier: MIT
"""Comparison of results with right ones: how far they may differ, and a likely cause if they do."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from torchpar.testing.operators.attempts import OutcomeException
from torchpar.testing.operators.tensors import Tensors, is_differentiable, real

ALIKE = 1e-3  # relative difference up to which numbers are equal when a cause is named


def close(
    actual: object,
    expected: object,
    exact: Callable[[], object] | None = None,
    others: Callable[[], Iterable[tuple[object, object]]] = lambda: (),
    operands: Sequence[Tensor] = (),
) -> None:
    """Compare the tensors in two structures, by the tolerances of `torch.testing.assert_close`.

    The tolerances do not grow with the length of sums. ``exact`` computes ``expected`` in
    float64. With it, a result with a larger error is also right in one of three cases:

    - The error is at most twice that of ``expected``, plus two roundings of the largest number.
    - The error of ``expected`` may be small by chance, or in one layout. ``others`` gives results
      for similar operands, and for the operands in other layouts, each with its result in float64.
      The largest of all these errors then takes the place of the error of ``expected``.
    - A sum of ``operands`` in one chain may have the error: see `chain_error`.

    Results of float64 are compared by the tolerances alone.
    """
    pairs = list(_pairs(actual, expected))
    for i, (a, e) in enumerate(pairs):
        try:
            assert_close(a, e, equal_nan=True)
        except AssertionError as error:
            wide = None
            if exact is not None and is_differentiable(a) and a.dtype != torch.float64:
                wide = tree_leaves(exact())[i]
            if wide is not None and _is_like(a, e):
                mine, limit = _errors(a, e, wide)
                if mine <= limit < math.inf:
                    continue
                limits = [
                    _errors(*(tree_leaves(one)[i] for one in (n, n, w)))[1] for n, w in others()
                ]
                limits.append(chain_error(operands) * float(real(wide.detach()).abs().max()))
                if mine <= max(limits) < math.inf:
                    continue
            which = f"[{i}] " if len(pairs) > 1 else ""
            raise OutcomeException("wrong", which + difference(a, e)) from error


LARGEST_CHAIN_ERROR = 5e-5  # so that a relative error of 1e-4 is always found


def chain_error(operands: Sequence[Tensor]) -> float:
    """The largest error of a float32 sum in one chain, relative to the largest number.

    A chain adds term after term, as a plain loop does. Its errors were measured with products of
    100, 784 and 2000 terms k: √k/2·ε of the largest result, and k/8·ε if all terms are equal, whose
    roundings do not cancel. k is at most the longest dimension of an operand, and for equal terms
    the longest one along which an operand repeats. Sums of 16-bit numbers are sums of float32, too:
    their own ε would excuse a sum in 16 bits. No more than `LARGEST_CHAIN_ERROR` is accepted.
    """
    longest = max((size for t in operands for size in t.shape), default=0)
    repeated = max((_longest_repeat(t) for t in operands if is_differentiable(t)), default=0)
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


def near(actual: object, expected: object, rtol: float) -> bool:
    """Whether all numbers differ by at most ``rtol`` of the largest number."""
    found, right = tree_leaves(actual), tree_leaves(expected)
    return all(
        a.shape == e.shape and bool((a - e).abs().max() <= rtol * e.abs().max())
        for a, e in zip(found, right, strict=True)
        if e.numel()
    )


def is_imprecise(t: Tensor) -> bool:
    """Whether numbers of float64 are all numbers of float32, as after a computation in it.

    Numbers of bfloat16 do not count: small integers and halves are exact in each dtype.
    """
    if t.dtype not in (torch.float64, torch.complex128):
        return False
    numbers = real(t.detach())
    has_few_bits = torch.equal(numbers, numbers.bfloat16().double())
    return not has_few_bits and torch.equal(numbers, numbers.float().double())


def _is_like(actual: Tensor, native: Tensor) -> bool:
    return (actual.shape, actual.dtype, actual.device) == (
        native.shape,
        native.dtype,
        native.device,
    )


def _errors(actual: Tensor, native: Tensor, exact: Tensor) -> tuple[float, float]:
    """The error of ``actual``, and the largest error that is accepted."""
    exactly = real(exact.detach()).double()
    error, theirs = (
        float((real(t.detach()).double() - exactly).abs().max()) for t in (actual, native)
    )
    return error, 2 * theirs + 2 * torch.finfo(actual.dtype).eps * float(exactly.abs().max())


def _pairs(actual: object, expected: object) -> Iterator[tuple[Tensor, Tensor]]:
    found, right = tree_leaves(actual), tree_leaves(expected)
    if len(found) != len(right):
        raise OutcomeException("wrong", f"{len(found)} results, expected {len(right)}")
    return zip(found, right, strict=True)


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


def difference(actual: Tensor, expected: Tensor) -> str:  # noqa: PLR0911  # one for each mistake
    if actual.shape != expected.shape:
        if (
            actual.dim() > 1
            and actual.mT.shape == expected.shape
            and near(actual.mT, expected, ALIKE)
        ):
            return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}; transposed"
        summed = _sum_to_shape(actual, expected)
        if summed is not None and near(summed, expected, ALIKE):
            missing = "the sum over a broadcast dimension is missing"
            return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}; {missing}"
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    for what in ("dtype", "device"):
        if getattr(actual, what) != getattr(expected, what):
            return f"{what} {getattr(actual, what)}, expected {getattr(expected, what)}"
    a, e = (real(t.detach()).double() for t in (actual, expected))
    if not torch.equal(a.isnan(), e.isnan()):
        return (
            f"NaN at {int(a.isnan().sum())} of {a.numel()} places, expected at "
            f"{int(e.isnan().sum())}"
        )
    size = float(e.nan_to_num(0, math.inf, -math.inf).abs().max())
    is_infinite = a.isinf() | e.isinf()
    at_infinity = bool((a != e)[is_infinite].any())
    a, e = a.nan_to_num(0), e.nan_to_num(0)  # infinities count as the largest numbers
    if not a.any():
        return f"0, of {size:.1e}"
    is_conjugate = actual.is_complex() and near(actual.conj(), expected, ALIKE)
    cause = "conjugated" if is_conjugate else likely_cause(a, e)
    if not cause and near(a, e, ALIKE) and is_imprecise(actual) and not is_imprecise(expected):
        cause = "float64 is computed in a lower precision"
    off = math.inf if at_infinity else float((a - e).abs().max())
    where = farthest(actual, expected)
    return with_cause(f"off by {off:.1e}, of {size:.1e}: {where}", cause)


def with_cause(message: str, cause: str) -> str:
    """A message, and a likely cause unless it is ""."""
    return f"{message}; {cause}" if cause else message


def _sum_to_shape(t: Tensor, like: Tensor) -> Tensor | None:
    try:
        return t.sum_to_size(like.shape)
    except RuntimeError:  # the shape of ``like`` does not broadcast to the shape of t
        return None


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


def same_metadata(actual: Tensors, expected: Tensors) -> None:
    """Compare shape, dtype, device, and the strides that matter; fake tensors have no values."""
    pairs = list(_pairs(actual, expected))
    for i, (a, e) in enumerate(pairs):
        message = ""
        long = [dim for dim, size in enumerate(e.shape) if size != 1 and e.numel()]
        if a.shape != e.shape:
            message = f"shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        elif a.dtype != e.dtype or a.device != e.device:
            message = difference(a, e)
        elif any(a.stride(dim) != e.stride(dim) for dim in long):
            message = f"strides {a.stride()}, expected {e.stride()}"
        if message:
            raise OutcomeException("wrong", f"[{i}] {message}" if len(pairs) > 1 else message)


def same_bits(actual: Tensors, expected: Tensors) -> None:
    for a, e in _pairs(actual, expected):
        bits = [
            t.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
            for t in (a, e)
        ]
        if not torch.equal(*bits):
            raise OutcomeException("wrong", f"other bits: {difference(a, e)}")


def accurate(
    actual: Tensors, native: Tensors, exact: Tensors, operands: Sequence[Tensor] = ()
) -> None:
    """Accept twice the error of ``native`` plus two roundings of the largest result.

    The error of a sum of ``operands`` in one chain is accepted, too: see `chain_error`.
    """
    for (a, n), wide in zip(_pairs(actual, native), exact, strict=True):
        if (a.shape, a.dtype) != (n.shape, n.dtype):
            raise OutcomeException("wrong", difference(a, n))
        if a.dtype == torch.float64:  # ``exact`` is not more exact
            close(a, n)
        elif a.numel() and is_differentiable(a):
            error, limit = _errors(a, n, wide)
            if not error <= limit and limit < math.inf:
                limit = max(limit, chain_error(operands) * float(real(wide.detach()).abs().max()))
                if error <= limit:
                    continue
                off = f"off by {error:.1e}, expected at most {limit:.1e}"
                raise OutcomeException("wrong", f"{off}: {farthest(a, wide)}")
