# SPDX-License-Identifier: MIT
"""Functions of a student's files, checked and timed in the ladder: ``run ladder --with my.py``.

A function gets copies of the arguments, as NumPy arrays. It returns an array, nested lists, or a
tensor or array on a GPU, which is copied back within the time. Caches are flushed, or warm, as for
the other rows. A file is executed once, in this process alone. Modules beside it can be imported,
and functions that it imports from them are the student's, too.
"""

import importlib.util
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from torchpar.baselines.exercises import CHECKS
from torchpar.baselines.grader import OPERATORS, own_of
from torchpar.baselines.numpy_mlp import Array
from torchpar.errors import ConfigError
from torchpar.parallel.launch.guard import (
    PATIENCE,
    WATCHED,
    GivenUp,
    TooSlow,
    advice,
    alarm,
    is_readers,
    top_level,
)

from ..results import duration
from ..timing import CPU, Rejected, flush, time_calls
from . import assignment
from .cases import A_B, WARM_SECONDS, WIDER, LadderCase, make_case

NAMES = ", ".join(OPERATORS)
LIMIT = 10.0  # seconds of a call, after which smaller arguments are tried
SQUARE = (5, 5, 5)  # of a product, whose operands may be in either order
OTHER_TYPES = "No matching definition for argument type"  # Numba's, of a function with signatures
SMALL = 32  # rows and columns of the smaller arguments that come first
COPIES = ("Memcpy", "Memset")  # what the profiler calls those of a GPU
SECONDS = 0.5  # of a call with smaller arguments
PACKAGES = ("matplotlib", "numba", "scipy", "triton")  # whose names pip knows


class SlowCall(Rejected):
    """A call took longer than `LIMIT` with the smaller arguments, too, or later in the turns."""


class Student(NamedTuple):
    """The functions of a file by name, and the error that ended its execution, or ""."""

    functions: dict[str, Callable[..., object]]
    error: str


def load(path: Path) -> Student:
    """Execute a file, and return those of its functions that the ladder knows.

    If a line fails, or takes too long, the functions above it are there. Code behind
    ``if __name__ == "__main__"`` does not run. What the file imports is its own only if it comes
    from a file beside it.

    Raises:
        ConfigError: there is no such file, or it defines none of the functions.
    """
    if not path.is_file():
        raise ConfigError(
            f"--with {path} is no file; name a Python file that defines any of {NAMES}"
        )
    file = str(path.resolve())
    module, error = loaded(file), ""
    if module is None:
        module, error = execute(file)
    defined = {known: getattr(module, known, None) for known in OPERATORS}
    functions = {
        known: function
        for known, function in defined.items()
        if callable(function) and not is_imported(known, function, file)
    }
    if not functions:
        remedy = f"define any of {NAMES}"
        if other := own_of(module, CHECKS):
            remedy = f"check {other[0]} by python -m torchpar exercises --with {path}"
        raise ConfigError(
            f"--with {path}: {error or f'it has no function that is known; {remedy}'}"
        )
    return Student(functions, error)


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
        return module, f"{Path(file).name}: its top level {e.how}{advice(e, at_top=True)}"
    except BaseException as e:
        if not (is_readers(e) or isinstance(e, TooSlow)):
            raise
        return module, describe(e, file) + advice(e, at_top=True)
    return module, ""


def is_free(stem: str, file: str) -> bool:
    """Whether no library is imported by this name."""
    if "." in stem:
        return False
    spec = importlib.util.find_spec(stem)
    return spec is None or spec.origin in (None, file)  # None: a folder, which files go before


def file_of_module(module: object) -> str:
    file = getattr(module, "__file__", None)
    return os.path.realpath(file) if isinstance(file, str) else ""


def is_imported(known: str, function: Callable[..., object], file: str) -> bool:
    """Whether a module has this function under this name that is not the student's."""
    files = [
        file_of_module(module)
        for module in list(sys.modules.values())
        if getattr(module, "__dict__", {}).get(known) is function
    ]
    return not all(is_beside(other, file) for other in files)


