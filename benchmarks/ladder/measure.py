# SPDX-License-Identifier: MIT
"""Times the rungs of a workload in turn: rows of the table and of the CSV."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, NamedTuple

import torch

from benchmarks.harness import Work
from benchmarks.timing import Ceiling

CPU = torch.device("cpu")
Unit = Literal["GB/s", "GFLOP/s"]


class Sample(NamedTuple):
    """Seconds of one call, which did ``part`` of the workload; ``covered`` of it has been done by now."""

    seconds: float
    part: float = 1.0
    covered: float = 1.0


@dataclass(frozen=True)
class Rung:
    """One way to do a workload.

    Attributes:
        sample: does it once, or its next part, and checks the result; None once nothing is left to do.
            It raises `benchmarks.timing.Rejected` if the result is wrong.
        warm: comes before the first sample, and compiles what is compiled; a sample by default.
        note: what the row says beside the name.
        compiles: report the time of ``warm``.
        device: where the work is done.
        intensity: floating-point operations that the workload needs, for each byte that this way loads.
    """

    name: str
    sample: Callable[[], Sample | None]
    warm: Callable[[], object] | None = None
    note: str = ""
    compiles: bool = False
    device: torch.device = CPU
    intensity: float | None = None


@dataclass(frozen=True)
class Workload:
    """What all rungs do.

    Attributes:
        work: the least that it takes.
        unit: in which its speed is told.
        seconds: of samples, after which a rung has no more.
    """

    name: str
    work: Work
    unit: Unit
    rungs: Sequence[Rung]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table and of the CSV. None is what was not measured, or is not believed.

    Attributes:
        seconds: of the whole workload: the median over the samples, each divided by its part.
        covered: how much of the workload was done; less than 1 where ``seconds`` is extrapolated.
        first_call: seconds that came before, with all that is compiled.
        over_pure_python, over_row_above: the other row's seconds over these.
        ceiling: the rate over the machine's copy (GB/s) or its matrix product in float32 (GFLOP/s).
    """

    workload: str
    rung: str
    note: str
    seconds: float | None = None
    covered: float | None = None
    samples: int = 0
    first_call: float | None = None
    over_pure_python: float | None = None
    over_row_above: float | None = None
    rate: float | None = None
    unit: str
    ceiling: float | None = None
    intensity: float | None = None
    ok: bool
    reason: str


@dataclass
class _Timed:
    rung: Rung
    samples: list[Sample] = field(default_factory=list)
    first_call: float | None = None
    reason: str = ""

    def seconds(self) -> float | None:
        if self.reason or not self.samples:
            return None
        return median(sample.seconds / sample.part for sample in self.samples)


def measure(
    workload: Workload,
    ceilings: Mapping[str, Ceiling],
    rounds: int,
    on_round: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Warm up every rung, then take a sample of each in turn: a row for each, in their order.

    Args:
        ceilings: of each type of device.
        rounds: the most samples of a rung.
        on_round: called after each round.
    """
    timed = [_Timed(rung) for rung in workload.rungs]
    for one in timed:
        start = time.perf_counter()
        _try(one, one.rung.warm or one.rung.sample)
        if one.rung.compiles:
            one.first_call = time.perf_counter() - start
    going = [one for one in timed if not one.reason]
    for _ in range(rounds):
        for one in list(going):
            sample = _try(one, one.rung.sample)
            if isinstance(sample, Sample):
                one.samples.append(sample)
            spent = sum(sample.seconds for sample in one.samples)
            if sample is None or spent > workload.seconds:
                going.remove(one)
        on_round()
    for one in timed:
        if not one.samples and not one.reason:
            one.reason = "there was nothing to measure"
    return _rows(workload, timed, ceilings)


def _try(one: _Timed, call: Callable[[], object]) -> object:
    try:
        return call()
    except Exception as error:
        one.reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return None


def _rows(workload: Workload, timed: Sequence[_Timed], ceilings: Mapping[str, Ceiling]) -> list[Row]:
    rows: list[Row] = []
    work = workload.work.bytes if workload.unit == "GB/s" else workload.work.flops
    for one in timed:
        seconds, rate, ceiling = one.seconds(), None, None
        if seconds is not None:
            of_device = ceilings[one.rung.device.type]
            most = of_device.bandwidth if workload.unit == "GB/s" else of_device.matmul[torch.float32]
            rate, ceiling = work / seconds / 1e9, work / seconds / most
        rows.append(
            Row(
                workload=workload.name,
                rung=one.rung.name,
                note=one.rung.note,
                seconds=seconds,
                covered=one.samples[-1].covered if one.samples else None,
                samples=len(one.samples),
                first_call=one.first_call,
                over_pure_python=_ratio(rows[0].seconds if rows else seconds, seconds),
                over_row_above=_ratio(rows[-1].seconds if rows else None, seconds),
                rate=rate,
                unit=workload.unit,
                ceiling=ceiling,
                intensity=one.rung.intensity,
                ok=not one.reason,
                reason=one.reason,
            )
        )
    return rows


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None else None
