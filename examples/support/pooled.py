# SPDX-License-Identifier: MIT
"""Flags, data, printed lines and plots of ``fashion_pooled.py`` and ``fashion_pooled_torch.py``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import adaptive_avg_pool2d

from support import console
from support.cli import ExampleFlags
from torchpar.baselines.mpi import Samples
from torchpar.baselines.numpy_mlp import Array
from torchpar.data import Dataset, load

SIZES = (400, 25, 10)
# The project's figures on Fashion-MNIST, at rate 0.1 after 60 iterations.
PUBLISHED = {
    "one process": "cost 7.50 → 3.217, precision 0.36; 1.1 to 1.16 s per iteration",
    "two processes": "cost 6.70 → 3.210, precision 0.36; 0.83 to 0.90 s per iteration",
    "GPU": "cost 6.55 → 3.214, precision 0.30; no time",
}


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
class PooledFlags(ExampleFlags):
    """Flags of both exercises."""

    data: Path = Path(__file__).parent.parent / "data"  # Folder of the data sets, as torchvision's root.
    dataset: Dataset = "mnist"  # Data set; the published figures are of fashion-mnist.
    samples: int = 5000  # Number of training images, the first ones.
    iterations: int = 800  # Iterations of the second run.
    lr: float = 0.1  # Learning rate of the second run.
    momentum: float = 0.9  # Momentum of the second run.


def make_plans(flags: PooledFlags) -> list[Plan]:
    """Return the settings of the university project's run, and of the second run."""
    published = Plan(iterations=60, lr=0.1, momentum=0.0, seed=flags.seed)
    return [published, Plan(flags.iterations, flags.lr, flags.momentum, flags.seed)]


def prepare(flags: PooledFlags) -> list[Samples]:
    """Check that the outputs can be written, and return the pooled training and test images.

    Returns:
        Rows of 400 numbers in [0, 1], and their labels.
    """
    console.create_outputs(folders=[flags.plots], files=[flags.metrics])
    train, test = load(flags.dataset, flags.data)
    splits = []
    for samples in (train[: flags.samples], test):
        images = adaptive_avg_pool2d(samples.features / 255, 20).flatten(1)
        splits.append(Samples(images.numpy(), samples.labels.numpy()))
    return splits


def report(flags: PooledFlags, library: str, device: str, ranks: int, results: list[Result]) -> None:
    """Print the figures of the runs, and write the metrics and plots that the flags ask for."""
    if flags.dataset == "fashion-mnist":
        way = "GPU" if device == "cuda" else "two processes" if ranks > 1 else "one process"
        print(f"published, {way}: {PUBLISHED[way]}")
    lines: list[dict[str, Any]] = []
    for plan, costs, (train, test), seconds, phases, _ in results:
        ms = {phase: 1e3 * t / plan.iterations for phase, t in phases.items() if t}
        once = ms.pop("data", 0.0) * plan.iterations
        print(
            f"{plan.iterations} iterations at rate {plan.lr:g}, momentum {plan.momentum:g}: cost "
            f"{costs[0]:.2f} → {costs[-1]:.3f}, training accuracy {train[1]:.2f}, "
            f"test accuracy {test[1]:.4f}; data: "
            f"{once:.1f} ms; an iteration: {1e3 * seconds / plan.iterations:.2f} ms, of it "
            + ", ".join(f"{phase} {t:.2f}" for phase, t in ms.items())
        )
        lines.append(
            plan._asdict()
            | {"library": library, "ranks": ranks, "device": device, "ms": ms, "ms_once": once}
            | {"first_cost": costs[0], "last_cost": costs[-1], "seconds": seconds}
            | {"precision": train[1], "test_loss": test[0], "test_accuracy": test[1]}
        )
    console.write_metrics(flags.metrics, lines)
    if flags.plots:
        save_plots(flags.plots, results)
    print(console.last_line(test[1], test[0], seconds, ranks, device))


def save_plots(folder: Path, results: list[Result]) -> None:
    """Draw the costs, and the weights of each hidden neuron of the last run."""
    from support import plots

    curves = {f"rate {plan.lr:g}, momentum {plan.momentum:g}": costs for plan, costs, *_ in results}
    plots.save_curves(folder / "costs.png", curves, "iteration", "cost")
    neurons = torch.from_numpy(results[-1].weights.T.reshape(-1, 20, 20))
    plots.save_matrices(folder / "neurons.png", neurons, "Weights of each hidden neuron")
