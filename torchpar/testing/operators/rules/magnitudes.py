# SPDX-License-Identifier: MIT
"""Large and small numbers: an operator beside its reference up to both ends of a dtype's range.

Operands or incoming gradients are multiplied by powers of two. At each power the reference, in the
operator's dtype, is compared with itself in float64. The operator is compared only where the
reference is accurate, also for numbers some octaves larger and smaller: another right formula can
overflow a little earlier. The operator's error is judged by the reference's error.
"""

import math
from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from torchpar.testing.operators.attempts import REFUSALS, Attempts, OutcomeException
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.compare import farthest
from torchpar.testing.operators.gradients import gradients
from torchpar.testing.operators.tensors import (
    LOW,
    Function,
    Tensors,
    cast,
    is_differentiable,
    moved_by_a_rounding,
    normal_like,
    real,
)

# Exponents of the factors, denser where most functions change.
EXPONENTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
# The least distance from where the reference fails, as a power of two. If a square is subnormal,
# its root has lost digits within this distance.
OCTAVES = 8
FLUSHED = (torch.float32, torch.bfloat16)  # processors may take their subnormal numbers for 0
OF_FLOAT64 = 1e-7  # the relative tolerance of `torch.testing.assert_close`
VALUES, GRADIENTS = "values", "gradients"


def large_and_small_numbers(case: Case, sign: int) -> Attempts:
    """Numbers up to the largest of a dtype, or with a ``sign`` of -1 down to the smallest."""
    case.expect_reference()
    every = range(len(case.floating))
    low = () if any(t.is_complex() for t in case.operands) else LOW
    for dtype in (torch.float32, *low):
        ladders = {"all operands": Ladder(case, dtype, every, sign)}
        # One operand alone in one dtype keeps the table fast.
        for i in every if len(every) > 1 and dtype == torch.float32 else ():
            ladders[f"operand {i}"] = Ladder(case, dtype, (i,), sign)
        ladders["incoming gradients"] = Ladder(case, dtype, (), sign)
        for what, ladder in ladders.items():
            for kind in (VALUES, GRADIENTS) if ladder.chosen else (GRADIENTS,):
                yield f"{dtype}, {kind}, {what}", partial(ladder.check, kind)
                if dtype == torch.float32:
                    yield f"torch.float64, {kind}, {what}", partial(ladder.check, kind, wide=True)


def _results(
    f: Function, case: Case, operands: Tensors, incoming: Tensors, kind: str | None = None
) -> dict[str, Tensors]:
    """Results, and gradients unless they are refused; or one ``kind`` of both, or an error."""
    xs = case.leaves(operands)
    ys = case.smooth(f)(*xs)
    found = {VALUES: tuple(y.detach() for y in ys)}
    if kind == VALUES:
        return found
    try:
        cotangents = [g.to(y.dtype) for g, y in zip(incoming, ys, strict=True)]
        found[GRADIENTS] = gradients(ys, xs, cotangents)
    except (*REFUSALS, TypeError) as e:  # the rows of gradients say why
        if kind is not None:
            raise OutcomeException("not run", f"eager mode refuses the backward: {e}") from e
    return found


class Step:
    """The reference at one power of two, in the operator's dtype and in float64.

    Attributes:
        has_new_ties: whether unequal numbers among those ``given`` are equal by rounding.
        sizes: for results and for gradients, the largest number of each.
        errors: likewise the largest error of the reference; infinite if it overflows.
    """

    def __init__(
        self, case: Case, exponent: int, given: Tensors, operands: Tensors, incoming: Tensors
    ) -> None:
        self.exponent, self.operands, self.incoming = exponent, operands, incoming
        self.has_new_ties = exponent < 0 and _count_distinct(operands) < _count_distinct(given)
        native = _results(case.plain, case, operands, incoming)
        self.exact = exact_results(case, operands, incoming)
        self.sizes = {kind: list(map(largest, self.exact[kind])) for kind in native}
        self.errors = {
            kind: [
                largest(wide(n) - wide(e)) if bool(n.isfinite().all()) else math.inf
                for n, e in zip(native[kind], self.exact[kind], strict=True)
            ]
            for kind in native
        }


def exact_results(case: Case, operands: Tensors, incoming: Tensors) -> dict[str, Tensors]:
    return _results(case.plain, case, cast(operands, torch.float64), cast(incoming, torch.float64))


