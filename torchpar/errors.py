# SPDX-License-Identifier: MIT
"""The errors of torchpar. A message is one line: what was wrong, what was expected, what to do."""

import math
from collections.abc import Sequence


class TorchparError(Exception):
    """Base class of torchpar's errors, whose message a program can print without a traceback."""


class ConfigError(TorchparError, ValueError):
    """An argument, a file or this machine does not fit what was asked for."""


class AllRanksError(ConfigError):
    """An error that every rank raises, such as a flag that differs: only rank 0 prints it."""


class DivergedError(TorchparError, FloatingPointError):
    """Training has diverged: a loss or an output is not finite."""


def check_finite(what: str, *values: float) -> None:
    """Raise `DivergedError` if a value is not finite; ``what`` names the values, as "the loss"."""
    for value in values:
        if not math.isfinite(value):
            raise DivergedError(f"{what} is {value}; take a smaller learning rate")


class RankLostError(TorchparError, RuntimeError):
    """A rank has ended or hangs.

    Attributes:
        missing: the ranks that do not answer, as far as is known.
    """

    def __init__(self, message: str, missing: Sequence[int] = ()):
        super().__init__(message)
        self.missing = missing


def first_line(error: BaseException) -> str:
    """The type of an error, and the first line of its message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
