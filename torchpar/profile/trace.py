# SPDX-License-Identifier: MIT
"""Trace of some training steps by `torch.profiler`, and the kind of work that takes most of a step.

Each moment of a step belongs to one kind of work:

- arithmetic: a matrix product runs;
- memory: another operator runs, which moves more numbers than it computes;
- communication: no such operator runs, and a message is under way;
- calls: none of these; Python, autograd, views and launches take the time.

On the CPU the operators are those that PyTorch calls, on CUDA the kernels that they launch.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, record_function, schedule

from torchpar.errors import ConfigError

T = TypeVar("T")
STEP = "training step"  # its name in the trace
SKIP = 3  # steps before the traced ones: two in which DistributedDataParallel sets itself up, one warms up
ADVICE = {
    "arithmetic": "faster products or more cores gain most",
    "memory": "fusing operators gains most",
    "communication": "larger batches or fewer ranks gain most",
    "calls": "larger batches or fewer operators gain most",
}

_OPERATOR = re.compile(r"\w+::\w+|## Call CompiledFxGraph .*")
_PRODUCT = re.compile(
    r"aten::(linear|matmul|\w*mm)|mkldnn::_linear_pointwise|torchpar::(linear_sigmoid|\w*matmul\w*)"
)
_VIEW = re.compile(
    r"aten::(empty\w*|\w*view\w*|as_strided|\w*transpose|t|numpy_T|permute|narrow|slice|select|split\w*|chunk"
    r"|expand\w*|reshape|flatten|detach|alias|(un)?squeeze|to|result_type|lift_fresh|resolve_\w+)_?"
)
# A send counts as under way until its sender waits for it, which may be long after its arrival.
_MESSAGE = re.compile(r"c10d::|shared_memory:|gloo:(?!send)|nccl")


class Trace:
    """Trace of ``steps`` steps after the first `SKIP`, or of fewer in a short run.

    Args:
        folder: for the file rank-<rank>.json.gz, in Chrome's format, which Perfetto opens.

    Attributes:
        profiler: a context, in which the steps are taken.
    """

    def __init__(self, folder: Path, rank: int, device: torch.device, steps: int = 10):
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it logs each start and end to stderr
        self._path = folder / f"rank-{rank}.json.gz"
        self._on_gpu, self._steps, self._ended = device.type == "cuda", steps, 0
        self.profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu,
            schedule=schedule(wait=SKIP - 1, warmup=1, active=steps, repeat=1),
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

    def save(self) -> dict[str, float]:
        """Write the trace, once the profiler's context has ended, unless the run was short.

        Returns:
            The seconds of each kind of work in a step; they add up to it. {} if no step was traced.

        Raises:
            ConfigError: the file could not be written.
        """
        if self._ended <= SKIP:
            return {}
        try:
            self.profiler.export_chrome_trace(str(self._path))
        except OSError as e:
            raise ConfigError(f"{self._path} cannot be written: {e}") from e
        seconds = seconds_by_kind(self.profiler.events())
        return {kind: total / self._traced for kind, total in seconds.items()}

    def __str__(self) -> str:
        """A table of the costliest operators, by `torch.profiler`."""
        by = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        table = self.profiler.key_averages().table(by, row_limit=10, max_name_column_width=40)
        return f"costliest operators of {self._traced} steps\n{table}"

    @property
    def _traced(self) -> int:
        return min(self._ended - SKIP, self._steps)


def seconds_by_kind(events: Iterable[Any]) -> dict[str, float]:
    """Return the seconds of each kind of work in the steps among a profiler's events.

    Each moment belongs to an operator that runs, else to a message, else to "calls"; of operators that call
    each other, to the innermost.

    Args:
        events: `torch.autograd.profiler_util.FunctionEvent`.
    """
    events = list(events)
    host = [e for e in events if e.device_type.name == "CPU"]
    # The profiler repeats `record_function` ranges, such as a step, on the device.
    kernels = [e for e in events if e.device_type.name != "CPU" and not e.is_user_annotation]
    operators = [e for e in host if not e.is_async and _OPERATOR.fullmatch(e.name)]
    launched = {kernel.name: _kind(e.name) for e in operators for kernel in e.kernels}

    def span(e: Any, priority: int, kind: str) -> tuple[float, float, int, str]:
        return e.time_range.start, e.time_range.end, priority, kind

    spans = [span(e, 0, "calls") for e in host if e.name == STEP]
    spans += [span(e, 1, "communication") for e in host + kernels if _MESSAGE.match(e.name)]
    spans += [
        span(e, 2, launched.get(e.name, _kind(e.name)))
        for e in kernels or operators
        # On the CPU this package's operators only call other operators, which are counted.
        if not _MESSAGE.match(e.name) and not e.name.startswith("torchpar::")
    ]
    seconds = dict.fromkeys(ADVICE, 0.0)
    ahead = sorted(spans, reverse=True)
    running: list[tuple[float, float, int, str]] = []
    for now, then in pairwise(sorted({t for span in spans for t in span[:2]})):
        while ahead and ahead[-1][0] <= now:
            running.append(ahead.pop())
        running = [span for span in running if span[1] > now]
        if any(span[2] == 0 for span in running):  # within a step
            *_, kind = max(running, key=lambda span: (span[2], span[0]))
            seconds[kind] += (then - now) / 1e6
    return seconds


def bottleneck(ranks: Sequence[dict[str, float]]) -> str:
    """Return a sentence on the kind of work that takes most of a step of the slowest rank.

    Ranks take a step together, and the slowest is the one that waits least for messages.

    Args:
        ranks: for each rank, the seconds of each kind in a step.
    """
    slowest, seconds = min(enumerate(ranks), key=lambda item: item[1]["communication"])
    total, kind = sum(seconds.values()), max(seconds, key=seconds.__getitem__)
    rank = f" on rank {slowest}, which waits least" if len(ranks) > 1 else ""
    share = f"{seconds[kind] / total:.0%} of a profiled step of {1000 * total:.2f} ms{rank}"
    return f"bottleneck: {kind} — {share}; {ADVICE[kind]}"


def _kind(operator: str) -> str:
    if _PRODUCT.fullmatch(operator):
        return "arithmetic"
    return "calls" if _VIEW.fullmatch(operator) else "memory"
