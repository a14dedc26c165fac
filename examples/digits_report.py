# SPDX-License-Identifier: MIT
"""Width, batch size, rate and penalty of a digit classifier, chosen on a validation set.

    python examples/digits_report.py --plots pictures

The last sixth of the training file is held back to choose by. Width, batch size B and rate come first. An
epoch of n samples is n/B steps. A large batch uses the processor better, and the epoch ends sooner; but a
mean over many gradients is less noisy than one over few, not longer, and fewer steps lead less far.

The best is trained for longer with each λ of the loss −log softmax(y)[label] + λ/2·‖W‖². Training loss far
below validation loss (a quarter): samples are learnt by heart, more λ. Both high (training loss above what
another λ has on samples it never saw): less λ. The best of those meets the test set, once.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product
from math import isfinite
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from torchpar import cli, report, training
from torchpar.data import Dataset, Samples, load
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel.step import ReplicaStep
from torchpar.parallel.world import World, alone
from torchpar.progress import EpochResult

Row = dict[str, Any]  # a choice, and what it had come to after an epoch
CHOICE = ("hidden", "batch_size", "lr", "weight_decay")
accuracy = itemgetter("validation_accuracy")
watched = partial(track, transient=True, disable=not Console().is_terminal)


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Choose and train a digit classifier."""

    hidden: tuple[int, ...] = (32, 128)  # Widths to choose from.
    depth: int = 1  # Hidden layers, all of one width.
    batch_size: tuple[int, ...] = (32, 128, 512)  # Samples per step to choose from.
    lr: tuple[float, ...] = (0.05, 0.2, 0.8)  # Learning rates at the start to choose from.
    weight_decay: tuple[float, ...] = (0.0, 3e-5, 3e-4)  # λ to choose from; the sweep takes the first.
    sweep_epochs: int = 2  # Epochs to choose width, batch size and rate by.
    epochs: int = 10  # Epochs to choose λ by.
    samples: int | None = None  # Training samples to use at most.
    dataset: Dataset = "mnist"  # What to learn.
    data: Path = Path(__file__).parent / "data"  # Folder of the data sets, as torchvision's root.

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in CHOICE:
            if not getattr(self, name):
                raise ConfigError(f"--{name.replace('_', '-')} has no value, expected one or more")
        if self.sweep_epochs < 1:
            raise ConfigError(f"--sweep-epochs is {self.sweep_epochs}, expected at least 1")


class Run(NamedTuple):
    """A network that was trained, and what it had come to after each epoch."""

    model: MLP
    results: list[EpochResult]
    rows: list[Row]


