# SPDX-License-Identifier: MIT
"""What was measured beside what was predicted, and the lines of the CSV.

The prediction is a sum, as if nothing overlapped: a rank's share of the time that one thread takes,
fitted as (a + b·batch), and its collectives (`torchpar.parallel.cost`) over a link whose α and β are
fitted to the measured all-reduces. A batch below the crossover is faster on one rank than on two.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from benchmarks.harness import percentiles
from benchmarks.scaling.plan import Configuration, Plan
from benchmarks.scaling.ranks import Prepared
from torchpar.parallel.cost import Expected, Link


class Compute(NamedTuple):
    """What one thread takes for a step: ``fixed`` seconds, and ``per_sample`` for each of the batch."""

    fixed: float
    per_sample: float

    @classmethod
    def fit(cls, points: Sequence[tuple[int, float]]) -> "Compute":
        """Of batch sizes and seconds; the squares of the relative errors are least."""
        rows = torch.tensor([[1 / s, batch / s] for batch, s in points], dtype=torch.float64)
        ones = torch.ones(len(points), 1, dtype=torch.float64)
        fixed, per_sample = torch.linalg.lstsq(rows, ones).solution.flatten().tolist()
        return cls(max(fixed, 0.0), per_sample)

    def seconds(self, batch: int) -> float:
        return self.fixed + self.per_sample * batch


def tensor_share(sizes: Sequence[int], tp: int) -> float:
    """The part of an MLP's work that is left to a rank of ``tp``: the last of an odd number of layers
    stays whole."""
    work = [a * b for a, b in pairwise(sizes)]
    whole = work[-1] if len(work) % 2 else 0
    return (whole + (sum(work) - whole) / tp) / sum(work)


def predict(one: Configuration, compute: Compute, link: Link, expected: Sequence[Expected]) -> float:
    """Seconds of a step: computing and then communicating."""
    own = compute.seconds(math.ceil(one.batch / one.dp)) * tensor_share(one.sizes, one.tp)
    return own + sum(link.seconds(e.operation, e.ranks, e.nbytes) for e in expected)


def crossover(speedups: Mapping[int, float]) -> float | None:
    """The batch from which on the speed-up is at least 1, interpolated on log-log axes.

    Returns:
        The least batch, if that is from the start; None, if the largest is not as fast.
    """
    points = sorted(speedups.items())
    if points[-1][1] < 1:
        return None
    for (b0, s0), (b1, s1) in reversed(list(pairwise(points))):
        if s0 < 1:
            return math.exp(math.log(b0) + math.log(b1 / b0) * -math.log(s0) / math.log(s1 / s0))
    return float(points[0][0])


class Steps(NamedTuple):
    """A configuration's measurement: what each rank found, and seconds of its steps, round by round."""

    prepared: list[Prepared]
    rounds: list[list[float]]

    @property
    def times(self) -> list[float]:
        return [t for block in self.rounds for t in block]

    @property
    def median(self) -> float | None:
        return median(self.times) if self.rounds else None

    @property
    def mean(self) -> float | None:
        return mean(self.times) if self.rounds else None

    @property
    def reason(self) -> str:
        return next((p.reason for p in self.prepared if p.reason), "")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the CSV: a step, or an all-reduce. None is what does not apply, or is not believed."""

    kind: str  # "step" or "all_reduce"
    sizes: str = ""
    batch: int | None = None
    ranks: int
    dp: int | None = None
    tp: int | None = None
    threads: int = 1
    reduction: str = ""
    nbytes: int | None = None
    polling: str = ""  # of gloo's thread: "batch" as join_world leaves it, "default" as gloo does
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    mean_ms: float | None = None
    speedup: float | None = None  # over one rank with one thread, median over the rounds
    mean_speedup: float | None = None  # of the means
    predicted_ms: float | None = None
    calls: int | None = None  # a rank's collectives in a step
    call_bytes: int | None = None
    error: float | None = None  # of the gradient, over the norm of the exact one
    note: str = ""
    ok: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Results:
    """Measurement and prediction side by side.

    Attributes:
        all_reduces: seconds by polling and bytes.
        expected: what rank 0 is predicted to send in the steps, and in those between.
    """

    plan: Plan
    steps: dict[Configuration, Steps]
    all_reduces: dict[tuple[str, int], list[float]]
    expected: dict[Configuration, list[Expected]]

    def fit_link(self, centre: Callable[[list[float]], float]) -> Link:
        times = {nbytes: t for (polling, nbytes), t in self.all_reduces.items() if polling == "batch"}
        return Link.fit([(2, nbytes, centre(t)) for nbytes, t in times.items()])

    @cached_property
    def link(self) -> Link:
        return self.fit_link(median)

    @cached_property
    def compute(self) -> dict[tuple[int, ...], Compute]:
        points: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        for one, steps in self.steps.items():
            if one == one.alone and steps.median:
                points.setdefault(one.sizes, []).append((one.batch, steps.median))
        return {sizes: Compute.fit(found) for sizes, found in points.items()}

    def predicted(self, one: Configuration) -> float | None:
        """Seconds of a step; None where nothing is: ranks that share cores, several threads."""
        if one.oversubscribed or one.threads > 1 or one.reduction != "fast":
            return None
        if one.sizes not in self.compute:
            return None
        return predict(one, self.compute[one.sizes], self.link, self.expected[one])

    def predicted_speedup(self, one: Configuration) -> float | None:
        seconds = self.predicted(one)
        return None if seconds is None else self.compute[one.sizes].seconds(one.batch) / seconds

    def speedup(self, one: Configuration) -> float | None:
        """Over one rank with one thread: the median over the rounds; None where it was not measured."""
        if one not in self.steps:
            return None
        rounds = zip(self.steps[one.alone].rounds, self.steps[one].rounds, strict=False)
        ratios = [median(alone) / median(mine) for alone, mine in rounds]
        return median(ratios) if ratios else None

    def mean_speedup(self, one: Configuration) -> float | None:
        mine, alone = self.steps[one].mean, self.steps[one.alone].mean
        return alone / mine if mine and alone else None

    def rows(self) -> list[Row]:
        steps = [
            Row(
                kind="step",
                sizes=one.model,
                batch=one.batch,
                ranks=one.ranks,
                dp=one.dp,
                tp=one.tp,
                threads=one.threads,
                reduction=one.reduction,
                polling="batch" if one.ranks > 1 else "",
                **_milliseconds(found.times, self.predicted(one)),
                speedup=self.speedup(one),
                mean_speedup=self.mean_speedup(one),
                calls=found.prepared[0].calls,
                call_bytes=found.prepared[0].call_bytes,
                error=max(p.error for p in found.prepared),
                note=one.note,
                ok=not found.reason,
                reason=found.reason,
            )
            for one, found in self.steps.items()
        ]
        return steps + [
            Row(
                kind="all_reduce",
                ranks=2,
                nbytes=nbytes,
                polling=polling,
                **_milliseconds(times, self.link.seconds("all_reduce", 2, nbytes)),
            )
            for (polling, nbytes), times in self.all_reduces.items()
        ]


def _milliseconds(times: Sequence[float], predicted: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"predicted_ms": None if predicted is None else 1e3 * predicted}
    if times:
        p20, p50, p80 = percentiles([1e3 * t for t in times])
        found |= {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "mean_ms": 1e3 * mean(times)}
    return found
