# SPDX-License-Identifier: MIT
"""Functions of a student's file for a GPU, executed without one.

`nogpu` executes what they launch by Triton, and kernels in CUDA C++, with faults, counters and the
least time on a GPU; so it does what they launch by ``numba.cuda`` where numba-cuda compiles that.
Elsewhere Numba's simulator executes it, of which it tells values, and `benchmarks.ladder.races`
tells races of threads at the first size.
"""

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from torchpar.optional import INSTALL_NOGPU, has_nogpu
from torchpar.parallel.launch.guard import TooSlow

from ..timing import Rejected
from .assignment import Launch
from .cases import A_B, LADDERS, LadderCase, make_case
from .cuda_files import CudaKernel, SampledCase
from .races import Races, recorded
from .student import SQUARE, Entry, SlowCall

if TYPE_CHECKING:
    from nogpu import Emulator, Fault, Report

BUDGET = 20.0  # seconds that the next larger size may take
LIMIT = 90.0  # seconds of any call
PATIENCE = 300.0  # seconds of a call of the whole that has no smaller one
GROWTH = 4
BLOCK = 1024  # threads of a block, of which no GPU takes more
FIXED = 64  # times as many threads as numbers of the result, from which a launch is for the whole
SAMPLE = 32  # blocks of a launch in CUDA C++ that is too large to be executed whole
NO_GPU = "0 active drivers"  # of Triton
SIMULATOR = "NUMBA_ENABLE_CUDASIM"  # of the environment, when Numba is imported
# Warnings of numba-cuda on launches that the exercises ask for.
SLOW_ON_A_GPU = r"(?s).*(Grid size \d+ will likely|Host array used in CUDA kernel)"
ADVICE = (
    "Numba's simulator executes kernels of numba.cuda. With numba-cuda, nogpu executes them as "
    "compiled for an H100, with all faults, counters and the least time: "
    "in a checkout, pip install './nogpu[numba]'"
)