def train(choice: Row, epochs: int, flags: Flags, sets: tuple[Samples, Samples], world: World) -> Run:
    torch.manual_seed(flags.seed)  # networks of one size start alike
    model = MLP([784, *[choice["hidden"]] * flags.depth, len(sets[0].classes)]).to(world.device)
    optimizer = training.sgd(model, choice["lr"], momentum=0.9, weight_decay=choice["weight_decay"])
    size, n = choice["batch_size"], len(sets[0])
    results = training.fit(model, optimizer, *sets, world, epochs=epochs, batch_size=size, seed=flags.seed)
    if not isfinite(results[-1].train_loss):
        raise ConfigError(f"training diverged with {choice}; take a smaller rate, or a smaller penalty")
    steps, seconds = -(-n // size), n / max(r.samples_per_s for r in results)
    cost = {"steps": steps, "ms_per_step": 1000 * seconds / steps, "s_per_epoch": seconds}
    rows = [
        {**choice, **cost, "epoch": r.epoch, "train_loss": r.train_loss}
        | {"validation_loss": r.test_loss, "validation_accuracy": r.test_accuracy}
        for r in results
    ]
    return Run(model, results, rows)


def sweep(flags: Flags, study: partial[Run]) -> list[Row]:
    """What every width, batch size and rate has come to, with the first λ."""
    grid = product(flags.hidden, sorted(flags.batch_size), sorted(flags.lr), flags.weight_decay[:1])
    choices = [dict(zip(CHOICE, values, strict=True)) for values in grid]
    return [study(choice, flags.sweep_epochs).rows[-1] for choice in watched(choices, "sweep")]


def compare_batch_sizes(swept: list[Row]) -> list[Row]:
    """Print the best rate's row of each width and batch size, and what the batch size does."""
    top = [max(rows, key=accuracy) for _, rows in groupby(swept, itemgetter("hidden", "batch_size"))]
    columns = ("hidden", "batch_size", "lr", "validation_accuracy", "steps", "ms_per_step", "s_per_epoch")
    report.print_rows(top, columns)
    small, *_, large = [row for row in top if row["hidden"] == max(swept, key=accuracy)["hidden"]] * 2
    time, gain = large["s_per_epoch"] / small["s_per_epoch"], accuracy(large) - accuracy(small)
    print(f"smallest to largest batch: {time:.2f}× the time of an epoch, accuracy {gain:+.4f}")
    return top


def penalise(flags: Flags, study: partial[Run], chosen: Row) -> list[Run]:
    """The chosen network with each λ; prints what the losses ask for."""
    choices = [{name: chosen[name] for name in CHOICE} | {"weight_decay": λ} for λ in flags.weight_decay]
    runs = [study(choice, flags.epochs) for choice in watched(choices, "λ")]
    lasts = [run.rows[-1] for run in runs]
    lowest = min(row["validation_loss"] for row in lasts)
    for row in lasts:
        by_heart, high = row["train_loss"] < row["validation_loss"] / 4, row["train_loss"] > lowest
        row["asks_for"] = "more λ" if by_heart else "less λ" if high else "this λ"
    columns = ("weight_decay", "train_loss", "validation_loss", "validation_accuracy", "asks_for")
    report.print_rows(lasts, columns)
    return runs


def test(run: Run, samples: Samples, world: World) -> EpochResult:
    """The run's last result, with the figures of the test set."""
    loss, outputs = training.evaluate(ReplicaStep(run.model), samples, world, "cross-entropy")
    right = (outputs.argmax(1) == samples.labels).sum().item() / len(samples)
    return replace(run.results[-1], test_loss=loss, test_accuracy=right)


def draw(axes: Any, rows: list[Row], x: str, y: str, *by: str, style: str = "o-") -> None:
    for key, line in groupby(rows, lambda row: [f"{name} {row[name]}" for name in by]):
        xs, ys = zip(*((row[x], row[y]) for row in line), strict=True)
        axes.plot(xs, ys, style, label=", ".join([y, *key]).replace("_", " "))
    axes.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    axes.legend(fontsize=8, framealpha=0.5)


def save_pictures(path: Path, swept: list[Row], top: list[Row], epochs: list[Row]) -> None:
    from matplotlib.figure import Figure

    figure = Figure((12, 8), layout="constrained")
    (by_rate, by_size), (losses, accuracies) = figure.subplots(2, 2)
    draw(by_rate, swept, "lr", "validation_accuracy", "hidden", "batch_size")
    draw(by_size, top, "batch_size", "s_per_epoch", "hidden")
    draw(losses, epochs, "epoch", "train_loss", "weight_decay", style="--")
    losses.set_prop_cycle(None)
    draw(losses, epochs, "epoch", "validation_loss", "weight_decay", style="-")
    draw(accuracies, epochs, "epoch", "validation_accuracy", "weight_decay")
    losses.set(ylabel="loss")
    by_size.set(ylim=(0, None))
    by_rate.set_xscale("log", base=2)
    by_size.set_xscale("log", base=2)
    figure.savefig(path, dpi=120)


def main(flags: Flags) -> None:
    with alone(flags.device) as world:
        report.prepare_outputs(world, folders=[flags.plots], files=[flags.metrics])
        file, test_set = load(flags.dataset, flags.data, world)
        rest = len(file) - len(file) // 6
        study = partial(train, flags=flags, sets=(file[:rest][: flags.samples], file[rest:]), world=world)
        swept = sweep(flags, study)
        top = compare_batch_sizes(swept)
        runs = penalise(flags, study, chosen=max(swept, key=accuracy))
        best = max(runs, key=lambda run: accuracy(run.rows[-1]))
        final = test(best, test_set, world)
    epochs = [row for run in runs for row in run.rows]
    if flags.metrics:
        found = {"test_accuracy": final.test_accuracy, "test_loss": final.test_loss}
        report.write_metrics(flags.metrics, [*swept, *epochs, best.rows[-1] | found])
    if flags.plots:
        save_pictures(flags.plots / "digits.png", swept, top, epochs)
    print(report.summary([*best.results[:-1], final]))


if __name__ == "__main__":
    cli.main(main, Flags)
