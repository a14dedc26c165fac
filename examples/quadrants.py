# SPDX-License-Identifier: MIT
"""Quadrants: a small network, what makes one over-fit, and what training in parallel can gain.

    python examples/quadrants.py            learn the quadrants; then a report by Amdahl's law
    python examples/quadrants.py --noise    over-fitting, and its cures

Points in quadrants I and III have label 0, in II and IV label 1. No line parts them, four ReLUs do: the sign
of |x + y| − |x − y| is that of x·y. All points, tested ones too, keep `MARGIN` from the axes: nearer, a label
hangs on digits that no finite training set settles. With --noise few points are learnt, some mislabelled: a
network too narrow, or λ too large, leaves both losses high; one too wide learns the noise, so that its
validation loss rises far above its training loss, which a larger λ cures.

The report trains a larger network by data parallelism on the CPU, in larger and in smaller batches.
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from benchmarks.amdahl import measure, show
from torchpar import cli, report, training
from torchpar.data import Samples
from torchpar.nn import MLP
from torchpar.parallel.step import LossSum, ReplicaStep
from torchpar.parallel.world import World, alone
from torchpar.phases import NoPhases, Phases

MARGIN = 0.02  # of a square of side 2


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Learn in which quadrants points lie, and report what parallel training gains."""

    noise: bool = False
    """Instead of both, learn few points, a tenth of them mislabelled, by networks of several widths and λ."""
    epochs: int = 60
    """Passes over the points; three times as many with --noise, where these are few."""
    processes: tuple[int, ...] = measure.PROCESSES
    """Numbers of processes of the report: 1, then each a multiple of the last."""
    sizes: tuple[int, ...] = (512, 4096, 32768)
    """Batch sizes of the report, over all processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        measure.check(self.processes, self.sizes)


class Points(Samples):
    """Points of the plane, ``(n, 2)`` float32, in the place of images."""

    def inputs(self, index: Tensor | slice) -> Tensor:
        return self.images[index]


def draw(n: int, seed: int, world: World, wrong: float = 0.0) -> Points:
    """Points of [−1, 1]², and whether x·y < 0; the opposite for a share ``wrong`` of them."""
    generator = torch.Generator().manual_seed(seed % 2**64)
    signs = torch.randint(0, 2, (n, 2), generator=generator) * 2 - 1
    points = signs * (MARGIN + (1 - MARGIN) * torch.rand(n, 2, generator=generator))
    labels = (points.prod(1) < 0) ^ (torch.rand(n, generator=generator) < wrong)
    return Points(points.to(world.device), labels.long().to(world.device), ("I, III", "II, IV"))


class OneOutput(ReplicaStep):
    """A step of a network whose one output is the probability p of label 1."""

    def gradients(
        self, x: Tensor, labels: Tensor, global_size: int, loss_sum: LossSum, measure: Phases | NoPhases
    ) -> Tensor:
        loss_sum = partial(F.binary_cross_entropy, reduction="sum")
        return super().gradients(x, labels.to(x).unsqueeze(1), global_size, loss_sum, measure)

    def outputs(self, x: Tensor) -> Tensor:
        p = self.forward(x)
        return torch.cat([1 - p, p], 1).log().clamp(min=-100)  # whose cross-entropy is p's binary one


def build(sizes: list[int], penalty: float, seed: int, world: World) -> tuple[MLP, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = MLP(sizes, hidden="relu", output="sigmoid").to(world.device)
    return model, training.sgd(model, lr=0.2, momentum=0.9, weight_decay=penalty)


def compare(flags: Flags, world: World) -> list[dict[str, float]]:
    """Train networks, one without --noise; figures of each, the best by validation loss last."""
    n, wrong, epochs, batch_size = (50, 0.1, 3, 10) if flags.noise else (4000, 0.0, 1, 100)
    train, validation = (draw(k, 3 * flags.seed + i, world, wrong) for i, k in enumerate((n, 1000)))
    test = draw(2500, 3 * flags.seed + 2, world)  # under their true labels
    tried = product((1, 4, 8, 32), (0.0, 1e-3, 1e-2, 1e-1)) if flags.noise else [(30, 0.0)]
    models, rows = {}, []
    for width, penalty in track(list(tried), transient=True, disable=not Console().is_terminal):
        model, optimizer = build([2, width, 1], penalty, flags.seed, world)
        step = OneOutput(model)
        fit = partial(training.fit, epochs=epochs * flags.epochs, batch_size=batch_size, seed=flags.seed)
        last = fit(model, optimizer, train, test, world, step=step)[-1]
        row = {"width": width, "penalty": penalty}
        for name, points in (("train_loss", train), ("validation_loss", validation)):
            row[name], _ = training.evaluate(step, points, world, "cross-entropy")
        rows.append(row | {"test_loss": last.test_loss, "test_accuracy": last.test_accuracy})
        print(" | ".join(f"{name.replace('_', ' ')} {value:<6.4g}" for name, value in rows[-1].items()))
        models[f"width {width}, λ {penalty:g}"] = model
    if flags.plots:
        from torchpar import plots

        plots.save_boundaries(flags.plots / "boundaries.png", models, train[:200])
    return sorted(rows, key=lambda row: -row["validation_loss"])


def main(flags: Flags) -> None:
    start = time.perf_counter()
    with alone(flags.device) as world:
        report.prepare_outputs(world, folders=[flags.plots], files=[flags.metrics])
        rows = compare(flags, world)
    best = rows[-1]
    if flags.noise:
        overfitted = max(rows, key=lambda row: row["validation_loss"] - row["train_loss"])
        for what, row in (("lowest validation loss", best), ("furthest above its training loss", overfitted)):
            losses = f"{row['train_loss']:.3f} in training, {row['validation_loss']:.3f} in validation"
            print(f"{what}: width {row['width']}, λ {row['penalty']:g} ({losses})")
    else:
        network = partial(build, [2, 128, 128, 1], 0.0, flags.seed)
        job = measure.Job(network, partial(draw, 2**15, flags.seed), OneOutput)
        rows = [*show.report(job, flags.processes, flags.sizes, flags.plots), best]
    found = (best["test_accuracy"], best["test_loss"], time.perf_counter() - start)
    print(report.last_line(*found, ranks=1, device=world.device.type))
    if flags.metrics:
        report.write_metrics(flags.metrics, rows)


if __name__ == "__main__":
    cli.main(main, Flags)