class WrittenForTheWhole(TooSlow):
    """A launch at a smaller size has the threads of the whole case, which would take too long."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        super().__init__(f"it launches {threads:,} threads")


class Raced(Rejected):
    """Threads of a kernel race, although its result may be right."""


@dataclass
class Executed:
    """What a function for a GPU has done without one; its result was right.

    Attributes:
        tried: the case that was executed.
        by: who executed its kernels.
        least: microseconds on an H100 of all kernels together, at least; None if unknown.
        text: the bound and the counters, or "".
        races: what was seen of races in Numba's simulator, or "".
        launches: of its kernels.
        how: its kernel in CUDA C++ was launched, or "".
    """

    tried: LadderCase
    by: str
    least: float | None = None
    text: str = ""
    races: str = ""
    launches: tuple[Launch, ...] = ()
    how: str = ""

    def __str__(self) -> str:
        tells = self.text or "which tells no time"
        races = f"; {self.races}" * bool(self.races)
        how = f" ({self.how})" * bool(self.how)
        return f"{self.by} at {self.tried.size}{how}, {tells}{races}"


def execute(entry: Entry) -> Executed:
    """Execute a function at 32 rows and columns, and at larger sizes while that takes seconds.

    If it fails at that size it may be written for the whole case alone, which is tried then. So is
    one that launches as many threads as the whole needs, since a part would not tell of them. The
    times of sizes that only fixed costs make slow are over-estimated, so that sizes grow in steps.

    Raises:
        Rejected: a fault of a kernel, an error of the function, or a wrong result.
    """
    if isinstance(entry.function, CudaKernel):
        return execute_cuda(entry, entry.function)
    whole, small = entry.case, entry.small()
    entry.tried = small
    try:
        found, seconds = execute_once(entry, records=True)
    except WrittenForTheWhole as launch:
        tell(
            entry,
            f"launches {launch.threads:,} threads; Numba's simulator executes them one after the "
            f"other, for at most {PATIENCE:.0f} s",
        )
        entry.tried = whole
        try:
            return execute_once(entry, PATIENCE, records=True)[0]
        except TooSlow:
            raise SlowCall(f"it takes more than {PATIENCE:.0f} s without a GPU") from None
    except Rejected as error:
        if small is whole or entry.is_given_up or isinstance(error, Raced):
            raise
        tell(entry, f"fails at {small.size}; {whole.size} is tried, for at most {LIMIT:.0f} s")
        entry.tried = whole
        try:
            return execute_once(entry, records=True)[0]
        except TooSlow:
            entry.tried = small
            limit = f"the whole size takes more than {LIMIT:.0f} s without a GPU"
            raise Rejected(f"{error} ({limit})") from None
    races = found.races
    if races and small is not whole:  # as fast as it is without the records
        found, seconds = execute_once(entry)
    return replace(grow(entry, found, seconds)[0], races=races)


def grow(entry: Entry, found: Executed, seconds: float) -> tuple[Executed, float]:
    """Execute a function that was right at larger sizes, as `execute` says."""
    whole = entry.case
    while found.tried.shape != whole.shape:
        shape = tuple(
            min(most, size * GROWTH)
            for most, size in zip(whole.shape, found.tried.shape, strict=True)
        )
        larger = whole if shape == whole.shape else make_case(whole.operator, shape, whole.variant)
        if seconds * larger.work.flops / found.tried.work.flops > BUDGET:
            break
        entry.tried = larger
        try:
            found, seconds = execute_once(entry)
        except TooSlow:
            break
    return found, seconds


def execute_cuda(entry: Entry, kernel: CudaKernel) -> Executed:
    """Execute a kernel in CUDA C++ as `execute` does, after a size that no block divides.

    Where the whole case takes too long, some of its blocks are executed.

    Raises:
        Rejected: as `execute`.
    """
    if entry.case.operator == "matmul":
        settle_product(entry)
    case = entry.case
    uneven = make_case(case.operator, LADDERS[case.operator].quick, case.variant)
    entry.tried = uneven
    try:
        found, seconds = execute_once(entry)
        if case.shape != uneven.shape:
            entry.tried = entry.small()
            found, seconds = grow(entry, *execute_once(entry))
    except TooSlow:
        raise SlowCall(f"it takes more than {LIMIT:.0f} s without a GPU") from None
    except Rejected as e:
        raise Rejected(f"{e} ({how(entry, kernel)})") from None
    entry.tried = found.tried
    found.how = how(entry, kernel)
    blocks = kernel.size_for(case).blocks
    part = min(1.0, SAMPLE / blocks)
    expected = seconds * part * case.work.flops / found.tried.work.flops
    if found.tried.shape == case.shape or expected > BUDGET:
        return found
    sampling = replace(kernel, samples=True)
    entry.tried, entry.function = SampledCase(**vars(case), kernel=sampling), sampling
    try:
        sampled, _ = execute_once(entry, sample=SAMPLE)
    except TooSlow:
        return found
    except Rejected as e:
        raise Rejected(f"{e} ({how(entry, kernel)})") from None
    finally:
        entry.function = kernel
    at = f"at {found.tried.size}, and in {min(SAMPLE, blocks)} of {blocks:,} blocks"
    return replace(sampled, by=f"{found.by} {at}", how=how(entry, kernel))


def how(entry: Entry, kernel: CudaKernel) -> str:
    """Say how a case launches a kernel, and which of two products it takes."""
    return ", ".join(filter(None, (entry.case.variant, kernel.called(entry.tried))))


def settle_product(entry: Entry) -> None:
    """Take A·B for the case unless the kernel computes A·Bᵀ, as square matrices tell.

    Raises:
        TooSlow: it does not end.
    """
    entry.tried = make_case(entry.case.operator, SQUARE)
    try:
        execute_once(entry)
    except Rejected:
        entry.take(A_B)


def tell(entry: Entry, text: str) -> None:
    """Print what comes next of a function, before it takes minutes."""
    print(f"{Path(entry.file).name}: {entry.name} {text}", flush=True)


def execute_once(
    entry: Entry, limit: float = LIMIT, records: bool = False, sample: int | None = None
) -> tuple[Executed, float]:
    """Execute a function for its case, for ``limit`` seconds; also the seconds of its kernels.

    Args:
        records: whether races of threads in Numba's simulator are looked for, which takes a few
            times as long.
        sample: the most blocks of a launch that are executed; None: all.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", SLOW_ON_A_GPU)
        launched: list[Launch] = []
        is_part = entry.tried.shape != entry.case.shape
        # Each of so many threads takes its part of the whole in a few operations.
        most = max(FIXED * entry.tried.expected.size, entry.case.work.flops / 16)
        races = stack.enter_context(
            simulated(launched, most if is_part else math.inf, records=records)
        )
        gpu = None
        if has_nogpu():
            is_cuda = isinstance(entry.function, CudaKernel)  # which takes arrays of NumPy
            gpu = stack.enter_context(emulated(sample, of_torch=not is_cuda))
        try:
            seconds = entry.call(limit=limit)
        except Rejected as e:
            report = gpu.report() if gpu is not None else None
            text = reason(e, report, races)
            kind = Raced if report is not None and is_race(report) else Rejected
            raise e if text == str(e) else kind(text) from None
    report = gpu.report() if gpu is not None else None
    if report is not None and report.errors:
        raise (Raced if is_race(report) else Rejected)(faults_of(report))
    if races is not None and races.first:
        raise Raced(races.first)
    if report is not None and report.launches:
        seconds = sum(one.seconds for one in report.launches)
        least, text = counted(report)
        programs = tuple(
            Launch(one.programs, math.prod(one.block) if one.block else None)
            for one in report.launches
        )
        by = "right in nogpu"
        return Executed(entry.tried, by, least, text, launches=programs), seconds
    if launched:
        seen = races.verdict(entry.tried.size) if races is not None else ""
        by = "right in Numba's simulator"
        return Executed(entry.tried, by, races=seen, launches=tuple(launched)), seconds
    nothing = "and has launched no kernel of Triton or Numba"
    return Executed(entry.tried, "right", text=nothing), seconds


