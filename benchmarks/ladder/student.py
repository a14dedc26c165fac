# SPDX-License-Identifier: MIT
"""Functions of a student's files, checked and timed in the ladder: ``run ladder --with my.py``.

A function gets copies of the arguments, as NumPy arrays. It returns an array, nested lists, or a
tensor or array on a GPU, which is copied back within the time. Caches are flushed, or warm, as for
the other rows. `torchpar.baselines.grader` executes the file, once and in this process alone.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from torchpar.baselines import grader
from torchpar.baselines.exercises import CHECKS
from torchpar.baselines.grader import (
    LIMIT,
    OPERATORS,
    Loaded,
    Wrong,
    as_array,
    calling,
    check_unchanged,
    code_of,
    is_beside,
)
from torchpar.parallel.launch.guard import WATCHED, TooSlow

from ..results import duration
from ..timing import CPU, Rejected, flush, time_calls
from . import assignment
from .cases import A_B, WARM_SECONDS, WIDER, LadderCase, make_case

NAMES = ", ".join(OPERATORS)
SQUARE = (5, 5, 5)  # of a product, whose operands may be in either order
OTHER_TYPES = "No matching definition for argument type"  # Numba's, of a function with signatures
SMALL = 32  # rows and columns of the smaller arguments that come first
COPIES = ("Memcpy", "Memset")  # what the profiler calls those of a GPU
SECONDS = 0.5  # of a call with smaller arguments


class SlowCall(Rejected):
    """A call took longer than `LIMIT` with the smaller arguments, too, or later in the turns."""


def load(path: Path) -> Loaded:
    """The functions of a file that the ladder knows.

    What the file imports is its own only if it comes from a file beside it.

    Raises:
        ConfigError: there is no such file, or it defines none of the functions.
    """
    return grader.load(path, OPERATORS, {"exercises": CHECKS}, takes_imports=False)


def source_of(known: str, function: Callable[..., object], path: Path) -> Path:
    """The file that defines a function: ``path``, or one beside it from which that imports."""
    code = code_of(function)
    written = os.path.realpath(code.co_filename) if code else ""
    return Path(written) if is_beside(written, str(path.resolve())) else path.resolve()


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
                calling(self.file, self.name, limit or LIMIT, self.function) as compilation,
            ):
                timed = time_calls(lambda: as_array(self.function(*arguments)), calls=calls)
            check_unchanged(self.tried.arguments, arguments)
        except Wrong as e:
            raise (SlowCall if e.is_endless else Rejected)(str(e)) from None
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
