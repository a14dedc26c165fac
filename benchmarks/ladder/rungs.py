# SPDX-License-Identifier: MIT
"""Compute operators in many ways, from pure Python to processes:
``python -m benchmarks run ladder``.

Four cases: elementwise maximum, X·Xᵀ, A·Bᵀ and linear+sigmoid; `benchmarks.train` trains whole
networks. The result of every call that is timed is checked against float64 (whole numbers:
exactly). Contestants take turns, and medians are quoted. Caches are flushed before all but
linear+sigmoid, whose arguments stay in them, as in training. ``--with my.py`` adds the functions of
a student's file (`benchmarks.ladder.student`).
"""

import ctypes
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import torchpar
from torchpar.baselines import numpy_mlp, pure_python
from torchpar.baselines.grader import OPERATORS, Loaded
from torchpar.baselines.numpy_mlp import Array
from torchpar.errors import ConfigError, writing
from torchpar.parallel.launch.guard import TooSlow, guarded

from ..flags import Command, run
from ..processes import Group, current_world, start_ranks, start_worker
from ..results import CORES, Result, Table, print_cells
from ..timing import CPU, Rejected, Times, Turn, flush, take_turns, time_calls
from . import assignment, cuda_files, emulated, homework, page, student
from .cases import (
    LADDERS,
    TILE,
    WARM_SECONDS,
    WIDER,
    LadderCase,
    make_case,
)
from .page import LIMITS

THREADS = (1, 2, 4, 8)
ROUNDS = 20
SECONDS = 2.0  # of a rung's turns, after which it has no more
WARM_CALLS = 100  # in another process
PRODUCTS = 10_000_000  # about a second of pure Python
KEPT = {-1: 2**30, -3: 2**25}  # bytes: glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD


@dataclass(frozen=True, kw_only=True, eq=False)
class Rung:
    """A rung of the ladder: a way to compute a case.

    Attributes:
        turn: times it and checks the result; None if it is left out.
        than: the rung, with its note if there are several, whose time its own is compared with.
        threads: that compute, in all processes together; None on a GPU and of a student's function.
        compiles: whether the time of the first call is kept.
        intensity: needed operations for each byte that it loads.
        left_out: why it is not measured, or "".
        switches: context switches of each call, if they are counted.
        whole: whether it ends with the whole result in one place; without it its time is no
            speed-up.
        executed: what a student's function for a GPU has done without one, or "".
        least_us: microseconds that its kernels take on an H100, at least; None if unknown.
        bytes: of the arguments and the result, in those of the case.
        remarks: on what an assignment forbids of a student's function, by lines.
    """

    name: str
    turn: Turn | None = None
    than: str = ""
    note: str = ""
    threads: int | None = 1
    compiles: bool = False
    intensity: float | None = None
    left_out: str = ""
    switches: list[float] = field(default_factory=list)
    whole: bool = True
    executed: str = ""
    least_us: float | None = None
    bytes: float = 1.0
    remarks: str = ""


class Helpers(NamedTuple):
    """Processes beside this one.

    Attributes:
        ranks: two, of one thread each.
        threads: computes Numba's parallel loops. It may have more threads than there are cores.
        interpreter: has Triton's interpreter.
    """

    ranks: Group
    threads: ProcessPoolExecutor
    interpreter: ProcessPoolExecutor


@contextmanager
def start_helpers(most_threads: int) -> Iterator[Helpers]:
    with (
        start_ranks(2) as ranks,
        start_worker(NUMBA_NUM_THREADS=str(most_threads)) as threads,
        start_worker(TRITON_INTERPRET="1") as interpreter,
    ):
        yield Helpers(ranks, threads, interpreter)


# Rungs


def thread_counts(quick: bool) -> list[int]:
    """The counts of a course. Those above the cores show what too many threads cost."""
    return [1] if quick else list(THREADS)


