# SPDX-License-Identifier: MIT
"""Run a student's own file, and say in one line what is wrong with its functions.

`torchpar.baselines.exercises` and the ladder check functions of such a file. The file is executed
once, in a process that `torchpar.parallel.launch.guard` watches. Modules beside the file can be
imported. Each call has a time limit, and an error of the file has its line in the message.
"""

import importlib.util
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from threading import main_thread
from types import CodeType, ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from torchpar.baselines.numpy_mlp import Array
from torchpar.console import breaking_silence
from torchpar.errors import ConfigError, message_of
from torchpar.parallel.launch.guard import TOP, WATCHED, GivenUp, TooSlow, advice, is_readers

Function = Callable[..., Any]

# The functions that the ladder takes: the operator of each, and the row that it is compared with.
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
    "gemm": ("matmul", "torch eager"),
    "linear_sigmoid": ("linear_sigmoid", "torchpar CPU"),
}
LIMIT = 10.0  # seconds of a call
TOP_LEVEL = 120.0  # seconds of a file's top level, which may compile and time functions
PATIENCE = 50.0  # seconds beyond these limits, in which compiled code may return
TRACEBACK: Any = vars(BaseException)["__traceback__"]  # that of a class may be another attribute
PACKAGES = ("matplotlib", "numba", "scipy", "triton")  # whose names pip knows


class Wrong(Exception):
    """A function of the student's is not right; says what, and what was expected.

    Attributes:
        is_endless: an earlier call did not return.
    """

    def __init__(self, text: str, is_endless: bool = False):
        self.is_endless = is_endless
        super().__init__(text)


# The file


class Loaded(NamedTuple):
    """The functions of a file by name, and the error that ended its execution, or ""."""

    functions: dict[str, Function]
    error: str


def load(
    path: Path,
    names: Collection[str],
    others: Mapping[str, Collection[str]],
    takes_imports: bool = True,
) -> Loaded:
    """The functions of `find_functions`. The error of a line that fails is printed.

    Raises:
        ConfigError: there is no such file, or it defines none of the functions.
    """
    functions, error = find_functions(path, names, others, takes_imports)
    if error:
        WATCHED.say(f"{error}; functions above this line are checked")
    return Loaded(functions, error)


def find_functions(
    path: Path,
    names: Collection[str],
    others: Mapping[str, Collection[str]],
    takes_imports: bool = True,
) -> Loaded:
    """Execute a file, and return those of its functions that have one of the ``names``.

    If a line fails, or takes too long, the functions above it are there. Code behind
    ``if __name__ == "__main__"`` does not run.

    Args:
        others: the names of functions that other commands take, by command.
        takes_imports: whether a function that the file imports from a library is the student's, as
            one from a file beside it is.

    Raises:
        ConfigError: there is no such file, or it defines none of the functions.
    """
    known = ", ".join(names)
    if not path.is_file():
        raise ConfigError(
            f"--with {path} is no file; name a Python file that defines any of {known}"
        )
    file = str(path.resolve())
    module, error = loaded(file), ""
    if module is None:
        module, error = execute(file)
    found = {name: getattr(module, name) for name in names if hasattr(module, name)}
    functions = {
        name: one
        for name, one in found.items()
        if takes_imports or (callable(one) and not is_imported(name, one, file))
    }
    if not functions:
        remedy = f"define any of {known}"
        for command, theirs in others.items():
            if own := own_of(module, theirs):
                remedy = f"check {own[0]} by python -m torchpar {command} --with {path}"
        raise ConfigError(
            f"--with {path}: {error or f'it has no function that is known; {remedy}'}"
        )
    return Loaded(functions, error)


def loaded(file: str) -> ModuleType | None:
    """The module of a file that another one has imported."""
    for module in list(sys.modules.values()):
        named_alike = str(getattr(module, "__file__", "")).endswith(os.path.basename(file))
        if named_alike and file_of_module(module) == file:
            return module
    return None


