# SPDX-License-Identifier: MIT
"""Timeline of a step of a pipeline as text: when each forward and backward pass ran on each rank."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from math import ceil
from statistics import median
from typing import Any, NamedTuple

import torch

from torchpar.errors import ConfigError
from torchpar.parallel.launch.world import World
from torchpar.reference import Backward, Forward

STEPS = 100  # number of the latest steps to keep
COLUMNS = 60  # of a step, at least: a line fits a terminal of 80
MOST_COLUMNS = 140


class Pass(NamedTuple):
    """A forward or backward pass of a micro-batch on one rank.

    Attributes:
        name: F0, F1, … or B0, B1, …, with the number of the micro-batch.
        start, end: seconds of `time.perf_counter`, which all processes of a machine share.
    """

    name: str
    start: float
    end: float


class Timeline:
    """Times of the passes of the last `STEPS` steps on this rank.

    Raises:
        ConfigError: ranks on several machines, whose clocks differ. On every rank.
    """

    def __init__(self, world: World):
        self.world = world
        self.steps: deque[list[Pass]] = deque(maxlen=STEPS)
        if any(world.gather_results(lambda: world.rank != world.local_rank)):
            raise ConfigError("--draw compares the clocks of one machine; start all ranks on one")

    def step(self, forward: Forward, backward: Backward) -> tuple[Forward, Backward]:
        """Begin a step, and return its two functions so that their times are kept."""
        passes: list[Pass] = []
        self.steps.append(passes)

        def timed(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                start = self._now()
                result = function(*args)
                number = sum(one.name[0] == kind for one in passes)  # micro-batches come in their order
                passes.append(Pass(f"{kind}{number}", start, self._now()))
                return result

            return run

        return timed("F", forward), timed("B", backward)

    def print(self) -> None:
        """Gather the times of all ranks, and print the timeline on rank 0."""
        ranks = self.world.gather_results(lambda: list(self.steps))
        if self.world.rank == 0:
            print("\n".join(draw(ranks)))

    def _now(self) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return time.perf_counter()


def draw(ranks: Sequence[Sequence[Sequence[Pass]]]) -> list[str]:
    """Return a line per rank, with dots where it is idle, from the passes of each rank's steps.

    Each pass is drawn from its median start to its median end, counted from the first pass of rank 0. Medians
    keep every order that all steps have. A step has as many columns as its shortest pass needs to show its
    name, up to `MOST_COLUMNS`. A pass that is too short for its name there moves the next ones to the right.
    """
    steps = len(ranks[0])
    if not steps:
        return ["timeline: nothing was recorded, no step was trained"]
    zeros = [passes[0].start for passes in ranks[0]]

    def median_pass(recorded: Sequence[Pass]) -> Pass:
        times = [(one.start - zero, one.end - zero) for one, zero in zip(recorded, zeros, strict=True)]
        return Pass(recorded[0].name, *map(median, zip(*times, strict=True)))

    medians = [[median_pass(recorded) for recorded in zip(*of_rank, strict=True)] for of_rank in ranks]
    passes = [one for passes in medians for one in passes]
    span = max(one.end for one in passes)
    needed = max(ceil((len(one.name) + 1) * span / (one.end - one.start)) for one in passes)
    columns = min(max(COLUMNS, needed), MOST_COLUMNS)
    lines = [
        f"a step of {1000 * span:.2f} ms, {1000 * span / columns:.3f} ms a column, medians of {steps} steps"
    ]
    for rank, passes in enumerate(medians):
        line = ""
        for one in passes:
            line = line.ljust(int(one.start / span * columns), ".") + one.name
            line = line.ljust(int(one.end / span * columns), "-")
        idle = 1 - sum(one.end - one.start for one in passes) / span
        lines.append(f"rank {rank}  {line.ljust(columns, '.')}  {idle:.0%} idle")
    return lines