def rungs(case: LadderCase, helpers: Helpers, quick: bool) -> Iterator[Rung]:
    """All rungs, first pure Python, and those left out. The seconds of a turn are of the whole
    case."""
    operator, arrays = case.operator, case.arguments
    ladder, threads = LADDERS[operator], torch.get_num_threads()
    native = ladder.functions.native
    note = threads_note(threads)

    def by(
        name: str,
        function: Callable[..., object],
        *arguments: object,
        than: str,
        compiles: bool = False,
    ) -> Rung:
        """A rung on the CPU, with as many threads as PyTorch has."""
        turn = timed_turn(case, partial(function, *arguments))
        return Rung(name=name, turn=turn, than=than, note=note, threads=threads, compiles=compiles)

    yield by_pure_python(case)
    yield from by_njit(case, helpers, quick)
    tensors = [torch.from_numpy(t) for t in arrays]
    numpy = by("NumPy", getattr(numpy_mlp, operator), *arrays, than="njit")
    # Only the products of NumPy have threads.
    yield replace(numpy, note="", threads=1) if operator == "maximum" else numpy
    yield by("torch eager", native, *tensors, than="NumPy")
    if quick:
        left_out = by("torch.compile", native, *tensors, than="torch eager")
        yield replace(left_out, turn=None, left_out="--quick")
    else:
        compiled = torch.compile(native, dynamic=False)
        yield by("torch.compile", compiled, *tensors, than="torch eager", compiles=True)
    if ladder.ours:
        yield by("torchpar CPU", ladder.functions.ours, *tensors, than="torch eager")
    yield from by_ranks(case, helpers.ranks)
    yield from on_gpu(case, helpers)


def gpu_rungs(case: LadderCase) -> Iterator[Rung]:
    """A GPU's rungs, and after them those that they are compared with."""
    yield from on_gpu(case, None)
    threads = torch.get_num_threads()
    native = LADDERS[case.operator].functions.native
    turn = timed_turn(case, partial(native, *map(torch.from_numpy, case.arguments)))
    yield Rung(name="torch eager", turn=turn, note=threads_note(threads), threads=threads)
    yield by_pure_python(case)


