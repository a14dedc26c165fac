# SPDX-License-Identifier: MIT
"""Rungs and workloads of the ladder, and the rows that measuring them gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from benchmarks.compare import Work
from benchmarks.results import Result
from benchmarks.timing import CPU, Ceiling, Turn, take_turns

ROUNDS = 20


@dataclass(frozen=True)
class Rung:
    """One way to do a workload.

    Attributes:
        turn: times it and checks the result. Its seconds are of the whole workload.
        note: printed beside the name.
        covered: the part of the workload that is done in all; the time is extrapolated from less than 1.
        compiles: whether the row shows the time of the warm-up.
        device: where the work is done.
        intensity: floating-point operations that the workload needs, for each byte that this way loads.
        figures: returns further columns of its row, measured after the turns.
    """

    name: str
    turn: Turn
    note: str = ""
    covered: float = 1.0
    compiles: bool = False
    device: torch.device = CPU
    intensity: float | None = None
    figures: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Workload:
    """The work of some rungs, the first of which is pure Python.

    Attributes:
        work: the least that it takes.
        unit: of its rate.
        seconds: of a rung's turns, after which it has no more.
    """

    name: str
    work: Work
    unit: Literal["GB/s", "GFLOP/s"]
    rungs: Sequence[Rung]
    seconds: float


def measure(workload: Workload, ceilings: Mapping[str, Ceiling], rounds: int = ROUNDS) -> list[Result]:
    """A row for each rung, timed in turn.

    Args:
        ceilings: of each type of device.
        rounds: the most turns of a rung.
    """
    rungs = {(rung.name, rung.note): rung for rung in workload.rungs}
    turns = {key: rung.turn for key, rung in rungs.items()}
    times = take_turns(turns, rounds, seconds=workload.seconds, label=workload.name)
    rows: list[Result] = []
    moves_bytes = workload.unit == "GB/s"
    for key, rung in rungs.items():
        row = times[key].row({"workload": workload.name}, rung.name)
        found: dict[str, Any] = {"note": rung.note}
        if row.p50_ms:
            rate = (workload.work.bytes if moves_bytes else workload.work.flops) / row.p50_ms * 1e3
            ceiling = ceilings[rung.device.type]
            most = ceiling.bandwidth if moves_bytes else ceiling.matmul[torch.float32]
            found |= {"over_pure_python": _ratio(rows[0] if rows else row, row)}
            found |= {"over_rung_before": _ratio(rows[-1], row) if rows else None}
            found |= {"gb_per_s" if moves_bytes else "gflop_per_s": rate / 1e9, "of_ceiling": rate / most}
            found |= {"covered": rung.covered}
        found |= {"first_s": times[key].first if rung.compiles else None, "intensity": rung.intensity}
        rows.append(replace(row, found=found))
    return rows


def _ratio(slower: Result, row: Result) -> float | None:
    return slower.p50_ms / row.p50_ms if slower.p50_ms and row.p50_ms else None


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