def execute(file: str) -> tuple[ModuleType, str]:
    """Execute a file as a module, and return the error that ended it, or "".

    Others import it by its name, and it is not executed again.
    """
    stem = Path(file).stem
    name = stem if stem not in sys.modules and is_free(stem, file) else f"with_{stem}"
    spec = importlib.util.spec_from_file_location(name, file, loader=SourceFileLoader(name, file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Numba and pickle look there
    try:
        # The file may have flags of its own.
        with patch.object(sys, "argv", [file]), modules_beside(file), top_level(file):
            spec.loader.exec_module(module)
    except GivenUp as e:
        return module, f"its top level {e.how}{advice(e, at_top=True)}"
    except BaseException as e:
        if not (is_readers(e) or isinstance(e, TooSlow)):
            raise
        return module, describe(e, file, at_top=True) + advice(e, at_top=True)
    return module, ""


def is_free(stem: str, file: str) -> bool:
    """Whether no library is imported by this name."""
    if "." in stem:
        return False
    spec = importlib.util.find_spec(stem)
    return spec is None or spec.origin in (None, file)  # None: a folder, which files go before


@contextmanager
def modules_beside(file: str) -> Iterator[None]:
    """Let the block import modules from the file's folder, as ``python my.py`` does.

    Those that were executed here under other names have their own in the block.
    """
    own = {
        name.removeprefix("with_"): module
        for name, module in list(sys.modules.items())
        if name.startswith("with_") and is_beside(file_of_module(module), file)
    }
    own = {name: module for name, module in own.items() if name not in sys.modules}
    sys.modules.update(own)
    try:
        with patch.object(sys, "path", [str(Path(file).parent), *sys.path]):
            yield
    finally:
        for name in own:
            sys.modules.pop(name, None)


@contextmanager
def top_level(file: str) -> Iterator[None]:
    """Execute a student's file in the block. Where that takes long, lines on stderr say how far it
    is.

    Raises:
        TooSlow: it takes more than `TOP_LEVEL` seconds. Python's code ends at its line.
        GivenUp: an earlier process has ended there, or did not return.
    """

    def how_far() -> str:
        frame = sys._current_frames().get(main_thread().ident or 0)
        while frame is not None and frame.f_code.co_filename != file:
            frame = frame.f_back
        at = "" if frame is None else f", line {frame.f_lineno}"
        return f"{Path(file).name}{at}: its top level has not ended"

    with breaking_silence(how_far), time_limit(TOP_LEVEL), watching(file, TOP, TOP_LEVEL):
        yield


def file_of_module(module: object) -> str:
    file = getattr(module, "__file__", None)
    return os.path.realpath(file) if isinstance(file, str) else ""


def is_imported(name: str, function: Function, file: str) -> bool:
    """Whether a module has this function under this name that is not the student's."""
    files = [
        file_of_module(module)
        for module in list(sys.modules.values())
        if getattr(module, "__dict__", {}).get(name) is function
    ]
    return not all(is_beside(other, file) for other in files)


def is_beside(other: str, file: str) -> bool:
    """Whether a file is in the folder of ``file``; packages there may be anybody's."""
    return bool(other) and Path(other).parent == Path(file).parent


def own_of(module: ModuleType, names: Collection[str]) -> list[str]:
    """Those of ``names`` that a module has as functions of its own."""
    functions = ((name, getattr(module, name, None)) for name in names)
    own = module.__name__
    return [name for name, one in functions if getattr(one, "__module__", None) == own]


def code_of(function: object) -> CodeType | None:
    """The code of a function, or of the one that Numba compiles."""
    return getattr(getattr(function, "py_func", function), "__code__", None)


# Calls


class Compilation:
    """Seconds in which Numba compiles, which are no part of a call's time and of its limit.

    Args:
        tell: takes whether a compilation has begun or ended.
    """

    def __init__(self, tell: Callable[[bool], None] = lambda has_begun: None) -> None:
        self.tell = tell
        self.done = 0.0
        self.begun = 0.0
        self.depth = 0

    @property
    def seconds(self) -> float:
        return self.done + (time.perf_counter() - self.begun if self.depth else 0.0)

    def notify(self, event: Any) -> None:
        """Take an event of Numba; compilations are nested."""
        if event.is_start and self.depth == 0:
            self.begun = time.perf_counter()
            self.tell(True)
        self.depth += 1 if event.is_start else -1
        if self.depth == 0:
            self.done += time.perf_counter() - self.begun
            self.tell(False)

    @contextmanager
    def watched(self) -> Iterator["Compilation"]:
        """Let Numba tell of its compilations in the block."""
        if "numba" not in sys.modules:
            yield self
            return
        from numba.core.event import Listener, install_listener

        Listener.register(Compilation)
        with install_listener("numba:compile", self):
            yield self


@contextmanager
def time_limit(seconds: float, compilation: Compilation | None = None) -> Iterator[None]:
    """Raise `TooSlow` in the block after ``seconds``, beside those of the ``compilation``.

    Compiled code ends first; `torchpar.parallel.launch.guard` waits for it. Without effect on
    Windows.
    """
    if seconds == math.inf or not hasattr(signal, "setitimer"):
        yield
        return
    start = time.perf_counter()

    def stop(*_: object) -> None:
        compiled = compilation.seconds if compilation else 0.0
        left = seconds + compiled - (time.perf_counter() - start)
        if compiled and left > 0:
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.01))
            return
        if compilation and compilation.depth:  # whose result would be lost
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return
        raise TooSlow(f"it takes more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def watching(
    file: str, name: str, limit: float, shown: float | None = None
) -> AbstractContextManager[Callable[[bool], None]]:
    """Let the guard give a call up that does not return in `PATIENCE` after its limit.

    The guard's notice names ``shown``, or if it is None, all these seconds.
    """
    return WATCHED.calling(file, name, limit + PATIENCE, shown)


