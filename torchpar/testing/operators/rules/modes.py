# SPDX-License-Identifier: MIT
"""Rules of settings and modes under which an operator is called."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch.func import vmap

from torchpar.testing.operators.attempts import (
    REFUSALS,
    Attempts,
    AttemptsAndRemark,
    OutcomeException,
)
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.compare import accurate, close, same_bits
from torchpar.testing.operators.rules.values import Compute, values_and_gradients
from torchpar.testing.operators.tensors import LOW, Tensors, cast, is_differentiable

T = TypeVar("T")
Setting = Callable[[], AbstractContextManager[None]]


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


DEFAULTS = (torch.float64, torch.float32, torch.bfloat16)


def global_settings(case: Case) -> AttemptsAndRemark:  # noqa: C901  # a try for each setting
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
                raise OutcomeException("not run", f"the reference refuses: {e}") from e
            actual = compute(case.op)
        if not _differs(actual, before):
            return
        if _differs(compute(case.op), before):
            raise OutcomeException("not run", "two calls with the same settings differ")
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
    values, pulled = values_and_gradients(case)
    for label, (setting, may_reorder) in settings.items():
        yield label, partial(check, label, setting, may_reorder, values)
        if pulled is not None:
            yield f"{label}, gradients", partial(check, label, setting, may_reorder, pulled)
    return f"other bits, by {changed[0]}" if changed else ""


def _differs(actual: Tensors, expected: Tensors) -> bool:
    try:
        same_bits(actual, expected)
    except OutcomeException:
        return True
    return False


def autocast(case: Case) -> AttemptsAndRemark:
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
                yield f"to {dtype}, with operand {i} of {dtype}", partial(mixed, dtype, operands)
    yield "of float64", partial(check, torch.bfloat16, cast(case.operands, torch.float64))
    return "it keeps float32" if keeps else "it casts to autocast's dtype"


def grad_modes(case: Case) -> Attempts:
    def check(mode: type[torch.no_grad] | type[torch.inference_mode]) -> None:
        expected = case.op(*case.operands)
        xs = [t.clone().requires_grad_(is_differentiable(t)) for t in case.operands]
        with mode():
            ys = case.op(*xs)
            close(case.op(*(t.clone() for t in case.operands)), expected)
        close(ys, expected)
        if any(y.requires_grad or y.is_inference() != (mode is torch.inference_mode) for y in ys):
            raise OutcomeException(
                "wrong", "the result requires a gradient, or is no inference tensor"
            )

    for mode in (torch.no_grad, torch.inference_mode):
        yield mode.__name__, partial(check, mode)
