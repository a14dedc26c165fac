# SPDX-License-Identifier: MIT
"""The rules of an operator's table, in its order. Each tries one part of PyTorch."""

import copy
import io
import itertools
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from torchpar.testing.operators.case import (
    LAYOUTS,
    LOW,
    REFUSALS,
    Attempts,
    AttemptsAndRemark,
    Calls,
    Case,
    Function,
    Layout,
    Outcome,
    Tensors,
    accurate,
    cast,
    close,
    gradients,
    is_differentiable,
    layouts,
    likely_cause,
    moved_by_a_rounding,
    normal_like,
    real,
    rolled,
    same_bits,
    same_metadata,
    with_cause,
)
from torchpar.testing.operators.rules.magnitudes import large_and_small_numbers
from torchpar.testing.operators.rules.writes import undeclared_writes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

T = TypeVar("T")
Rule = Callable[[Case], Attempts | str | None]
RULES: dict[str, Rule] = {}
"""The rules by name, in the table's order.

A rule returns nothing or a remark, and raises an `Outcome` or any error. Or it yields attempts,
each a label and a function that raises likewise, and returns nothing or a remark.
"""
ONCE = ("torch.compile by Inductor", "torch.export, save and load")  # for the first sample only


def rule(name: str) -> Callable[[Rule], None]:
    """A decorator that adds a rule."""

    def add(function: Rule) -> None:
        RULES[name] = function

    return add


# Plain calls: values, the schema, and the shapes that it promises


@rule("values")
def _values(case: Case) -> None:
    operands = (
        case.operands if case.reference is not None else [t.contiguous() for t in case.operands]
    )
    try:
        actual, expected = case.op(*case.operands), case.plain(*operands)
    except Exception as e:  # samples are what the operator takes
        raise Outcome("crashes", f"{type(e).__name__}: {e}") from e
    case.close(actual, expected, lambda: case.wide.plain(*case.wide.operands))


CALLS = 45  # if one call in ten differs, all are alike with a chance of 0.9^44, of a hundredth
FEWEST, LONGEST = 4, 2.0  # calls, and seconds after which a slow operator is called no more


@rule("same bits twice")
def _same_bits_twice(case: Case) -> AttemptsAndRemark:
    done: list[int] = []

    def check(compute: Callable[[Function], Tensors]) -> None:
        first, start = compute(case.op), time.monotonic()
        for calls in range(2, CALLS + 1):
            same_bits(compute(case.op), first)
            if calls >= FEWEST and time.monotonic() - start > LONGEST:
                done.append(calls)
                return

    values, pulled = _values_and_gradients(case)
    yield "results", partial(check, values)
    if pulled is not None:
        yield "gradients", partial(check, pulled)
    return f"in {min(done)} calls" if done else ""


Compute = Callable[[Function], Tensors]
"""The results of a function of the operands, or its gradients."""


def _values_and_gradients(case: Case) -> tuple[Compute, Compute | None]:
    """Functions that compute results, and gradients if there is a reference with gradients."""

    def values(function: Function) -> Tensors:
        return function(*case.operands)

    def pulled(function: Function) -> Tensors:
        return pulled_back(case.smooth(function), case)

    has_gradients = case.reference is not None and case.floating and any(case.is_smooth)
    return values, pulled if has_gradients else None


@contextmanager
def _setting(get: Callable[[], T], change: Callable[[T], object], value: T) -> Iterator[None]:
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Allow only deterministic algorithms; uninitialised memory then holds NaN."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


Setting = Callable[[], AbstractContextManager[None]]


@rule("global settings")
def _global_settings(case: Case) -> AttemptsAndRemark:  # noqa: C901  # a try for each setting
    """PyTorch's default dtype, deterministic algorithms and threads change no result.

    The default dtype changes no bit, unless it changes bits of the reference. Deterministic
    algorithms and threads can change the order of sums.
    """
    changed: list[str] = []

    def check(label: str, setting: Setting, may_reorder: bool, compute: Compute) -> None:
        before, theirs = compute(case.op), compute(case.plain)
        with setting():
            try:
                expected = compute(case.plain)
            except REFUSALS as e:
                raise Outcome("not run", f"the reference refuses: {e}") from e
            actual = compute(case.op)
        if not _differs(actual, before):
            return
        if _differs(compute(case.op), before):
            raise Outcome("not run", "two calls with the same settings differ")
        if case.reference is None:
            (close if may_reorder else same_bits)(actual, before)
        elif _differs(expected, theirs):  # the reference depends on the setting, too
            close(actual, expected)
        elif may_reorder:
            close(actual, before)
        else:
            same_bits(actual, before)
        changed.append(label)

    threads = 1 if torch.get_num_threads() > 1 else 2
    settings: dict[str, tuple[Setting, bool]] = {
        "deterministic algorithms": (_deterministic, True),
        f"threads: {threads}": (
            partial(_setting, torch.get_num_threads, torch.set_num_threads, threads),
            True,
        ),
    }
    # Results of integers may have the default dtype.
    if case.reference is not None or case.floating:
        default = partial(_setting, torch.get_default_dtype, torch.set_default_dtype)
        settings |= {
            f"default dtype {dtype}": (partial(default, dtype), False) for dtype in DEFAULTS
        }
    values, pulled = _values_and_gradients(case)
    for label, (setting, may_reorder) in settings.items():
        yield label, partial(check, label, setting, may_reorder, values)
        if pulled is not None:
            yield f"{label}, gradients", partial(check, label, setting, may_reorder, pulled)
    return f"other bits, by {changed[0]}" if changed else ""


