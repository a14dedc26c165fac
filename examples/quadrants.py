# SPDX-License-Identifier: MIT
"""Quadrants: a small network, over-fitting and its cures, and the gain of training in parallel.

    python examples/quadrants.py            learn the quadrants; then a report by Amdahl's law
    python examples/quadrants.py --noise    over-fitting and its cures

Points in quadrants I and III have label 0, points in II and IV label 1. No line separates them. Four ReLUs
do: |x + y| − |x − y| has the sign of x·y. All points keep the distance `MARGIN` from the axes, because labels
of nearer points cannot be learned from a finite set.

With --noise the networks learn few points, and a tenth of the labels is wrong. A narrow network or a large
penalty λ leaves both losses high. A wide network learns the noise, so its validation loss is far above its
training loss. A larger λ cures that.

The report trains a larger network by data parallelism on the CPU, in large and in small batches. It fits
Amdahl's law to the times: of the time of one process a share p is divided among N, and 1 − p is not.

    T(N) = T(1)·((1 − p) + p/N)        S(N) = T(1)/T(N) = 1/((1 − p) + p/N)        S(∞) = 1/(1 − p)

(G. M. Amdahl, "Validity of the single processor approach to achieving large scale computing capabilities",
AFIPS 1967.) The law has no term for communication: a fitted p counts it as work that is not divided.
"""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise, product
from statistics import median
from typing import Any

import torch
from rich.console import Console
from support import cli, console
from torch import Tensor
from torch.nn.functional import binary_cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from torchpar.data import Samples, batches
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel.launch.local import Ranks
from torchpar.parallel.launch.world import join_world
from torchpar.training import lr_scheduler, sgd

MARGIN = 0.02  # of a square of side 2
WIDTHS, PENALTIES = (1, 4, 8, 32), (0.0, 1e-3, 1e-2, 1e-1)  # with --noise
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ROUNDS = 8  # of the report, after one that is not counted
LOSS_ERROR = 1e-4  # of a loss in float64; another share of a batch, or fewer samples, is 1e-2

Rounds = dict[tuple[int, int], list[tuple[float, float]]]  # by batch size and number of processes


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Learn the quadrants that points lie in, and report the gain of parallel training."""

    noise: bool = False  # Learn few noisy points by networks of several widths and λ; no report.
    epochs: int = 60  # Passes over the points; three times as many with --noise, where the points are few.
    # Processes in the report: 1, then multiples of the last.
    processes: tuple[int, ...] = tuple(2**i for i in range(max(CORES, 2).bit_length()))
    sizes: tuple[int, ...] = (512, 4096, 32768)  # Batch sizes of the report, over all processes.

    def __post_init__(self) -> None:
        super().__post_init__()
        n, sizes = self.processes, self.sizes
        if len(n) < 2 or n[0] != 1 or any(b <= a or b % a for a, b in pairwise(n)):
            raise ConfigError(f"--processes is {n}, expected 1 and then multiples of the last, as 1 2 4")
        if min(sizes, default=0) < n[-1]:
            raise ConfigError(f"--sizes is {sizes}, expected at least {n[-1]}, one sample a process")


def draw(n: int, seed: int, wrong: float = 0.0, device: torch.device | str = "cpu") -> Samples:
    """Return points of [−1, 1]² with the label x·y < 0, which is inverted for a share ``wrong`` of them."""
    generator = torch.Generator().manual_seed(seed % 2**64)
    signs = torch.randint(0, 2, (n, 2), generator=generator) * 2 - 1
    points = signs * (MARGIN + (1 - MARGIN) * torch.rand(n, 2, generator=generator))
    labels = (points.prod(1) < 0) ^ (torch.rand(n, generator=generator) < wrong)
    return Samples(points.to(device), labels.long().to(device), ("I, III", "II, IV"))


def build(
    sizes: list[int], penalty: float, seed: int, device: torch.device | str = "cpu"
) -> tuple[MLP, Optimizer]:
    """Return a network whose one output is the probability of label 1, and its optimizer."""
    torch.manual_seed(seed)
    model = MLP(sizes, hidden="relu", output="sigmoid").to(device)
    return model, sgd(model, lr=0.2, momentum=0.9, weight_decay=penalty)


def loss_sum(p: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy of the probabilities ``p (b, 1)``, summed over samples."""
    return binary_cross_entropy(p.squeeze(1), labels.to(p), reduction="sum")


