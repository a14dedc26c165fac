# SPDX-License-Identifier: MIT
"""Trace of some training steps by `torch.profiler`, and the bottleneck that it shows.

Each moment of a step belongs to one kind of work:

- arithmetic: a matrix product runs;
- memory: another operator runs, which moves more numbers than it computes;
- communication: no such operator runs, and a message is under way;
- calls: none of these; Python, autograd, views and launches take the time.

On the CPU the operators are those that PyTorch calls, on CUDA the kernels that they launch.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch.profiler import ProfilerActivity, record_function, schedule

from torchpar.errors import ConfigError
from torchpar.profile.collectives import SHARED

T = TypeVar("T")
Kind = Literal["arithmetic", "memory", "communication", "calls"]
KINDS: tuple[Kind, ...] = get_args(Kind)
STEP = "training step"  # its name in the trace
BETWEEN = "between operators"
SKIP = 3  # steps before the traced ones: two in which DistributedDataParallel sets itself up, one warms up

_OPERATOR = re.compile(r"\w+::\w+|## Call CompiledFxGraph .*")
_PRODUCT = re.compile(
    r"aten::(linear|matmul|\w*mm)|mkldnn::_linear_pointwise|torchpar::(linear_sigmoid|\w*matmul\w*)"
)
_VIEW = re.compile(
    r"aten::(empty\w*|\w*view\w*|as_strided|\w*transpose|t|numpy_T|permute|narrow|slice|select|split\w*|chunk"
    r"|expand\w*|reshape|flatten|detach|alias|(un)?squeeze|to|result_type|lift_fresh|resolve_\w+)_?"
)
_COMPILED = re.compile(r"## Call (CompiledFxGraph) .*")
# A send counts as under way until its sender waits for it, which may be long after its arrival.
_MESSAGE = re.compile(r"c10d::|shared_memory:|gloo:(?!send)|nccl")
Span = tuple[float, float, int, str, Kind]  # start, end, priority, name, kind


@dataclass(frozen=True)
class Row:
    """An operator, kernel or message of a step: its calls, and the seconds attributed to it alone."""

    name: str
    kind: Kind
    calls: float
    seconds: float


@dataclass(frozen=True)
class StepProfile:
    """The mean of a rank's traced steps.

    Attributes:
        rank: of the process.
        steps: how many were traced.
        rows: the longest first; their seconds add up to the step's.
        flops: floating-point operations of the matrix products.
    """

    rank: int
    steps: int
    rows: list[Row]
    flops: float

    def seconds(self, *kinds: Kind) -> float:
        return sum(row.seconds for row in self.rows if row.kind in kinds)


class Trace:
    """Trace of ``steps`` steps after the first `SKIP`, or of fewer in a short run.

    Args:
        folder: for the file rank-<rank>.json.gz, in Chrome's format, which Perfetto opens.

    Attributes:
        profiler: a context, in which the steps are taken.
    """

    def __init__(self, folder: Path, rank: int, device: torch.device, steps: int = 10):
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it logs each start and end to stderr
        self._path, self._rank, self._ended = folder / f"rank-{rank}.json.gz", rank, 0
        self._result: StepProfile | None = None
        self._error: ConfigError | None = None
        self.profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda"),
            schedule=schedule(wait=SKIP - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._save,
            record_shapes=True,
            with_flops=True,
        )

    def steps(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield ``batches``. A step lasts from the request for its batch until the next request."""
        while True:
            with record_function(STEP):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                yield batch
            self._ended += 1
            self.profiler.step()

    def result(self) -> StepProfile | None:
        """Return the mean of the traced steps, once the profiler's context has ended; None if there are none.

        Raises:
            ConfigError: the file could not be written.
        """
        if self._error:
            raise self._error
        return self._result

    def _save(self, profiler: torch.profiler.profile) -> None:
        if self._ended <= SKIP:
            return
        self._result = summarize(self._rank, self._ended - SKIP, profiler.events())
        try:
            profiler.export_chrome_trace(str(self._path))
        except OSError as e:  # the training goes on
            self._error = ConfigError(f"{self._path} cannot be written: {e}")


