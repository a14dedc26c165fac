# SPDX-License-Identifier: MIT
"""The errors of torchpar, and the lines that its commands print.

The message of an error is one line: what was wrong, what was expected, what to do.
"""

import importlib
import io
import math
import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import (
    AbstractContextManager,
    _GeneratorContextManager,
    contextmanager,
    suppress,
)
from functools import partial, wraps
from importlib.util import find_spec
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from pathlib import Path
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
# The variables that name the folders of compiled kernels, and the default folders. PyTorch's
# compiler cannot even be imported if the first folder cannot be made.
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "", "TRITON_CACHE_DIR": "~/.triton"}
SILENCE = 10.0  # seconds after which a loop says how far it is

__all__ = ["AllRanksError", "ConfigError", "DivergedError", "RankLostError", "TorchparError"]
__all__ += ["check_finite", "first_line"]


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


def first_line(error: BaseException) -> str:
    """The type of an error, and the first line of its message, if it has any."""
    return f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    """The cells of a table in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def cache_remedy(error: OSError) -> str:
    """What to do where a cache of compiled kernels cannot be written; "" for another file."""
    if not isinstance(error.filename, str):
        return ""
    failed = Path(error.filename)
    for name, default in CACHES.items():
        if folder := os.environ.get(name) or os.path.expanduser(default):
            # The error may name the first parent that is missing. `Path.exists` raises an error of
            # its own in a folder that this user cannot search, before Python 3.14.
            is_parent = Path(folder).is_relative_to(failed) and not os.path.exists(failed)
            if is_parent or failed.is_relative_to(folder):
                return f"let {name} name a folder that can be written"
    return ""


def stop_printing() -> None:
    """Let what is printed from now on go nowhere, as after a reader has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items. Where they take longer than `SILENCE`, lines on stderr say how far the loop is.

    A line comes early if the next item might take until after that time.

    Args:
        what: the items, as "steps" in "37 of 100 steps after 10 s".
        total: their number; by default that of a sequence.
    """
    total = len(items) if total is None and isinstance(items, Sized) else total
    of = "" if total is None else f" of {total}"
    begun = last = before = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        took, before = now - before, now
        if now + took - last >= SILENCE:
            last = now
            print(f"{done}{of} {what} after {now - begun:.0f} s", file=sys.stderr, flush=True)
        yield item


def decorated(
    name: str, enter: Callable[[], AbstractContextManager[object]], function: Callable[P, R]
) -> Callable[P, R]:
    """A function whose calls are made within ``enter()``, as `contextlib.ContextDecorator` does it.

    Raises:
        ConfigError: a generator or a coroutine function, or at the call one that returns such an
            object. The block would end before the body begins. ``name`` names the block.
    """
    _refuse_suspended(name, function, _kind_of_function(function))

    @wraps(function)
    def within(*args: P.args, **kwargs: P.kwargs) -> R:
        with enter():
            result = function(*args, **kwargs)
        if isinstance(result, _SUSPENDED):
            if not isinstance(result, AsyncGeneratorType):
                result.close()  # else Python warns of a coroutine that was never awaited
            kind = type(result).__name__.replace("_", " ")
            _refuse_suspended(name, function, f"which returns an object of type {kind}")
        return result

    return within


_SUSPENDED = GeneratorType, CoroutineType, AsyncGeneratorType


def _kind_of_function(function: Callable[..., object]) -> str:
    """The kind of a function whose body runs after its call has returned, or ""."""
    for one in (function, getattr(function, "__call__", None)):  # noqa: B004  # it may be async
        if isasyncgenfunction(one):
            return "an asynchronous generator function"
        if isgeneratorfunction(one):
            return "a generator function"
        if iscoroutinefunction(one):
            return "a coroutine function"
    return ""


def _refuse_suspended(name: str, function: Callable[..., object], kind: str) -> None:
    if kind:
        whose = getattr(function, "__qualname__", type(function).__qualname__)
        raise ConfigError(
            f"{name} decorates {whose}, {kind}, whose body runs when the block has ended; write "
            f"`with {name}(…):` within the body"
        )


class _ContextManager(_GeneratorContextManager[T]):
    """A context manager by `context_manager`."""

    name: str

    def __call__(self, func: Callable[P, R]) -> Callable[P, R]:  # type: ignore[override]
        return decorated(self.name, self._recreate_cm, func)


def context_manager(
    name: str,
) -> Callable[[Callable[P, Iterator[T]]], Callable[P, _ContextManager[T]]]:
    """`contextlib.contextmanager`, whose managers refuse to decorate what `decorated` refuses.

    Args:
        name: of the function, as its users write it.
    """

    def make(function: Callable[P, Iterator[T]]) -> Callable[P, _ContextManager[T]]:
        @wraps(function)
        def enter(*args: P.args, **kwargs: P.kwargs) -> _ContextManager[T]:
            generator: Any = function
            found = _ContextManager[T](generator, args, kwargs)
            found.name = name
            return found

        return enter

    return make


@contextmanager
def breaking_silence(how_far: Callable[[], str]) -> Iterator[None]:
    """Say on stderr how far the block is, after each `SILENCE` seconds in which it prints nothing.

    It serves a block of somebody else's code, which has no loop to ask. A thread speaks, to the
    stderr that is there at the start, so that what the block captures stays its own. What is
    printed by other ways than the two streams of the start is not noticed.

    Args:
        how_far: as "12 launches executed"; " after 10 s" follows. The thread calls it.
    """
    stderr, ended = sys.stderr, threading.Event()
    silence = min(SILENCE, threading.TIMEOUT_MAX)
    begun = last = time.monotonic()
    if stderr is None:  # it was closed, and `print` would take stdout
        yield
        return

    def noted(write: Callable[[str], int], text: str) -> int:
        nonlocal last
        last = time.monotonic()
        return write(text)

    def speak() -> None:
        nonlocal last
        while not ended.wait(max(last + silence - time.monotonic(), 0.0)):
            if (now := time.monotonic()) - last >= silence:  # the block has not printed meanwhile
                last = now
                with suppress(OSError, ValueError):  # the block has closed it
                    print(f"{how_far()} after {now - begun:.0f} s", file=stderr, flush=True)

    streams = {id(one): one for one in (sys.stdout, stderr) if isinstance(one, io.TextIOWrapper)}
    before = {number: vars(one).get("write") for number, one in streams.items()}
    for stream in streams.values():  # an attribute in the method's place: the stream stays the same
        stream.write = partial(noted, stream.write)  # type: ignore[method-assign]
    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for number, stream in streams.items():
            del vars(stream)["write"]
            if before[number] is not None:  # of a block around this one
                vars(stream)["write"] = before[number]


@contextmanager
def printing(command: str) -> Iterator[None]:
    """Let the block print; end the process in one line where the output, or a cache of
    compiled kernels, cannot be written.

    Where nobody reads on, such as head, that has read enough, the process ends without a line.

    Args:
        command: whose block it is, for the message.
    """
    if sys.stdout is None:  # it was closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until this process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where there is only ASCII, print ? for others
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        stop_printing()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as e:
        if remedy := cache_remedy(e):
            print(f"{command}: error: {e}; {remedy}", file=sys.stderr)
            sys.exit(1)
        if e.filename is not None or can_print():  # then it is another file's
            raise
        stop_printing()
        print(f"{command}: error: the output cannot be written: {e}", file=sys.stderr)
        sys.exit(1)


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


def can_print() -> bool:
    """Whether a line, which is empty, can be written to the output."""
    try:
        print(flush=True)  # a flush alone would find an empty buffer
    except OSError:
        return False
    return True


def import_nogpu(what: str) -> Any:
    """Import nogpu, which executes Triton kernels on a machine without a GPU.

    Args:
        what: the subject of the message, such as "--all".

    Raises:
        ConfigError: it is not installed.
    """
    if not has_nogpu():
        raise ConfigError(f"{what} needs nogpu; pip install nogpu")
    return importlib.import_module("nogpu")


def has_nogpu() -> bool:
    return is_installed("nogpu")


def is_installed(package: str) -> bool:
    """Whether a package is installed. A folder without ``__init__.py``, as the one that a checkout
    has of the name nogpu, does not count."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def needs_torch(package: str, names: Sequence[str]) -> Callable[[str], NoReturn]:
    """A package's `__getattr__` where PyTorch is not installed, which its ``names`` need."""

    def missing(name: str) -> NoReturn:
        if name in names:
            raise ImportError(f"{package}.{name} needs PyTorch; pip install torch")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return missing
