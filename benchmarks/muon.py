# SPDX-License-Identifier: MIT
"""`torchpar.optim.Muon` beside `torch.optim.Muon`, and beside SGD on MNIST: ``python -m benchmarks.muon``.

The first table is the time of a step of one weight, or of many small ones, in turn with every other
optimizer, each on the same gradients. After the steps the weights must agree, as far as orthogonalising in
bfloat16 lets them; the status is 1 if some do not. The second is what
`examples/train_ddp.py --hidden 512 --epochs 8 --batch-size 32` does with SGD and with Muon, each at its best
rate, in one picture.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.harness import percentiles
from benchmarks.report import provenance, write_csv
from torchpar import cli, data, report, training
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.optim import Muon
from torchpar.parallel.world import World, alone

SHAPES = ((1, 2048, 2048), (1, 1024, 4096), (1, 4096, 1024), (1, 512, 784), (50, 128, 128))
DISTANCE = 0.03  # of the way: bfloat16's roundings of directions, an order less for momenta that are noise
SIZES = (784, 512, 10)
EPOCHS = 8
BATCH_SIZE = 32
RATES = {  # SGD's is the best of 0.05, 0.1, 0.2 and 0.3, Muon's of 0.01, 0.02 and 0.03
    "sgd": {**cli.RATES["sgd"], "lr": 0.1},
    "muon": {**cli.RATES["muon"], "lr": 0.03},
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch.optim.Muon": torch.optim.Muon,
    "torchpar, standard": lambda params: Muon(params, ns="standard"),
    "torchpar, gram": lambda params: Muon(params, ns="gram"),
    "torchpar": Muon,
}
REFERENCE = "torch.optim.Muon"


@dataclass(kw_only=True)
class Flags:
    """Measure Muon."""

    output: Path | None = None
    """Folder for muon.csv and muon.png."""
    rounds: int = 15
    """Timed steps of each optimizer and shape."""
    epochs: int = EPOCHS
    """Passes over the training samples; 0 leaves training out."""
    data: Path = Path(__file__).parents[1] / "examples" / "data"
    """Folder of MNIST, as torchvision's root."""

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("epochs", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} is {getattr(self, name)}, expected at least {least}")


@dataclass(frozen=True)
class Row:
    """A line of the CSV: a step's milliseconds, or an epoch's result."""

    optimizer: str
    weight: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    speedup: float | None = None  # torch.optim.Muon's time over this one's, median over the rounds
    distance: float | None = None  # to torch.optim.Muon's weight after all steps, of the way it went
    epoch: int | None = None
    test_accuracy: float | None = None
    train_loss: float | None = None


def main(flags: Flags) -> None:
    with alone() as world:
        report.prepare_outputs(world, folders=[flags.output], files=[])
        samples = data.load("mnist", flags.data, world) if flags.epochs else None
        rows = [row for shape in SHAPES for row in steps(shape, flags.rounds, world.device)]
        report.print_rows(map(vars, rows), ("optimizer", "weight", "p50_ms", "speedup", "distance"))
        curves = learning(*samples, flags.epochs, world) if samples else []
        if curves:
            report.print_rows(map(vars, curves), ("optimizer", "epoch", "train_loss", "test_accuracy"))
        if flags.output:
            (flags.output / "muon.csv").unlink(missing_ok=True)
            threads = torch.get_num_threads()
            write_csv(
                flags.output / "muon.csv", [*rows, *curves], threads=threads, **provenance(world.device)
            )
            if curves:
                save(flags.output / "muon.png", curves)
    if elsewhere := [
        f"{row.optimizer} of {row.weight}" for row in rows if not (row.distance or 0) < DISTANCE
    ]:
        sys.exit(f"benchmarks.muon: {', '.join(elsewhere)} went another way than torch.optim.Muon")


def steps(shape: tuple[int, int, int], rounds: int, device: torch.device) -> list[Row]:
    """Time a step of each optimizer on ``shape``, so many weights of rows × columns (float32), in turn."""
    count, *size = shape
    torch.manual_seed(0)
    start = torch.randn(shape, device=device)
    weights = {name: [torch.nn.Parameter(w.clone()) for w in start] for name in OPTIMIZERS}
    optimizers = {name: make(weights[name]) for name, make in OPTIMIZERS.items()}
    times: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    terminal = Console(stderr=True)
    label = "x".join(map(str, size))
    label = f"{count} of {label}" if count > 1 else label
    for _ in track(range(rounds + 1), label, console=terminal, disable=not terminal.is_terminal):
        gradients = torch.randn(shape, device=device)
        for name, optimizer in optimizers.items():
            for weight, gradient in zip(weights[name], gradients, strict=True):
                weight.grad = gradient.clone()
            times[name].append(_milliseconds(optimizer.step, device))
    ended = {name: torch.stack([w.detach() for w in weights[name]]) for name in OPTIMIZERS}
    rows = []
    for name, samples in times.items():
        samples = samples[1:]  # the first step is a warm-up
        p20, p50, p80 = percentiles(samples)
        ratio = percentiles([r / s for r, s in zip(times[REFERENCE][1:], samples, strict=True)])[1]
        distance = _relative(ended[name] - ended[REFERENCE], ended[REFERENCE] - start)
        rows.append(Row(name, label, p20, p50, p80, ratio, distance))
    return rows


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(10_000_000)  # the queue fills meanwhile, so that launches are not in the time
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _relative(difference: Tensor, way: Tensor) -> float:
    return float(difference.norm() / way.norm())


def learning(train: data.Samples, test: data.Samples, epochs: int, world: World) -> list[Row]:
    """Train a network on MNIST with SGD and with Muon."""
    rows = []
    made: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": training.sgd, "muon": training.muon}
    for name, make in made.items():
        torch.manual_seed(0)
        model = MLP(SIZES).to(world.device)
        with report.reporting(world, epochs, len(train), metrics=None) as shown:
            results = training.fit(
                model,
                make(model, **RATES[name]),
                train,
                test,
                world,
                epochs=epochs,
                batch_size=BATCH_SIZE,
                on_step=shown.step,
            )
        label = "-".join(map(str, SIZES))
        rows += [
            Row(name, label, epoch=r.epoch, test_accuracy=r.test_accuracy, train_loss=r.train_loss)
            for r in results
        ]
    return rows


def save(path: Path, curves: list[Row]) -> None:
    """Draw the test accuracy and the training loss of both optimizers over the epochs."""
    from torchpar.plots import Panel, save_panels

    rows = [{**vars(row), "error_%": 100 * (1 - (row.test_accuracy or 0))} for row in curves]
    save_panels(
        path,
        [
            Panel(rows, "epoch", ["error_%"], ["optimizer"]),
            Panel(rows, "epoch", ["train_loss"], ["optimizer"]),
        ],
    )


if __name__ == "__main__":
    cli.main(main, Flags)
