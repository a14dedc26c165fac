# SPDX-License-Identifier: MIT
"""Rules of values: of any layout and precision, the same each time, at NaN and at ties."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from torchpar.testing.operators.attempts import (
    REFUSALS,
    Attempts,
    AttemptsAndRemark,
    OutcomeException,
    named,
)
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.compare import accurate, close, same_bits
from torchpar.testing.operators.gradients import gradients, pulled_back
from torchpar.testing.operators.layouts import LAYOUTS
from torchpar.testing.operators.rules.schema import right_fakes
from torchpar.testing.operators.tensors import (
    LOW,
    Function,
    Layout,
    Memory,
    Tensors,
    cast,
    is_differentiable,
    moved_by_a_rounding,
    normal_like,
)


def values(case: Case) -> None:
    operands: Sequence[Tensor] = case.operands
    who, second = "the reference", "the reference raises "
    if case.reference is None:
        operands = [t.contiguous() for t in operands]
        who, second = "the forward", "with contiguous operands: "
    found, memory = [], Memory(case.operands)
    for caller, what, function, given in (
        ("the forward", "", case.op, case.operands),
        (who, second, case.plain, operands),
    ):
        try:
            found.append(function(*given))
        except Exception as e:  # samples are what both take
            raise OutcomeException("crashes", what + named(e)) from e
        if memory.has_changed():
            raise OutcomeException("wrong", f"{caller} writes to its operand")
    actual, expected = found
    case.close(actual, expected, lambda: case.wide.plain(*case.wide.operands))
    if case.reference is None and all(t.is_contiguous() for t in case.operands):
        message = "no reference, and contiguous operands: the operator was compared with itself"
        raise OutcomeException("not run", message)


CALLS = 45  # if one call in ten differs, all are alike with a chance of 0.9^44, of a hundredth
FEWEST, LONGEST = 4, 2.0  # calls, and seconds after which a slow operator is called no more


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.layout == b.layout == torch.strided
        and a.numel() > 0
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    )


def same_bits_twice(case: Case) -> AttemptsAndRemark:
    done: list[int] = []

    def check(compute: Callable[[Function], Tensors]) -> None:
        first, start = compute(case.op), time.monotonic()
        for calls in range(2, CALLS + 1):
            again = compute(case.op)
            same_bits(again, first)
            if any(map(_is_same_memory, again, first)):
                message = "two calls return the same memory; a result is new memory in each call"
                raise OutcomeException("wrong", message)
            if calls >= FEWEST and time.monotonic() - start > LONGEST:
                done.append(calls)
                return

    results, pulled = values_and_gradients(case)
    yield "results", partial(check, results)
    if pulled is not None:
        yield "gradients", partial(check, pulled)
    return f"in {min(done)} calls" if done else ""


Compute = Callable[[Function], Tensors]
"""The results of a function of the operands, or its gradients."""


def values_and_gradients(case: Case) -> tuple[Compute, Compute | None]:
    """Functions that compute results, and gradients if there is a reference with gradients."""

    def results(function: Function) -> Tensors:
        return function(*case.operands)

    def pulled(function: Function) -> Tensors:
        return pulled_back(case.smooth(function), case)

    has_gradients = case.reference is not None and case.floating and any(case.is_smooth)
    return results, pulled if has_gradients else None


def same_values(case: Case, operands: Tensors) -> None:
    actual = case.takes(operands)
    copies = [t.clone(memory_format=torch.contiguous_format) for t in operands]

    def exact(tensors: Sequence[Tensor] = copies) -> Tensors:
        return case.plain(*cast(tuple(tensors), torch.float64))

    def others() -> Iterator[tuple[Tensors, Tensors]]:
        """Results of the reference whose sums may have other orders: results for other layouts, and
        for operands that differ by roundings. Sums of equal terms may have no error."""
        for seed in range(5):
            like = [moved_by_a_rounding(t, seed) if seed else t for t in copies]
            right = exact(like)
            yield case.plain(*like), right
            # Without a reference the operator's own error in a layout would be its excuse.
            for name in ("transposed", "stepped") if case.reference else ():
                with suppress(OutcomeException):  # the reference may refuse a layout
                    yield case.takes([LAYOUTS[name](t) for t in like], case.plain), right
        if case.reference:
            with suppress(OutcomeException):
                yield case.takes(operands, case.plain), exact()

    close(actual, case.takes(copies, case.plain), exact, others, operands)


def low_precision(case: Case) -> Attempts:
    case.expect_reference()

    def pulled(dtype: torch.dtype, f: Function, operands: Tensors) -> Tensors:
        xs = case.leaves(operands)
        ys = case.smooth(f)(*xs)
        return gradients(ys, xs, [normal_like(y).to(dtype).to(y.dtype) for y in ys])

    def check(of: Callable[[Function, Tensors], Tensors], operands: Tensors) -> None:
        case.takes(operands)
        exact = of(case.plain, cast(operands, torch.float64))
        accurate(of(case.op, operands), of(case.plain, operands), exact, operands)

    for dtype in (torch.float32, *(() if any(t.is_complex() for t in case.operands) else LOW)):
        operands = cast(case.operands, dtype)
        yield str(dtype), partial(check, lambda f, operands: f(*operands), operands)
        yield f"{dtype}, gradients", partial(check, partial(pulled, dtype), operands)
        yield f"{dtype}, fake tensors", partial(right_fakes, case, operands)


def nan(case: Case) -> Attempts:
    """A NaN in an operand makes the results and gradients NaN where it does in the reference."""
    case.expect_reference()
    for i, t in enumerate(case.operands):
        if not (is_differentiable(t) and t.numel()):
            continue
        poisoned = t.clone(memory_format=torch.contiguous_format)
        poisoned.view(-1)[t.numel() // 2] = math.nan
        other = case.of([*case.operands[:i], poisoned, *case.operands[i + 1 :]])
        yield f"in operand {i}", partial(_same_as_reference, other)
        if any(case.is_smooth):
            yield f"in operand {i}, gradients", partial(other.transformed, pulled_back)


def infinities(case: Case) -> Attempts:
    """An infinity in an operand: results and gradients are the reference's, where it has a number.

    Where the reference is NaN nothing is asked: another right formula can have a limit there.
    """
    case.expect_reference()
    of: dict[str, Callable[[Function, Case], Tensors]] = {"": _called}
    if any(case.is_smooth):
        of[", gradients"] = pulled_back
    for i, t in enumerate(case.operands):
        for sign in ("inf", "-inf") if is_differentiable(t) and t.numel() else ():
            infinite = t.clone(memory_format=torch.contiguous_format)
            infinite.view(-1)[t.numel() // 2] = float(sign)
            other = case.of([*case.operands[:i], infinite, *case.operands[i + 1 :]])
            for what, compute in of.items():
                yield f"{sign} in operand {i}{what}", partial(_where_numbers, other, compute)


def _called(f: Function, case: Case) -> Tensors:
    return f(*case.floating)


def _where_numbers(case: Case, compute: Callable[[Function, Case], Tensors]) -> None:
    """Compare the operator with the reference, except where this is NaN, also in float64."""
    try:
        expected = compute(case.oracle, case)
        exact = compute(case.wide.oracle, case.wide)
    except (*REFUSALS, TypeError) as e:
        raise OutcomeException("not run", f"the reference refuses: {e}") from e
    actual = compute(case.smooth(case.op), case)
    asked = [~(e.isnan() | wide.isnan()) for e, wide in zip(expected, exact, strict=True)]
    if not any(places.any() for places in asked):
        raise OutcomeException("not run", "the reference is NaN")
    if len(actual) != len(asked) or not all(map(_fits, actual, asked)):
        case.close(actual, expected)  # which says how they differ
    found, right, wide = (
        tuple(t.where(places, 0) for t, places in zip(tensors, asked, strict=True))
        for tensors in (actual, expected, exact)
    )
    case.close(found, right, lambda: wide)


def _fits(t: Tensor, places: Tensor) -> bool:
    return t.shape == places.shape and t.device == places.device


def _same_as_reference(case: Case) -> None:
    expected = case.takes(case.operands, case.plain)
    case.close(case.op(*case.operands), expected, lambda: case.wide.plain(*case.wide.operands))


def ties_and_zeros(case: Case) -> Attempts:
    """At equal numbers and zeros, kinks of a maximum or |x|, the reference gives the gradients."""
    case.expect_reference()
    first = next((t.flatten() for t in case.floating if t.numel()), torch.zeros(1, device="cpu"))

    def repeated(numbers: Tensor, t: Tensor) -> Tensor:
        return numbers.repeat(-(-t.numel() // len(numbers)))[: t.numel()].view(t.shape).to(t.dtype)

    kinds: dict[str, Layout] = {
        "pairs in an operand": lambda t: (
            t.flatten().repeat_interleave(2)[: t.numel()].view(t.shape)
        ),
        "the same numbers in all operands": lambda t: repeated(first, t),
        "one number": lambda t: repeated(first[:1], t),
        "zeros": torch.zeros_like,
        "negative zeros": lambda t: torch.full_like(t, -0.0),
        "some negative zeros": lambda t: torch.where(normal_like(t).real < 0, -0.0, t),
    }
    for name, change in kinds.items():
        other = case.of([change(t) if is_differentiable(t) else t for t in case.operands])
        yield name, partial(_at_a_tie, other)


def _at_a_tie(case: Case) -> None:
    """Compare values and gradients, unless the reference jumps there, as an inverse can."""
    expected = case.takes(case.operands, case.plain)
    eps = max(torch.finfo(t.dtype).eps for t in case.floating)
    moved = [t + eps**0.5 * normal_like(t) if is_differentiable(t) else t for t in case.operands]
    smooth = [y for y in expected if is_differentiable(y)]
    around = [y for y in case.takes(moved, case.plain) if is_differentiable(y)]
    if any(not y.isfinite().all() for y in smooth) or not _is_near(around, smooth, eps**0.25):
        raise OutcomeException("not run", "the reference jumps there")
    case.close(case.op(*case.operands), expected, lambda: case.wide.plain(*case.wide.operands))
    case.transformed(pulled_back)


def _is_near(around: Sequence[Tensor], ys: Sequence[Tensor], tolerance: float) -> bool:
    """Whether results of moved operands are as near as the results of a continuous function."""
    return all(
        bool((a - y).abs().max() <= tolerance * max(1.0, float(y.abs().max())))
        for a, y in zip(around, ys, strict=True)
        if y.numel()
    )
