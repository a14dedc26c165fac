# SPDX-License-Identifier: MIT
"""Rules of derivatives by autograd, in reverse and in forward mode."""

import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint

from torchpar.testing.operators.attempts import Attempts, OutcomeException
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.compare import ALIKE, is_imprecise, likely_cause, near, with_cause
from torchpar.testing.operators.differences import difference_of
from torchpar.testing.operators.gradients import gradients, pulled_back
from torchpar.testing.operators.layouts import layouts
from torchpar.testing.operators.tensors import (
    Function,
    Layout,
    Tensors,
    is_differentiable,
    moved_by_a_rounding,
    normal_like,
    real,
)

ALIKE_IN_FLOAT64 = 1e-10  # finite differences divide errors by 1e-6
# Of samples that are cast to float64, beyond which derivatives are taken in one direction.
MOST_NUMBERS = 64


def numerically(check: Callable[..., bool], case: Case) -> str:
    """Compare with finite differences, in float64: samples of another dtype are cast to it."""
    given = {t.dtype for t in case.floating} - {torch.float64, torch.complex128}
    if given:
        case = case.wide
        _expect_float64(case)
    numbers = sum(t.numel() for t in case.floating)
    try:
        # Samples in float64 are small, as docs say; others may be of any size.
        check(case.smooth(case.op), case.leaves(), fast_mode=bool(given) and numbers > MOST_NUMBERS)
    except GradcheckError as e:
        if given and _is_as_the_reference(case):
            message = "finite differences are not the derivatives of the reference either"
            raise OutcomeException("not run", message) from e
        message = with_cause(_of_gradcheck(str(e)), _imprecision(case))
        raise OutcomeException("wrong", message) from e
    return "the samples are cast to float64" if given else ""


def _is_as_the_reference(case: Case) -> bool:
    """Whether the gradients are the reference's. Samples that nobody chose for finite differences
    may lie at a kink, as a zero does for |x|."""
    try:
        found, expected = (pulled_back(f, case) for f in (case.smooth(case.op), case.oracle))
    except Exception:  # such as a reference without a gradient: the gradcheck has failed still
        return False
    return near(found, expected, ALIKE_IN_FLOAT64)


def _expect_float64(case: Case) -> None:
    """Raise "not run" if an operator refuses float64, or computes it in a lower precision."""
    results = case.takes(case.operands)
    kinds = {y.dtype for y in results if is_differentiable(y)}
    if not kinds <= {torch.float64, torch.complex128}:
        raise OutcomeException(
            "not run", f"operands of float64 give results of {min(map(str, kinds))}"
        )
    # Not numbers of float32 themselves, whose results could be numbers of float32, too.
    moved = case.of([moved_by_a_rounding(t, 0) for t in case.operands])
    if _imprecision(moved):
        raise OutcomeException("not run", _imprecision(moved))


def _imprecision(case: Case) -> str:
    """Name values or gradients that are right, but not to float64: their differences are wrong."""
    computed: dict[str, Callable[[Function], Tensors]] = {
        "values": lambda f: f(*case.floating),
        # By thirds: a gradient that repeats a number of float32 would look imprecise.
        "gradients": lambda f: pulled_back(f, case, layout=lambda t: t / 3),
    }
    for what, compute in computed.items():
        try:
            actual = compute(case.smooth(case.op))
            if case.reference is None:
                is_low = any(map(is_imprecise, actual)) and not any(
                    map(is_imprecise, case.floating)
                )
            else:
                expected = compute(case.oracle)
                is_low = near(actual, expected, ALIKE) and not near(
                    actual, expected, ALIKE_IN_FLOAT64
                )
        except Exception:  # such as a reference without a gradient: the gradcheck has failed still
            return ""
        if is_low:
            return f"the {what} of float64 are computed in a lower precision"
    return ""


NUMBER = r"-?\d+\.?\d*(?:e[+-]?\d+)?|nan|inf"