class Ladder:
    """Steps from the sample's numbers to an end of the dtype's range.

    Attributes:
        chosen: which of the floating operands are multiplied; if none, the incoming gradients.
        room: the octaves around a step in which the reference must be accurate.
        tiny: an error that is always accepted.
    """

    def __init__(self, case: Case, dtype: torch.dtype, chosen: Sequence[int], sign: int) -> None:
        self.case, self.dtype, self.chosen, self.sign = case, dtype, chosen, sign
        self.info = torch.finfo(dtype)
        self.operands = cast(case.operands, dtype)
        numbers = max((t.numel() for t in case.operands), default=0)
        # A sum may overflow in another order of its terms.
        self.room = max(OCTAVES, 2 + math.ceil(math.log2(max(numbers, 1))))
        # To flush a number is an error as large as the smallest normal number, which is multiplied.
        self.tiny = self.info.smallest_normal * (2**OCTAVES if dtype in FLUSHED else 1)

    @cached_property
    def incoming(self) -> Tensors:
        ys = self.case.takes(self.case.leaves(self.operands), self.case.smooth(self.case.plain))
        return cast(tuple(map(normal_like, ys)), self.dtype)

    @cached_property
    def exponents(self) -> list[int]:
        """To the end, and as many octaves as `room` in the other direction."""
        floating = [t for t in self.operands if is_differentiable(t)]
        scaled = [floating[i] for i in self.chosen] if self.chosen else self.incoming
        size = max(map(largest, scaled), default=0.0)
        if not 0 < size < math.inf:
            raise OutcomeException("not run", "no number to multiply")
        top = math.floor(math.log2(self.info.max) - math.log2(size))
        normal = math.ceil(math.log2(self.info.smallest_normal) - math.log2(size))
        subnormal = normal + math.floor(math.log2(self.info.eps))
        every = {0, *EXPONENTS, *(-k for k in EXPONENTS)}
        every |= {top, top - self.room, normal, normal - OCTAVES // 2, subnormal}
        first, last = (-self.room, top) if self.sign > 0 else (subnormal, self.room)
        return sorted(
            k for k in {*every, first, last} if max(first, subnormal) <= k <= min(last, top)
        )

    @cached_property
    def steps(self) -> list[Step]:
        return [self._step(exponent) for exponent in self.exponents]

    @cached_property
    def sample(self) -> Step:
        """The step whose factor is 1."""
        given = (step for step in self.steps if step.exponent == 0)
        return next(given, None) or self._step(0)

    def _step(self, exponent: int) -> Step:
        if not self.chosen:
            incoming = tuple(times(g, exponent) for g in self.incoming)
            return Step(self.case, exponent, self.operands, self.operands, incoming)
        indices = [i for i, t in enumerate(self.operands) if is_differentiable(t)]
        scaled = {indices[i] for i in self.chosen}
        operands = tuple(
            times(t, exponent) if i in scaled else t for i, t in enumerate(self.operands)
        )
        return Step(self.case, exponent, self.operands, operands, self.incoming)

    def around(self, step: Step) -> list[Step]:
        """The steps up to `room` octaves larger and smaller; none if the range ends above."""
        larger = [k for k in self.exponents if k >= step.exponent + self.room]
        smaller = [k for k in self.exponents if k <= step.exponent - self.room]
        if not larger:
            return []
        first, last = max(smaller, default=-math.inf), min(larger)
        return [one for one in self.steps if first <= one.exponent <= last]

    def check(self, kind: str, wide: bool = False) -> None:
        """Compare the operator at each step, or with ``wide`` in float64 at the same numbers."""
        to = torch.float64 if wide else self.dtype
        self.case.takes(cast(self.operands, to))
        is_compared = False
        for step in sorted(self.steps, key=lambda one: abs(one.exponent)):
            if step.exponent * self.sign <= 0:
                continue
            bounds = self.bounds(kind, step)
            if any(bound is not None for bound in bounds):
                operands = cast(step.operands, to)
                found = _results(self.case.op, self.case, operands, step.incoming, kind)[kind]
                try:
                    self.compare(kind, step, found, bounds)
                except OutcomeException as e:
                    outcome, message = e.args
                    raise OutcomeException(outcome, f"times 2**{step.exponent}: {message}") from e
                is_compared = True
        if not is_compared:
            raise OutcomeException("not run", "the reference is not accurate for such numbers")

    def bounds(self, kind: str, step: Step) -> list[tuple[float, float] | None]:
        """For each output the relative error that is accepted, and the number that it relates to.

        None where nothing is compared: where the reference, here or around, is not accurate.
        """
        around = self.around(step)
        kinds = (VALUES,) if kind == VALUES else (VALUES, GRADIENTS)
        if any(k not in step.errors for k in kinds):
            raise OutcomeException("not run", "the reference has no derivative")
        nothing: list[tuple[float, float] | None] = [None] * len(step.sizes[kind])
        if not around or any(e == math.inf for one in around for k in kinds for e in one.errors[k]):
            return nothing
        if kind == GRADIENTS and step.has_new_ties:  # where a derivative can jump
            return nothing
        found = nothing
        if not self.chosen or (kind == VALUES and self.sign < 0):
            for i, size in enumerate(step.sizes[kind]):
                error = max(self._relative(one, kind, i) for one in around)
                found[i] = (error, size) if size > 0 and self._is_accurate(error) else None
        if self.chosen and None in found:
            # An output can vanish beside the rest, as the derivative of a function that saturates.
            # It is compared with the sample's largest number, if all outputs are accurate so.
            beside = {
                k: [
                    max(self._relative(one, k, i, least) for one in around)
                    for i, least in enumerate(self.sample.sizes[k])
                ]
                for k in kinds
            }
            if all(self._is_accurate(error) for k in kinds for error in beside[k]):
                for i, error in enumerate(beside[kind]):
                    size = max(step.sizes[kind][i], self.sample.sizes[kind][i])
                    found[i] = found[i] or (error, size)
        return found

    def _is_accurate(self, relative: float) -> bool:
        """Whether half of the digits are right."""
        return relative <= math.sqrt(self.info.eps)

    def _relative(self, step: Step, kind: str, i: int, least: float = 0.0) -> float:
        """The error of the reference, relative to its largest number or to ``least``."""
        error, size = step.errors[kind][i], max(step.sizes[kind][i], least)
        if error <= self.tiny:
            return 0.0
        return error / size if size > 0 else math.inf

    def compare(
        self,
        kind: str,
        step: Step,
        found: Tensors,
        bounds: Sequence[tuple[float, float] | None],
    ) -> None:
        right, flushed = step.exact[kind], self._flushed(step, kind)
        if len(found) != len(right):
            raise OutcomeException("wrong", f"{len(found)} results, expected {len(right)}")
        for i, (actual, exact, other, bound) in enumerate(
            zip(found, right, flushed, bounds, strict=True)
        ):
            if bound is None:
                continue
            which = f"[{i}] " if len(found) > 1 else ""
            if actual.shape != exact.shape:
                shapes = f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
                raise OutcomeException("wrong", which + shapes)
            moved = (wide(other) - wide(exact)).abs()
            compared = moved.isfinite()
            error = (wide(actual) - wide(exact)).abs().where(compared, 0)
            if bad := int((~error.isfinite()).sum()):
                numbers = f"{bad} of {error.numel()} numbers"
                raise OutcomeException(
                    "wrong", f"{which}{numbers} are not finite, expected all to be"
                )
            limit = self._limit(actual.dtype, *bound) + 2 * largest(moved.where(compared, 0))
            most = largest(error)
            if most > limit:
                limit += 2 * self._change_by_roundings(step, kind, i, actual.dtype)
            if most > limit:
                off = f"off by {most:.1e}, of {largest(exact):.1e}; expected at most {limit:.1e}"
                raise OutcomeException("wrong", f"{which}{off}: {farthest(actual, exact)}")

    def _limit(self, dtype: torch.dtype, relative: float, size: float) -> float:
        """Twice the error of the reference, and half of the digits.

        Rounding errors of numbers on the way to a result can be large beside the result, and differ
        from one right formula to another.
        """
        if dtype in (torch.float64, torch.complex128):
            return OF_FLOAT64 * size
        return (2 * relative + math.sqrt(self.info.eps)) * size + self.tiny

    def _change_by_roundings(self, step: Step, kind: str, i: int, dtype: torch.dtype) -> float:
        """How much an output changes if operands do by a rounding, as numbers made of them may."""
        most = 0.0
        for seed in range(1, 4):
            moved = tuple(moved_by_a_rounding(t, seed) for t in cast(step.operands, dtype))
            other = exact_results(self.case, moved, step.incoming)[kind][i]
            most = max(most, largest(wide(other) - wide(step.exact[kind][i])))
        return most

    def _flushed(self, step: Step, kind: str) -> Tensors:
        """The right outputs, if subnormal operands and incoming gradients count as 0."""
        given = step.operands, step.incoming
        operands, incoming = (tuple(map(self._flush, tensors)) for tensors in given)
        if all(a is b for a, b in zip((*operands, *incoming), (*given[0], *given[1]), strict=True)):
            return step.exact[kind]
        return exact_results(self.case, operands, incoming)[kind]

    def _flush(self, t: Tensor) -> Tensor:
        if self.dtype not in FLUSHED or not is_differentiable(t):
            return t
        parts = real(t)
        is_subnormal = (parts != 0) & (parts.abs() < self.info.smallest_normal)
        if not is_subnormal.any():
            return t
        parts = parts.masked_fill(is_subnormal, 0)
        return torch.view_as_complex(parts) if t.is_complex() else parts


def _count_distinct(tensors: Tensors) -> int:
    numbers = [wide(t).flatten() for t in tensors if is_differentiable(t)]
    return len(torch.cat(numbers).unique())


def wide(t: Tensor) -> Tensor:
    return real(t.detach()).double()


def largest(t: Tensor) -> float:
    """The largest absolute value; infinite if a number is NaN."""
    most = float(real(t.detach()).abs().max()) if t.numel() else 0.0
    return math.inf if math.isnan(most) else most


def times(t: Tensor, exponent: int) -> Tensor:
    """t·2^exponent, rounded. A number that would vanish becomes the smallest one, not a zero."""
    if not is_differentiable(t):
        return t
    parts = real(t)
    scaled = (parts.double() * 2.0**exponent).to(parts.dtype)
    info = torch.finfo(parts.dtype)
    smallest = torch.full_like(scaled, info.smallest_normal * info.eps).copysign(parts)
    scaled = torch.where((scaled == 0) & (parts != 0), smallest, scaled)
    return torch.view_as_complex(scaled) if t.is_complex() else scaled