def by_pure_python(case: LadderCase) -> Rung:
    lists = [t.tolist() for t in case.arguments]
    function = getattr(pure_python, case.operator)
    if "matmul" not in case.operator:
        return Rung(name="pure Python", turn=timed_turn(case, partial(function, *lists)))
    total = len(case.expected)  # some rows take long enough
    rows = max(1, min(total, PRODUCTS * total // (case.expected.size * case.arguments[0].shape[1])))
    turn = timed_turn(case, partial(function, *lists, rows), rows)
    note = "" if rows == total else f"from {rows} of {total} rows"
    return Rung(name="pure Python", turn=turn, note=note)


def threads_note(count: int) -> str:
    on = f" on {CORES} core{'s' * (CORES > 1)}"
    return f"{count} thread{'s' * (count > 1)}{on * (count > CORES)}"


NO_NUMBA = "numba is not installed; pip install numba"


def by_njit(case: LadderCase, helpers: Helpers, quick: bool) -> Iterator[Rung]:
    """Numba's loops: each in one thread, then the plain and the best ones in several."""
    ladder = LADDERS[case.operator]
    loops = ladder.loops
    if find_spec("numba") is None:
        yield from (Rung(name=name, left_out=NO_NUMBA) for name in loops)
        return
    from torchpar.baselines import numba_njit

    assert numba_njit.TILE == TILE, "the intensities are those of these tiles"
    before = "pure Python"
    for name, (loop, intensity) in loops.items():
        call = partial(getattr(numba_njit.SERIAL, loop), *arguments_of(case, loop))
        turn = timed_turn(case, call)
        yield Rung(name=name, turn=turn, than=before, compiles=True, intensity=intensity)
        before = name
    for name in dict.fromkeys(["njit", ladder.best]):
        yield from in_threads(case, helpers.threads, name, quick)
    if case.operator == "maximum":
        yield from in_threads(case, helpers.threads, "njit", quick, warm=True)


def in_threads(
    case: LadderCase, worker: ProcessPoolExecutor, name: str, quick: bool, warm: bool = False
) -> Iterator[Rung]:
    """A loop of Numba in several threads, each count compared with the one before.

    Args:
        warm: the caches are not flushed, so that memory limits less.
    """
    loop, intensity = LADDERS[case.operator].loops[name]
    parallel = f"{name}, parallel{', warm caches' * warm}"
    before = f"{name}, parallel, {threads_note(1)}" if warm else name
    for count in THREADS:
        if count not in thread_counts(quick):
            plural = f"{count} thread{'s' * (count > 1)}"
            yield Rung(name=parallel, note=plural, threads=count, left_out="--quick")
            continue
        note, switches = threads_note(count), list[float]()
        yield Rung(
            name=parallel,
            turn=partial(threads_turn, case, worker, loop, count, warm, switches),
            than=before,
            note=note,
            threads=count,
            compiles=count == 1,
            intensity=intensity,
            switches=switches,
        )
        before = f"{parallel}, {note}"


def arguments_of(case: LadderCase, loop: str) -> tuple[Array, ...]:
    """The arguments of a loop: X·Xᵀ by a general product takes X twice."""
    general = case.operator == "matmul_t" and not loop.startswith("matmul_t")
    return case.arguments * 2 if general else case.arguments


def by_ranks(case: LadderCase, ranks: Group) -> Iterator[Rung]:
    """One process of one thread, and two: each computes half of the rows, and then one has all of
    them."""
    one, halves, joined = (
        partial(ranks_turn, case, ranks, way) for way in ("whole", "halves", "joined")
    )
    all_cores = "torchpar CPU" if case.operator not in ("matmul", "matmul_t") else "torch eager"
    yield Rung(name="1 rank", turn=one, note="1 thread", than=all_cores)
    note = "no speed-up of the whole"
    yield Rung(name="2 ranks, halves left apart", turn=halves, threads=2, note=note, whole=False)
    yield Rung(name="2 ranks, joined", turn=joined, threads=2, than="1 rank")


def on_gpu(case: LadderCase, helpers: Helpers | None) -> Iterator[Rung]:
    """PyTorch's and our operator with and without copies, and the first kernels of a course.

    With a GPU no helpers are needed.
    """
    operator = case.operator
    ladder = LADDERS[operator]
    functions = {"torch eager GPU": ladder.functions.native}
    if ladder.ours:
        functions["torchpar GPU"] = ladder.functions.ours
    best = list(functions)[-1]
    if not torch.cuda.is_available():
        for name in (*functions, f"{best}, with copies"):
            yield Rung(name=name, threads=None, left_out="no GPU")
        assert helpers is not None
        for name, launcher in ladder.taught.items():
            yield without_gpu(helpers.interpreter, operator, name, launcher)
        return
    tensors = [torch.from_numpy(t).cuda() for t in case.arguments]
    device = tensors[0].device
    before = "torch eager"
    for name, function in functions.items():
        turn = timed_turn(case, partial(function, *tensors), device=device)
        yield Rung(name=name, turn=turn, threads=None, than=before, compiles=True)
        before = name

    def with_copies() -> Tensor:
        return functions[best](*(torch.from_numpy(t).cuda() for t in case.arguments)).cpu()

    turn = timed_turn(case, with_copies)
    yield Rung(name=f"{best}, with copies", turn=turn, threads=None, than=best)
    if find_spec("triton") is not None:
        from torchpar.baselines import triton_kernels

        for name, launcher in ladder.taught.items():
            turn = timed_turn(
                case, partial(getattr(triton_kernels, launcher), *tensors), device=device
            )
            yield Rung(name=name, turn=turn, threads=None, than=best, compiles=True)


def without_gpu(interpreter: ProcessPoolExecutor, operator: str, name: str, function: str) -> Rung:
    """A kernel of a course that is not timed: its result is checked in Triton's interpreter."""
    if find_spec("triton") is None:
        return Rung(name=name, threads=None, left_out="Triton is not installed")
    case = make_case(operator, LADDERS[operator].interpreted)
    try:
        case.check(interpreter.submit(interpret, operator, case.shape, function).result())
    except Exception as e:
        reason = f"{type(e).__name__} in Triton's interpreter, {case.size}: {e}".partition("\n")[0]
        return Rung(name=name, threads=None, turn=partial(reject, reason))
    reason = f"no GPU; right in Triton's interpreter at {case.size}, which tells no time"
    return Rung(name=name, threads=None, left_out=reason)


def reject(reason: str, index: int) -> list[float]:
    raise Rejected(reason)


def interpret(operator: str, shape: tuple[int, ...], function: str) -> Array:
    from torchpar.baselines import triton_kernels

    arguments = map(torch.from_numpy, make_case(operator, shape).arguments)
    result: Array = getattr(triton_kernels, function)(*arguments).numpy()
    return result


# Turns


def timed_turn(
    case: LadderCase,
    call: Callable[[], object],
    rows: int | None = None,
    device: torch.device = CPU,
) -> Turn:
    """Turns of a call that computes the first ``rows``.

    A cold turn is one call, after the caches were flushed; a warm one has as many as take
    `WARM_SECONDS`.
    """
    calls = 1
    part = 1.0 if rows is None else rows / len(case.expected)

    def turn(index: int) -> list[float]:
        nonlocal calls
        if case.cold:
            flush(device)
        timed = time_calls(call, device, calls)
        seconds = timed.seconds()
        result = timed.result.cpu() if isinstance(timed.result, Tensor) else timed.result
        case.check(np.asarray(result), slice(rows))
        if index == 0 and not case.cold:  # the first call may have compiled
            calls = 1 + int(WARM_SECONDS / time_calls(call, device).seconds())
        return [seconds / part]

    return turn


known_case = cache(make_case)  # in the other processes


def threads_turn(
    case: LadderCase,
    worker: ProcessPoolExecutor,
    loop: str,
    threads: int,
    warm: bool,
    switches: list[float],
    index: int,
) -> list[float]:
    submitted = worker.submit(call_in_threads, case.operator, case.shape, loop, threads, warm)
    seconds, switched = submitted.result()
    if index > 0:
        switches.append(switched)
    return [seconds]


def call_in_threads(
    operator: str, shape: tuple[int, ...], loop: str, threads: int, warm: bool
) -> tuple[float, float]:
    """Seconds and context switches of a call of a parallel loop, whose result is right."""
    import numba

    from torchpar.baselines import numba_njit

    case = known_case(operator, shape)
    call = partial(getattr(numba_njit.PARALLEL, loop), *arguments_of(case, loop))
    numba.set_num_threads(threads)
    if case.cold and not warm:
        flush(CPU)
    calls = WARM_CALLS if warm or not case.cold else 1
    before = context_switches()
    timed = time_calls(call, calls=calls)
    switched = (context_switches() - before) / calls
    case.check(timed.result)
    return timed.seconds(), switched


def context_switches() -> int:
    """Of all threads of this process so far: those that waited, and those that others displaced."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_nvcsw + usage.ru_nivcsw


def ranks_turn(case: LadderCase, ranks: Group, way: str, index: int) -> list[float]:
    seconds, parts = zip(*ranks.run(compute_on_rank, case.operator, case.shape, way), strict=True)
    case.check(np.concatenate([part for part in parts if part is not None]))
    return [max(seconds)]


def compute_on_rank(operator: str, shape: tuple[int, ...], way: str) -> tuple[float, Array | None]:
    """Seconds of a call, and the rows of the result that this rank then has.

    Args:
        way: "whole": rank 0 computes all. "halves": each rank computes half of the rows and keeps
            them. "joined": rank 1 sends its half to rank 0, whose time counts.
    """
    case = known_case(operator, shape)
    rank = current_world().rank
    call = call_of_rank(operator, shape, way)
    if case.cold:
        flush(CPU)
    dist.barrier()
    if way == "whole" and rank > 0:
        return 0.0, None
    timed = time_calls(call, calls=1 if case.cold else WARM_CALLS)
    if way == "joined" and rank > 0:
        return 0.0, None
    return timed.seconds(), timed.result.numpy()


@cache
def call_of_rank(operator: str, shape: tuple[int, ...], way: str) -> Callable[[], Tensor]:
    first, *others = map(torch.from_numpy, known_case(operator, shape).arguments)
    world = current_world()
    rows = first if way == "whole" else world.share(first)
    if operator == "maximum":
        others = [others[0] if way == "whole" else world.share(others[0])]
    if "matmul" in operator:
        second = others[0] if others else first
        compute = partial(torch.mm, rows, second.T)
    else:
        compute = partial(getattr(torchpar, operator), rows, *others)

    def joined() -> Tensor:
        part = compute()
        if world.rank > 0:
            dist.send(part, 0)
            return part
        result = part.new_empty(len(first), *part.shape[1:])
        result[: len(part)] = part
        dist.recv(result[len(part) :], 1)
        return result

    return joined if way == "joined" else compute


# Measurement


def measure(case: LadderCase, rungs: Sequence[Rung], rounds: int = ROUNDS) -> list[Result]:
    """Time the rungs in turn, and compare each with pure Python and with the one that it names."""
    turns = {one: one.turn for one in rungs if one.turn}
    times = take_turns(turns, rounds, seconds=SECONDS, label=case.label)
    results: list[Result] = []
    for one in rungs:
        timed = times.get(one, Times())
        columns: dict[str, Any] = {
            "note": one.note,
            "threads": one.threads,
            "left_out": one.left_out,
            "than": one.than,
            "intensity": one.intensity,
            "first_s": timed.first if one.compiles and one.turn else None,
            "switches": mean(one.switches) if one.switches else None,
            "executed": one.executed or None,
            "least_us": one.least_us,
            "remarks": one.remarks or None,
        }
        results.append(timed.result({"workload": case.label}, one.name, **columns))
    for i, (one, result) in enumerate(zip(rungs, results, strict=True)):
        if not result.p50_ms:
            continue
        added = {}
        for name, other in (("over_pure_python", "pure Python"), ("faster", one.than)):
            found = page.find(results, other) if one.whole else None
            added[name] = found.p50_ms / result.p50_ms if found and found.p50_ms else None
        if case.operator == "maximum":
            added["gb_per_s"] = one.bytes * case.work.bytes / result.p50_ms / 1e6
        else:
            added["gflop_per_s"] = case.work.flops / result.p50_ms / 1e6
        results[i] = result.plus(**added)
    return results


def limits(quick: bool) -> list[Result]:
    """Measure what bounds all rungs on the CPU, each by its median time.

    These are copies in memory, loads from a core's nearest cache, and the flop/s of large products.
    The loads are those of the plain loop on 8 rows of 4 KB.
    """
    size, n = (2**20, 64) if quick else (2**27, 1024)
    source, target = (torch.ones(size, dtype=torch.int8) for _ in range(2))
    square, rows = torch.randn(n, n), np.ones((8, 1024), np.float32)
    before = torch.get_num_threads()
    results = []

    def add(name: str, threads: int, call: Callable[[], object], **work: float) -> None:
        torch.set_num_threads(threads)
        call()
        calls = 1 + int((0.001 if quick else 0.03) / time_calls(call).seconds())
        seconds = [time_calls(call, calls=calls).seconds() for _ in range(9)]
        torch.set_num_threads(before)
        columns: dict[str, object] = {"note": threads_note(threads), "threads": threads}
        columns |= {name: amount / median(seconds) / 1e9 for name, amount in work.items()}
        measured = Times([[one] for one in seconds]).result(
            {"workload": LIMITS}, name, None, **columns
        )
        results.append(measured)

    counts = dict.fromkeys([1, before])
    for count in counts:
        add("copy in memory", count, partial(target.copy_, source), gb_per_s=2 * size)
    if find_spec("numba"):
        from torchpar.baselines import numba_njit

        loaded = 2 * len(rows) * rows.nbytes
        add(
            "loads from the nearest cache",
            1,
            partial(numba_njit.SERIAL.matmul_t, rows),
            gb_per_s=loaded,
        )
    flops = 2 * n**3
    for count in counts:
        add("torch.mm", count, partial(torch.mm, square, square), gflop_per_s=flops)
    array = square.numpy()
    add("NumPy's product", before, partial(np.matmul, array, array), gflop_per_s=flops)
    return results


# The command


def students_entries(
    path: Path, functions: Mapping[str, Callable[..., object]], cases: Mapping[str, LadderCase]
) -> dict[str, list[Rung]]:
    """Call the student's functions once each; rungs by operator."""
    entries: dict[str, list[Rung]] = {operator: [] for operator in cases}
    for name, function in functions.items():
        operator, than = OPERATORS[name]
        if operator not in cases:
            print(f"{path.name}: {name} is left out; add {operator} to --cases", flush=True)
            continue
        case = cases[operator]
        is_cuda = isinstance(function, cuda_files.CudaKernel)
        if is_cuda and torch.cuda.is_available():
            left_out = "CUDA C++ is executed without a GPU only"
            row = Rung(name=f"{path.name}: {name}", threads=None, left_out=left_out)
            entries[operator].append(row)
            print(f"{row.name}: {left_out}", flush=True)
            continue
        if is_cuda or (name.endswith("_gpu") and not torch.cuda.is_available()):
            entries[operator].append(student_without_gpu(path, name, function, case))
            continue
        entry = student.enter(path, name, function, case)
        entries[operator] += [
            replace(
                one,
                remarks="\n".join(entry.remarks),
                bytes=1.0 + (entry.case.variant in WIDER.values()),
            )
            for one in entry_rungs(entry, than)
        ]
    return entries


def case_names(given: Sequence[str] | None, files: Sequence[tuple[Path, Loaded]]) -> Sequence[str]:
    """The cases of the flag ``--cases``; without it those of a student's files, or all.

    Raises:
        ConfigError: the flag leaves out all functions of the files.
    """
    used = {OPERATORS[own][0] for _, one in files for own in one.functions}
    names = given or [name for name in LADDERS if name in used or not files]
    if files and not used.intersection(names):
        raise ConfigError(
            f"--cases {' '.join(names)} leaves out all functions of the files; add "
            f"{' or '.join(sorted(used))}, or drop --cases"
        )
    return names


def is_any_tried(entries: Mapping[str, Sequence[Rung]]) -> bool:
    """Whether a function of the student's was called, and say so if none was."""
    rungs = [one for of_operator in entries.values() for one in of_operator]
    if any(one.turn is not None or one.executed for one in rungs):
        return True
    print("No function of the files is checked: each is left out.", flush=True)
    return False


def entry_rungs(entry: student.Entry, than: str) -> Iterator[Rung]:
    """The rows of a student's function: of Numba's by cores, of a GPU's also without copies."""
    shown = f"{Path(entry.file).name}: {entry.name}"
    if entry.name.endswith("_numba"):  # loops of Python take one core
        before = than
        for count in sorted({*THREADS, CORES}):
            plural = f"{'all ' * (count == CORES)}{count} core{'s' * (count > 1)}"
            plural = "the only core" if CORES == 1 else plural
            by_count = plural if count <= CORES else threads_note(count)
            note = ", ".join(filter(None, (entry.note, by_count)))
            turn = replace(entry, cores=count).turn
            yield Rung(name=shown, turn=turn, than=before, note=note, threads=None)
            before = f"{shown}, {note}"
        return
    yield Rung(name=shown, turn=entry.turn, than=than, note=entry.note, threads=None)
    if entry.name.endswith("_gpu"):
        note = ", ".join(filter(None, (entry.note, "without copies")))
        yield Rung(name=shown, turn=entry.turn_of_kernels, than=shown, note=note, threads=None)


def student_without_gpu(
    path: Path, name: str, function: Callable[..., object], case: LadderCase
) -> Rung:
    """A function for a GPU, which is executed without one; its time is unknown."""
    source = student.source_of(name, function, path)
    shown = f"{source.name}: {name}"
    entry = student.Entry(str(source), name, function, case, case)
    try:
        done = emulated.execute(entry)
    except (Rejected, TooSlow) as e:
        reason = f"{e}{' without a GPU' * isinstance(e, TooSlow)}"
        whole = LADDERS[case.operator].shape
        is_cuda = isinstance(function, cuda_files.CudaKernel)  # whose sizes are arguments
        is_final = is_cuda or isinstance(e, emulated.Raced)
        if whole != case.shape and not is_final:  # for which it may be written
            reason += f" (without --quick {'×'.join(map(str, whole))} is tried)"
        is_slow = isinstance(e, (TooSlow, student.SlowCall))
        verdict = "too slow" if is_slow else f"not right at {entry.tried.size}"
        print(f"{shown} is {verdict}: {reason}", flush=True)
        entry.remark(assignment.on_source(name, function))
        remarks = "\n".join(entry.remarks)
        return Rung(name=shown, threads=None, turn=partial(reject, reason), remarks=remarks)
    print(f"{shown} is {done}", flush=True)
    entry.remark(assignment.on_source(name, function))
    entry.remark(assignment.on_launches(name, done.launches, done.tried.shape))
    part = "" if done.tried.shape == case.shape else f"at {done.tried.size}"
    note = ", ".join(filter(None, (entry.case.variant, part)))
    return Rung(
        name=shown,
        threads=None,
        note=note,
        left_out="no GPU",
        executed=str(done),
        least_us=done.least,
        remarks="\n".join(entry.remarks),
    )


def show(
    measured: Mapping[str, Sequence[Result]], own: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Print the tables, and the README's table.

    Args:
        own: of a student's functions, the lines below the table of their workload.
    """
    for workload, results in measured.items():
        print_cells(workload, list(page.lines(results, "contestant")), page.SPARE)
        lines = [*page.notes(results), *page.over_loops(results), *(own or {}).get(workload, ())]
        print(*lines, sep="\n", end="\n\n")
    print(page.load_note(next(iter(measured.values()))))
    if table := readme_table(measured):
        print(f"\n{table}", end="")


def readme_table(measured: Mapping[str, Sequence[Result]]) -> str:
    """The README's table, if its two cases were measured."""
    labels = [
        next((one for one in measured if one.startswith(text)), "") for text in ("maximum", "X·Xᵀ")
    ]
    return page.summary(measured, labels) if all(labels) else ""


def write(
    folder: Path,
    measured: Mapping[str, Sequence[Result]],
    cases: Mapping[str, LadderCase],
    own: Mapping[str, Sequence[str]],
) -> None:
    """Write the tables in Markdown, and a picture of each case if matplotlib is installed."""
    load = page.load_note(next(iter(measured.values())))
    tables = [
        "\n\n".join([page.as_markdown(results).rstrip(), *own.get(workload, ())]) + "\n"
        for workload, results in measured.items()
    ]
    parts = [readme_table(measured), f"{load}\n", *tables]
    with writing(file := folder / "ladder.md", "--output"):
        file.write_text("\n".join(filter(None, parts)), "utf-8")
    if find_spec("matplotlib") is None:
        print("No picture is drawn: matplotlib is not installed; pip install matplotlib")
        return
    for operator, case in cases.items():
        if any(one.p50_ms for one in measured[case.label]):
            page.draw(
                folder / f"ladder-{operator}.png", measured[case.label], measured.get(LIMITS, [])
            )


def load_files(paths: Sequence[Path]) -> tuple[list[tuple[Path, Loaded]], int]:
    """Execute a student's files, and print their errors; 1 if there are any.

    A function that one file imports from another is tried once.
    """
    was_simulating = emulated.is_simulating()
    by_nogpu = not torch.cuda.is_available() and emulated.executes_numba()
    if not torch.cuda.is_available() and not by_nogpu:
        os.environ.setdefault(emulated.SIMULATOR, "1")  # which Numba reads when it is imported
    os.environ.setdefault("NUMBA_NUM_THREADS", str(max(*THREADS, CORES)))  # and this
    files, status, known = [], 0, set[int]()
    for path in dict.fromkeys(one.resolve() for one in paths):
        load = cuda_files.load if path.suffix == cuda_files.SUFFIX else student.load
        # Kernels with signatures are compiled as soon as the file is executed.
        with emulated.emulated() if by_nogpu and names_numba_cuda(path) else nullcontext():
            functions, error = load(path)
        status |= int(bool(error))
        new = {name: one for name, one in functions.items() if id(one) not in known}
        known |= set(map(id, functions.values()))
        files.append((path, Loaded(new, error)))
    if emulated.is_simulating() and not was_simulating:
        print(emulated.ADVICE, flush=True)
    student.limit_threads(CORES)
    return files, status


def names_numba_cuda(path: Path) -> bool:
    """Whether a file, or what stands for one, may have kernels of numba.cuda."""
    if not path.is_file():
        return False
    text = path.read_bytes()
    return b"numba" in text and b"cuda" in text


def silence_search_for_cuda() -> None:
    """Do without the warning of PyTorch's compiler where there is CUDA's toolkit but no GPU.

    The tables say that there is no GPU.
    """
    if not torch.cuda.is_available():
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def keep_freed_memory() -> None:
    """Let glibc keep the memory that is freed, so that a row is not slow after another one.

    After the rows of two ranks it gave memory back, and the next row's result got its pages one by
    one, which took longer than the maximum. Without effect where there is no glibc.
    """
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, size in KEPT.items():
            mallopt(option, size)


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("ladder")
    add = command.parser.add_argument
    add(
        "--with",
        dest="paths",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help=f"also functions of yours, from files in Python or CUDA C++ (.cu): {student.NAMES}",
    )
    add(
        "--cases",
        nargs="+",
        choices=LADDERS,
        metavar="CASE",
        help=f"only these of {', '.join(LADDERS)}",
    )
    add(
        "--gpu",
        action="store_true",
        help="only a GPU's rows, and those that they are compared with: less than a minute",
    )
    load = os.getloadavg()[0]
    options = command.parse(arguments)
    if options.gpu and not torch.cuda.is_available():
        raise ConfigError("--gpu is given, but PyTorch finds no CUDA GPU; leave it out")
    if options.output and find_spec("matplotlib") is None:  # now, and not after the measurement
        print("No picture will be drawn: matplotlib is not installed; pip install matplotlib")
    silence_search_for_cuda()
    keep_freed_memory()
    rounds = 2 if options.quick else ROUNDS
    files, status = load_files(options.paths)
    names = case_names(options.cases, files)
    cases = {
        name: make_case(name, LADDERS[name].quick if options.quick else LADDERS[name].shape)
        for name in names
    }
    entries: dict[str, list[Rung]] = {name: [] for name in names}
    for path, one in files:
        for name, added in students_entries(path, one.functions, cases).items():
            entries[name] += added
    status |= int(bool(files) and not is_any_tried(entries))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    table = Table(command.csv(options), CPU, cores=CORES, gpu=gpu, load_before=round(load, 2))
    with (
        nullcontext()
        if options.gpu
        else start_helpers(max(thread_counts(options.quick))) as helpers
    ):
        for operator, case in cases.items():
            print(f"compiling the rows of {case.label}", file=sys.stderr, flush=True)
            own = gpu_rungs(case) if helpers is None else rungs(case, helpers, options.quick)
            table.add(measure(case, [*own, *entries[operator]], rounds))
    if not options.gpu:
        print(f"measuring the {LIMITS}", file=sys.stderr, flush=True)
        table.add(limits(options.quick))
    measured: dict[str, list[Result]] = {}
    for result in table.results:
        measured.setdefault(result.case["workload"], []).append(result.plus(**table.common))
    own_lines = {
        case.label: list(homework.lines(case, measured[case.label], options.quick))
        for operator, case in cases.items()
        if entries[operator]
    }
    show(measured, own_lines)
    if options.output:
        write(options.output, measured, cases, own_lines)
    else:
        print("\n--output DIR writes the tables, a CSV and pictures.")
    return status or table.status


if __name__ == "__main__":
    with_files = any(argument.startswith("--w") for argument in sys.argv[1:])
    run(partial(guarded, main, "the ladder") if with_files else main, "run ladder")