def _of_gradcheck(message: str) -> str:
    """The message of a mismatch, with the numbers of the two Jacobians that differ most."""
    title, numerical, rest = message.partition("numerical:tensor(")
    if not numerical:
        return message
    theirs, ours = (
        torch.tensor(
            [float(one) for one in re.findall(NUMBER, part.partition("dtype")[0])],
            dtype=torch.float64,
            device="cpu",
        )
        for part in rest.split("analytical:tensor(")
    )
    title = " ".join(title.split()).rstrip(",")
    if len(ours) != len(theirs) or not len(ours):
        return title
    i = int((ours - theirs).abs().argmax())
    cause = "0 everywhere" if not ours.any() else likely_cause(ours, theirs)
    return with_cause(
        f"{title}: {ours[i]:.4g}, expected {theirs[i]:.4g} by finite differences", cause
    )


def _pulled_back_twice(f: Function, case: Case, layout: Layout) -> Tensors:
    xs = case.leaves()
    ys = f(*map(layout, xs))
    incoming = [normal_like(y).requires_grad_() for y in ys]
    first = torch.autograd.grad(
        ys, xs, list(map(layout, incoming)), create_graph=True, materialize_grads=True
    )
    total = sum((real(g).square().sum() for g in first), torch.zeros((), device="cpu"))
    return torch.autograd.grad(total, (*xs, *incoming), materialize_grads=True)


def incoming_gradients_of_any_layout(case: Case) -> Attempts:
    for name, layout in layouts(case.op(*case.operands)).items():
        yield name, partial(case.transformed, pulled_back, layout=layout)
        if "expanded" not in name:
            both = partial(case.transformed, pulled_back, layout=layout, of_operands=layout)
            yield f"{name}, and operands", both
            twice = partial(case.transformed, _pulled_back_twice, layout=layout)
            yield f"{name}, second derivatives", twice


def any_of_the_gradients(case: Case) -> Attempts:
    """Some operands do not require a gradient, and some results have none."""
    operands, results = range(len(case.floating)), len(case.oracle(*case.floating))
    for i in operands:
        for required in dict.fromkeys([(i,), tuple(j for j in operands if j != i) or (i,)]):
            yield (
                f"of operands {required}",
                partial(case.transformed, pulled_back, required=required),
            )
    for i in range(results) if results > 1 else ():
        yield f"of result {i}", partial(case.transformed, pulled_back, used=slice(i, i + 1))


def changes_after_the_call(case: Case) -> Attempts:
    """Change in place what the backward needs: gradients are right, or autograd raises an error."""

    def check(of_results: bool) -> None:
        expected, leaves = pulled_back(case.oracle, case), case.leaves()
        xs = [x.clone() for x in leaves]
        ys = case.smooth(case.op)(*xs)
        try:
            with torch.no_grad():
                for t in ys if of_results else xs:
                    t.add_(1)
            actual = gradients(ys, leaves, list(map(normal_like, ys)))
        except RuntimeError as e:
            if "modified by an inplace operation" not in str(e):
                raise
        else:
            case.close(actual, expected, lambda: pulled_back(case.wide.oracle, case.wide))

    for what in ("operands", "results"):
        yield f"of {what}", partial(check, what == "results")


def forward_mode(case: Case) -> Attempts:
    def pushed(f: Function, case: Case, chosen: Sequence[int]) -> list[Tensor]:
        with forward_ad.dual_level():
            xs = [x.clone() for x in case.floating]
            for i in chosen:
                xs[i] = forward_ad.make_dual(xs[i], normal_like(xs[i]))
            ys = [forward_ad.unpack_dual(y) for y in f(*xs)]
            return [
                (torch.zeros_like(y.primal) if y.tangent is None else y.tangent).clone() for y in ys
            ]

    for chosen in dict.fromkeys([case.indices, *((i,) for i in case.indices)]):
        yield (
            f"of operands {chosen}",
            partial(case.transformed, pushed, difference_of, chosen=chosen),
        )


def batched_gradients(f: Function, case: Case) -> Tensors:
    xs = case.leaves()
    ys = f(*xs)
    batches = [torch.stack([normal_like(y, seed) for seed in range(3)]) for y in ys]
    found = torch.autograd.grad(ys, xs, batches, allow_unused=True, is_grads_batched=True)
    return tuple(
        x.new_zeros(3, *x.shape) if g is None else g for x, g in zip(xs, found, strict=True)
    )


def checkpointed_gradients(f: Function, case: Case) -> Tensors:
    return pulled_back(lambda *xs: checkpoint(f, *xs, use_reentrant=False), case)
