# SPDX-License-Identifier: MIT
"""Errors, and checks of arguments that raise them.

The message of an error is one line: what was wrong, what was expected, what to do.
"""

import math
import operator
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["AllRanksError", "ConfigError", "DivergedError", "RankLostError", "TorchparError"]
__all__ += ["check_finite", "first_line"]
LONGEST = 4000  # characters of a message


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


def check_whole(name: str, value: object, least: int = 1) -> int:
    """The argument ``name`` as an int, which is ``least`` or more.

    NumPy's integers are taken, and a tensor of one integer. A bool is not, nor a float such as 2.0.

    Raises:
        ConfigError: ``value`` is something else.
    """
    number = whole_or_text(value)
    if not isinstance(number, int) or number < least:
        found = in_one_line(number) if isinstance(number, int) else number
        raise ConfigError(f"{name} is {found}, expected a whole number from {least} on")
    return number


def whole_or_text(value: object) -> int | str:
    """``value`` as an int if it is a whole number, or else how Python writes it.

    So 2 and `numpy.int64(2)` compare as equal, and 2 and 2.0 do not.
    """
    with suppress(TypeError, RuntimeError):  # RuntimeError: a tensor of the device "meta"
        if not _is_bool(value):
            return operator.index(value)  # type: ignore[arg-type]  # TypeError is the answer
    return in_one_line(value)


def in_one_line(value: object) -> str:
    """How Python writes ``value``, with a space in place of each break and its indentation."""
    try:
        return " ".join(line.strip() for line in repr(value).splitlines())
    except ValueError:  # an int of more digits than Python writes
        return f"{value:#x}"


def _is_bool(value: object) -> bool:
    """Whether ``value`` is a bool, also one of NumPy, or a tensor of such."""
    dtype = str(getattr(value, "dtype", ""))
    return isinstance(value, bool) or dtype in ("bool", "torch.bool")


def check_number(name: str, value: object, *, above: bool = False, most: float = math.inf) -> float:
    """The argument ``name`` as a float from 0 on.

    Numbers of NumPy are taken, and a tensor of one number.

    Args:
        above: 0 itself is refused, too.
        most: the largest that is taken, by default infinity.

    Raises:
        ConfigError: ``value`` is something else, such as NaN, a bool or a string.
    """
    number = math.nan
    # OverflowError: an int of 400 digits. RuntimeError: a tensor of several numbers, or of none.
    with suppress(TypeError, ValueError, OverflowError, RuntimeError):
        if not (_is_bool(value) or isinstance(value, str | bytes)):
            # `float` warns of a tensor that requires a gradient.
            plain = value.detach() if hasattr(value, "detach") else value
            number = float(plain)  # type: ignore[arg-type]  # TypeError is the answer
    if not (0 < number <= most if above else 0 <= number <= most):
        expected = "above 0" if above else "from 0 on"
        expected += f", at most {most:g}" if math.isfinite(most) else ""
        raise ConfigError(f"{name} is {in_one_line(value)}, expected a number {expected}")
    return number


class RankLostError(TorchparError, RuntimeError):
    """A rank has ended or hangs.

    Attributes:
        missing: the ranks that do not answer, as far as is known.
    """

    def __init__(self, message: str, missing: Sequence[int] = ()):
        super().__init__(message)
        self.missing = missing


def message_of(error: BaseException) -> str:
    """The message of an error, of which at most `LONGEST` characters are taken.

    An error of somebody else's class may raise another one when it is asked.
    """
    try:
        text = str(error)
    except BaseException as e:
        # KeyboardInterrupt and this package's time limit do not come from the error's class.
        if isinstance(e, KeyboardInterrupt) or type(e).__module__.startswith(f"{__package__}."):
            raise
        text = f"(str of it raises {type(e).__name__})"
    return str.__getitem__(text, slice(LONGEST))  # of a subclass, too, an ordinary string


def first_line(error: BaseException) -> str:
    """The type of an error, and the first line of its message, if it has any."""
    return f"{type(error).__name__}: {message_of(error)}".partition("\n")[0].removesuffix(": ")


@contextmanager
def writing(path: Path, flag: str) -> Iterator[None]:
    """Name a file that the block cannot write, such as on a full disk, and what to do.

    Args:
        flag: the flag that names the file or its folder.

    Raises:
        ConfigError: instead of an OSError.
    """
    try:
        yield
    except OSError as e:
        reason = e.strerror or e
        raise ConfigError(
            f"{path} cannot be written ({reason}); make room there, or name another place by {flag}"
        ) from e


def check_writable(path: Path, flag: str) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    The folder is made. A file that does not exist is not made: several ranks may ask.

    Args:
        flag: the flag that names the file.

    Raises:
        ConfigError: the folder or the file cannot be written.
    """
    with writing(path, flag):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.stat()
        except FileNotFoundError:
            tempfile.TemporaryFile(dir=path.parent).close()
        else:
            path.open("a").close()
