# SPDX-License-Identifier: MIT
"""Compute three operators in many ways, from pure Python to processes: ``python -m benchmarks run ladder``.

Three cases: elementwise maximum, X·Xᵀ and linear+sigmoid; `benchmarks.train` trains whole networks. The
result of every call that is timed is checked against float64 (whole numbers: exactly). Contestants take
turns, and medians are quoted. Caches are flushed before maximum and X·Xᵀ; what linear+sigmoid works on stays
in them, as in training.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import torchpar
from benchmarks import operators
from benchmarks.command import Command, run
from benchmarks.compare import Work
from benchmarks.operators import NATIVE, OURS
from benchmarks.ranks import Group, current_world, start_ranks
from benchmarks.results import CORES, Result, Table, duration, markdown, number, print_results
from benchmarks.timing import (
    CPU,
    Contestant,
    Rejected,
    Turn,
    flush,
    take_turns,
    time_calls,
)
from torchpar.baselines import numpy_mlp, pure_python
from torchpar.baselines.numpy_mlp import Array

SHAPES: dict[str, tuple[int, ...]] = {
    "maximum": (1000, 1000),
    "matmul_t": (1000, 1000),  # n, k
    "linear_sigmoid": (64, 784, 128),  # rows, in_features, out_features
}
LABELS = {
    "maximum": "maximum of {}×{} int32",
    "matmul_t": "X·Xᵀ of {}×{} float32",
    "linear_sigmoid": "linear+sigmoid of {}×{}→{} float32",
}
QUICK_SHAPES = {"maximum": (20, 30), "matmul_t": (33, 17), "linear_sigmoid": (7, 33, 5)}
THREADS = (1, 2, 4, 8)
ROUNDS = 20
SECONDS = 2.5  # of a contestant's turns, after which it has no more
WARM_SECONDS = 5e-3
WARM_CALLS = 100  # of a rank
PRODUCTS = 10_000_000  # about a second of pure Python
SPEEDS = ("p50_ms", "samples", "over_pure_python", "over_previous", "gb_per_s", "gflop_per_s")
COLUMNS = ("contestant", "note", *SPEEDS, "first_s", "ok")


@dataclass(frozen=True)
class LadderCase:
    """An operator, its arguments, and its result in float64 (or whole numbers).

    Attributes:
        bound: how far off each number of the result may be.
        work: the least that it takes.
        cold: whether calls find the arguments in memory, or in a cache as a training step does.
    """

    operator: str
    label: str
    arguments: tuple[Array, ...]
    expected: Array
    bound: Array
    work: Work
    cold: bool

    def check(self, result: Array, rows: slice = slice(None)) -> None:
        """Raise if ``result`` is not that of these rows."""
        expected = self.expected[rows]
        if result.shape != expected.shape:
            raise Rejected(f"the result has shape {result.shape}, expected {expected.shape}")
        wrong = ~(np.abs(result - expected) <= self.bound[rows])
        if wrong.any():
            raise Rejected(f"{wrong.sum()} numbers are off by more than rounding")


def make_case(operator: str, shape: Sequence[int]) -> LadderCase:
    """The case of "maximum" or "matmul_t" ``(n, k)``, or of "linear_sigmoid" ``(m, in, out)``.

    A sum of k products in float32, in whatever order, is off by at most γ(k)·Σ|a·b| with γ(k) = ku/(1 − ku)
    and u = 2⁻²⁴ (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). The sigmoid's
    slope is at most 1/4; 8u allow for its own few roundings.
    """
    integers = operator == "maximum"
    shapes = (shape, shape) if integers else tuple(shape)
    case = operators.make_case(operator, shapes, torch.int32 if integers else torch.float32, CPU)
    arguments = tuple(t.numpy() for t in case.inputs(0)[:-1])
    expected = case.oracle(*(torch.from_numpy(t.astype(np.float64)) for t in arguments)).numpy()
    sizes = [np.abs(t.astype(np.float64)) for t in arguments]
    bound, u = 0 * expected, 2.0**-24
    if operator == "matmul_t":
        ku = shape[1] * u
        bound = ku / (1 - ku) * sizes[0] @ sizes[0].T
    elif operator == "linear_sigmoid":
        ku = (shape[1] + 1) * u  # the bias is one more term
        bound = ku / (1 - ku) * (sizes[0] @ sizes[1].T + sizes[2]) / 4 + 8 * u
    label = LABELS[operator].format(*shape)
    return LadderCase(operator, label, arguments, expected, bound, case.forward, operator != "linear_sigmoid")


def contestants(case: LadderCase, shape: tuple[int, ...], ranks: Group, quick: bool) -> Iterator[Contestant]:
    """All contestants, first pure Python; if ``quick``, without torch.compile and many threads.

    The seconds of a turn are those of the whole case, also if it computes a part.
    """
    import numba

    from benchmarks import numba_njit

    operator, arrays = case.operator, case.arguments

    def by(name: str, function: Callable[..., Any], *arguments: Any, **shown: Any) -> Contestant:
        device = next((t.device for t in arguments if isinstance(t, Tensor)), CPU)
        return Contestant(name, timed_turn(case, partial(function, *arguments), device=device), **shown)

    lists = [t.tolist() for t in arrays]
    if operator == "matmul_t":  # some rows take long enough
        rows = max(1, min(shape[0], PRODUCTS // math.prod(shape)))
        note = "" if rows == shape[0] else f"from {rows} of {shape[0]} rows"
        call = partial(pure_python.matmul_t, lists[0], rows)
        yield Contestant("pure Python", timed_turn(case, call, rows), note)
    else:
        yield by("pure Python", getattr(pure_python, operator), *lists)

    loops: dict[str, tuple[str, float | None, tuple[bool, ...]]] = {"njit": (operator, None, ())}
    if operator == "matmul_t":
        # Needed operations of each byte loaded. A product is two operations, of which the symmetric result
        # needs one; its numbers are 8 bytes, which serve as many products as a tile has rows.
        loops = {
            "njit": ("matmul_t", 1 / 8, ()),
            "njit, blocked": ("matmul_t_tiled", numba_njit.TILE / 8, (False,)),
            "njit, triangular": ("matmul_t_tiled", numba_njit.TILE / 4, (True,)),
        }
    for name, (loop, intensity, flags) in loops.items():
        yield by(name, getattr(numba_njit.SERIAL, loop), *arrays, *flags, compiles=True, intensity=intensity)

    def in_threads(count: int, function: Callable[..., Array], *flags: bool) -> Array:
        numba.set_num_threads(count)
        return function(*arrays, *flags)

    for name, (loop, intensity, flags) in loops.items():
        for count in THREADS[: 1 if quick else None]:
            parallel = partial(in_threads, count, getattr(numba_njit.PARALLEL, loop), *flags)
            shown = {"compiles": True} if count == 1 else {"intensity": intensity}
            if count <= CORES:
                yield by(f"{name}, parallel", parallel, note=f"{count} thread{'s' * (count > 1)}", **shown)

    tensors = [torch.from_numpy(t) for t in arrays]
    yield by("NumPy", getattr(numpy_mlp, operator), *arrays)
    yield by("torch eager", NATIVE[operator], *tensors)
    if not quick:
        yield by("torch.compile", torch.compile(NATIVE[operator], dynamic=False), *tensors, compiles=True)
    yield by("torchpar CPU", OURS[operator], *tensors)
    if torch.cuda.is_available():
        tensors = [t.cuda() for t in tensors]
        yield by("torch eager GPU", NATIVE[operator], *tensors, compiles=True)
        yield by("torchpar GPU", OURS[operator], *tensors, compiles=True)
    yield Contestant("2 ranks", partial(ranks_turn, case, shape, ranks), "a half each, left there")


def timed_turn(
    case: LadderCase, call: Callable[[], Any], rows: int | None = None, device: torch.device = CPU
) -> Turn:
    """Turns of a call that computes the first ``rows``.

    A cold turn is one call, after the caches were flushed; a warm one has as many as take `WARM_SECONDS`.
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


