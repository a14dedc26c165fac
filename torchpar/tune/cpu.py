# SPDX-License-Identifier: MIT
"""Measure the products of this processor, for the table in `torchpar.ops.cpu_table`, in about a minute."""

import time
from datetime import UTC, datetime
from functools import partial

import torch
from torch import Tensor

from torchpar.ops import cpu_table, processor, symmetric_cpu
from torchpar.ops.cpu_table import Choice
from torchpar.tune.measure import Call, Reference, check, print_times, reference, take_turns

PLAIN = "torch.mm"
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SIZES = (
    *((n, n) for n in (128, 192, 256, 384, 512, 768, 1024, 2048)),
    *((128, 2048), (256, 4096), (512, 1024), (512, 4096), (1024, 4096)),
    *((512, 64), (2048, 128)),
)
_MOST = {torch.float32: 2**33, torch.float64: 2**30, torch.bfloat16: 2**33}  # multiplications of a problem
_ROUND_SECONDS = 0.007
_EVICTING = torch.empty(2**26, dtype=torch.uint8)  # more than the caches of a core hold
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


def time_warm(call: Call) -> float:
    """The mean seconds of calls that follow one another."""
    count, begin = 0, time.perf_counter()
    while (taken := time.perf_counter() - begin) < _ROUND_SECONDS or count == 0:
        call()
        count += 1
    return taken / count


def time_cold(call: Call) -> float:
    """The seconds of a call with emptied caches."""
    _EVICTING.zero_()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def x_xt(x: Tensor) -> Reference:
    """The reference of X·Xᵀ."""
    return reference(x.double() @ x.double().T, x @ x.T, x.shape[1])


def measure_symmetric(dtype: torch.dtype, n: int, k: int) -> Choice:
    """The fastest way to X·Xᵀ for X ``(n, k)``, each of which must be right beside float64.

    With emptied caches it is no slower than the first one, the whole product: a call of many small steps
    gains in a loop, and loses between other work.
    """
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(dtype)
    expected = x_xt(x)
    calls = {way: partial(symmetric_cpu.symmetric_product, x, x, chosen=way) for way in candidates(dtype, n)}
    for way, call in calls.items():
        check(call(), expected, describe(way))
    whole = next(iter(calls))
    if n < _COLD_BELOW:
        cold = take_turns(calls, time_cold)
        calls = {way: call for way, call in calls.items() if cold[way] <= _MARGIN * cold[whole]}
    times = take_turns({PLAIN: partial(torch.mm, x, x.t()), **calls}, time_warm)
    print_times(f"{dtype} {n}x{k}, threads: {torch.get_num_threads()}", times, describe)
    best = whole
    for way in calls:
        if times[way] * _MARGIN < times[best]:
            best = way
    return best._replace(gain=round(times[PLAIN] / times[best], 3))


def tune() -> str:
    """Measure this processor with one and with all threads, and return what is printed.

    The table is saved after each number of threads, and keeps its entries of other ones.
    """
    all_threads, begin = torch.get_num_threads(), time.perf_counter()
    try:
        for threads in sorted({1, all_threads}):
            torch.set_num_threads(threads)
            measured = [
                [str(dtype).removeprefix("torch."), threads, n, k, *measure_symmetric(dtype, n, k)]
                for dtype in DTYPES
                for n, k in SIZES
                if n * n * k <= _MOST[dtype] and symmetric_cpu.computed_in(dtype) == dtype
            ]
            loaded = cpu_table.load()
            kept = [entry for entry in (loaded[1]["symmetric"] if loaded else []) if entry[1] != threads]
            date = datetime.now(UTC).date().isoformat()
            header = {"processor": processor.processor_kind(), "torch": torch.__version__, "date": date}
            path = cpu_table.save(header | {"symmetric": kept + measured})
    finally:
        torch.set_num_threads(all_threads)
    return f"{path}, measured in {time.perf_counter() - begin:.0f} s"


def describe(way: Choice | str) -> str:
    return way if isinstance(way, str) else f"{way.library} by {way.rows or 'all'} rows"
