# SPDX-License-Identifier: MIT
"""Compares providers of one operator: each call is checked (see `benchmarks.timing`), and timed, in turn.

The result of every timed call is compared with an oracle in float64. A provider's largest error may be
twice its yardstick's, in the same dtype on the same inputs: that of the reference provider, or of another
that is named. Inputs are new in every round, so that what a provider kept from an earlier call is wrong.
Providers take turns within a round, so that what disturbs the machine disturbs all of them.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import Row, clocks, environment
from benchmarks.timing import Ceiling, Mode, Provider, Rejected, Sample, prepare, time_call

MIN_ROUNDS = 5
YARDSTICK_ERROR = 0.03  # ‖error‖/‖oracle‖: under 0.01 in correct bfloat16, over 0.3 for other inputs' result


class Work(NamedTuple):
    """The least that a call must do: bytes through memory, and floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Case:
    """An operator on inputs of one shape and dtype.

    ``inputs(seed)`` returns the operator's arguments and then the gradient of its result: new, dense,
    of ``dtype`` (floating) and on ``device``. ``oracle`` computes the operator in float64.
    """

    operator: str
    shape: str
    dtype: torch.dtype
    device: torch.device
    inputs: Callable[[int], Sequence[Tensor]]
    oracle: Provider
    forward: Work
    backward: Work

    def work(self, mode: Mode) -> Work:
        full = Work(self.forward.bytes + self.backward.bytes, self.forward.flops + self.backward.flops)
        return {"forward": self.forward, "backward": self.backward, "full": full}[mode]


def measure(
    case: Case,
    providers: Mapping[str, Provider],
    *,
    reference: str,
    yardsticks: Mapping[str, str] = MappingProxyType({}),
    mode: Mode = "forward",
    rounds: int = 20,
    seconds: float = math.inf,
    repeat: int = 1,
    ceiling: Ceiling | None = None,
) -> list[Row]:
    """Check and time ``providers``: a row for each. A row that is not ok says why, and has no times.

    Args:
        reference: the provider that times are compared with, and errors.
        yardsticks: whose error a provider's is compared with, where that is not the reference. One that
            is its own yardstick need only compute what the oracle does.
        mode: "forward" (graph recorded, as in training), "backward" (gradients of all arguments), or
            "full" (both).
        rounds: timed calls of each provider; one more comes first, checked and not timed.
        seconds: begin no round after so long, once there were `MIN_ROUNDS`.
        repeat: calls in a sample; more than one is for the cost of small calls. Not for "backward".
    """
    live = [t.detach().fill_(math.nan).requires_grad_() for t in case.inputs(0)]
    work = case.work(mode)
    samples: dict[str, list[Sample]] = {name: [] for name in providers}
    errors: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    oracle_error = torch.zeros(())
    start = time.perf_counter()
    for index in range(1 + rounds):
        if index > MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        drawn = _inputs(case, index)
        expected = [t.detach() for t in prepare(case.oracle, [_leaf(t.double()) for t in drawn], mode)()]
        oracle_error = _oracle_error(expected, work).maximum(oracle_error)
        for name in [name for name in providers if name not in reasons]:
            try:
                sample, results = time_call(providers[name], live, drawn, expected, mode, repeat)
                differences = [result.double() - t for result, t in zip(results, expected, strict=True)]
                if yardsticks.get(name, reference) == name:
                    _check_yardstick(differences, expected)
            except Exception as error:
                reasons[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
                continue
            largest = _largest(differences)
            errors[name] = largest.maximum(errors.get(name, largest))
            samples[name].append(sample)
    for name in errors.keys() - reasons.keys():
        yardstick = yardsticks.get(name, reference)
        if failed := reasons.keys() & {reference, yardstick}:
            reasons[name] = f"nothing to compare with: {', '.join(failed)} failed"
        # The yardstick may be off by oracle_error more than it seems to, and the provider by less.
        elif not (errors[name] <= 2 * (errors[yardstick] + oracle_error) + oracle_error).all():
            reasons[name] = f"errors {errors[name].tolist()}, {yardstick}'s are {errors[yardstick].tolist()}"
    configuration = [
        f"{max(map(len, samples.values())) - 1} rounds of {repeat} calls",
        f"{torch.get_num_threads()} threads",
        f"float32 products {torch.backends.cuda.matmul.fp32_precision}",
    ]
    if ceiling is not None:
        configuration.append(ceiling.describe(case.dtype))
    common: dict[str, Any] = {
        "operator": case.operator,
        "mode": mode,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "configuration": ", ".join(configuration),
        "clocks": clocks(case.device),
        **environment(case.device),
    }
    rows = []
    for name in providers:
        reason = reasons.get(name, "")
        max_error = errors[name].max().item() if name in errors else None
        times = {} if reason else _times(samples[name][1:], samples[reference][1:], work, ceiling, case.dtype)
        rows.append(Row(**common, **times, provider=name, max_error=max_error, ok=not reason, reason=reason))
    return rows


def _inputs(case: Case, seed: int) -> list[Tensor]:
    *arguments, gradient = case.inputs(seed)
    return [*map(_leaf, arguments), gradient]


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def _check_yardstick(differences: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for difference, t in zip(differences, expected, strict=True):
        if not difference.norm() <= YARDSTICK_ERROR * t.norm():
            raise Rejected("the result is not what the oracle computes")


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.abs().max() for t in tensors]).cpu()


def _oracle_error(expected: Sequence[Tensor], work: Work) -> Tensor:
    """What the oracle itself may be off by: a rounding per operation on an element, of random signs.

    It counts in float64 alone, where a yardstick may round exactly as the oracle does.
    """
    roundings = work.flops / sum(t.numel() for t in expected)
    return _largest(expected) * (math.sqrt(roundings) * torch.finfo(torch.float64).eps / 2)


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    p20, p50, p80 = np.quantile(samples, [0.2, 0.5, 0.8]).tolist()
    return p20, p50, p80


def _times(
    samples: Sequence[Sample],
    reference: Sequence[Sample],
    work: Work,
    ceiling: Ceiling | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    p20, p50, p80 = percentiles([sample.ms for sample in samples])
    hosts = [sample.host_ms for sample in samples if sample.host_ms is not None]
    peaks = [sample.peak_memory_mb for sample in samples if sample.peak_memory_mb is not None]
    roofline = None
    if ceiling is not None:
        roofline = max(work.bytes / ceiling.bandwidth, work.flops / ceiling.matmul[dtype]) / (p50 * 1e-3)
    return {
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "host_ms": percentiles(hosts)[1] if hosts else None,
        "speedup": percentiles([r.ms / s.ms for r, s in zip(reference, samples, strict=True)])[1],
        "gb_per_s": work.bytes / p50 * 1e-6,
        "tflop_per_s": work.flops / p50 * 1e-9,
        "roofline": roofline,
        "peak_memory_mb": max(peaks, default=None),
    }