def summarize(rank: int, steps: int, events: Iterable[Any]) -> StepProfile:
    """Return the mean of ``steps`` steps from a profiler's `torch.autograd.profiler_util.FunctionEvent`."""
    events = list(events)
    steps_on_host = [e for e in events if e.name == STEP and e.device_type.name == "CPU"]
    windows = [(e.time_range.start, e.time_range.end) for e in steps_on_host]
    events = [
        e
        for e in events
        if e.name != STEP and any(start <= e.time_range.start < end for start, end in windows)
    ]
    host = [e for e in events if e.device_type.name == "CPU"]
    # The profiler repeats `record_function` ranges, such as a step, on the device.
    kernels = [e for e in events if e.device_type.name != "CPU" and not e.is_user_annotation]
    operators = [e for e in host if not e.is_async and _OPERATOR.fullmatch(e.name)]
    launched = {kernel.name: _kind(e.name) for e in operators for kernel in e.kernels}

    spans: list[Span] = [(*window, 0, BETWEEN, "calls") for window in windows]
    spans += [
        (e.time_range.start, e.time_range.end, 1, e.name, "communication")
        for e in host + kernels
        if _MESSAGE.match(e.name)
    ]
    for e in kernels or operators:
        # On the CPU this package's operators only call other operators, which are counted.
        if not _MESSAGE.match(e.name) and not e.name.startswith("torchpar::"):
            name, kind = _COMPILED.sub(r"\1", e.name), launched.get(e.name, _kind(e.name))
            spans.append((e.time_range.start, e.time_range.end, 2, name, kind))
    seconds = _attribute(spans)
    calls = Counter((name, kind) for *_, name, kind in spans)
    calls[BETWEEN, "calls"] = 0
    rows = [Row(*key, calls[key] / steps, seconds[key] / 1e6 / steps) for key in calls]
    flops = sum(map(_flops, operators)) / steps
    return StepProfile(rank, steps, sorted(rows, key=lambda row: -row.seconds), flops)


def bottleneck(profiles: Sequence[StepProfile]) -> str:
    """Return a sentence on the kind of work that takes most of a step of the slowest rank.

    Ranks take a step together, and the slowest is the one that waits least for messages.
    """
    slowest = min(profiles, key=lambda p: p.seconds("communication"))
    total, kind = slowest.seconds(*KINDS), max(KINDS, key=slowest.seconds)
    seconds = slowest.seconds(kind)
    calls = sum(row.calls for row in slowest.rows if row.kind != "communication")
    messages = sum(row.calls for row in slowest.rows if row.name.startswith(("c10d::", SHARED)))
    of_memory = next((row.name for row in slowest.rows if row.kind == "memory"), "")
    reason = {
        "arithmetic": f"is matrix products, at {slowest.flops / seconds / 1e9:.3g} GFLOP/s; "
        "faster products or more cores gain most",
        "memory": f"is operators that move memory, {of_memory} most of all; fusing operators gains most",
        "communication": "passes while messages are under way and no operator runs, "
        f"{messages:.0f} messages a step; larger batches or fewer ranks gain most",
        "calls": f"is spent between operators, in Python, autograd and launches, {calls:.0f} calls a step; "
        "larger batches or fewer operators gain most",
    }[kind]
    rank = f" on rank {slowest.rank}, which waits least," if len(profiles) > 1 else ""
    share = f"{seconds / total:.0%} of a profiled step of {1000 * total:.2f} ms{rank}"
    return f"bottleneck: {kind} — {share} {reason}"


def _attribute(spans: Iterable[Span]) -> dict[tuple[str, Kind], float]:
    """Time by name: each moment belongs to the open span of highest priority; of equals, to the latest."""
    ahead = sorted(spans, reverse=True)
    times: dict[tuple[str, Kind], float] = defaultdict(float)
    opened: list[tuple[int, float, float, str, Kind]] = []
    for now, then in pairwise(sorted({t for span in ahead for t in span[:2]})):
        while ahead and ahead[-1][0] <= now:
            start, end, priority, name, kind = ahead.pop()
            heappush(opened, (-priority, -start, end, name, kind))
        while opened and opened[0][2] <= now:
            heappop(opened)
        if opened:
            times[opened[0][3:]] += then - now
    return times


def _kind(operator: str) -> Kind:
    if _PRODUCT.fullmatch(operator):
        return "arithmetic"
    return "calls" if _VIEW.fullmatch(operator) else "memory"


def _flops(event: Any) -> float:
    """The floating-point operations of a product; those that PyTorch does not count, by their shapes."""
    if not _PRODUCT.fullmatch(event.name):
        return 0.0
    matrices = [shape for shape in event.input_shapes if len(shape) > 1]
    if event.name.startswith("torchpar::") and not event.kernels:
        return 0.0  # it calls other products, or none
    if event.name in ("mkldnn::_linear_pointwise", "torchpar::linear_sigmoid"):
        return float(2 * prod(matrices[0][:-1]) * prod(matrices[-1]))  # of input and weight
    if event.name.startswith("torchpar::"):
        return float(prod(matrices[0]) * matrices[0][-2])  # half of a symmetric product
    return float(event.flops or 0)