DEFAULTS = (torch.float64, torch.float32, torch.bfloat16)


def _differs(actual: Tensors, expected: Tensors) -> bool:
    try:
        same_bits(actual, expected)
    except Outcome:
        return True
    return False


@rule("schema")
def _schema(case: Case) -> Attempts:
    overload = case.overload
    if overload is None:
        raise Outcome("not run", "no operator was called")
    with Calls() as calls:
        case.op(*case.operands)
    if overload not in calls.seen and case.callable is not overload:
        raise Outcome("not run", "the operator decomposes before it is dispatched")
    arguments = calls.seen.get(overload, case.arguments(case.operands))

    def check(test: str, requires_grad: bool) -> None:
        def prepared(t: Tensor) -> Tensor:
            return t.detach().requires_grad_(requires_grad and is_differentiable(t))

        args, kwargs = tree_map_only(Tensor, prepared, arguments)
        found = torch.library.opcheck(
            overload, args, kwargs, test_utils=test, raise_exception=False
        )
        if found[test] != "SUCCESS":
            raise Outcome("wrong", f"opcheck: {found[test]}")

    for test in ("test_schema", "test_autograd_registration"):
        for requires_grad in (False, True):
            yield test, partial(check, test, requires_grad)


def _other_operands(case: Case) -> Iterator[tuple[str, Tensors]]:
    yield "as given", case.operands
    for name, layout in layouts(case.operands).items():
        yield f"{name} operands", tuple(map(layout, case.operands))
        for i, t in enumerate(case.operands if len(case.operands) > 1 else ()):
            yield f"{name} operand {i}", (*case.operands[:i], layout(t), *case.operands[i + 1 :])
    yield from case.resized(lambda t, dim: t.narrow(dim, 0, 0))
    yield from case.resized(lambda t, dim: t.narrow(dim, 0, min(t.shape[dim], 1)))
    yield (
        "operands without dimensions",
        tuple(t.flatten()[0] if t.numel() else t for t in case.operands),
    )


def _layouts(check: Callable[[Case, Tensors], None], case: Case) -> Attempts:
    for name, operands in _other_operands(case):
        yield name, partial(check, case, operands)


def _same_values(case: Case, operands: Tensors) -> None:
    actual = case.takes(operands)
    copies = [t.clone(memory_format=torch.contiguous_format) for t in operands]

    def exact(tensors: Sequence[Tensor] = copies) -> Tensors:
        return case.plain(*cast(tuple(tensors), torch.float64))

    def others() -> Iterator[tuple[Tensors, Tensors]]:
        """Results of the reference that may be summed in other orders: in other layouts, and of
        operands that differ by roundings. Sums of equal terms may have no error."""
        for seed in range(5):
            like = [moved_by_a_rounding(t, seed) if seed else t for t in copies]
            right = exact(like)
            yield case.plain(*like), right
            # Without a reference the operator's own error in a layout would be its excuse.
            for name in ("transposed", "stepped") if case.reference else ():
                with suppress(Outcome):  # the reference may refuse a layout
                    yield case.takes([LAYOUTS[name](t) for t in like], case.plain), right
        if case.reference:
            with suppress(Outcome):
                yield case.takes(operands, case.plain), exact()

    close(actual, case.takes(copies, case.plain), exact, others, operands)


def _fake_of_meta(case: Case) -> None:
    """Call the fake on the device "meta", so that a device that the fake fixes is seen."""
    actual = case.op(*case.operands)
    metas = case.op(*(t.to("meta") for t in case.operands))
    same_metadata(metas, tuple(t.to("meta") for t in actual))


def _symbolic_fake(case: Case) -> None:
    """Refuse a fake that converts a size to a number: it would be compiled for this size alone."""
    fixed = _fixed_sizes(case, case.operands)
    for label, operands in case.resized(lambda t, dim: torch.cat([t, t], dim)):
        size = int(label.rpartition(" ")[2])
        # A fake that only asks whether a size is 8 does not fix a size of 16.
        if size in fixed and _is_taken(case, operands) and 2 * size in _fixed_sizes(case, operands):
            raise Outcome("wrong", f"the fake fixes the size {size}, as int() of it does")