def train(model: MLP, optimizer: Optimizer, points: Samples, epochs: int, batch_size: int, seed: int) -> None:
    scheduler = lr_scheduler(optimizer, "linear", steps=epochs * -(-len(points) // batch_size))
    for epoch in range(1, epochs + 1):
        for x, labels, _ in batches(points, batch_size, seed=seed, epoch=epoch):
            loss = loss_sum(model(x), labels) / len(x)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: MLP, points: Samples) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    p = model(points.features).double()
    right = (p.squeeze(1) > 0.5) == points.labels
    return loss_sum(p, points.labels).item() / len(points), right.double().mean().item()


def compare(flags: Flags, device: torch.device) -> list[dict[str, float]]:
    """Train networks, one without --noise, and return their figures, the best by validation loss last."""
    n, wrong, epochs, batch_size = (50, 0.1, 3, 10) if flags.noise else (4000, 0.0, 1, 100)
    points, validation = (draw(k, 3 * flags.seed + i, wrong, device) for i, k in enumerate((n, 1000)))
    test = draw(2500, 3 * flags.seed + 2, device=device)  # without wrong labels
    choices = list(product(WIDTHS, PENALTIES) if flags.noise else [(30, 0.0)])
    rows = []
    for width, penalty in console.progress(choices, "networks"):
        model, optimizer = build([2, width, 1], penalty, flags.seed, device)
        train(model, optimizer, points, epochs * flags.epochs, batch_size, flags.seed)
        row = {"width": width, "penalty": penalty, "train_loss": evaluate(model, points)[0]}
        row["validation_loss"], _ = evaluate(model, validation)
        row["test_loss"], row["test_accuracy"] = evaluate(model, test)
        rows.append(row)
        print(" | ".join(f"{name.replace('_', ' ')} {value:<6.4g}" for name, value in row.items()))
    return sorted(rows, key=lambda row: -row["validation_loss"])


def measure(flags: Flags) -> Rounds:
    """Time epochs of data-parallel training on the CPU, a thread to a process; return rank 0's `time_epoch`.

    Each round times all numbers of processes and all sizes in turn, so that whatever disturbs the machine
    disturbs all alike. The first round computes in float64, as rounding can turn a ReLU of float32 on.
    """
    keys = list(product(flags.sizes, flags.processes))
    rounds: Rounds = {key: [] for key in keys}
    with Console().status(f"timing epochs on {flags.processes} processes"), ExitStack() as stack:
        groups = {n: stack.enter_context(Ranks()) for n in flags.processes}
        for seed, (size, n) in product(range(1 + ROUNDS), keys):
            dtype = torch.float32 if seed else torch.float64
            rounds[size, n].append(groups[n](n, time_epoch, flags.seed, size, seed, dtype)[0])
    return rounds


def time_epoch(first_seed: int, size: int, seed: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return the seconds of an epoch, and the mean loss over all points after it."""
    model, optimizer = build([2, 128, 128, 1], 0.0, first_seed)
    model.to(dtype)
    samples = draw(2**15, first_seed)
    samples = replace(samples, features=samples.features.to(dtype))
    with join_world("cpu") as world:
        wrapped = DistributedDataParallel(model) if world.world_size > 1 else model
        start = time.perf_counter()
        for x, labels, global_size in batches(samples, size, seed=seed, epoch=1, share=world.share):
            (loss_sum(wrapped(x), labels) * (world.world_size / global_size)).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - start
    with torch.no_grad():
        return seconds, loss_sum(model(samples.features), samples.labels).item() / len(samples)


def fit(speedups: Mapping[int, float]) -> float:
    """Return the p in [0, 1] that fits measured speed-ups best, by least squares.

    In ``1/S = 1 − p·(1 − 1/N)`` the law is linear, and the sum of squared residuals of 1/S = T(N)/T(1) is
    least at ``p = Σ (1 − 1/N)·(1 − 1/S) / Σ (1 − 1/N)²``; where that lies outside [0, 1], at the nearer end.

    Args:
        speedups: S for each N. N = 1 does not affect the fit. With a single N > 1 it is exact if 1 ≤ S ≤ N.
    """
    p = sum((1 - 1 / n) * (1 - 1 / s) for n, s in speedups.items())
    return min(max(p / sum((1 - 1 / n) ** 2 for n in speedups), 0.0), 1.0)


def report(flags: Flags) -> list[dict[str, Any]]:
    """Print the times and what Amdahl's law says of them, and return a row for each size.

    The times are medians of all rounds but the first, which gives the losses.
    """
    rounds = measure(flags)
    off = max(abs(first[1] / rounds[size, 1][0][1] - 1) for (size, _), (first, *_) in rounds.items())
    if not off <= LOSS_ERROR:
        raise ConfigError(f"the loss on several processes is off by {off:.0e} of that on one; report this")
    rows: list[dict[str, Any]] = []
    for size in flags.sizes:
        ms = {n: 1000 * median(seconds for seconds, _ in rounds[size, n][1:]) for n in flags.processes}
        speedups = {n: ms[1] / ms[n] for n in flags.processes}
        p = fit(speedups)
        row = {"batch_size": size, "ms_on_1": ms[1]} | {f"speedup_on_{n}": s for n, s in speedups.items()}
        rows.append(row | {"p": p, "limit": 1 / (1 - p) if p < 1 else None})  # JSON has no infinity
    console.print_rows(rows, list(rows[0]))
    print(f"all numbers of processes reach the same loss (largest relative difference {off:.0e})")
    most = flags.processes[-1]
    if len(flags.processes) == 2:
        print(f"p is of N = {most} alone: whether the law holds, only more processes would tell")
    if most > CORES:
        print(f"{most} processes on {CORES} cores are oversubscribed: the machine limits them, not the law")
    return rows


def main(flags: Flags) -> None:
    start = time.perf_counter()
    with join_world(flags.device, alone=True) as world:
        rows = compare(flags, world.device)
    best = rows[-1]
    if flags.noise:
        overfitted = max(rows, key=lambda row: row["validation_loss"] - row["train_loss"])
        for what, row in (("lowest validation loss", best), ("furthest above its training loss", overfitted)):
            losses = f"{row['train_loss']:.3f} in training, {row['validation_loss']:.3f} in validation"
            print(f"{what}: width {row['width']}, λ {row['penalty']:g} ({losses})")
    else:
        rows = [*report(flags), best]
    figures = (best["test_accuracy"], best["test_loss"], time.perf_counter() - start)
    print(console.last_line(*figures, ranks=1, device=world.device.type))
    console.write_metrics(flags.metrics, rows)


if __name__ == "__main__":
    cli.main(main, Flags)
