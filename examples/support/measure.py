# SPDX-License-Identifier: MIT
"""Median times of functions that are called in turn, and the memory that a call takes."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

from torchpar.console import say_progress

Function = Callable[[], object]
ROUNDS = 30


def interleaved_ms(functions: Mapping[str, Function], device: torch.device) -> dict[str, float]:
    """Return the median milliseconds of each function, for lessons: they are called in turn.

    The first calls are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in say_progress(range(1 + ROUNDS), "rounds of timing"):
        for name, function in functions.items():
            start = now(device)
            function()
            times[name].append(1000 * (now(device) - start))
    return {name: median(of_name[1:]) for name, of_name in times.items()}


def peak_bytes(function: Function, device: torch.device) -> int:
    """Return the most bytes that a call of ``function`` has allocated at a time, its result
    included.

    PyTorch's allocators count them: on a CPU in the trace of its profiler. What a library such as
    oneDNN allocates by itself is not counted.
    """
    function()  # what the first call alone allocates is not counted
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        del result
        return torch.cuda.max_memory_allocated(device) - before
    # Otherwise it logs each start and end to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    del result
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = [
            e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"
        ]
    current = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        current += event["args"]["Bytes"]
        peak = max(peak, current)
    return peak


def now(device: torch.device) -> float:
    """Return the seconds of a clock, once ``device`` has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