def _fixed_sizes(case: Case, operands: Tensors) -> set[int]:
    """The sizes of operands that a call on fake tensors converts to numbers."""
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes) as mode:
        contexts: list[Any] = [
            StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK] * t.dim()) for t in operands
        ]
        fakes = [
            mode.from_tensor(t, symbolic_context=context)
            for t, context in zip(operands, contexts, strict=True)
        ]
        symbols = {
            fake.shape[dim].node.expr: t.shape[dim]  # type: ignore[attr-defined]
            for t, fake in zip(operands, fakes, strict=True)
            for dim in range(t.dim())
            if isinstance(fake.shape[dim], torch.SymInt)
        }
        case.op(*fakes)
    return {size for symbol, size in symbols.items() if shapes.replace(symbol).is_number}


def _is_taken(case: Case, operands: Tensors) -> bool:
    try:
        case.takes(operands)
    except Outcome:
        return False
    return True


def _right_fakes(case: Case, operands: Tensors) -> None:
    actual = case.takes(operands)
    with FakeTensorMode() as mode:
        fakes = case.op(*map(mode.from_tensor, operands))
    same_metadata(fakes, actual)
    shared, expected = (len({t.untyped_storage()._cdata for t in ts}) for ts in (fakes, actual))
    if shared < expected:
        raise Outcome("wrong", "two results share memory, expected one new tensor for each")


RULES["layouts and sizes"] = partial(_layouts, _same_values)


@rule("fake tensors")
def _fake_tensors(case: Case) -> Attempts:
    yield from _layouts(_right_fakes, case)
    yield "meta operands", partial(_fake_of_meta, case)
    yield "symbolic sizes", partial(_symbolic_fake, case)


@rule("low precision")
def _low_precision(case: Case) -> Attempts:
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
        yield f"{dtype}, fake tensors", partial(_right_fakes, case, operands)


# Derivatives


def _numerically(check: Callable[..., bool], case: Case) -> None:
    if not {t.dtype for t in case.floating} <= {torch.float64, torch.complex128}:
        raise Outcome("not run", "operands have to be float64")
    try:
        check(case.smooth(case.op), case.leaves())
    except GradcheckError as e:
        raise Outcome("wrong", _of_gradcheck(str(e))) from e


def _of_gradcheck(message: str) -> str:
    """The message of a mismatch, with the numbers of the two Jacobians that differ most."""
    title, numerical, rest = message.partition("numerical:tensor(")
    if not numerical:
        return message
    theirs, ours = (
        torch.tensor(
            [float(one) for one in re.findall(NUMBER, part.partition("dtype")[0])],
            dtype=torch.float64,
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


NUMBER = r"-?\d+\.?\d*(?:e[+-]?\d+)?|nan|inf"
RULES["gradcheck"] = partial(_numerically, torch.autograd.gradcheck)
RULES["gradgradcheck"] = partial(_numerically, torch.autograd.gradgradcheck)


def pulled_back(
    f: Function,
    case: Case,
    layout: Layout = lambda t: t,
    of_operands: Layout = lambda t: t,
    required: Sequence[int] | None = None,
    used: slice = slice(None),
) -> Tensors:
    """Gradients of ``f`` for normally distributed incoming gradients, of any layout."""
    xs = case.leaves()
    chosen = xs if required is None else [xs[i] for i in required]
    for x in xs:
        x.requires_grad_(any(x is one for one in chosen))
    ys = f(*map(of_operands, xs))[used]
    incoming, kept = ([layout(normal_like(y)) for y in ys] for _ in range(2))
    found = gradients(ys, chosen, incoming)
    if not all(map(torch.equal, incoming, kept)):
        raise Outcome("wrong", "the backward writes to its incoming gradient")
    return found


def _pulled_back_twice(f: Function, case: Case, layout: Layout) -> Tensors:
    xs = case.leaves()
    ys = f(*map(layout, xs))
    incoming = [normal_like(y).requires_grad_() for y in ys]
    first = torch.autograd.grad(
        ys, xs, list(map(layout, incoming)), create_graph=True, materialize_grads=True
    )
    total = sum((real(g).square().sum() for g in first), torch.zeros(()))
    return torch.autograd.grad(total, (*xs, *incoming), materialize_grads=True)


@rule("incoming gradients of any layout")
def _incoming_gradients_of_any_layout(case: Case) -> Attempts:
    for name, layout in layouts(case.op(*case.operands)).items():
        yield name, partial(case.transformed, pulled_back, layout=layout)
        if "expanded" not in name:
            both = partial(case.transformed, pulled_back, layout=layout, of_operands=layout)
            yield f"{name}, and operands", both
            twice = partial(case.transformed, _pulled_back_twice, layout=layout)
            yield f"{name}, second derivatives", twice


@rule("any of the gradients")
def _any_of_the_gradients(case: Case) -> Attempts:
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


@rule("changes after the call")
def _changes_after_the_call(case: Case) -> Attempts:
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


RULES["undeclared writes"] = undeclared_writes


@rule("forward mode")
def _forward_mode(case: Case) -> Attempts:
    def pushed(f: Function, case: Case, chosen: Sequence[int]) -> list[Tensor]:
        with forward_ad.dual_level():
            xs = [x.clone() for x in case.floating]
            for i in chosen:
                xs[i] = forward_ad.make_dual(xs[i], normal_like(xs[i]))
            ys = [forward_ad.unpack_dual(y) for y in f(*xs)]
            return [
                (torch.zeros_like(y.primal) if y.tangent is None else y.tangent).clone() for y in ys
            ]

    for chosen in dict.fromkeys([_every(case), *((i,) for i in _every(case))]):
        yield (
            f"of operands {chosen}",
            partial(case.transformed, pushed, _difference_of, chosen=chosen),
        )


def _moved(f: Function, xs: Tensors, step: float, chosen: Sequence[int]) -> list[Tensor]:
    moved = [x + step * normal_like(x) if i in chosen else x for i, x in enumerate(xs)]
    return [y.double() for y in f(*moved)]


def _difference_of(
    f: Function, case: Case, chosen: Sequence[int] | None = None
) -> tuple[list[Tensor], float]:
    """The directional derivative by (f(x + h·v) − f(x − h·v))/2h, in float64, and its tolerance.

    The error of the difference is about h², and the error of the roundings ε/h. Both are ε^⅔ for
    h = ε^⅓.
    """
    h = torch.finfo(torch.float64).eps ** (1 / 3)
    every = _every(case) if chosen is None else chosen
    after, before = (_moved(f, case.floating, step, every) for step in (h, -h))
    return [(a - b) / (2 * h) for a, b in zip(after, before, strict=True)], 1000 * h**2


def _value_and_difference_of(f: Function, case: Case) -> tuple[list[Tensor], float]:
    differences, tolerance = _difference_of(f, case)
    return [*f(*case.floating), *differences], tolerance


def _second_difference_of(f: Function, case: Case) -> tuple[list[Tensor], float]:
    """The first directional derivative, and the second by (f(x + h·v) − 2·f(x) + f(x − h·v))/h².

    For h = ε^¼ the errors of the difference and of the roundings are both about √ε.
    """
    h = torch.finfo(torch.float64).eps ** (1 / 4)
    after, middle, before = (_moved(f, case.floating, step, _every(case)) for step in (h, 0.0, -h))
    second = [(a - 2 * m + b) / h**2 for a, m, b in zip(after, middle, before, strict=True)]
    return [*_difference_of(f, case)[0], *second], 1000 * h**2


def _scalar(f: Function) -> Callable[..., Tensor]:
    """A scalar whose gradient differs from element to element."""
    return lambda *xs: sum((y + y.square()).sum() for y in map(real, f(*xs)))  # type: ignore[return-value]


def _every(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.floating)))


