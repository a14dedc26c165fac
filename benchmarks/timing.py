# SPDX-License-Identifier: MIT
"""The timer of all benchmarks: contestants take turns, round after round.

Turns are interleaved, so that whatever disturbs the machine disturbs all contestants alike. The
first round warms up and is not timed. A contestant that raises is out and has no times.

On a GPU the time lies between two CUDA events in a queue that does not run dry: it contains no
launch overhead. The host's time to issue the call is a number of its own.
"""

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import mean, median
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from torchpar.errors import first_line

from .results import Cells, Result, track

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")
CPU = torch.device("cpu")

# The seconds of each call made in round ``index``. Round 0 warms up.
Turn = Callable[[int], Sequence[float]]


class Contestant(NamedTuple):
    """A contestant of a case.

    Attributes:
        turn: times it and checks the result.
        note: printed beside the name.
        compiles: whether the time of the first call is shown.
    """

    name: str
    turn: Turn
    note: str = ""
    compiles: bool = False


class Rejected(Exception):
    """The result of a timed call is wrong."""


@dataclass
class Times:
    """The measurement of one contestant.

    Attributes:
        rounds: seconds of the calls of each round.
        first: seconds of the whole warm-up, compilation included.
        reason: why the times are not believed, or "".
    """

    rounds: list[list[float]] = field(default_factory=list)
    first: float = math.nan
    reason: str = ""

    @property
    def all(self) -> list[float]:
        return [seconds for calls in self.rounds for seconds in calls]

    def speedup_over(self, other: "Times") -> float | None:
        """The other's time over this one's: the median over the rounds that both have."""
        pairs = zip(other.rounds, self.rounds, strict=False)
        ratios = [median(theirs) / median(mine) for theirs, mine in pairs]
        return median(ratios) if ratios and not (self.reason or other.reason) else None

    @property
    def lower_quartile(self) -> float:
        """Of all calls' seconds; nan if there are none, or they are not believed."""
        return float(np.percentile(self.all, 25)) if self.rounds and not self.reason else math.nan

    def ratio_over(self, other: "Times") -> float | None:
        """The other's lower quartile over this one's."""
        ratio = other.lower_quartile / self.lower_quartile
        return None if math.isnan(ratio) else ratio

    def result(
        self,
        case: Cells,
        contestant: str,
        reference: "Times | None" = None,
        **columns: object,
    ) -> Result:
        """The result of this measurement; without times if there is a ``reason``.

        Args:
            case: what was done, by column.
            reference: whose time the speed-up is relative to.
            columns: further columns.
        """
        reason = self.reason
        result = Result(
            case=case, contestant=contestant, columns=columns, ok=not reason, reason=reason
        )
        if reason or not self.rounds:
            return result
        p20, p50, p80 = (1e3 * float(np.percentile(self.all, q)) for q in (20, 50, 80))
        return replace(
            result,
            p20_ms=p20,
            p50_ms=p50,
            p80_ms=p80,
            mean_ms=1e3 * mean(self.all),
            samples=len(self.all),
            speedup=self.speedup_over(reference) if reference else None,
        )


def take_turns(
    contestants: Mapping[K, Turn],
    rounds: int,
    *,
    seconds: float = math.inf,
    least: int = 1,
    before: Callable[[int], object] = lambda index: None,
    label: str,
) -> dict[K, Times]:
    """Warm up each contestant, then time it once a round, in turn with the others.

    Args:
        seconds: a contestant whose turns took so long has no further one, once it had ``least``.
        before: called before each round, outside all times.
        label: what the rounds time, for the progress bar or the lines in its place.
    """
    times = {key: Times() for key in contestants}
    spent = dict.fromkeys(contestants, 0.0)
    going = dict(contestants)
    for index in track(range(1 + rounds), f"rounds of {label}"):
        if not going:
            break
        before(index)
        for key, turn in list(going.items()):
            start = time.perf_counter()
            try:
                calls = turn(index)
            except Exception as error:
                times[key].reason = first_line(error)
                del going[key]
                continue
            turn_seconds = time.perf_counter() - start
            if index == 0:
                times[key].first = turn_seconds
                continue
            times[key].rounds.append(list(calls))
            spent[key] += turn_seconds
            if spent[key] > seconds and len(times[key].rounds) >= least:
                del going[key]
    return times


@dataclass
class Timed(Generic[R]):
    """Calls that were issued and timed.

    Attributes:
        result: of the last call; on a GPU it may not be there yet.
        host: seconds that the host took to issue a call. On a CPU this is the time of the call.
    """

    result: R
    host: float
    _events: tuple[torch.cuda.Event, torch.cuda.Event] | None
    _calls: int

    def seconds(self) -> float:
        """Wait for the calls to end; the seconds of one."""
        if self._events is None:
            return self.host
        begin, end = self._events
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / self._calls


def time_calls(call: Callable[[], R], device: torch.device = CPU, calls: int = 1) -> Timed[R]:
    """Time ``calls`` calls in a row, at least one."""
    events = None
    if device.type == "cuda":
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        events[0].record()
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    host = (time.perf_counter() - start) / calls
    if events:
        events[1].record()
    return Timed(result, host, events, calls)


@cache
def _scratch(device: torch.device) -> Tensor:
    on_gpu = device.type == "cuda"
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 128 * 2**20
    return torch.empty(size, dtype=torch.int8, device=device)


def flush(device: torch.device) -> None:
    """Evict the caches. On a GPU this also gives the host about a millisecond to fill the queue."""
    for _ in range(16 if device.type == "cuda" else 1):
        _scratch(device).zero_()
