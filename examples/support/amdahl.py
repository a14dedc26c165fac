# SPDX-License-Identifier: MIT
"""Time data-parallel training by phase on several numbers of processes, and report it by Amdahl's law.

Of the time of one process a share p is divided among N, and 1 − p is not:

    T(N) = T(1)·((1 − p) + p/N)        S(N) = T(1)/T(N) = 1/((1 − p) + p/N)        S(∞) = 1/(1 − p)

(G. M. Amdahl, "Validity of the single processor approach to achieving large scale computing capabilities",
AFIPS 1967.) The law has no term for communication: a fitted p counts it as work that is not divided.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
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
from torchpar.profile.collectives import Collectives
from torchpar.profile.phases import Phases

PHASES = ("data", "forward", "backward", "collectives", "optimizer")
DIVIDED = ("forward", "backward")  # each rank draws the order of all samples, and updates all parameters
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PROCESSES = tuple(2**i for i in range(max(CORES, 2).bit_length()))  # 1, 2, 4 … to the cores
ROUNDS = 8  # after one that is not counted
LOSS_ERROR = 1e-4  # of a loss: rounding is some 1e-7, another share of a batch or fewer samples 1e-2


def speedup(p: float, processes: float) -> float:
    """Return ``S(N) = 1/((1 − p) + p/N)``.

    Args:
        p: the share of one process's time that is divided, in [0, 1].
        processes: N ≥ 1; `math.inf` gives the limit ``1/(1 − p)``, infinite for p = 1.
    """
    time = (1 - p) + p / processes
    return 1 / time if time else math.inf


def fit(speedups: Mapping[int, float]) -> float:
    """Return the p in [0, 1] that fits measured speed-ups best, by least squares.

    In ``1/S = 1 − p·(1 − 1/N)`` the law is linear, and the sum of squared residuals of 1/S = T(N)/T(1) is
    least at ``p = Σ (1 − 1/N)·(1 − 1/S) / Σ (1 − 1/N)²``; where that lies outside [0, 1], at the nearer end.

    Args:
        speedups: S for each N. N = 1 does not affect the fit. With a single N > 1 it is exact if 1 ≤ S ≤ N.
    """
    p = sum((1 - 1 / n) * (1 - 1 / s) for n, s in speedups.items())
    return min(max(p / sum((1 - 1 / n) ** 2 for n in speedups), 0.0), 1.0)


@dataclass(frozen=True)
class Scaling:
    """Times of training in batches of one size, on several numbers of processes.

    Attributes:
        batch_size: samples of a step, over all processes.
        seconds: of each of the `PHASES` in an epoch, for each number of processes, 1 among them.
        losses: after the last epoch, for each number of processes.
    """

    batch_size: int
    seconds: Mapping[int, Mapping[str, float]]
    losses: Mapping[int, float]

    @property
    def speedups(self) -> dict[int, float]:
        """``S(N) = T(1)/T(N)`` as measured, T the sum of the phases."""
        return {n: sum(self.seconds[1].values()) / sum(t.values()) for n, t in self.seconds.items()}

    @property
    def p(self) -> float:
        """The p that `fit` finds for the speed-ups."""
        return fit(self.speedups)

    @property
    def p_of_profile(self) -> float:
        """The share of forward and backward in one process's time: p if these divide perfectly."""
        return sum(self.seconds[1][phase] for phase in DIVIDED) / sum(self.seconds[1].values())

    @property
    def limit(self) -> float:
        """The speed-up on any number of processes, ``1/(1 − p)``."""
        return speedup(self.p, math.inf)

    @property
    def limiting(self) -> tuple[str, float]:
        """The phase with most seconds beyond its ideal share, ``t(N) − t(1)/N``, on most processes N."""
        most = max(self.seconds)
        excess = {phase: t - self.seconds[1][phase] / most for phase, t in self.seconds[most].items()}
        return max(excess.items(), key=lambda item: item[1])

    def __str__(self) -> str:
        """p, its limit, the speed-up achieved, and the phase that limits it."""
        most, (phase, seconds) = max(self.seconds), self.limiting
        return (
            f"batch {self.batch_size}: p {self.p:.3f} ({self.p_of_profile:.3f} by the profile), limit "
            f"{self.limit:.2f}×, achieved {self.speedups[most]:.2f}× on {most}; "
            f"{phase} limits, {1000 * seconds:.1f} ms beyond its share"
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return the figures of each number of processes; times in milliseconds."""
        return [
            {"batch_size": self.batch_size, "processes": n}
            | {f"{phase}_ms": 1000 * t for phase, t in self.seconds[n].items()}
            | {"epoch_ms": 1000 * sum(self.seconds[n].values()), "speedup": s}
            | {"p": self.p, "p_of_profile": self.p_of_profile, "limiting_phase": self.limiting[0]}
            | {"limit": self.limit if self.p < 1 else None, "loss": self.losses[n]}
            for n, s in self.speedups.items()
        ]


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