def _vjp(f: Function, case: Case) -> object:
    ys, pull, *_ = vjp(f, *case.floating)
    return pull(tuple(map(normal_like, ys)))


def _jvp(f: Function, xs: Tensors) -> tuple[Tensors, Tensors]:
    ys, pushed, *_ = jvp(f, xs, tuple(map(normal_like, xs)))
    return ys, pushed


def _batched(f: Function, case: Case) -> Tensors:
    xs = case.leaves()
    ys = f(*xs)
    batches = [torch.stack([normal_like(y, seed) for seed in range(3)]) for y in ys]
    found = torch.autograd.grad(ys, xs, batches, allow_unused=True, is_grads_batched=True)
    return tuple(
        x.new_zeros(3, *x.shape) if g is None else g for x, g in zip(xs, found, strict=True)
    )


def _checkpointed(f: Function, case: Case) -> Tensors:
    return pulled_back(lambda *xs: checkpoint(f, *xs, use_reentrant=False), case)


MOST_SQUARED = 2**24  # numbers that a rule may keep, of 8 bytes each


def _of_every_pair(f: Callable[[], object], xs: Tensors) -> object:
    """Compute derivatives by all operands at once, unless they take too much memory."""
    count = sum(x.numel() for x in xs)
    if count**2 > MOST_SQUARED:
        raise Outcome(
            "not run", f"{count}² derivatives, expected at most 2²⁴ numbers; take a smaller sample"
        )
    return f()


def _jacfwd(f: Function, xs: Tensors) -> object:
    return _of_every_pair(lambda: jacfwd(f, tuple(range(len(xs))))(*xs), xs)


def _hessian(f: Function, xs: Tensors) -> object:
    return _of_every_pair(lambda: hessian(_scalar(f), tuple(range(len(xs))))(*xs), xs)


TRANSFORMS: dict[str, Callable[[Function, Case], object]] = {
    "batched gradients": _batched,
    "checkpoint": _checkpointed,
    "torch.func: vjp": _vjp,
    "torch.func: jvp": lambda f, case: _jvp(f, case.floating),
    "torch.func: jacrev": lambda f, case: jacrev(f, _every(case))(*case.floating),
    "torch.func: jacfwd": lambda f, case: _jacfwd(f, case.floating),
    "torch.func: hessian": lambda f, case: _hessian(f, case.floating),
    "torch.func: jvp of jvp": lambda f, case: _jvp(lambda *xs: _jvp(f, xs)[1], case.floating),
}
BY_DIFFERENCES = {
    "torch.func: jvp": _value_and_difference_of,
    "torch.func: jvp of jvp": _second_difference_of,
}
RULES.update(
    {
        name: partial(Case.transformed, transform=how, numerical=BY_DIFFERENCES.get(name))
        for name, how in TRANSFORMS.items()
    }
)


