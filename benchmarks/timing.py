# SPDX-License-Identifier: MIT
"""Times one call of one provider so that only work which the call did can pass for its result.

- The call's inputs are NaN until shortly before it, so that what a provider computes before its turn
  is NaN.
- Memory freed before the call holds NaN, and so does every earlier result, so that what a provider
  leaves unwritten is NaN.
- The result is copied right behind the call, in stream order, so that what is unfinished when the
  clock stops is unfinished in the copy.
- Inputs must come out as they went in, and share no memory with the result.

Caches are flushed first. On a GPU the time lies between two CUDA events in a queue that does not run
dry, so that it holds no launch overhead; the host's time to issue the call is a number of its own.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

Provider = Callable[..., Tensor]
Mode = Literal["forward", "backward", "full"]


class Rejected(Exception):
    """A provider's result cannot be what it is taken for."""


class Sample(NamedTuple):
    """Milliseconds of a call. On a CPU the host's time is the time, and memory is not measured."""

    ms: float
    host_ms: float | None
    peak_memory_mb: float | None


def prepare(provider: Provider, inputs: Sequence[Tensor], mode: Mode) -> Callable[[], Sequence[Tensor]]:
    """The call to time on ``inputs``: arguments, then a gradient. What comes before it is done here."""
    *arguments, gradient = inputs
    if mode == "forward":
        return lambda: [provider(*arguments)]
    if mode == "full":
        return lambda: torch.autograd.grad(provider(*arguments), arguments, gradient)
    result = provider(*arguments)
    return lambda: torch.autograd.grad(result, arguments, gradient)


def time_call(
    provider: Provider,
    live: Sequence[Tensor],
    drawn: Sequence[Tensor],
    expected: Sequence[Tensor],
    mode: Mode,
    repeat: int = 1,
) -> tuple[Sample, list[Tensor]]:
    """Time ``repeat`` calls on ``live``, which holds ``drawn`` meanwhile.

    Args:
        expected: tensors of the shapes and device of the results, which are of ``live``'s dtype.

    Returns:
        Times of one call, and a copy of the last results.

    Raises:
        Rejected: a result of another kind, or memory that a provider must not touch.
    """
    device, dtype = live[0].device, live[0].dtype
    on_gpu = device.type == "cuda"
    if on_gpu:
        flush(device)  # what does not wait for the current stream will find the inputs still NaN
    with torch.no_grad():
        for t, value in zip(live, drawn, strict=True):
            t.copy_(value)
    call = prepare(provider, live, mode)
    poison = [torch.full_like(t, math.nan, dtype=dtype) for t in (*expected, *live)]
    del poison
    flush(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
    start = time.perf_counter()
    for _ in range(repeat):
        results = call()
    host_ms = (time.perf_counter() - start) * 1e3 / repeat
    if on_gpu:
        end.record()
        peak_memory_mb = (torch.cuda.max_memory_allocated(device) - allocated) / 1e6
    copies = [result.detach().clone() for result in results]
    _check_memory(results, live, drawn, expected)
    with torch.no_grad():
        for t in (*live, *results):
            t.fill_(math.nan)
    if not on_gpu:
        return Sample(host_ms, None, None), copies
    end.synchronize()
    return Sample(begin.elapsed_time(end) / repeat, host_ms, peak_memory_mb), copies


def _check_memory(
    results: Sequence[Tensor], live: Sequence[Tensor], drawn: Sequence[Tensor], expected: Sequence[Tensor]
) -> None:
    inputs = {t.untyped_storage().data_ptr() for t in live}
    for result, t in zip(results, expected, strict=True):
        if (result.shape, result.dtype, result.device) != (t.shape, live[0].dtype, t.device):
            raise Rejected(f"a result is {result.dtype} {tuple(result.shape)} on {result.device}")
        if result.untyped_storage().data_ptr() in inputs:
            raise Rejected("a result shares memory with an input")
    if not all(torch.equal(t, value) for t, value in zip(live, drawn, strict=True)):
        raise Rejected("an input was changed")


@cache
def _scratch(device: torch.device) -> Tensor:
    on_gpu = device.type == "cuda"
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 128 * 2**20
    return torch.empty(size, dtype=torch.int8, device=device)


def flush(device: torch.device) -> None:
    """Evict what caches hold; on a GPU also give the host about a millisecond to fill the queue."""
    for _ in range(16 if device.type == "cuda" else 1):
        _scratch(device).zero_()


class Ceiling(NamedTuple):
    """What the machine does at best: bytes/s of a copy, and flop/s of a matrix product in each dtype."""

    bandwidth: float
    matmul: Mapping[torch.dtype, float]

    def describe(self, dtype: torch.dtype) -> str:
        return f"ceiling {self.bandwidth / 1e9:.1f} GB/s {self.matmul[dtype] / 1e12:.3f} TFLOP/s"


def measure_ceiling(device: torch.device, dtypes: Sequence[torch.dtype]) -> Ceiling:
    """Measure a large copy (bytes read and bytes written), and a large product in each dtype."""
    size, n = (2**30, 8192) if device.type == "cuda" else (2**27, 1024)

    def seconds(call: Callable[..., Any], *args: Tensor) -> float:
        timer = Timer(
            "call(*args)", globals={"call": call, "args": args}, num_threads=torch.get_num_threads()
        )
        return timer.blocked_autorange(min_run_time=0.3).median

    source, target = (torch.ones(size, dtype=torch.int8, device=device) for _ in range(2))
    matmul = {}
    for dtype in dtypes:
        x = torch.randn(n, n, device=device).to(dtype)
        matmul[dtype] = 2 * n**3 / seconds(torch.mm, x, x)
    return Ceiling(2 * size / seconds(torch.Tensor.copy_, target, source), matmul)
