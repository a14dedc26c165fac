# SPDX-License-Identifier: MIT
"""The three operators on each rung."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import torchpar
from benchmarks.baselines import numba_njit, numpy_mlp, pure_python
from benchmarks.ladder import split
from benchmarks.ladder.inputs import Operands, operands
from benchmarks.ladder.measure import CPU, Rung, Sample, Workload
from benchmarks.operators import NATIVE
from benchmarks.scaling.plan import CORES
from benchmarks.scaling.ranks import Ranks
from benchmarks.timing import flush

THREADS = (1, 2, 4, 8)
# Floating-point operations of x·xᵀ that are needed, for each byte loaded. A product is two operations, of
# which the symmetric result needs one; its numbers are 8 bytes, which serve as many as a tile has rows.
NAIVE, BLOCKED, TRIANGULAR = 1 / 8, numba_njit.TILE / 8, numba_njit.TILE / 4
SECONDS = 2.5  # of a rung's samples
WARM_SECONDS = 5e-3
PRODUCTS = 10_000_000  # about a second of pure Python


def workload(name: str, shape: tuple[int, ...], ranks: Ranks) -> Workload:
    """All rungs of "maximum", "matmul_t" or "linear_sigmoid" on inputs of this shape."""
    given = operands(name, shape)
    rungs = [_pure_python(given), *_njit(given), *_libraries(given)]
    if torch.cuda.is_available():
        rungs += _gpu(given)
    rungs.append(_two_ranks(given, shape, ranks))
    return Workload(given.label, given.work, "GB/s" if name == "maximum" else "GFLOP/s", rungs, SECONDS)


def cache_bandwidth() -> float:
    """Bytes/s that one core loads from its first-level cache: in the naive loop on 8 rows of 4 KB."""
    x = np.ones((8, 1024), np.float32)
    call = numba_njit.SERIAL.matmul_t
    seconds = Timer("call(x)", globals={"call": call, "x": x}).blocked_autorange(min_run_time=0.2).median
    return 2 * len(x) * x.nbytes / seconds


def _pure_python(given: Operands) -> Rung:
    lists = [t.tolist() for t in given.arguments]
    if given.name == "matmul_t":
        n, k = given.arguments[0].shape
        rows = max(1, min(n, PRODUCTS // (n * k)))
        call = partial(pure_python.matmul_t, lists[0], rows)
        note = "" if rows == n else f"from {rows} of {n} rows"
        return Rung("pure Python", _on_cpu(given, call, rows), note=note)
    return Rung("pure Python", _on_cpu(given, partial(getattr(pure_python, given.name), *lists)))


def _njit(given: Operands) -> Iterator[Rung]:
    ways: dict[str, tuple[str, float | None]] = {"njit": (given.name, None)}
    if given.name == "matmul_t":
        ways = {
            "njit": ("matmul_t", NAIVE),
            "njit, blocked": ("matmul_t_blocked", BLOCKED),
            "njit, triangular": ("matmul_t_triangular", TRIANGULAR),
        }
    for name, (function, intensity) in ways.items():
        serial = partial(getattr(numba_njit.SERIAL, function), *given.arguments)
        yield Rung(name, _on_cpu(given, serial), compiles=True, intensity=intensity)
    for name, (function, intensity) in ways.items():
        for threads in THREADS:
            if threads <= CORES:
                parallel = partial(getattr(numba_njit.PARALLEL, function), *given.arguments)
                yield Rung(
                    f"{name}, parallel",
                    _on_cpu(given, partial(_in_threads, threads, parallel)),
                    note=f"{threads} thread{'s' if threads > 1 else ''}",
                    compiles=threads == 1,
                    intensity=intensity if threads > 1 else None,
                )


def _in_threads(threads: int, call: Callable[[], Any]) -> Any:
    with numba_njit.threads(threads):
        return call()


def _libraries(given: Operands) -> Iterator[Rung]:
    tensors = [torch.from_numpy(t) for t in given.arguments]
    native, ours = NATIVE[given.name], getattr(torchpar, given.name)
    yield Rung("NumPy", _on_cpu(given, partial(getattr(numpy_mlp, given.name), *given.arguments)))
    yield Rung("torch eager", _on_cpu(given, partial(native, *tensors)))
    compiled = torch.compile(native, dynamic=False)
    yield Rung("torch.compile", _on_cpu(given, partial(compiled, *tensors)), compiles=True)
    yield Rung("torchpar CPU", _on_cpu(given, partial(ours, *tensors)))


def _two_ranks(given: Operands, shape: tuple[int, ...], ranks: Ranks) -> Rung:
    def sample() -> Sample:
        seconds, parts = zip(*ranks.all(split.operate, given.name, shape, given.cold), strict=True)
        given.check(np.concatenate(parts, axis=1 if given.name == "linear_sigmoid" else 0))
        return Sample(max(seconds))

    return Rung("2 ranks", sample, note=split.noted("a half each, left there"))


def _gpu(given: Operands) -> Iterator[Rung]:
    from benchmarks.baselines import launch_shapes  # imports Triton

    device = torch.device("cuda")
    tensors = [torch.from_numpy(t).to(device) for t in given.arguments]
    rung = partial(Rung, device=device, compiles=True)
    for note, kernel in launch_shapes.SHAPES.get(given.name, {}).items():
        yield rung("Triton", _on_gpu(given, partial(kernel, *tensors)), note=note)
    yield rung("torch eager GPU", _on_gpu(given, partial(NATIVE[given.name], *tensors)))
    yield rung("torchpar GPU", _on_gpu(given, partial(getattr(torchpar, given.name), *tensors)))


def _on_cpu(given: Operands, call: Callable[[], Any], rows: int | None = None) -> Callable[[], Sample]:
    """Samples of a call that computes the first ``rows``.

    What is cold has one call, after the caches were flushed; else there are as many as take `WARM_SECONDS`.
    """
    calls = 0  # the first sample finds out

    def sample() -> Sample:
        nonlocal calls
        if given.cold:
            flush(CPU)
        elif not calls:
            call()  # may compile, and is not to tell how many calls are needed
        start = time.perf_counter()
        for _ in range(calls or 1):
            result = call()
        seconds = (time.perf_counter() - start) / (calls or 1)
        if not calls:
            calls = 1 if given.cold else 1 + int(WARM_SECONDS / seconds)
        given.check(np.asarray(result), slice(rows))
        part = 1.0 if rows is None else rows / len(given.expected)
        return Sample(seconds, part, part)

    return sample


def _on_gpu(given: Operands, call: Callable[[], Tensor]) -> Callable[[], Sample]:
    """Between two events in a queue that flushing keeps from running dry."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> Sample:
        flush(torch.device("cuda"))
        begin.record()
        result = call()
        end.record()
        given.check(result.cpu().numpy())
        return Sample(begin.elapsed_time(end) / 1e3)

    return sample
