# SPDX-License-Identifier: MIT
"""Timeline of a step of a pipeline as text: when each forward and backward pass ran on each
rank."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from shutil import get_terminal_size
from typing import Any

import numpy as np
import torch

from torchpar.errors import ConfigError
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.schedules import Backward, Forward

STEPS = 100  # number of the latest steps to keep
# F0, B0 and so on, by micro-batch: start and end in seconds.
Passes = Mapping[str, tuple[float, float]]


class Timeline:
    """Times of the passes of the last `STEPS` steps on this rank, by the clock of its machine.

    Raises:
        ConfigError: ranks on several machines, whose clocks differ. On every rank.
    """

    def __init__(self, world: World):
        self.world = world
        self.steps: deque[Passes] = deque(maxlen=STEPS)
        if any(world.gather_results(lambda: world.rank != world.local_rank)):
            raise ConfigError("--draw compares the clocks of one machine; start all ranks on one")

    def step(self, forward: Forward, backward: Backward) -> tuple[Forward, Backward]:
        """Begin a step, and return its two functions so that their times are kept."""
        passes: dict[str, tuple[float, float]] = {}
        self.steps.append(passes)

        def timed(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
            numbers = count()  # micro-batches come in their order

            def run(*args: Any) -> Any:
                start = now(self.world.device)
                result = function(*args)
                passes[f"{kind}{next(numbers)}"] = start, now(self.world.device)
                return result

            return run

        return timed("F", forward), timed("B", backward)

    def print(self) -> None:
        """Gather the times of all ranks, and print the timeline on rank 0."""
        ranks = self.world.gather_results(lambda: list(self.steps))
        if self.world.rank == 0:
            print("\n".join(draw(ranks)))


def now(device: torch.device) -> float:
    """Return the seconds of a clock, once ``device`` has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def draw(ranks: Sequence[Sequence[Passes]]) -> list[str]:
    """Return a line per rank, with dots where it is idle, from the passes of each rank's steps.

    Each pass is drawn from its median start to its median end, counted from the first pass of rank
    0. Medians keep every order that all steps have. The lines are as wide as the terminal. A pass
    that is too short for its name there moves the next ones to the right.
    """
    steps = len(ranks[0])
    if not steps:
        return ["timeline: nothing was recorded, no step was trained"]
    times = [np.array([[*passes.values()] for passes in of_rank]) for of_rank in ranks]
    zeros = times[0][:, :1, :1]
    medians = [np.median(of_rank - zeros, axis=0) for of_rank in times]  # (passes, 2)
    span = max(of_rank.max() for of_rank in medians)
    columns = max(get_terminal_size().columns, 80) - 20
    ms = 1000 * span
    lines = [f"a step of {ms:.2f} ms, {ms / columns:.3f} ms a column, medians of {steps} steps"]
    for rank, (of_rank, recorded) in enumerate(zip(medians, ranks, strict=True)):
        line = ""
        for name, (start, end) in zip(recorded[0], of_rank, strict=True):
            line = line.ljust(int(start / span * columns), ".") + name
            line = line.ljust(int(end / span * columns), "-")
        idle = 1 - (of_rank[:, 1] - of_rank[:, 0]).sum() / span
        lines.append(f"rank {rank}  {line.ljust(columns, '.')}  {idle:.0%} idle")
    return lines