def reason(error: Rejected, report: "Report | None", races: Races | None) -> str:
    """Why a function is not right: a fault of its kernels, which may explain its error."""
    if report is not None and report.errors:
        return faults_of(report)
    if races is not None and races.first:
        return races.first
    if NO_GPU in str(error) and report is None:
        return f"kernels of Triton need nogpu here; {INSTALL_NOGPU}"
    warning = warning_of(report) if report is not None else ""
    return "; ".join(filter(None, (str(error), warning)))


def executes_numba() -> bool:
    """Whether nogpu executes what functions launch by ``numba.cuda``, which numba-cuda compiles."""
    chosen = os.environ.get(SIMULATOR, "0") not in ("", "0")
    return not chosen and has_nogpu() and all(map(find_spec, ("numba_cuda", "nogpu.numba")))


def is_simulating() -> bool:
    """Whether Numba's simulator executes what functions launch; numba-cuda imports it, too."""
    return "numba.cuda.simulator.kernel" in sys.modules and not executes_numba()


@contextmanager
def emulated(sample: int | None = None, of_torch: bool = True) -> Iterator["Emulator"]:
    """Execute kernels as compiled for an H100.

    Args:
        sample: the most blocks of a launch that are executed; None: all.
        of_torch: whether "cuda" means the CPU to PyTorch, too.
    """
    from nogpu import cuda_is_cpu, emulate

    with emulate("sm_90", sample=sample) as gpu, cuda_is_cpu(gpu) if of_torch else nullcontext():
        yield gpu


def faults_of(report: "Report") -> str:
    """The first fault in one line, and how many there are."""
    first, *others = report.errors
    more = f"; {len(others)} more fault{'s' * (len(others) > 1)}" if others else ""
    return f"{shown(first)}{more}"


def is_race(report: "Report") -> bool:
    """Whether the first fault is a race, which no other size cures."""
    return bool(report.errors) and report.errors[0].name.startswith("race")


def shown(fault: "Fault") -> str:
    """A fault in one line, with its line of the source."""
    place = ""
    if fault.source is not None:
        file, line = fault.source
        place = f"{file.rpartition('/')[2]}, line {line}: "
    return f"{place}{' '.join(fault.described.split())}"