# Special values


@rule("NaN")
def _nan(case: Case) -> Attempts:
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


def _same_as_reference(case: Case) -> None:
    expected = case.takes(case.operands, case.plain)
    case.close(case.op(*case.operands), expected, lambda: case.wide.plain(*case.wide.operands))


@rule("ties and zeros")
def _ties_and_zeros(case: Case) -> Attempts:
    """At equal numbers and zeros, kinks of a maximum or |x|, the reference gives the gradients."""
    case.expect_reference()
    first = next((t.flatten() for t in case.floating if t.numel()), torch.zeros(1))

    def repeated(numbers: Tensor, t: Tensor) -> Tensor:
        return numbers.repeat(-(-t.numel() // len(numbers)))[: t.numel()].view(t.shape).to(t.dtype)

    kinds: dict[str, Layout] = {
        "pairs in an operand": lambda t: (
            t.flatten().repeat_interleave(2)[: t.numel()].view(t.shape)
        ),
        "the same numbers in all operands": lambda t: repeated(first, t),
        "one number": lambda t: repeated(first[:1], t),
        "zeros": torch.zeros_like,
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
        raise Outcome("not run", "the reference jumps there")
    case.close(case.op(*case.operands), expected, lambda: case.wide.plain(*case.wide.operands))
    case.transformed(pulled_back)


def _is_near(around: Sequence[Tensor], ys: Sequence[Tensor], tolerance: float) -> bool:
    """Whether results of moved operands are as near as the results of a continuous function."""
    return all(
        bool((a - y).abs().max() <= tolerance * max(1.0, float(y.abs().max())))
        for a, y in zip(around, ys, strict=True)
        if y.numel()
    )


RULES["large numbers"] = partial(large_and_small_numbers, sign=1)
RULES["small numbers"] = partial(large_and_small_numbers, sign=-1)


# vmap


def _looped(f: Function) -> Function:
    """The result of `vmap`, by a loop."""
    return lambda *batches: tuple(
        map(torch.stack, zip(*(f(*one) for one in zip(*batches, strict=True)), strict=True))
    )


def _vmap(case: Case, in_dims: tuple[int | None, ...], size: int = 3) -> None:
    with_dims = list(zip(case.operands, in_dims, strict=True))
    batches = [
        torch.stack([t if dim is None else rolled(t, k) for k in range(size)])
        for t, dim in with_dims
    ]
    expected = _looped(case.plain)(*batches)
    given = [
        t if dim is None else b.movedim(0, dim)
        for b, (t, dim) in zip(batches, with_dims, strict=True)
    ]

    def exact() -> Tensors:
        return _looped(case.plain)(*cast(tuple(batches), torch.float64))

    case.close(vmap(case.op, in_dims)(*given), expected, exact)
    last = [y.movedim(0, -1) for y in expected]
    case.close(
        vmap(case.op, in_dims, out_dims=-1)(*given),
        last,
        lambda: [y.movedim(0, -1) for y in exact()],
    )
    case.expect_call(lambda: vmap(case.op, in_dims)(*given))


@rule("vmap over one operand")
def _vmap_over_one_operand(case: Case) -> AttemptsAndRemark:
    for i, t in enumerate(case.operands):
        for dim in range(t.dim() + 1):
            in_dims = tuple(dim if i == j else None for j in range(len(case.operands)))
            yield f"in_dims {in_dims}", partial(_vmap, case, in_dims)
            if dim == 0:
                yield f"in_dims {in_dims}, a batch of 1", partial(_vmap, case, in_dims, 1)
    keys = ("FuncTorchBatched", "FuncTorchBatchedDecomposition", "CompositeImplicitAutograd")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if case.overload is not None and not any(has_kernel(case.overload.name(), key) for key in keys):
        return "a loop over the samples: no rule"
    return ""


@rule("vmap over all operands")
def _vmap_over_all_operands(case: Case) -> Attempts:
    count = len(case.operands)
    for in_dims in ((0,) * count, (-1,) * count, tuple(-(i % 2) for i in range(count))):
        yield f"in_dims {in_dims}", partial(_vmap, case, in_dims)
        yield f"in_dims {in_dims}, a batch of 1", partial(_vmap, case, in_dims, 1)


@rule("vmap of vmap")
def _vmap_of_vmap(case: Case) -> None:
    rows = [[[rolled(t, 2 * i + j) for j in range(2)] for i in range(3)] for t in case.operands]
    batches = [torch.stack([torch.stack(row) for row in of_operand]) for of_operand in rows]
    looped = _looped(_looped(case.plain))
    wide = cast(tuple(batches), torch.float64)
    case.close(vmap(vmap(case.op))(*batches), looped(*batches), lambda: looped(*wide))
    case.expect_call(lambda: vmap(vmap(case.op))(*batches))


OF_BATCHES: dict[str, Callable[[Function, Tensors], object]] = {
    "vmap of jvp": lambda f, xs: vmap(lambda *x: jvp(f, x, tuple(t.cos() for t in x)))(*xs),
    "vmap of vjp": lambda f, xs: vmap(lambda *x: vjp(f, *x)[1](f(*x)))(*xs),
    "jacfwd of vmap": lambda f, xs: _jacfwd(vmap(f), xs),
    "hessian of vmap": lambda f, xs: _hessian(vmap(f), xs),
    "vmap of vmap of grad": lambda f, xs: vmap(vmap(grad(_scalar(f))))(
        *(torch.stack([x, x]) for x in xs)
    ),
    "vmap of grad": lambda f, xs: vmap(grad(_scalar(f), tuple(range(len(xs)))))(*xs),
    "gradients of vmap": lambda f, xs: torch.autograd.grad(
        _scalar(vmap(f))(*xs), xs, materialize_grads=True
    ),
}


def _of_batches(f: Function, case: Case, nested: Callable[[Function, Tensors], object]) -> object:
    rolls = [[rolled(t, k) for k in range(3)] for t in case.floating]
    return nested(f, tuple(torch.stack(of_operand).requires_grad_() for of_operand in rolls))


@rule("vmap and gradients")
def _vmap_and_gradients(case: Case) -> Attempts:
    for name, nested in OF_BATCHES.items():
        yield name, partial(case.transformed, _of_batches, nested=nested)


# Modes, and other kinds of tensors


@rule("autocast")
def _autocast(case: Case) -> AttemptsAndRemark:
    case.expect_reference()

    def check(dtype: torch.dtype, operands: Tensors, batch: bool = False) -> None:
        native, device = case.takes(operands), operands[0].device.type
        with torch.autocast(device, dtype):
            actual = case.op(*operands)
            if batch:
                actual = tuple(y[0] for y in vmap(case.op)(*(t[None] for t in operands)))
            theirs = case.plain(*operands)
            with torch.autocast(device, enabled=False):
                same_bits(case.op(*operands), native)
        accurate(actual, theirs, case.plain(*cast(operands, torch.float64)), operands)
        if actual[0].dtype == torch.float32:
            keeps.append(dtype)

    def mixed(dtype: torch.dtype, operands: Tensors) -> None:
        with torch.autocast(operands[0].device.type, dtype):
            theirs = case.takes(operands, case.plain)
            actual = case.op(*operands)
        accurate(actual, theirs, case.plain(*cast(operands, torch.float64)), operands)

    keeps: list[torch.dtype] = []
    single = cast(case.operands, torch.float32)
    for dtype in LOW:
        yield f"to {dtype}", partial(check, dtype, single)
        yield f"to {dtype}, in vmap", partial(check, dtype, single, True)
        # A layer before the operator casts its result, and the operator's parameters stay float32.
        low = cast(case.operands, dtype)
        yield f"of {dtype}", partial(mixed, dtype, low)
        for i, t in enumerate(case.operands if len(case.floating) > 1 else ()):
            if t.is_floating_point():
                operands = (*single[:i], low[i], *single[i + 1 :])
                yield f"to {dtype}, of which operand {i} is", partial(mixed, dtype, operands)
    yield "of float64", partial(check, torch.bfloat16, cast(case.operands, torch.float64))
    return "it keeps float32" if keeps else "it casts to autocast's dtype"


@rule("grad modes")
def _grad_modes(case: Case) -> Attempts:
    def check(mode: type[torch.no_grad] | type[torch.inference_mode]) -> None:
        expected = case.op(*case.operands)
        xs = [t.clone().requires_grad_(is_differentiable(t)) for t in case.operands]
        with mode():
            ys = case.op(*xs)
            close(case.op(*(t.clone() for t in case.operands)), expected)
        close(ys, expected)
        if any(y.requires_grad or y.is_inference() != (mode is torch.inference_mode) for y in ys):
            raise Outcome("wrong", "the result requires a gradient, or is no inference tensor")

    for mode in (torch.no_grad, torch.inference_mode):
        yield mode.__name__, partial(check, mode)


@rule("functionalize, and a copied graph")
def _functionalize_and_a_copied_graph(case: Case) -> None:
    expected = case.op(*case.operands)
    close(functionalize(case.op)(*case.operands), expected)
    graph = make_fx(functionalize(case.op))(*case.operands)
    close(copy.deepcopy(graph)(*case.operands), expected)


@rule("tensor subclass")
def _tensor_subclass(case: Case) -> Attempts:  # noqa: C901  # a try for each operand
    """Try PyTorch's TwoTensor, a subclass that computes with two tensors, here with one twice."""
    from torch.testing._internal.two_tensor import TwoTensor

    def inner(tensors: Tensors) -> Tensors:
        if any(not isinstance(t, TwoTensor) for t in tensors):
            raise Outcome("wrong", "the result is no tensor of the subclass")
        return tuple(t.a for t in tensors)  # type: ignore[attr-defined]

    def wrapped(tensors: Iterable[Tensor]) -> Tensors:
        return tuple(TwoTensor(t, t) for t in tensors)

    def values(function: Function) -> None:
        close(inner(function(*wrapped(case.operands))), function(*case.operands))

    def pulled(function: Function) -> None:
        xs = tuple(t.requires_grad_() for t in wrapped(case.floating))
        incoming = wrapped(map(normal_like, case.oracle(*case.floating)))
        close(
            inner(gradients(case.smooth(function)(*xs), xs, incoming)),
            pulled_back(case.oracle, case),
        )

    def check(compare: Callable[[Function], None]) -> None:
        try:
            compare(case.op)
        except Outcome:
            if case.reference is not None:
                try:
                    compare(case.plain)
                except Outcome as e:  # PyTorch's subclass forgets that a view is conjugated
                    raise Outcome(
                        "not run", f"the reference is wrong for a subclass: {e.args[1]}"
                    ) from e
            raise

    yield "values", partial(check, values)
    if case.floating:
        yield "gradients", partial(check, pulled)


# Compilers


def _compiled(case: Case, backend: str, dynamic: bool | None = None) -> Attempts:
    def call(*args: object, **kwargs: object) -> object:
        return case.callable(*args, **kwargs)

    def values(operands: Tensors) -> None:
        expected, actual = case.takes(operands), compiled(*operands)
        close(actual, expected)
        same_metadata(actual, expected)

    def pulled() -> None:
        transform = partial(pulled_back, case=case, layout=LAYOUTS["permuted"])
        expected = transform(case.oracle)
        case.close(
            transform(case.smooth(compiled)),
            expected,
            lambda: transform(case.wide.oracle, case=case.wide),
        )

    torch._dynamo.reset()
    compiled = case.bind(torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic))
    yield "values", partial(values, case.operands)
    if case.floating:
        yield "gradients", pulled
    for name, operands in case.resized(lambda t, dim: torch.cat([t, t], dim)) if dynamic else ():
        yield f"twice {name}", partial(values, operands)
    torch._dynamo.reset()


def _by_inductor(case: Case) -> Attempts:
    if not any(map(shutil.which, filter(None, [os.environ.get("CXX"), "g++", "clang++"]))):
        raise Outcome("not run", "no C++ compiler")
    from torch._inductor import config

    # Processes for compiling would take longer to start. The caches on disk do not depend on an
    # operator's rules.
    with config.patch(compile_threads=1, force_disable_caches=True):
        yield from _compiled(case, backend="inductor")


RULES["torch.compile"] = partial(_compiled, backend="aot_eager")
RULES["torch.compile, dynamic"] = partial(_compiled, backend="aot_eager", dynamic=True)
RULES["torch.compile by Inductor"] = _by_inductor


@rule("torch.export, save and load")
def _torch_export_save_and_load(case: Case) -> AttemptsAndRemark:
    class Module(torch.nn.Module):
        def forward(self, *args: object, **kwargs: object) -> object:
            return case.callable(*args, **kwargs)

    def reloaded() -> torch.export.ExportedProgram:
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        return torch.export.load(file)

    def check(stage: Callable[[], torch.export.ExportedProgram]) -> None:
        close(case.bind(stage().module())(*case.operands), case.op(*case.operands))

    program = torch.export.export(Module(), *case.arguments(case.operands))
    yield "exported", partial(check, lambda: program)
    yield "loaded", partial(check, reloaded)
    yield "decomposed", partial(check, program.run_decompositions)
    is_kept = any(node.target is case.overload for node in program.graph.nodes)
    return "the graph holds the operator" if is_kept else "the graph holds other operators"


# Ranks

RANKS = 2
_meshes = itertools.count()
MOST_COMBINATIONS = 48  # drawn from all, if there are more


@rule("DTensor")
def _dtensor(case: Case) -> AttemptsAndRemark:
    """Try every placement of every operand, on simulated ranks.

    All ranks are in this process, in PyTorch's LocalTensor mode: no other process has to import the
    operator.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    choices = []
    for t in case.operands:
        partial_sum = [Partial("sum")] if is_differentiable(t) else []
        choices.append([Replicate(), *map(Shard, range(t.dim())), *partial_sum])
    combinations = list(itertools.product(*choices))
    if len(combinations) > MOST_COMBINATIONS:
        combinations = random.Random(0).sample(combinations, MOST_COMBINATIONS)
    leaves = case.leaves()
    ys = case.smooth(case.plain)(*leaves)
    incoming = list(map(normal_like, ys))
    every = range(len(ys))
    chosen = [every, *([i] for i in every if len(every) > 1 and ys[i].requires_grad)]
    of_operands = []
    with suppress(RuntimeError):  # without a derivative, which is another rule's matter
        for some in chosen:
            given = [ys[i] for i in some], leaves, [incoming[i] for i in some]
            of_operands.append((some, gradients(*given, retain_graph=True)))
    expected = case.op(*case.operands), incoming, of_operands
    local: list[tuple[Placement, ...]] = []
    with _simulated_ranks() as mesh:
        for placements in combinations:
            label = ", ".join(map(str, placements))
            yield label, partial(_compare, case, mesh, placements, expected, local)
    return f"{len(local)} of {len(combinations)} placements take no communication"


@contextmanager
def _simulated_ranks() -> Iterator["DeviceMesh"]:
    """A mesh of ranks in this process, unequal to all meshes before it.

    DTensor caches what it finds for a mesh, and takes meshes of two process groups for equal. So
    the dimension of each mesh has a name of its own: otherwise DTensor would ask for a group that
    was destroyed.
    """
    if dist.is_initialized():
        raise Outcome("not run", "this process belongs to a process group")
    from torch.distributed._local_tensor import LocalTensorMode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook  # the next call replaces it by a hook that names the rank
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        with LocalTensorMode(RANKS):
            yield init_device_mesh("cpu", (RANKS,), mesh_dim_names=(f"ranks {next(_meshes)}",))
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def _place(t: Tensor, mesh: "DeviceMesh", placement: "Placement") -> "DTensor":
    """A DTensor of ``t``. The terms of a partial sum differ in every element."""
    from torch.distributed._local_tensor import LocalTensor, maybe_disable_local_tensor_mode
    from torch.distributed.tensor import DTensor, distribute_tensor

    is_sum = placement.is_partial()
    with maybe_disable_local_tensor_mode():  # the mode would draw the weights once for each rank
        if is_sum:
            weights = [normal_like(t, seed) for seed in range(RANKS - 1)]
            weights.append(1 - torch.stack(weights).sum(0))
            of_ranks = [t * weight for weight in weights]
        else:
            of_ranks = [t.clone() for _ in range(RANKS)]
    local = LocalTensor(dict(enumerate(of_ranks)))
    if is_sum:
        return DTensor.from_local(local, mesh, [placement], run_check=False)
    return distribute_tensor(local, mesh, [placement], src_data_rank=None)


def _compare(
    case: Case,
    mesh: "DeviceMesh",
    placements: tuple["Placement", ...],
    expected: tuple[Tensors, list[Tensor], list[tuple[Sequence[int], Tensors]]],
    local: list[tuple["Placement", ...]],
) -> None:
    """Compare results and gradients on all ranks with those of the unsharded operands."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.debug import CommDebugMode

    values, incoming, of_operands = expected
    placed = [_place(t, mesh, p) for t, p in zip(case.operands, placements, strict=True)]
    xs = [t.requires_grad_() for t in placed if is_differentiable(t)]
    try:
        with CommDebugMode() as communication:
            ys = case.op(*placed)
    except NotImplementedError as e:
        if "sharding strategy" not in str(e):
            raise
        way = "register one by op.register_sharding of torchpar.library"
        raise NotImplementedError(f"{str(e).rstrip('.')}; {way}") from e
    results = [y for y in ys if isinstance(y, DTensor)]
    if len(results) < len(ys):
        raise Outcome("wrong", "the result is not a DTensor")
    replicated = [y.redistribute(placements=[Replicate()]) for y in results]
    _same_on_all_ranks(replicated, values)
    if communication.get_total_counts() == 0:
        local.append(placements)
    smooth = [y for y, smooth in zip(replicated, case.is_smooth, strict=True) if smooth]
    placed = [_place(g, mesh, Replicate()) for g in incoming]
    for some, right in of_operands:
        given = [smooth[i] for i in some], xs, [placed[i] for i in some]
        found: Sequence[Any] = gradients(*given, retain_graph=True)
        _same_on_all_ranks([g.redistribute(placements=[Replicate()]) for g in found], right)


def _same_on_all_ranks(actual: Sequence["DTensor"], expected: Sequence[Tensor]) -> None:
    from torch.distributed._local_tensor import maybe_disable_local_tensor_mode

    with maybe_disable_local_tensor_mode(), torch.no_grad():
        for a, e in zip(actual, expected, strict=True):
            parts: list[Any] = [a.to_local()]
            for part in parts:
                if of_ranks := getattr(part, "_local_tensors", None):  # a sum nests them
                    parts += of_ranks.values()
                else:
                    close(part.detach(), e.detach())


# A GPU


@rule("CUDA graph")
def _cuda_graph(case: Case) -> None:
    """Capture a call on another stream, and replay it with other operands in the same memory."""
    if not torch.cuda.is_available():
        raise Outcome("not run", "no GPU")
    operands = [t.cuda() for t in case.operands]
    others = [rolled(t, 1).cuda() for t in case.operands]
    case.takes(operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = case.op(*operands)
    for t, changed in zip(operands, others, strict=True):
        t.copy_(changed)
    graph.replay()
    close(actual, case.op(*others))
