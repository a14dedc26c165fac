# SPDX-License-Identifier: MIT
"""Functions of a student's file, checked and timed in the ladder: ``run ladder --with my.py``.

A function gets copies of the arguments, as NumPy arrays. It returns an array, nested lists, or a tensor or
array on a GPU, which is copied back within the time. The file is executed once, in this process alone.
"""

import importlib.util
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.ladder_case import LadderCase, make_case
from benchmarks.results import duration
from benchmarks.timing import CPU, Rejected, flush, time_calls
from torchpar.baselines.numpy_mlp import Array
from torchpar.errors import ConfigError

# The operator of each function, and the row that it is compared with.
OPERATORS = {
    "max_cpu": ("maximum", "pure Python"),
    "max_numba": ("maximum", "njit"),
    "max_gpu": ("maximum", "torchpar GPU, with copies"),
    "matmul_transpose_trivial": ("matmul_t", "pure Python"),
    "matmul_transpose_numba": ("matmul_t", "njit"),
    "matmul_transpose_gpu": ("matmul_t", "torchpar GPU, with copies"),
    "maximum": ("maximum", "torchpar CPU"),
    "matmul_t": ("matmul_t", "torchpar CPU"),
    "matmul": ("matmul", "torch eager"),
    "linear_sigmoid": ("linear_sigmoid", "torchpar CPU"),
}
NAMES = ", ".join(OPERATORS)
LIMIT = 10.0  # seconds of a call, after which smaller arguments are tried
SMALL = 32  # rows and columns of the smaller arguments that come first
SECONDS = 0.5  # of a call with smaller arguments


class TooSlow(BaseException):
    """A call took longer than `LIMIT`. No ``except Exception`` of the student catches it."""


class Student(NamedTuple):
    """The functions of a file by name, and the error that ended its execution, or ""."""

    functions: dict[str, Callable[..., Any]]
    error: str


def load(path: Path) -> Student:
    """Execute a file, and return those of its functions that the ladder knows.

    If a line fails, the functions above it are there. Code behind ``if __name__ == "__main__"`` does not run.

    Raises:
        ConfigError: there is no such file, or it defines none of the functions.
    """
    if not path.is_file():
        raise ConfigError(f"--with {path} is no file; name a Python file that defines any of {NAMES}")
    file = str(path.resolve())
    name = f"with_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, file, loader=SourceFileLoader(name, file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Numba and pickle look there
    error = ""
    try:
        with patch.object(sys, "argv", [file]):  # the file may have flags of its own
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        error = describe(e, file)
    functions = {}
    for known in OPERATORS:
        function = getattr(module, known, None)
        if callable(function) and function not in (getattr(np, known, None), getattr(torch, known, None)):
            functions[known] = function
    if not functions:
        raise ConfigError(
            f"--with {path}: {error or 'it has no function that is known'}; define any of {NAMES}"
        )
    return Student(functions, error)


def describe(error: BaseException, file: str, function: Callable[..., Any] | None = None) -> str:
    """The error in one line, with the file's name and the line where it happened."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    name = Path(file).name
    if isinstance(error, SyntaxError) and error.lineno:
        lines.append(error.lineno)
    if not lines:  # an error of Numba's compiler names the line in its text
        lines += map(int, re.findall(rf'File "[^"]*{re.escape(name)}", line (\d+)', str(error)))
    if not lines and function is not None:  # it was called with other arguments than it takes
        code = getattr(getattr(function, "py_func", function), "__code__", None)
        lines += [code.co_firstlineno] if code else []
    place = f"{name}, line {lines[-1]}" if lines else name
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # Numba's errors are coloured
    text = " ".join(" ".join(plain.splitlines()[:2]).split())
    return f"{place}: {type(error).__name__}{': ' * bool(text)}{text}"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TooSlow` in the block after ``seconds``; compiled code ends first. Without effect on Windows."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def as_array(result: Any) -> Array:
    """The result on the CPU. On a GPU it waits until it is there."""
    if result is None:
        raise Rejected("it returns None, expected an array")
    if isinstance(result, torch.Tensor):
        return result.detach().cpu().numpy()
    return np.asarray(result.copy_to_host() if hasattr(result, "copy_to_host") else result)


@dataclass
class Entry:
    """A function of a student's file.

    Attributes:
        case: that of the ladder.
        tried: the case that is computed: a smaller one if the function takes longer than `LIMIT`.
    """

    file: str
    name: str
    function: Callable[..., Any]
    case: LadderCase
    tried: LadderCase

    @property
    def note(self) -> str:
        """The smaller case, from which the time is extrapolated."""
        return "" if self.tried is self.case else f"from {'×'.join(map(str, self.tried.shape))}"

    def turn(self, index: int) -> list[float]:
        """Time a call and check its result. The seconds are those of the whole case.

        Raises:
            Rejected: an error of the function, with its line; a wrong result; or a changed argument.
        """
        try:
            seconds = self.call()
        except TooSlow:
            self.shrink()
            seconds = self.call()
        return [seconds * self.case.work.flops / self.tried.work.flops]

    def shrink(self) -> None:
        """Take the largest case that a call computes in `SECONDS`, by the time of a small one."""
        operator, shape = self.case.operator, self.case.shape
        small = tuple(min(size, SMALL) for size in shape)
        self.tried = make_case(operator, small)
        try:
            seconds = self.call()
        except TooSlow:
            raise Rejected(f"it takes more than {LIMIT:.0f} s for {'×'.join(map(str, small))}") from None
        factor = max(1.0, (SECONDS / seconds) ** (1 / (3 if "matmul" in operator else len(shape))))
        sizes = zip(small, shape, strict=True)
        self.tried = make_case(operator, tuple(min(most, int(size * factor)) for size, most in sizes))

    def call(self) -> float:
        """Call the function, check its result, and return the seconds."""
        arguments = [t.copy() for t in self.tried.arguments]
        flush(CPU)
        try:
            with time_limit(LIMIT):
                timed = time_calls(lambda: as_array(self.function(*arguments)))
        except Rejected:
            raise
        except (Exception, SystemExit) as e:
            raise Rejected(describe(e, self.file, self.function)) from None
        for i, (mine, given) in enumerate(zip(arguments, self.tried.arguments, strict=True), 1):
            if not np.array_equal(mine, given):
                raise Rejected(f"it changed its argument {i}; write to a new array")
        if timed.result.dtype.kind not in "biuf":
            raise Rejected(f"the result has dtype {timed.result.dtype}, expected numbers")
        self.tried.check(timed.result)
        return timed.seconds()


def enter(path: Path, name: str, function: Callable[..., Any], case: LadderCase) -> Entry:
    """Call a function once, say whether its result is right, and return it."""
    entry = Entry(str(path.resolve()), name, function, case, case)
    try:
        (seconds,) = entry.turn(0)
        extrapolated = f"{entry.note}, " * bool(entry.note)
        print(f"{path.name}: {name} is right ({extrapolated}first call {duration(seconds)})", flush=True)
    except Rejected as e:
        print(f"{path.name}: {name} is not right: {e}", flush=True)
    return entry
