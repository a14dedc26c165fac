# SPDX-License-Identifier: MIT
"""Flags, data, printed tables and plots of ``fashion_pooled.py`` and ``fashion_pooled_torch.py``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import adaptive_avg_pool2d

from support import console
from support.cli import DataFlags
from torchpar.baselines.mpi import Samples
from torchpar.baselines.numpy_mlp import Array
from torchpar.data import load

SIZES = (400, 25, 10)


class Plan(NamedTuple):
    """Settings of a run: full-batch steps of SGD, and the seed of the first weights."""

    iterations: int
    lr: float
    momentum: float
    seed: int


class Result(NamedTuple):
    """Figures of a run.

    Attributes:
        costs: of each iteration, before its step.
        ends: mean cost and accuracy at the end, on the training and on the test samples.
        seconds: of all iterations.
        phases: the seconds of each phase; "data" comes once, before the iterations.
        weights: of the first layer, ``(400, 25)``.
    """

    plan: Plan
    costs: list[float]
    ends: Sequence[Sequence[float]]
    seconds: float
    phases: dict[str, float]
    weights: Array


@dataclass(kw_only=True)
class Flags(DataFlags):
    """Train a small network on pooled images by full-batch descent."""

    samples: int = 5000  # Number of training images, the first ones.
    iterations: int = 800  # Iterations of the second run.
    lr: float = 0.1  # Learning rate of the second run.
    momentum: float = 0.9  # Momentum of the second run.

    def plans(self) -> list[Plan]:
        """Return the settings of the university project's run, and of the second run."""
        project = Plan(iterations=60, lr=0.1, momentum=0.0, seed=self.seed)
        return [project, Plan(self.iterations, self.lr, self.momentum, self.seed)]


def pooled(flags: Flags) -> list[Samples]:
    """Return the training and test images: rows of 400 numbers in [0, 1], and their labels."""
    train, test = load(flags.dataset, flags.data)
    splits = []
    for samples in (train[: flags.samples], test):
        images = adaptive_avg_pool2d(samples.features / 255, 20).flatten(1)
        splits.append(Samples(images.numpy(), samples.labels.numpy()))
    return splits


def report(flags: Flags, library: str, device: str, ranks: int, results: list[Result]) -> None:
    """Print the figures of the runs, and write the metrics and plots that the flags ask for."""
    rows: list[dict[str, Any]] = []
    for plan, costs, (train, test), seconds, phases, _ in results:
        ms = {f"{name}_ms": 1e3 * t / plan.iterations for name, t in phases.items() if name != "data"}
        figures = {"first_cost": costs[0], "last_cost": costs[-1], "train_accuracy": train[1]}
        figures |= {"test_loss": test[0], "test_accuracy": test[1], "seconds": seconds}
        once = {"library": library, "ranks": ranks, "device": device, "data_ms_once": 1e3 * phases["data"]}
        rows.append(plan._asdict() | figures | once | ms)
    console.print_rows(rows, ("iterations", "lr", "momentum", *figures))
    console.print_rows(rows, ("iterations", "data_ms_once", *ms))
    console.write_metrics(flags.metrics, rows)
    if flags.plots:
        from support import plots

        curves = {f"rate {plan.lr:g}, momentum {plan.momentum:g}": costs for plan, costs, *_ in results}
        plots.save_curves(flags.plots / "costs.png", curves, "iteration", "cost")
        neurons = torch.from_numpy(results[-1].weights.T.reshape(-1, 20, 20))
        plots.save_matrices(flags.plots / "neurons.png", neurons, "Weights of each hidden neuron")
    print(console.last_line(test[1], test[0], seconds, ranks, device))