def ranks_turn(case: LadderCase, shape: tuple[int, ...], ranks: Group, index: int) -> list[float]:
    seconds, parts = zip(*ranks.run(compute_on_rank, case.operator, shape), strict=True)
    case.check(np.concatenate(parts, axis=1 if case.operator == "linear_sigmoid" else 0))
    return [max(seconds)]


def compute_on_rank(operator: str, shape: tuple[int, ...]) -> tuple[float, Array]:
    """Seconds of a call, and this rank's part of the result: rows, or columns of linear+sigmoid."""
    cold, call = call_of_rank(operator, shape)
    if cold:
        flush(CPU)
    dist.barrier()
    timed = time_calls(call, calls=1 if cold else WARM_CALLS)
    return timed.seconds(), timed.result.numpy()


@cache
def call_of_rank(operator: str, shape: tuple[int, ...]) -> tuple[bool, Callable[[], Tensor]]:
    case = make_case(operator, shape)
    arguments = [torch.from_numpy(t) for t in case.arguments]
    share = current_world().share
    if operator == "matmul_t":
        return case.cold, partial(torch.mm, share(arguments[0]), arguments[0].T)
    whole = arguments[:1] if operator == "linear_sigmoid" else []  # x
    own = map(share, arguments[len(whole) :])
    return case.cold, partial(getattr(torchpar, operator), *whole, *own)


