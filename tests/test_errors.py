# SPDX-License-Identifier: MIT
"""Numbers as arguments: those of NumPy and of tensors are taken, others refused in one line.
Messages of errors whose classes are anybody's."""

import asyncio
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from torchpar.errors import (
    LONGEST,
    ConfigError,
    check_number,
    check_whole,
    first_line,
    message_of,
    whole_or_text,
)
from torchpar.parallel.launch.guard import TooSlow
from torchpar.parallel.launch.processes import Terminated
from torchpar.testing.operators.attempts import outcome_of

BOOLS = [True, np.True_, torch.tensor(True), np.array(True)]
BROKEN = [torch.ones(3, 3), np.ones((3, 3)), torch.tensor(1, device="meta"), "2", None]


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3), np.array(3)])
def test_whole_numbers_are_taken(value):
    for found in (check_whole("n", value), whole_or_text(value)):
        assert type(found) is int
        assert found == 3


@pytest.mark.parametrize("value", [*BOOLS, *BROKEN, 2.0, -(10**400), torch.tensor(2.0)])
def test_other_values_are_no_whole_numbers(value):
    with pytest.raises(ConfigError, match=r"^n is .*, expected a whole number from 1 on\Z"):
        check_whole("n", value)


@pytest.mark.parametrize(
    "value",
    [2, 2.0, np.float32(2), torch.tensor(2.0), torch.tensor([[2]]), torch.ones(()).mul(2)],
)
def test_numbers_are_taken(value):
    assert check_number("x", value) == 2


def test_a_number_that_requires_a_gradient_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_number("x", torch.tensor(2.0, requires_grad=True)) == 2


@pytest.mark.parametrize("value", [*BOOLS, *BROKEN, 10**400, float("nan"), -1])
def test_other_values_are_no_numbers(value):
    with pytest.raises(ConfigError, match=r"^x is .*, expected a number from 0 on\Z"):
        check_number("x", value)


def test_an_int_of_many_digits_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"^n is -0x.*, expected a whole number from 1 on\Z"):
        check_whole("n", -(10**5000))
    with pytest.raises(ConfigError, match=r"^x is 0x.*, expected a number from 0 on\Z"):
        check_number("x", 10**5000)


def raising(what: BaseException) -> Exception:
    """An error whose str raises another one."""

    class Silent(Exception):
        def __str__(self) -> str:
            raise what

    return Silent()


def test_an_error_is_described_whatever_its_str_does():
    for what in (RuntimeError("x"), SystemExit(0), GeneratorExit(), asyncio.CancelledError()):
        said = f"(str of it raises {type(what).__name__})"
        assert message_of(raising(what)) == said
        assert first_line(raising(what)) == f"Silent: {said}"
        assert outcome_of(raises(raising(what))) == ("crashes", f"Silent: {said}")
    assert len(message_of(ValueError("x" * 10**7))) == LONGEST
    assert first_line(ValueError("a\nb")) == "ValueError: a"
    for ours in (KeyboardInterrupt(), TooSlow(), Terminated(15)):  # these end what asks
        with pytest.raises(type(ours)):
            message_of(raising(ours))


def raises(error: Exception) -> Callable[[], None]:
    def attempt() -> None:
        raise error

    return attempt
