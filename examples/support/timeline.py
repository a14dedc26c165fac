# SPDX-License-Identifier: MIT
"""Timeline of a pipeline's step as text: when each forward and backward pass ran on each rank."""

from collections.abc import Sequence
from shutil import get_terminal_size

import numpy as np

from torchpar.errors import ConfigError
from torchpar.parallel.launch.world import World
from torchpar.training.profile.record import RankRecord, Step

LETTERS = {"forward": "F", "backward": "B"}
LEGEND = "F, B: forward and backward pass of a micro-batch; -: it goes on; .: idle"
# F0, B0 and so on, by micro-batch: start and end in seconds.
Passes = dict[str, tuple[float, float]]


def check_one_machine(world: World) -> None:
    """Raise ConfigError, on every rank, if the ranks run on several machines."""
    if any(world.gather_results(lambda: world.rank != world.local_rank)):
        raise ConfigError("--draw compares the clocks of one machine; start all ranks on one")


def passes(step: Step) -> Passes:
    """Return the passes of the micro-batches, in turn; a rank runs each kind in their order."""
    pipeline = next(span for span in step.spans if span.name == "pipeline")
    found: Passes = {}
    counts = dict.fromkeys(LETTERS, 0)
    for name, start, end in sorted(step.spans, key=lambda span: span.start):
        if name in LETTERS and pipeline.start <= start and end <= pipeline.end:
            found[f"{LETTERS[name]}{counts[name]}"] = start, end
            counts[name] += 1
    return found


def draw(records: Sequence[RankRecord]) -> list[str]:
    """Return the scale, a line per rank and what its letters mean, from the passes of all steps.

    Each pass is drawn from its median start to its median end, counted from the first pass of rank
    0. Medians keep every order that all steps have. The lines are as wide as the terminal. A pass
    that is too short for its name there moves the next ones to the right.
    """
    ranks = [[passes(step) for step in record.steps] for record in records]
    steps = len(ranks[0])
    if not steps:
        return ["timeline: nothing was recorded, no more than two steps were trained"]
    times = [np.array([[*found.values()] for found in of_rank]) for of_rank in ranks]
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
    return [*lines, LEGEND]
