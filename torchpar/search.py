# SPDX-License-Identifier: MIT
"""A search among configurations that outlives its process, and the table of what won.

A problem has candidates, a trial is one of them measured. The journal keeps each trial as soon as it is made;
what it holds is not measured again. Nothing here needs a GPU: what measures is handed in.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

Tiles = tuple[int, ...]  # of `torchpar.kernels.tuning`, whose Tiles are tuples

SIZES = (4096, 1024, 8192, 256, 2048, 512, 128, 64)  # in an order that soon covers the range
BATCH = 64
BATCHED_UP_TO = 512


class Problem(NamedTuple):
    """A kernel on ``batch`` n×n matrices; its dtype is a torch dtype's name, or tf32."""

    kernel: str
    dtype: str
    n: int
    batch: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, "float32" if self.dtype == "tf32" else self.dtype)
        return dtype

    @property
    def precision(self) -> str:
        return "tf32" if self.dtype == "tf32" else "ieee"

    def __str__(self) -> str:
        return f"{self.kernel} {self.dtype} {self.n}" + f" x {self.batch}" * (self.batch > 1)


class Trial(NamedTuple):
    """What became of a candidate: median milliseconds of a call, and of the library's; or an error."""

    problem: Problem
    tiles: Tiles
    ms: float = math.nan
    library_ms: float = math.nan
    error: str = ""

    @property
    def speedup(self) -> float:
        return self.library_ms / self.ms

    def __str__(self) -> str:
        """Which is faster, what the candidate takes, and how far it is ahead."""
        if self.error:
            return f"{describe(self.tiles)}: {self.error}"
        winner = describe(self.tiles) if self.speedup > 1 else f"the library (before {describe(self.tiles)})"
        return f"{winner}, {self.ms:.4g} ms, {self.speedup:.2f}x"


def describe(tiles: Tiles) -> str:
    """As 128x128x64 w8 s3 tma persistent: the tile, warps, stages."""
    m, n, k, warps, stages, *flags = tiles
    marks = "".join(f" {mark}" for mark, on in zip(("tma", "persistent"), flags, strict=False) if on)
    return f"{m}x{n}x{k} w{warps} s{stages}{marks}"


Problems = Mapping[Problem, Sequence[Tiles]]


class Journal:
    """Trials in a file, a JSON object per line.

    Args:
        where: what a trial holds for, such as device and versions. Lines from elsewhere are left alone.

    Attributes:
        unreadable: lines that are no trials, such as one that was being written when the power went.
    """

    def __init__(self, path: Path, where: Mapping[str, str]):
        self.path = path
        self.where = dict(where)
        self.trials: dict[tuple[Problem, Tiles], Trial] = {}
        self.begun: Counter[tuple[Problem, Tiles]] = Counter()
        self.unreadable = 0
        text = path.read_text(errors="replace") if path.exists() else ""
        for line in text.splitlines():
            try:
                self._read(json.loads(line))
            except (KeyError, TypeError, ValueError):
                self.unreadable += 1
        for (problem, tiles), times in self.begun.items():
            if times >= 2:
                trial = Trial(problem, tiles, error="it ended the process twice")
                self.trials.setdefault((problem, tiles), trial)
        if text and not text.endswith("\n"):
            with path.open("a") as file:
                file.write("\n")

    def _read(self, line: dict[str, Any]) -> None:
        if line["where"] != self.where:
            return
        problem, tiles = Problem(*line["problem"]), tuple(line["tiles"])
        if "begun" in line:
            self.begun[problem, tiles] += 1 if line["begun"] else -1
            return
        ms, library_ms = (math.nan if line[key] is None else float(line[key]) for key in ("ms", "library_ms"))
        trial = Trial(problem, tiles, ms, library_ms, line["error"])
        if not trial.error and not (0 < ms < math.inf and 0 < library_ms < math.inf):
            raise ValueError("neither times nor an error")
        self.trials[problem, tiles] = trial

    def begin(self, problem: Problem, tiles: Tiles) -> None:
        """Note what is about to be measured: it may bring down the compiler, and this process with it."""
        self._write({"problem": problem, "tiles": tiles, "begun": True})

    def take_back(self, problem: Problem, tiles: Tiles) -> None:
        """Note that what was begun has ended for a reason that is not the candidate's."""
        self._write({"problem": problem, "tiles": tiles, "begun": False})

    def add(self, trial: Trial) -> None:
        line = trial._asdict()
        self._write(line | {key: None for key in ("ms", "library_ms") if math.isnan(line[key])})
        self.trials[trial.problem, trial.tiles] = trial

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**line, "where": self.where}, allow_nan=False) + "\n")

    def missing(self, problems: Problems) -> list[tuple[Problem, Tiles]]:
        pairs = ((problem, tiles) for problem, candidates in problems.items() for tiles in candidates)
        return [pair for pair in pairs if pair not in self.trials]

    def best(self, problem: Problem, candidates: Iterable[Tiles]) -> Trial | None:
        """The candidate furthest ahead of the library, or least behind; None if none has been timed."""
        trials = (self.trials.get((problem, tiles)) for tiles in candidates)
        timed = [trial for trial in trials if trial is not None and not trial.error]
        return max(timed, key=lambda trial: trial.speedup, default=None)


