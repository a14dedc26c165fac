# SPDX-License-Identifier: MIT
"""A refusal is told from a crash by the exception, however its `raise` is written."""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from torchpar.testing.optimizers.refusals import failures, raising_module
from torchpar.testing.optimizers.trial import Failure


def on_one_line() -> None:
    raise RuntimeError("not supported")


def over_lines() -> None:
    # fmt: off
    raise \
        RuntimeError(
            "not supported")
    # fmt: on


def by_a_function() -> None:
    refuse = functools.partial(over_lines)
    refuse()


def from_another() -> None:
    try:
        torch.ones(-1)
    except RuntimeError as e:
        raise NotImplementedError("not supported") from e


def again() -> None:
    try:
        on_one_line()
    except RuntimeError:
        raise


@contextmanager
def translated() -> Iterator[None]:
    try:
        yield
    except KeyError as e:
        raise ValueError("not supported") from e


def by_a_context() -> None:
    with translated():
        {}["none"]


def by_a_future() -> None:
    future: Future[None] = Future()
    future.set_exception(RuntimeError("not supported"))
    future.result()


def by_a_check() -> None:
    torch._check(False, lambda: "not supported")


def without_source() -> None:
    exec("raise RuntimeError('not supported')", {"__name__": "notebook"})


def in_pytorch(name: str) -> Callable[[], None]:
    """A function that raises a RuntimeError in a module of this name."""
    namespace: dict[str, Any] = {"__name__": name}
    exec("def fail():\n    raise RuntimeError('not supported')", namespace)
    fail: Callable[[], None] = namespace["fail"]
    return fail


def of_native_code() -> None:
    torch.ones(-1)  # which may raise


def of_native_code_again() -> None:
    try:
        torch.ones(-1)
    except RuntimeError:
        raise


def of_native_code_within_a_raise() -> None:
    raise ValueError(int("not a number"))


def of_an_assertion() -> None:
    raise AssertionError("not supported")


def of_a_missing_argument() -> None:
    in_pytorch()  # type: ignore[call-arg]


REFUSALS = [
    *(on_one_line, over_lines, by_a_function, from_another, again, by_a_context, by_a_future),
    *(by_a_check, without_source, in_pytorch("torch.optim.adamw")),
]
CRASHES = [
    *(of_native_code, of_native_code_again, of_native_code_within_a_raise, of_an_assertion),
    *(of_a_missing_argument, in_pytorch("torch.distributed.tensor")),
]


@pytest.mark.parametrize(
    "fail, verdict",
    [*((one, "refuses") for one in REFUSALS), *((one, "crashes") for one in CRASHES)],
)
def test_the_verdict_is_that_of_the_exception(fail: Callable[[], None], verdict: str) -> None:
    with pytest.raises(Failure) as found, failures():
        fail()
    assert found.value.args[0] == verdict, found.value


def test_the_module_that_raised() -> None:
    for fail, module in (without_source, "notebook"), (of_native_code, None):
        with pytest.raises(RuntimeError) as found:
            fail()
        assert raising_module(found.value) == module
