# SPDX-License-Identifier: MIT
"""The rungs of the operators: a call of each way to compute one, timed and checked."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ladder.inputs import Operands, operands
from benchmarks.ladder.rungs import Rung, Workload, plural
from benchmarks.operations import NATIVE, OURS
from benchmarks.timing import CPU, Turn, flush, settle, time_calls
from torchpar.baselines import numba_njit, numpy_mlp, pure_python
from torchpar.parallel.launch.local import Ranks

# Floating-point operations of x·xᵀ that are needed, for each byte loaded. A product is two operations, of
# which the symmetric result needs one; its numbers are 8 bytes, which serve as many as a tile has rows.
NAIVE, BLOCKED, TRIANGULAR = 1 / 8, numba_njit.TILE / 8, numba_njit.TILE / 4
SECONDS = 2.5  # of a rung's turns
WARM_SECONDS = 5e-3
PRODUCTS = 10_000_000  # about a second of pure Python


def workload(
    name: str, shape: tuple[int, ...], ranks: Ranks, threads: Sequence[int], compiled: bool = True
) -> Workload:
    """All rungs of "maximum", "matmul_t" or "linear_sigmoid"; without ``compiled`` less torch.compile."""
    given = operands(name, shape)
    rungs = [pure_python_rung(given), *njit_rungs(given, threads), *library_rungs(given, compiled)]
    if torch.cuda.is_available():
        rungs += gpu_rungs(given)
    rungs.append(two_ranks_rung(given, shape, ranks))
    return Workload(given.label, given.work, "GB/s" if name == "maximum" else "GFLOP/s", rungs, SECONDS)


def pure_python_rung(given: Operands) -> Rung:
    lists = [t.tolist() for t in given.arguments]
    if given.name != "matmul_t":
        return Rung("pure Python", cpu_turn(given, partial(getattr(pure_python, given.name), *lists)))
    n, k = given.arguments[0].shape
    rows = max(1, min(n, PRODUCTS // (n * k)))
    note = "" if rows == n else f"from {rows} of {n} rows"
    turn = cpu_turn(given, partial(pure_python.matmul_t, lists[0], rows), rows)
    return Rung("pure Python", turn, note, covered=rows / n)


def njit_rungs(given: Operands, threads: Sequence[int]) -> Iterator[Rung]:
    ways: dict[str, tuple[str, float | None]] = {"njit": (given.name, None)}
    if given.name == "matmul_t":
        ways = {
            "njit": ("matmul_t", NAIVE),
            "njit, blocked": ("matmul_t_blocked", BLOCKED),
            "njit, triangular": ("matmul_t_triangular", TRIANGULAR),
        }
    for name, (function, intensity) in ways.items():
        serial = partial(getattr(numba_njit.SERIAL, function), *given.arguments)
        yield Rung(name, cpu_turn(given, serial), compiles=True, intensity=intensity)
    for name, (function, intensity) in ways.items():
        for count in threads:
            parallel = partial(getattr(numba_njit.PARALLEL, function), *given.arguments)
            yield Rung(
                f"{name}, parallel",
                cpu_turn(given, partial(in_threads, count, parallel)),
                plural(count, "thread"),
                compiles=count == 1,
                intensity=intensity if count > 1 else None,
            )


def in_threads(count: int, call: Callable[[], Any]) -> Any:
    with numba_njit.threads(count):
        return call()


def library_rungs(given: Operands, compiled: bool) -> Iterator[Rung]:
    tensors = [torch.from_numpy(t) for t in given.arguments]
    native, ours = NATIVE[given.name], OURS[given.name]
    yield Rung("NumPy", cpu_turn(given, partial(getattr(numpy_mlp, given.name), *given.arguments)))
    yield Rung("torch eager", cpu_turn(given, partial(native, *tensors)))
    if compiled:
        fast = torch.compile(native, dynamic=False)
        yield Rung("torch.compile", cpu_turn(given, partial(fast, *tensors)), compiles=True)
    yield Rung("torchpar CPU", cpu_turn(given, partial(ours, *tensors)))


def two_ranks_rung(given: Operands, shape: tuple[int, ...], ranks: Ranks) -> Rung:
    from benchmarks.ladder import on_ranks

    def turn(index: int) -> list[float]:
        seconds, parts = zip(*ranks.run(on_ranks.operate, given.name, shape, given.cold), strict=True)
        given.check(np.concatenate(parts, axis=1 if given.name == "linear_sigmoid" else 0))
        return [max(seconds)]

    return Rung("2 ranks", turn, "a half each, left there")


def gpu_rungs(given: Operands) -> Iterator[Rung]:
    from torchpar.baselines import launch_shapes  # imports Triton

    device = torch.device("cuda")
    tensors = [torch.from_numpy(t).to(device) for t in given.arguments]

    def rung(name: str, function: Callable[..., Tensor], note: str = "") -> Rung:
        return Rung(name, gpu_turn(given, partial(function, *tensors)), note, compiles=True, device=device)

    for note, kernel in launch_shapes.SHAPES.get(given.name, {}).items():
        yield rung("Triton", kernel, note)
    yield rung("torch eager GPU", NATIVE[given.name])
    yield rung("torchpar GPU", OURS[given.name])


def cpu_turn(given: Operands, call: Callable[[], Any], rows: int | None = None) -> Turn:
    """Turns of a call that computes the first ``rows``.

    A cold turn is one call, after the caches were flushed; a warm one has as many as take `WARM_SECONDS`.
    """
    calls = 1
    part = 1.0 if rows is None else rows / len(given.expected)

    def turn(index: int) -> list[float]:
        nonlocal calls
        if given.cold:
            flush(CPU)
        timed = time_calls(call, calls=calls)
        given.check(np.asarray(timed.result), slice(rows))
        if index == 0 and not given.cold:  # the first call may have compiled
            calls = 1 + int(WARM_SECONDS / time_calls(call).seconds())
        return [timed.seconds() / part]

    return turn


def gpu_turn(given: Operands, call: Callable[[], Tensor]) -> Turn:
    def turn(index: int) -> list[float]:
        flush(torch.device("cuda"))
        timed = time_calls(call, torch.device("cuda"))
        given.check(timed.result.cpu().numpy())
        return [timed.seconds()]

    return turn


def cache_bandwidth(quick: bool) -> float:
    """Bytes/s that one core loads from its first-level cache: in the naive loop on 8 rows of 4 KB."""
    x = np.ones((8, 1024), np.float32)
    seconds = settle(partial(numba_njit.SERIAL.matmul_t, x), CPU, 0.01 if quick else 0.2)
    return 2 * len(x) * x.nbytes / seconds