@contextmanager
def calling(
    file: str, name: str, limit: float, function: Function | None = None
) -> Iterator[Compilation]:
    """Call a function of a file in the block, for ``limit`` seconds beside those of Numba's
    compiler.

    Args:
        function: whose line is named if it takes other arguments than it is given.

    Raises:
        TooSlow: it takes longer.
        Wrong: an error of the function, with its line; or a call that an earlier process ended in,
            or did not return from.
    """
    try:
        with (
            modules_beside(file),
            watching(file, name, limit) as tell,
            Compilation(tell).watched() as compilation,
            time_limit(limit, compilation),
            describing(file, function),
        ):  # within the limit
            yield compilation
    except GivenUp as e:
        raise Wrong(str(e), e.is_endless) from None


@contextmanager
def describing(file: str, function: Function | None = None) -> Iterator[None]:
    """Let an error of a student's function in the block be Wrong, with its line.

    The error's class is the student's, too, and is asked: that may take any time.
    """
    try:
        yield
    except (Wrong, GivenUp):
        raise
    except BaseException as e:
        if not is_readers(e):
            raise
        raise Wrong(describe(e, file, function) + advice(e)) from None


def describe(
    error: BaseException, file: str, function: Function | None = None, at_top: bool = False
) -> str:
    """An error in one line, with its line in a file or in one beside it.

    Args:
        function: its first line is named if the error has no line there.
        at_top: the line is that of the file's top level. Where that has called something else, the
            line of the error stands behind it.
    """
    try:
        return description(error, file, function, at_top)
    except BaseException as e:  # a class of the student's may raise it when it is asked
        if not is_readers(e):
            raise
        return f"{line_of(file, None)}: an error that raises {type(e).__name__} when it is asked"