def search(
    problems: Problems,
    measure: Callable[[Problem, Tiles], tuple[float, float]],
    journal: Journal,
    seconds: float,
) -> Iterator[Trial]:
    """Measure what the journal lacks: each problem's first candidate, then each one's second, and so on.

    Yields each trial once it is kept. Where the GPU's memory does not suffice, which may be another
    program's doing, the trial is an error that is not kept: the next search tries the candidate again.

    Args:
        measure: milliseconds of a candidate, and of the library. What it raises is the candidate's error.
        seconds: begin no trial after so long.
    """
    end = time.monotonic() + seconds
    rounds = sorted(journal.missing(problems), key=lambda pair: problems[pair[0]].index(pair[1]))
    for problem, tiles in rounds:
        if time.monotonic() >= end:
            return
        journal.begin(problem, tiles)
        try:
            trial = Trial(problem, tiles, *measure(problem, tiles))
        except torch.OutOfMemoryError as e:
            journal.take_back(problem, tiles)
            yield Trial(problem, tiles, error=f"skipped for now, {in_a_line(e)}")
            continue
        except Exception as e:
            trial = Trial(problem, tiles, error=in_a_line(e))
        except BaseException:  # Ctrl-C
            journal.take_back(problem, tiles)
            raise
        journal.add(trial)
        yield trial


def in_a_line(e: BaseException) -> str:
    while e.__cause__ is not None:  # Triton's errors wrap the cause in the source that leads to it
        e = e.__cause__
    message = getattr(e, "error_message", None) or e
    return f"{type(e).__name__}: {message}".partition("\n")[0]


def tabulate(
    problems: Problems, journal: Journal, present: Callable[[Problem], Tiles | None]
) -> dict[str, Any]:
    """The "tiles" of a table for `torchpar.kernels.tuning`, less the kinds of operands that have no trial.

    Args:
        present: what a problem without a trial keeps; None is the library.
    """
    from torchpar.kernels import tuning

    found: dict[str, Any] = {}
    for series in dict.fromkeys(problem._replace(n=0) for problem in problems):
        own = {p.n: journal.best(p, tiles) for p, tiles in problems.items() if p._replace(n=0) == series}
        if not any(own.values()):
            continue
        winners: dict[int, Tiles | None] = {}
        for n in sorted({*own, *sizes_of(series.batch)}):
            best = own.get(n)
            winners[n] = (best.tiles if best.speedup > 1 else None) if best else present(series._replace(n=n))
        kind = tuning.operand_kind(series.torch_dtype, series.precision, series.batch)
        found.setdefault(series.kernel, {})[kind] = _entries(winners)
    return found


def tiles_of(table: dict[str, Any] | None, problem: Problem) -> Tiles | None:
    """What a problem's launcher takes with this table, or with none; None for the library."""
    from torchpar.kernels import tuning

    kernel, _, n, batch = problem
    kind = (problem.torch_dtype, problem.precision)
    kinds = table["tiles"].get(kernel, {}) if table else {}
    for entry in kinds.get(tuning.operand_kind(*kind, batch), ()):
        if entry["up_to"] is None or n <= entry["up_to"]:
            return tuning.Tiles(*entry["tiles"]) if entry["tiles"] else None
    return tuning.default_tiles(*kind, n, n, torch.empty(n, n, dtype=kind[0], device="meta"))


def _entries(winners: Mapping[int, Tiles | None]) -> list[dict[str, Any]]:
    """Each winner holds up to the geometric mean of its size and the next."""
    entries: list[dict[str, Any]] = []
    ends = [*(math.isqrt(n * following) for n, following in pairwise(winners)), None]
    for end, tiles in zip(ends, winners.values(), strict=True):
        if entries and entries[-1]["tiles"] == tiles:
            entries[-1]["up_to"] = end
        else:
            entries.append({"up_to": end, "tiles": tiles})
    return entries


def sizes_of(batch: int) -> list[int]:
    return [n for n in SIZES if batch == 1 or n <= BATCHED_UP_TO]