def is_beside(other: str, file: str) -> bool:
    """Whether a file is in the folder of ``file``; packages there may be anybody's."""
    return bool(other) and Path(other).parent == Path(file).parent


def source_of(known: str, function: Callable[..., object], path: Path) -> Path:
    """The file that defines a function: ``path``, or one beside it from which that imports."""
    code = code_of(function)
    written = os.path.realpath(code.co_filename) if code else ""
    return Path(written) if is_beside(written, str(path.resolve())) else path.resolve()


def code_of(function: object) -> CodeType | None:
    """The code of a function, or of that which Numba compiles."""
    return getattr(getattr(function, "py_func", function), "__code__", None)


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


def describe(error: BaseException, file: str, function: Callable[..., object] | None = None) -> str:
    """The error in one line, with the file's name and the line where it happened."""
    frames = [
        (Path(frame.filename).name, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        # "<frozen importlib._bootstrap>" is no file, also where the folder is the current one.
        if os.path.isfile(frame.filename) and is_beside(os.path.realpath(frame.filename), file)
    ]
    name = frames[-1][0] if frames else Path(file).name
    lines = [line for _, line in frames]
    if isinstance(error, SyntaxError) and error.lineno:
        lines.append(error.lineno)
    if not lines:  # an error of Numba's compiler names the line in its text
        lines += map(int, re.findall(rf'File "[^"]*{re.escape(name)}", line (\d+)', str(error)))
    if not lines and function is not None:  # it was called with other arguments than it takes
        code = code_of(function)
        lines += [code.co_firstlineno] if code else []
    place = f"{name}, line {lines[-1]}" if lines else name
    told = error.msg if isinstance(error, SyntaxError) else str(error)  # without the place again
    plain = re.sub(r"\x1b\[[0-9;]*m", "", told)  # Numba's errors are colored
    text = " ".join(" ".join(plain.splitlines()[:2]).split())
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        text += f"; pip install {error.name}"
    return f"{place}: {type(error).__name__}{': ' * bool(text)}{text}"


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
        raise TooSlow

    with alarm(seconds, stop):
        yield


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
        cores: on which it runs, with as many threads of Numba; None: all.
        compiled: seconds in which Numba has compiled it.
        too_slow: why it is not timed, or "".
        remarks: on what the assignment forbids.
    """

    file: str
    name: str
    function: Callable[..., object]
    case: LadderCase
    tried: LadderCase
    calls: int = 1
    cores: int | None = None
    compiled: float = 0.0
    too_slow: str = ""
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{Path(self.file).name}: {self.name}"

    @property
    def note(self) -> str:
        """The variant of the case, and the smaller case from which the time is extrapolated."""
        part = "" if self.tried is self.case else f"from {self.tried.size}"
        return ", ".join(filter(None, (self.case.variant, part)))

    @property
    def is_given_up(self) -> bool:
        """Whether it has ended the ladder before, or has not returned."""
        return (self.file, self.name) in WATCHED.given_up

    def remark(self, remarks: Iterable[str]) -> None:
        """Print remarks, and keep them."""
        added = tuple(dict.fromkeys(remarks))
        self.remarks += added
        for one in added:
            print(f"{self}: note: {one}", flush=True)

    def begin(self) -> float:
        """Call the function for the first time, and settle its case; the seconds of the whole case.

        Before that a call with a small case compiles it, which nobody times. It may fail where the
        whole case does not.

        Raises:
            Rejected: as `turn`.
        """
        if self.case.operator == "matmul":
            self.settle_product()
        self.tried = self.small()
        try:
            self.warm_up()
        except SlowCall:
            raise
        except Rejected as e:
            if OTHER_TYPES in str(e):
                self.widen(e)
        self.tried = self.case
        try:
            seconds = self.call()
        except TooSlow:
            self.shrink()
            seconds = self.limited_call()
        return self.whole(seconds)

    def settle_product(self) -> None:
        """Take A·B for the case if the function computes that, and not A·Bᵀ.

        Square matrices fit both, and tell the two apart.

        Raises:
            Rejected: it computes neither.
        """
        errors = []
        for variant in ("", A_B):
            self.tried = make_case(self.case.operator, SQUARE, variant)
            try:
                self.call()
            except TooSlow:
                return
            except Rejected as e:
                errors.append(e)
            else:
                self.take(variant)
                return
        raise Rejected(f"{errors[0]}; it is neither A·Bᵀ of b (n, k) nor A·B of b (k, n)")

    def widen(self, error: Rejected) -> None:
        """Take wider numbers for the case: the function has signatures of other types.

        Raises:
            Rejected: it takes those neither.
        """
        given = str(self.case.arguments[0].dtype)
        before = self.case
        self.take(WIDER[given])
        self.tried = self.small()
        try:
            self.warm_up()
        except SlowCall:
            raise
        except Rejected as e:
            if OTHER_TYPES in str(e):
                self.case = before
                self.tried = self.small()
                raise Rejected(
                    f"{error}; let its signatures take {given} or {WIDER[given]}, or leave them out"
                ) from None

    def take(self, variant: str) -> None:
        """Make the case one with other arguments, as `make_case` says."""
        if variant != self.case.variant:
            self.case = make_case(self.case.operator, self.case.shape, variant)

    def warm_up(self) -> None:
        """Call the function, and once more if that is slow: another compiler may have a part in it.

        Raises:
            Rejected: as `turn`.
        """
        try:
            self.call()
        except TooSlow:
            print(
                f"{self} takes more than {LIMIT:.0f} s for {self.tried.size}; it is called once "
                "more, since the first call may have compiled it",
                file=sys.stderr,
                flush=True,
            )
            self.limited_call()

    def turn(self, index: int) -> list[float]:
        """Time a turn, as `ladder.timed_turn`, and check its result. The seconds are those of the
        whole case.

        Raises:
            SlowCall: a call takes longer than `LIMIT`.
            Rejected: an error of the function, with its line; a wrong result; or a changed
                argument.
        """
        if self.too_slow:  # which nobody waits for again
            raise SlowCall(self.too_slow)
        seconds = self.limited_call(self.calls)
        if index == 0 and not self.case.cold:  # the first call may have compiled
            self.calls = 1 + int(WARM_SECONDS / self.limited_call())
        return [self.whole(seconds)]

    def turn_of_kernels(self, index: int) -> list[float]:
        """As `turn`, but the seconds are those of the kernels on a GPU alone, without copies."""
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            self.limited_call()
        microseconds = [
            one.time_range.elapsed_us()
            for one in record.events() or []
            if str(one.device_type) == "DeviceType.CUDA" and not one.name.startswith(COPIES)
        ]
        if not microseconds:
            raise Rejected("no kernel ran on the GPU")
        return [self.whole(sum(microseconds) / 1e6)]

    def whole(self, seconds: float) -> float:
        """The seconds of the whole case by those of the case that is computed."""
        return seconds * self.case.work.flops / self.tried.work.flops

    def small(self) -> LadderCase:
        shape = tuple(min(size, SMALL) for size in self.case.shape)
        if shape == self.case.shape:
            return self.case
        return make_case(self.case.operator, shape, self.case.variant)

    def shrink(self) -> None:
        """Take the largest case that a call computes in `SECONDS`, by the time of a small one."""
        operator, shape = self.case.operator, self.case.shape
        self.tried = self.small()
        small = self.tried.shape
        self.limited_call()  # which may compile
        factor = max(
            1.0,
            (SECONDS / self.limited_call()) ** (1 / (3 if "matmul" in operator else len(shape))),
        )
        sizes = zip(small, shape, strict=True)
        larger = tuple(min(most, int(size * factor)) for size, most in sizes)
        is_whole = larger == shape
        self.tried = self.case if is_whole else make_case(operator, larger, self.case.variant)

    def limited_call(self, calls: int = 1) -> float:
        """As `call`; a SlowCall if it takes longer than `LIMIT`."""
        try:
            return self.call(calls)
        except TooSlow:
            raise SlowCall(f"it takes more than {LIMIT:.0f} s for {self.tried.size}") from None

    def call(self, calls: int = 1, limit: float | None = None) -> float:
        """Call the function ``calls`` times, check its last result, and return the seconds of a
        call, without those in which Numba compiles.

        Args:
            limit: seconds of a call whose time does not count; by default `LIMIT`.
        """
        arguments = [t.copy() for t in self.tried.arguments]
        if self.case.cold and limit is None:
            flush(CPU)
        try:
            with (
                same_threads_of_torch(),
                on_cores(self.cores),
                modules_beside(self.file),
                WATCHED.calling(self.file, self.name, (limit or LIMIT) + PATIENCE) as tell,
                Compilation(tell).watched() as compilation,
                time_limit(limit or LIMIT, compilation),
            ):
                timed = time_calls(lambda: as_array(self.function(*arguments)), calls=calls)
        except Rejected:
            raise
        except GivenUp as e:
            raise (SlowCall if e.is_endless else Rejected)(str(e)) from None
        except BaseException as e:
            if not is_readers(e):
                raise
            raise Rejected(describe(e, self.file, self.function) + advice(e)) from None
        for i, (mine, given) in enumerate(zip(arguments, self.tried.arguments, strict=True), 1):
            if not np.array_equal(mine, given):
                raise Rejected(f"it changed its argument {i}; write to a new array")
        if timed.result.dtype.kind not in "biuf":
            raise Rejected(f"the result has dtype {timed.result.dtype}, expected numbers")
        self.tried.check(timed.result)
        self.compiled += compilation.seconds
        return timed.seconds() - compilation.seconds / calls


@contextmanager
def on_cores(count: int | None) -> Iterator[None]:
    """Let all threads of this process share ``count`` cores, and Numba have as many threads.

    Args:
        count: None: all, and a Numba thread for each. Above the cores, the threads share them.
    """
    if count is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    limit_threads(count)
    set_affinity(set(sorted(allowed)[:count]))
    try:
        yield
    finally:
        set_affinity(allowed)
        limit_threads(len(allowed))


@contextmanager
def same_threads_of_torch() -> Iterator[None]:
    """Leave PyTorch its number of threads, which those that Numba starts would change."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def set_affinity(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended
            os.sched_setaffinity(int(thread), cores)


@same_threads_of_torch()
def limit_threads(count: int) -> None:
    if "numba" in sys.modules:
        import numba

        config: Any = numba.config  # whose names are those of the environment
        numba.set_num_threads(min(count, config.NUMBA_NUM_THREADS))


def enter(path: Path, name: str, function: Callable[..., object], case: LadderCase) -> Entry:
    """Call a function once, say whether its result is right, and return it."""
    source = source_of(name, function, path)
    entry = Entry(str(source), name, function, case, case)
    try:
        seconds = entry.begin()
        call = f"first call {duration(seconds)}"
        if entry.tried is not entry.case:  # nobody has waited for it
            call = f"at {entry.tried.size}; a call of the whole would take {duration(seconds)}"
        compiled = f", compiled in {duration(entry.compiled)}" * bool(entry.compiled)
        taken = f"{case_of(entry)}, " * bool(entry.case.variant)
        print(f"{entry} is right ({taken}{call}{compiled})", flush=True)
    except SlowCall as e:
        entry.too_slow = str(e)
        print(f"{entry} is too slow: {e}", flush=True)
    except Rejected as e:
        print(f"{entry} is not right at {entry.tried.size}: {e}", flush=True)
    entry.remark(assignment.on_source(name, function))
    return entry


def case_of(entry: Entry) -> str:
    """What a function takes in place of the case's arguments."""
    variant = entry.case.variant
    return variant if variant == A_B else f"of {variant}, as its signatures ask"