def description(error: Any, file: str, function: Function | None, at_top: bool) -> str:
    """The text of `describe`."""
    kind = type(error)  # `isinstance` would ask the error, too
    places: list[tuple[str, int | None]] = []
    top: list[tuple[str, int | None]] = []
    for frame in traceback.extract_tb(TRACEBACK.__get__(error)):
        path = os.path.realpath(frame.filename)
        # "<frozen importlib._bootstrap>" is no file, also where the folder is the current one.
        if os.path.isfile(frame.filename) and is_beside(path, file):
            places.append((path, frame.lineno))
            if (path, frame.name) == (file, "<module>"):
                top.append(places[-1])
    told = message_of(error)
    if issubclass(kind, SyntaxError) and is_beside(os.path.realpath(error.filename or ""), file):
        places.append((os.path.realpath(error.filename or ""), error.lineno))
        told = str(error.msg)  # without the place again
    code = code_of(function)
    if not places:  # an error of Numba's compiler names the line in its text
        numbers = re.findall(rf'File "[^"]*{re.escape(Path(file).name)}", line (\d+)', told)
        places = [(file, int(number)) for number in numbers]
    if not places and code:  # it was called with other arguments than it takes
        places = [(code.co_filename, code.co_firstlineno)]
    place = (top if at_top and top else places or [(file, None)])[-1]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", told)  # Numba's errors are colored
    text = " ".join(" ".join(plain.splitlines()[:2]).split())
    if issubclass(kind, ModuleNotFoundError) and error.name in PACKAGES:
        text += f"; pip install {error.name}"
    behind = f" ({line_of(*places[-1])})" if at_top and top and places[-1] != place else ""
    return f"{line_of(*place)}: {kind.__name__}{': ' * bool(text)}{text}{behind}"


def line_of(file: str, line: int | None) -> str:
    return Path(file).name + (f", line {line}" if line else "")


# Results


def as_array(result: object) -> Array:
    """The result on the CPU. On a GPU it waits until it is there."""
    if result is None:
        raise Wrong("it returns None, expected an array")
    if isinstance(result, torch.Tensor):
        return result.detach().cpu().numpy()
    return np.asarray(result.copy_to_host() if hasattr(result, "copy_to_host") else result)


def compare(
    found: Array, expected: Array, bound: Array, where: str = "", z: Array | None = None
) -> None:
    """Raise Wrong, with the first wrong number, if ``found`` is off by more than ``bound``.

    Args:
        where: of the result, as "at z".
        z: the argument of each element of ``found``, which the message then names.
    """
    result = f"the result{' ' * bool(where)}{where}"
    if found.dtype.kind not in "biuf":
        raise Wrong(f"{result} has dtype {found.dtype}, expected numbers")
    if found.shape != expected.shape:
        raise Wrong(f"{result} has shape {found.shape}, expected {expected.shape}")
    wrong = ~(np.abs(found - expected) <= bound)
    if not wrong.any():
        return
    at = tuple(map(int, np.argwhere(wrong)[0]))
    place = f"result[{', '.join(map(str, at))}]" if at else "the result"
    of = f" = {z[at]:g}" if z is not None else ""
    many = f"; {wrong.sum():,} of {wrong.size:,} numbers are wrong" if at else ""
    prefix = f"{where}{of}: " if where else ""
    raise Wrong(f"{prefix}{place} is {found[at]:.7g}, expected {expected[at]:.7g}{many}")


def check_unchanged(arguments: Sequence[Any], given: Sequence[Any]) -> None:
    """Raise Wrong if a call has changed an argument: an array, or a list of arrays."""
    for i, (before, after) in enumerate(zip(arguments, given, strict=True), start=1):
        arrays, changed = (list(t) if isinstance(t, list) else [t] for t in (before, after))
        if len(arrays) != len(changed) or not all(map(np.array_equal, arrays, changed)):
            raise Wrong(f"it changes its argument {i}; write to a new array")