def measure(case: LadderCase, contestants: Sequence[Contestant], rounds: int = ROUNDS) -> list[Result]:
    """Time the contestants in turn, and compare each with the first and with the one before."""
    turns = {one: one.turn for one in contestants}
    times = take_turns(turns, rounds, seconds=SECONDS, label=case.label)
    results: list[Result] = []
    for one in contestants:
        result = times[one].result({"workload": case.label}, one.name)
        columns: dict[str, Any] = {"note": one.note, "intensity": one.intensity}
        columns["first_s"] = times[one].first if one.compiles else None
        if result.p50_ms:
            others = {"over_pure_python": results[:1] or [result], "over_previous": results[-1:]}
            for name, other in others.items():
                columns[name] = other[0].p50_ms / result.p50_ms if other and other[0].p50_ms else None
            if case.operator == "maximum":
                columns["gb_per_s"] = case.work.bytes / result.p50_ms / 1e6
            else:
                columns["gflop_per_s"] = case.work.flops / result.p50_ms / 1e6
        results.append(replace(result, columns=columns))
    return results


def limits(quick: bool) -> tuple[dict[str, float], float]:
    """Bytes/s of a large copy and of a core's first-level cache, and flop/s of a large product.

    The cache's are those of the naive loop on 8 rows of 4 KB.
    """
    from benchmarks import numba_njit

    def settled(call: Callable[[], object]) -> float:
        """Seconds of a call in a row of calls, the median of 9 such rows."""
        call()
        calls = 1 + int((0.001 if quick else 0.03) / time_calls(call).seconds())
        return median(time_calls(call, calls=calls).seconds() for _ in range(9))

    size, n = (2**20, 64) if quick else (2**27, 1024)
    source, target = (torch.ones(size, dtype=torch.int8) for _ in range(2))
    square, rows = torch.randn(n, n), np.ones((8, 1024), np.float32)
    copied = 2 * size / settled(partial(target.copy_, source))
    loaded = 2 * len(rows) * rows.nbytes / settled(partial(numba_njit.SERIAL.matmul_t, rows))
    roofs = {"memory": copied, "a core's cache": loaded}
    return roofs, 2 * n**3 / settled(partial(torch.mm, square, square))


def label(result: Result) -> str:
    return ", ".join(filter(None, (result.contestant, result.columns["note"])))


def as_markdown(results: Sequence[Result]) -> str:
    """The table of one case."""
    lines = [[results[0].case["workload"], "time", "× pure Python", "× previous"]]
    for result in results:
        ratios = [number(result.columns.get(name)) for name in ("over_pure_python", "over_previous")]
        lines.append([label(result), duration(result.p50_ms and result.p50_ms / 1e3), *ratios])
    return markdown(lines)


def draw(path: Path, results: Sequence[Result], roofs: Mapping[str, float], arithmetic: float) -> None:
    """Speed of X·Xᵀ by needed operations per byte loaded, under what loads and arithmetic allow.

    Args:
        roofs: bytes/s that are loaded from the memory, or from a cache, by name.
        arithmetic: flop/s of a product.
    """
    from matplotlib.figure import Figure

    known = [one for one in results if one.columns["intensity"] and one.p50_ms]
    span = [one.columns["intensity"] for one in known] or [1.0]
    left, right = min(span) / 3, max(span) * 8
    figure = Figure((9, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, bandwidth in roofs.items():
        reach = [left, arithmetic / bandwidth, right]
        heights = [min(x * bandwidth, arithmetic) / 1e9 for x in reach]
        text = f"{name}, {bandwidth / 1e9:.0f} GB/s; torch.mm, {arithmetic / 1e9:.0f} GFLOP/s"
        axes.plot(reach, heights, lw=1, label=text)
    for one in known:
        point = one.columns["intensity"], one.columns["gflop_per_s"]
        axes.plot(*point, "o", color="tab:orange")
        threaded = "parallel" in one.contestant  # to the left of the point; one thread to the right
        place: dict[str, Any] = {"xytext": (-7, 5) if threaded else (7, -9)}
        place |= {"ha": "right" if threaded else "left", "textcoords": "offset points", "fontsize": 8}
        axes.annotate(label(one).replace(", parallel", ""), point, **place)
    axes.set(xscale="log", yscale="log", xlim=(left, right), title=results[0].case["workload"])
    axes.set(xlabel="needed operations per byte loaded", ylabel="GFLOP/s of needed operations")
    axes.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("ladder", "Compute the same in every way.", ["numba", "matplotlib"])
    options = command.parse(arguments)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    table = Table(command.csv(options), CPU, cores=CORES, gpu=gpu)
    shapes, rounds = (QUICK_SHAPES, 2) if options.quick else (SHAPES, ROUNDS)
    measured = {}
    with start_ranks(2) as ranks:
        for operator, shape in shapes.items():
            case = make_case(operator, shape)
            compared = list(contestants(case, shape, ranks, options.quick))
            measured[operator] = table.add(measure(case, compared, rounds))
    for results in measured.values():
        print_results(results[0].case["workload"], results, COLUMNS)
    if options.output:
        (options.output / "ladder.md").write_text("\n".join(map(as_markdown, measured.values())))
        draw(options.output / "intensity.png", measured["matmul_t"], *limits(options.quick))
    return table.status


if __name__ == "__main__":
    run(main)