def counted(report: "Report") -> tuple[float, str]:
    """The least microseconds on an H100 of all launches, and a sentence with their counters."""
    launches = report.launches
    bounds = [one.bounds[0] for one in launches]
    sums = [one.counters.sums("global") for one in launches]
    sectors = sum(one.transactions for one in sums)
    distinct = sum(one.distinct for one in sums)
    least = sum(one.least for one in bounds)
    if len(launches) == 1:
        text = str(bounds[0])
    else:
        text = f"at least {least:.3g} µs on an {bounds[0].gpu} for {len(launches)} launches"
    text += f"; {sectors:,} sectors of global memory, {distinct:,} of them distinct"
    estimates = [one.time.get("H100") for one in launches if one.block is not None]
    if estimates and all(estimates):  # of CUDA C++, where DRAM seldom bounds a plain kernel
        about = sum(one.microseconds for one in estimates if one)
        text += f"; about {about:,.4g} µs by an estimate"
    if warning := warning_of(report):
        text += f"; {warning}"
    return least, text


def warning_of(report: "Report") -> str:
    """The first warning, or ""."""
    warned = [one for one in report.faults if one.kind == "warning"]
    return f"warning: {shown(warned[0])}" if warned else ""


@contextmanager
def simulated(
    launched: list[Launch], most: float = math.inf, records: bool = False
) -> Iterator[Races | None]:
    """Let Numba's simulator execute the threads of a block one after the other, if none waits.

    It starts a thread of Python for each, and a million of them take minutes.

    Args:
        launched: gets each launch.
        most: the threads above which a launch raises `WrittenForTheWhole`.
        records: whether races are looked for.

    Yields:
        the races of the launches, if they are looked for.
    """
    if not is_simulating():
        yield None
        return
    from numba.cuda.simulator import kernel, kernelapi

    @cache
    def threads_of(block: tuple[int, ...]) -> list[Any]:
        return [kernelapi.Dim3(*at) for at in np.ndindex(*block)]

    in_threads = kernel.BlockManager.run
    call = kernel.FakeCUDAKernel.__call__

    def called(self: Any, *args: object) -> object:
        if not self._device:
            blocks, threads = math.prod(self.grid_dim), math.prod(self.block_dim)
            launched.append(Launch(blocks, threads))
            check_launch(blocks, threads, most)
            if races is not None:
                races.begin_launch()
        return call(self, *args)

    def run(self: Any, grid_point: tuple[int, ...], *args: object) -> None:
        if waits(self._f, kernel.FakeCUDAKernel):
            in_threads(self, grid_point, *args)
            return
        one = SimpleNamespace(blockIdx=kernelapi.Dim3(*grid_point))
        standing_in = SimpleNamespace(current_thread=lambda: one)
        with patch.object(kernelapi, "threading", standing_in):
            for at in threads_of(tuple(self._block_dim)):
                one.threadIdx, one.place = at, None  # which the records of races keep
                try:
                    self._f(*args)
                except Exception as e:
                    where = f"thread {at.x}, block {grid_point[0]}"
                    raise type(e)(f"{e} ({where})").with_traceback(e.__traceback__) from None

    with (
        patch.object(kernel.BlockManager, "run", run),
        patch.object(kernel.FakeCUDAKernel, "__call__", called),
        recorded() if records else nullcontext() as races,
    ):
        yield races


def check_launch(blocks: int, block: int, most: float) -> None:
    """Refuse a block that no GPU takes, and a launch of more than ``most`` threads."""
    if block > BLOCK:  # the simulator has no limit
        raise ValueError(f"a block of {block} threads; a GPU takes at most {BLOCK}")
    if blocks * block > most:
        raise WrittenForTheWhole(blocks * block)


def waits(function: Callable[..., object], kernels: Any) -> bool:
    """Whether threads of a kernel need others of its block, by the names that it mentions."""
    names = function.__code__.co_names
    needing = ("sync", "shfl", "vote", "shared", "grid_group", "cg", "laneid", "warp")
    if any(word in name.lower() for name in names for word in needing):
        return True
    used = (function.__globals__.get(name) for name in names)
    return any(isinstance(one, kernels) and waits(one.py_func, kernels) for one in used)
