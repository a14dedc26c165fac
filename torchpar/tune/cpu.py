# SPDX-License-Identifier: MIT
"""Measure the products of this processor, for the table in `torchpar.ops.cpu_table`, in about a minute."""

import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.ops import cpu_table, processor, symmetric_cpu
from torchpar.ops.cpu_table import Choice

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_SQUARE = (128, 192, 256, 384, 512, 768, 1024, 2048)
SIZES = (
    *((n, n) for n in _SQUARE),
    *((128, 2048), (256, 4096), (512, 1024), (512, 4096), (1024, 4096)),
    *((512, 64), (2048, 128)),
)
_MOST = {torch.float32: 2**33, torch.float64: 2**30, torch.bfloat16: 2**33}  # multiplications of a problem
_ROUND_SECONDS, _ROUNDS = 0.007, 5
_CACHES = 2**26  # bytes, more than the caches of a core hold
_COLD_BELOW = 1024  # rows; larger products take as long with emptied caches
_MARGIN = 1.03  # by how much a choice must be faster than the one before


def candidates(dtype: torch.dtype, n: int) -> list[Choice]:
    """The ways to a product of n rows."""
    found = [
        Choice("blas", rows, 1.0) for rows in sorted({0, 128, 256, 512, n}) if 2 * rows <= n or rows == n
    ]
    if dtype == torch.float32 and processor.uses_onednn():
        found += [Choice("onednn", rows, 1.0) for rows in (128, 256, 512) if rows <= n]
    return found


def seconds(calls: Sequence[Callable[[], object]], cold: bool = False) -> list[float]:
    """The lower quartile of the seconds of each call. They take turns, so that a disturbance slows all.

    Args:
        cold: empty the caches before each call.
    """
    begin = time.perf_counter()
    for call in calls:
        call()
    count = max(int(_ROUND_SECONDS * len(calls) / (time.perf_counter() - begin)), 1)
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for call, own in zip(calls, times, strict=True):
            if cold:
                _evicting().zero_()
                count = 1
            begin = time.perf_counter()
            for _ in range(count):
                call()
            own.append((time.perf_counter() - begin) / count)
    return [sorted(own)[len(own) // 4] for own in times]


@cache
def _evicting() -> Tensor:
    return torch.empty(_CACHES, dtype=torch.uint8)


class Reference(NamedTuple):
    """X·Xᵀ in float64, and the largest error that a way to it may have."""

    product: Tensor
    bound: float


def reference(x: Tensor) -> Reference:
    exact = x.double() @ x.double().T
    error = ((x @ x.T).double() - exact).abs().max().item()
    # The reference has an error too: a rounding of random sign for each of k terms.
    own = exact.abs().max().item() * math.sqrt(x.shape[1]) * torch.finfo(torch.float64).eps
    return Reference(exact, 2 * error + 3 * own)


def check(found: Tensor, expected: Reference, way: Choice) -> None:
    """Raise a ValueError if the error is over twice PyTorch's, or if the product is not symmetric."""
    error = (found.double() - expected.product).abs().max().item()
    if error > expected.bound:
        raise ValueError(f"{way} of {len(found)} rows has an error of {error:.1e}, over {expected.bound:.1e}")
    if not torch.equal(found, found.T):
        raise ValueError(f"{way} of {len(found)} rows is not symmetric")


def measure_symmetric(dtype: torch.dtype, n: int, k: int) -> Choice:
    """The fastest way to X·Xᵀ for X ``(n, k)``, of those that are right beside float64.

    With emptied caches it is no slower than the first one, the whole product: a call of many small steps
    gains in a loop, and loses between other work.
    """
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(dtype)
    ways, expected = [], reference(x)
    for way in candidates(dtype, n):
        try:
            check(symmetric_cpu.symmetric_product(x, x, chosen=way), expected, way)
            ways.append(way)
        except ValueError as error:
            print(f"left out: {error}")
    if not ways:
        raise ConfigError(f"no product of {n}x{k} in {dtype} is right on this processor")
    calls = [partial(symmetric_cpu.symmetric_product, x, x, chosen=way) for way in ways]
    if n < _COLD_BELOW and len(ways) > 1:
        first, *others = seconds(calls, cold=True)
        kept = [True, *(taken <= _MARGIN * first for taken in others)]
        ways, calls = list(compress(ways, kept)), list(compress(calls, kept))
    plain, *times = seconds([lambda: torch.mm(x, x.t()), *calls])
    best = 0
    for i, taken in enumerate(times):
        if taken * _MARGIN < times[best]:
            best = i
    return ways[best]._replace(gain=round(plain / times[best], 3))


def tune() -> str:
    """Measure this processor with one and with all threads, and return what is printed.

    The table is saved after each number of threads, and keeps its entries of other ones.
    """
    all_threads = torch.get_num_threads()
    begin = time.perf_counter()
    try:
        for threads in sorted({1, all_threads}):
            torch.set_num_threads(threads)
            measured = _measure(threads)
            loaded = cpu_table.load()
            kept = [entry for entry in (loaded[1]["symmetric"] if loaded else []) if entry[1] != threads]
            date = datetime.now(UTC).date().isoformat()
            header = {"processor": processor.processor_kind(), "torch": torch.__version__, "date": date}
            path = cpu_table.save(header | {"symmetric": kept + measured})
    finally:
        torch.set_num_threads(all_threads)
    return f"{path}, measured in {time.perf_counter() - begin:.0f} s"


def _measure(threads: int) -> list[list[Any]]:
    """The entries of a number of threads."""
    measured: list[list[Any]] = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for n, k in SIZES:
            if n * n * k <= _MOST[dtype] and symmetric_cpu.computed_in(dtype) == dtype:
                chosen = measure_symmetric(dtype, n, k)
                measured.append([name, threads, n, k, *chosen])
                way = f"{chosen.library}, {chosen.rows or 'all'} rows at a time"
                print(f"{name}, threads: {threads}, {n}x{k}: {way}, {chosen.gain:.2f}×")
    return measured
