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
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from torchpar import cli, report, training
from torchpar.data import Dataset, Samples, load
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel.step import ReplicaStep
from torchpar.parallel.world import World, join_world
from torchpar.progress import EpochResult

Row = dict[str, Any]  # a choice, and what it had come to after an epoch
Trained = tuple[MLP, list[EpochResult], list[Row]]
accuracy = itemgetter("validation_accuracy")


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Choose and train a digit classifier."""

    hidden: tuple[int, ...] = (32, 128)  # Widths to choose from.
    depth: int = 1  # Hidden layers, all of one width.
    batch_sizes: tuple[int, ...] = (32, 128, 512)  # Samples per step to choose from.
    lrs: tuple[float, ...] = (0.05, 0.2, 0.8)  # Learning rates at the start to choose from.
    weight_decays: tuple[float, ...] = (0.0, 3e-5, 3e-4)  # λ to choose from; the sweep takes the first.
    sweep_epochs: int = 2  # Epochs to choose width, batch size and rate by.
    epochs: int = 10  # Epochs to choose λ by.
    samples: int | None = None  # Training samples to use at most.
    dataset: Dataset = "mnist"  # What to learn.
    data: Path = Path(__file__).parent / "data"  # Folder of the data sets, as torchvision's root.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sweep_epochs < 1:
            raise ConfigError(f"--sweep-epochs is {self.sweep_epochs}, expected at least 1")
        for name, least in {"hidden": 1, "batch_sizes": 1, "lrs": 0, "weight_decays": 0}.items():
            values, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if not values or not all(least <= value < float("inf") for value in values):
                raise ConfigError(f"{flag} is {values}, expected one or more numbers of at least {least}")


def train(choice: Row, epochs: int, flags: Flags, sets: tuple[Samples, Samples], world: World) -> Trained:
    torch.manual_seed(flags.seed)  # networks of one size start alike
    model = MLP([784, *[choice["hidden"]] * flags.depth, len(sets[0].classes)]).to(world.device)
    optimizer = training.sgd(model, choice["lr"], momentum=0.9, weight_decay=choice["weight_decay"])
    size, n = choice["batch_size"], len(sets[0])
    results = training.fit(model, optimizer, *sets, world, epochs=epochs, batch_size=size, seed=flags.seed)
    steps, seconds = -(-n // size), n / max(r.samples_per_s for r in results)
    cost = {"steps": steps, "ms_per_step": 1000 * seconds / steps, "s_per_epoch": seconds}
    rows = [
        {**choice, **cost, "epoch": r.epoch, "train_loss": r.train_loss}
        | {"validation_loss": r.test_loss, "validation_accuracy": r.test_accuracy}
        for r in results
    ]
    return model, results, rows


def show(rows: list[Row], *columns: str) -> None:
    table = Table(*(column.replace("_", " ") for column in columns))
    for row in rows:
        table.add_row(*(f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    Console().print(table)


def draw(axes: Any, rows: list[Row], x: str, y: str, *by: str, style: str = "o-") -> None:
    for key, line in groupby(rows, lambda row: [f"{name} {row[name]}" for name in by]):
        xs, ys = zip(*((row[x], row[y]) for row in line), strict=True)
        axes.plot(xs, ys, style, label=", ".join([y, *key]).replace("_", " "))
    axes.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    axes.legend(fontsize=8, framealpha=0.5)


def main(flags: Flags) -> None:
    with join_world(flags.device) as world:
        if world.world_size > 1:
            raise ConfigError(f"{world.world_size} ranks were started, expected 1; start it without torchrun")
        report.prepare_outputs(world, folders=[flags.plots], files=[flags.metrics])
        file, test_set = load(flags.dataset, flags.data, world)
        rest = len(file) - len(file) // 6
        study = partial(train, flags=flags, sets=(file[:rest][: flags.samples], file[rest:]), world=world)
        bar = partial(track, transient=True, disable=not Console().is_terminal)
        grid = product(flags.hidden, sorted(flags.batch_sizes), sorted(flags.lrs), flags.weight_decays[:1])
        choices = [dict(zip(("hidden", "batch_size", "lr", "weight_decay"), v, strict=True)) for v in grid]
        swept = [study(choice, flags.sweep_epochs)[2][-1] for choice in bar(choices, "sweep")]
        groups = groupby(swept, itemgetter("hidden", "batch_size"))
        top, chosen = [max(rows, key=accuracy) for _, rows in groups], max(swept, key=accuracy)
        show(top, "hidden", "batch_size", "lr", "validation_accuracy", "steps", "ms_per_step", "s_per_epoch")
        alike = [row for row in top if row["hidden"] == chosen["hidden"]]
        time = alike[-1]["s_per_epoch"] / alike[0]["s_per_epoch"]
        gain = accuracy(alike[-1]) - accuracy(alike[0])
        print(f"smallest to largest batch: {time:.2f}× the time of an epoch, accuracy {gain:+.4f}")

        runs = [study(chosen | {"weight_decay": v}, flags.epochs) for v in bar(flags.weight_decays, "λ")]
        lasts = [rows[-1] for _, _, rows in runs]
        lowest = min(row["validation_loss"] for row in lasts)
        for row in lasts:
            by_heart, high = row["train_loss"] < row["validation_loss"] / 4, row["train_loss"] > lowest
            row["asks_for"] = "more λ" if by_heart else "less λ" if high else "this λ"
        show(lasts, "weight_decay", "train_loss", "validation_loss", "validation_accuracy", "asks_for")
        model, results, rows = max(runs, key=lambda run: accuracy(run[2][-1]))
        loss, outputs = training.evaluate(ReplicaStep(model), test_set, world, "cross-entropy")
        right = (outputs.argmax(1) == test_set.labels).sum().item() / len(test_set)
        found: Row = {"test_accuracy": right, "test_loss": loss}
        epochs = [row for run in runs for row in run[2]]
        if flags.metrics:
            report.write_metrics(flags.metrics, [*swept, *epochs, rows[-1] | found])
        if flags.plots:
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
            figure.savefig(flags.plots / "digits.png", dpi=120)
        print(report.summary([*results[:-1], replace(results[-1], **found)]))


if __name__ == "__main__":
    cli.main(main, Flags)
