# SPDX-License-Identifier: MIT
"""Functions of a student's file, checked and timed in the ladder: ``run ladder --with my.py``.

A function gets copies of the arguments, as NumPy arrays. It returns an array, nested lists, or a
tensor or array on a GPU, which is copied back within the time. Caches are flushed, or warm, as for
the other rows. The file is executed once, in this process alone. Modules beside it can be imported.
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
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.ladder.cases import WARM_SECONDS, LadderCase, make_case
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


class SlowCall(Rejected):
    """A call took longer than `LIMIT` with the smaller arguments, too, or later in the turns."""


class Student(NamedTuple):
    """The functions of a file by name, and the error that ended its execution, or ""."""

    functions: dict[str, Callable[..., object]]
    error: str


def load(path: Path) -> Student:
    """Execute a file, and return those of its functions that the ladder knows.

    If a line fails, the functions above it are there. Code behind ``if __name__ == "__main__"``
    does not run. What the file only imports is not its own.

    Raises:
        ConfigError: there is no such file, or it defines none of the functions.
    """
    if not path.is_file():
        raise ConfigError(
            f"--with {path} is no file; name a Python file that defines any of {NAMES}"
        )
    file = str(path.resolve())
    name = f"with_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, file, loader=SourceFileLoader(name, file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Numba and pickle look there
    error = ""
    try:
        # The file may have flags of its own.
        with patch.object(sys, "argv", [file]), modules_beside(file):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        error = describe(e, file)
    defined = {known: getattr(module, known, None) for known in OPERATORS}
    functions = {
        known: function
        for known, function in defined.items()
        if callable(function) and not is_imported(known, function, name)
    }
    if not functions:
        raise ConfigError(
            f"--with {path}: {error or 'it has no function that is known'}; define any of {NAMES}"
        )
    return Student(functions, error)


def is_imported(known: str, function: Callable[..., object], file_module: str) -> bool:
    """Whether another module than the file's has this function under this name."""
    others = [module for name, module in list(sys.modules.items()) if name != file_module]
    return any(getattr(module, "__dict__", {}).get(known) is function for module in others)


@contextmanager
def modules_beside(file: str) -> Iterator[None]:
    """Let the block import modules from the file's folder, as ``python my.py`` does."""
    with patch.object(sys, "path", [str(Path(file).parent), *sys.path]):
        yield


def describe(error: BaseException, file: str, function: Callable[..., object] | None = None) -> str:
    """The error in one line, with the file's name and the line where it happened."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
    ]
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
    """Raise `TooSlow` in the block after ``seconds``; compiled code ends first. Without effect on
    Windows."""
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


def as_array(result: object) -> Array:
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
        calls: of a turn.
    """

    file: str
    name: str
    function: Callable[..., object]
    case: LadderCase
    tried: LadderCase
    calls: int = 1

    @property
    def note(self) -> str:
        """The smaller case, from which the time is extrapolated."""
        return "" if self.tried is self.case else f"from {self.size}"

    @property
    def size(self) -> str:
        return "×".join(map(str, self.tried.shape))

    def begin(self) -> float:
        """Call the function for the first time, and settle its case; the seconds of the whole case.

        Raises:
            Rejected: as `turn`.
        """
        try:
            seconds = self.call()
        except TooSlow:
            self.shrink()
            seconds = self.limited_call()
        return self.whole(seconds)

    def turn(self, index: int) -> list[float]:
        """Time a turn, as `ladder.timed_turn`, and check its result. The seconds are those of the
        whole case.

        Raises:
            SlowCall: a call takes longer than `LIMIT`.
            Rejected: an error of the function, with its line; a wrong result; or a changed
                argument.
        """
        seconds = self.limited_call(self.calls)
        if index == 0 and not self.case.cold:  # the first call may have compiled
            self.calls = 1 + int(WARM_SECONDS / self.limited_call())
        return [self.whole(seconds)]

    def whole(self, seconds: float) -> float:
        """The seconds of the whole case by those of the case that is computed."""
        return seconds * self.case.work.flops / self.tried.work.flops

    def shrink(self) -> None:
        """Take the largest case that a call computes in `SECONDS`, by the time of a small one."""
        operator, shape = self.case.operator, self.case.shape
        small = tuple(min(size, SMALL) for size in shape)
        self.tried = make_case(operator, small)
        self.limited_call()  # which may compile
        factor = max(
            1.0,
            (SECONDS / self.limited_call()) ** (1 / (3 if "matmul" in operator else len(shape))),
        )
        sizes = zip(small, shape, strict=True)
        larger = tuple(min(most, int(size * factor)) for size, most in sizes)
        self.tried = self.case if larger == shape else make_case(operator, larger)

    def limited_call(self, calls: int = 1) -> float:
        """As `call`; a SlowCall if it takes longer than `LIMIT`."""
        try:
            return self.call(calls)
        except TooSlow:
            raise SlowCall(f"it takes more than {LIMIT:.0f} s for {self.size}") from None

    def call(self, calls: int = 1) -> float:
        """Call the function ``calls`` times, check its last result, and return the seconds of a
        call."""
        arguments = [t.copy() for t in self.tried.arguments]
        if self.case.cold:
            flush(CPU)
        try:
            with time_limit(LIMIT), modules_beside(self.file):
                timed = time_calls(lambda: as_array(self.function(*arguments)), calls=calls)
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


def enter(path: Path, name: str, function: Callable[..., object], case: LadderCase) -> Entry:
    """Call a function once, say whether its result is right, and return it."""
    entry = Entry(str(path.resolve()), name, function, case, case)
    try:
        seconds = entry.begin()
        extrapolated = f"{entry.note}, " * bool(entry.note)
        print(
            f"{path.name}: {name} is right ({extrapolated}first call {duration(seconds)})",
            flush=True,
        )
    except SlowCall as e:
        print(f"{path.name}: {name} is too slow: {e}", flush=True)
    except Rejected as e:
        at = f" at {entry.size}" * bool(entry.note)
        print(f"{path.name}: {name} is not right{at}: {e}", flush=True)
    return entry
