# SPDX-License-Identifier: MIT
"""Time data-parallel training by phase on several numbers of processes, and report it by Amdahl's law."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from support.console import print_rows
from torchpar.data import Samples, batches
from torchpar.errors import ConfigError
from torchpar.parallel.launch.local import current_world, start_ranks
from torchpar.profile.amdahl import PHASES, Scaling, speedup
from torchpar.profile.collectives import Collectives
from torchpar.profile.phases import Phases

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PROCESSES = tuple(2**i for i in range(max(CORES, 2).bit_length()))  # 1, 2, 4 … to the cores
ROUNDS = 8  # after one that is not counted
LOSS_ERROR = 1e-4  # of a loss: rounding is some 1e-7, another share of a batch or fewer samples 1e-2


@dataclass(frozen=True)
class Job:
    """The training to time. It is picklable, and the same on every rank.

    Attributes:
        build: makes the model and its optimizer.
        draw: makes the samples of an epoch.
        loss_sum: outputs, labels → the loss summed over samples.
    """

    build: Callable[[], tuple[torch.nn.Module, Optimizer]]
    draw: Callable[[], Samples]
    loss_sum: Callable[[Tensor, Tensor], Tensor]


def check(processes: Sequence[int], sizes: Sequence[int]) -> None:
    """Refuse numbers of processes, or batch sizes, that `measure` cannot work with."""
    if len(processes) < 2 or processes[0] != 1 or any(b <= a or b % a for a, b in pairwise(processes)):
        raise ConfigError(f"--processes is {processes}, expected 1 and then multiples of the last, as 1 2 4")
    if min(sizes, default=0) < processes[-1]:
        raise ConfigError(f"--sizes is {sizes}, expected at least {processes[-1]}, one sample a process")


def measure(job: Job, processes: Sequence[int], sizes: Sequence[int]) -> list[Scaling]:
    """Time epochs of data-parallel training on the CPU, a thread to a process; a `Scaling` for each size.

    Each round times all numbers of processes and all sizes in turn, so that whatever disturbs the machine
    disturbs all alike. The first round is not counted; of the others' times the medians are given. They are
    rank 0's, so that "collectives" includes its wait for slower ranks. While phases are timed a collective
    overlaps with nothing.
    """
    seconds: dict[tuple[int, int], list[dict[str, float]]] = {key: [] for key in product(sizes, processes)}
    losses: dict[tuple[int, int], float] = {}
    with Console().status(f"timing epochs on {processes} processes"), ExitStack() as stack:
        groups = {n: stack.enter_context(start_ranks(n)) for n in processes}
        for seed, (size, n) in product(range(1 + ROUNDS), seconds):
            of_rank_0, losses[size, n] = groups[n].run(_train_epoch, job, size, seed)[0]
            seconds[size, n].append(of_rank_0)
    return [
        Scaling(
            size,
            {n: {p: median(of[p] for of in seconds[size, n][1:]) for p in PHASES} for n in processes},
            {n: losses[size, n] for n in processes},
        )
        for size in sizes
    ]


def _train_epoch(job: Job, size: int, seed: int) -> tuple[dict[str, float], float]:
    """Seconds of each phase of an epoch, and the mean loss over all samples after it."""
    world = current_world()
    model, optimizer = job.build()
    wrapped = DistributedDataParallel(model) if world.world_size > 1 else model
    samples = job.draw()
    with Phases(world.device) as phases, Collectives(world):
        shares = batches(samples, size, seed=seed, epoch=1, share=world.share)
        for x, labels, global_size in phases.steps(shares):
            (job.loss_sum(wrapped(x), labels) * (world.world_size / global_size)).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        everything = slice(None)
        mean = job.loss_sum(model(samples.inputs(everything)), samples.labels).item() / len(samples)
    return {name: phases.seconds[name] for name in PHASES}, mean


def report(
    job: Job, processes: Sequence[int], sizes: Sequence[int], plots: Path | None = None
) -> list[dict[str, Any]]:
    """Call `measure` and print the times by phase, each `Scaling`, and what they are worth.

    Args:
        plots: an existing folder for ``amdahl.png``.

    Returns:
        The `Scaling.rows` of all sizes.
    """
    scalings = measure(job, processes, sizes)
    off = max(abs(loss / s.losses[1] - 1) for s in scalings for loss in s.losses.values())
    if not off <= LOSS_ERROR:
        raise ConfigError(
            f"the loss on several processes differs from that on one by {off:.0e} of it; mend the step"
        )
    rows = [row for scaling in scalings for row in scaling.rows()]
    times = [f"{name}_ms" for name in (*PHASES, "epoch")]
    print_rows(rows, ["batch_size", "processes", *times, "speedup"])
    for scaling in scalings:
        print(scaling)
    print(f"all numbers of processes reach the same loss (largest relative difference {off:.0e})")
    print("while phases are timed a collective overlaps with nothing: a plain run is faster than this")
    most = processes[-1]
    if len(processes) == 2:
        print(f"p is of N = {most} alone: whether the law holds, only more processes would tell")
    if most > CORES:
        print(f"{most} processes on {CORES} cores are oversubscribed: the machine limits them, not the law")
    if plots:
        _save_picture(plots / "amdahl.png", scalings, most)
    return rows


def _save_picture(path: Path, scalings: Sequence[Scaling], most: int) -> None:
    """Draw the speed-ups on the law's curves, with their limits, up to eight times as many processes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    numbers = [n for n in (2 ** (i / 4) for i in range(65)) if n <= 8 * most]
    for i, s in enumerate(scalings):
        limit = f"limit {s.limit:.1f}" if s.p < 1 else "no limit"
        label = f"batch {s.batch_size}, p {s.p:.3f}, {limit}"
        axes.plot(numbers, [speedup(s.p, n) for n in numbers], f"C{i}", label=label)
        axes.plot(list(s.speedups), list(s.speedups.values()), f"oC{i}")
        if s.p < 1:
            axes.axhline(s.limit, color=f"C{i}", linestyle=":")
    axes.plot(numbers, numbers, "k--", label="S = N")
    axes.set(xlabel="processes N", ylabel="speed-up S", title="Measured (dots), Amdahl's law, limit (dotted)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.legend()
    figure.savefig(path, dpi=110)
