# SPDX-License-Identifier: MIT
"""Width, batch size, learning rate and penalty of a digit classifier, chosen on a validation set.

    python examples/digits_report.py --plots pictures

The last sixth of the training file is the validation set. First, width, batch size B and learning
rate are chosen. An epoch of n samples is n/B steps. With large batches an epoch takes less time,
because the processor is used better. But fewer steps make less progress: the mean of many gradients
is less noisy than the mean of few, and not larger.

Then the best network is trained for more epochs with each λ of the loss −log softmax(y)[label] +
λ/2·‖W‖². With ``--decay-biases`` the biases count in ‖W‖², too. A training loss below a quarter of
the validation loss means over-fitting: more λ. A training loss above the validation loss of a
smaller λ means that both are high: less λ. The test set is used once, for the best one.
"""

import time
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from math import inf
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

from support import cli, console, plots

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from torchpar.data import Samples, load
from torchpar.nn import MLP
from torchpar.parallel import World
from torchpar.parallel.launch.world import join_world
from torchpar.training import Classification, Run, evaluate, sgd

Row = dict[str, Any]  # a choice and its figures after an epoch
CHOICE = ("hidden", "batch_size", "lr", "weight_decay")
CURVES = ("train_loss", "validation_loss", "validation_accuracy")
best = partial(max, key=itemgetter("validation_accuracy"))


@dataclass(kw_only=True)
class Flags(cli.DataFlags):
    """Choose and train a digit classifier."""

    hidden: cli.Sizes = (32, 128)  # Widths to choose from.
    depth: Annotated[int, cli.Bounds(1, 2**16)] = 1  # Hidden layers, all of one width.
    batch_size: cli.Counts = (32, 128, 512)  # Samples per step to choose from.
    lr: cli.Numbers = (0.05, 0.2, 0.8)  # Learning rates at the start to choose from.
    # Values of λ to choose from; the sweep takes the first.
    weight_decay: cli.Numbers = (0.0, 3e-5, 3e-4)
    decay_biases: bool = False  # Count the biases in the penalty λ/2·‖p‖², too.
    sweep_epochs: cli.Count = 2  # Epochs to choose width, batch size and rate by.
    epochs: cli.Count = 10  # Epochs to choose λ by.
    samples: cli.Count | None = None  # Training samples to use at most.
    plots: cli.Plots = None  # Folder for pictures.

    def check(self) -> None:
        super().check()
        widest = max(self.hidden)
        given = f"--hidden {widest} --depth {self.depth}"
        cli.check_memory([784, *[widest] * self.depth, 10], given)


def train(
    choice: Row, epochs: int, flags: Flags, sets: tuple[Samples, Samples], world: World
) -> tuple[MLP, list[Row]]:
    torch.manual_seed(flags.seed)  # networks of the same size start with the same weights
    model = MLP([784, *[choice["hidden"]] * flags.depth, len(sets[0].classes)]).to(world.device)
    optimizer = sgd(model, choice["lr"], 0.9, choice["weight_decay"], flags.decay_biases)
    steps = -(-len(sets[0]) // choice["batch_size"])
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / (epochs * steps))
    task = Classification(*sets, choice["batch_size"], seed=flags.seed)
    with Run(model, optimizer, scheduler, world, task, epochs=epochs) as run:
        for epoch in run.epochs():
            for x, labels, batch_size in run.batches(epoch):
                loss = cross_entropy(model(x), labels, reduction="sum")
                (loss / batch_size).backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                run.end_step(loss_sum=loss)
            run.end_epoch()
    seconds = len(sets[0]) / max(r.samples_per_s for r in run.results)
    cost = {"steps": steps, "ms_per_step": 1000 * seconds / steps, "s_per_epoch": seconds}
    curves = [(r.train_loss, r.test_loss, r.test_accuracy) for r in run.results]
    rows = [dict(zip(CURVES, values, strict=True)) for values in curves]
    return model, [{**choice, **cost, "epoch": i, **row} for i, row in enumerate(rows, 1)]


def sweep(flags: Flags, study: partial[tuple[MLP, list[Row]]]) -> list[Row]:
    """Train with each width, batch size and learning rate, and print the effect of the batch
    size."""
    grid = product(flags.hidden, sorted(flags.batch_size), sorted(flags.lr), flags.weight_decay[:1])
    choices = [dict(zip(CHOICE, values, strict=True)) for values in grid]
    console.print_load()
    study(choices[0], 1)  # not counted: the first run of a process is slow
    swept = [
        study(choice, flags.sweep_epochs)[1][-1] for choice in console.progress(choices, "choices")
    ]
    top = [best(rows) for _, rows in groupby(swept, itemgetter("hidden", "batch_size"))]
    console.print_rows(
        top, columns=(*CHOICE[:3], "validation_accuracy", "steps", "ms_per_step", "s_per_epoch")
    )
    chosen = best(swept)
    rows = [row for row in top if row["hidden"] == chosen["hidden"]]
    if len(rows) > 1:
        ratio = rows[-1]["s_per_epoch"] / rows[0]["s_per_epoch"]
        gain = rows[-1]["validation_accuracy"] - rows[0]["validation_accuracy"]
        print(f"smallest to largest batch: {ratio:.2f}× the time of an epoch, accuracy {gain:+.4f}")
    print(
        f"chosen, as its validation accuracy is the highest: hidden {chosen['hidden']}, batch size "
        f"{chosen['batch_size']}, lr {chosen['lr']:g}"
    )
    return swept


def penalties(
    flags: Flags, study: partial[tuple[MLP, list[Row]]], chosen: Row
) -> list[tuple[MLP, list[Row]]]:
    """Train the chosen network with each λ, and print the change of λ that the losses ask for."""
    watched = console.progress(flags.weight_decay, "values of λ")
    runs = [study(chosen | {"weight_decay": λ}, flags.epochs) for λ in watched]
    lasts = [rows[-1] for _, rows in runs]
    for row in lasts:
        loss, λ = row["train_loss"], row["weight_decay"]
        high = loss > min(
            (r["validation_loss"] for r in lasts if r["weight_decay"] < λ), default=inf
        )
        row["asks_for"] = (
            "more λ" if loss < row["validation_loss"] / 4 else "less λ" if high else "this λ"
        )
    console.print_rows(lasts, columns=("weight_decay", *CURVES, "asks_for"))
    return runs


def draw(path: Path, swept: list[Row], epochs: list[Row]) -> None:
    one_rate = [row for row in swept if row["lr"] == swept[0]["lr"]]
    by_rate = plots.Panel(swept, "lr", ["validation_accuracy"], ["hidden", "batch_size"], log=True)
    by_size = plots.Panel(one_rate, "batch_size", ["s_per_epoch"], ["hidden"], log=True)
    by_epoch = [
        plots.Panel(epochs, "epoch", ys, ["weight_decay"]) for ys in (CURVES[:2], CURVES[2:])
    ]
    with plots.picture(path, (12, 9), rows=2, columns=2) as grid:
        plots.draw_panels(grid, [by_rate, by_size, *by_epoch])


def main(flags: Flags) -> None:
    start = time.perf_counter()
    with join_world(flags.device, alone=True) as world:
        file, test_set = load(flags.dataset, flags.data, world.device)
        rest = len(file) - len(file) // 6  # the others are for validation
        cli.check_samples(flags.samples, rest)
        widest, largest = max(flags.hidden), max(flags.batch_size)
        sizes = [784, *[widest] * flags.depth, 10]
        cli.take_threads(world.device.type, cli.largest_product(sizes, largest))
        study = partial(
            train, flags=flags, sets=(file[:rest][: flags.samples], file[rest:]), world=world
        )
        swept = sweep(flags, study)
        runs = penalties(flags, study, chosen=best(swept))
        model, rows = max(runs, key=lambda run: run[1][-1]["validation_accuracy"])
        loss, outputs = evaluate(model, test_set, world)
    λ = rows[-1]["weight_decay"]
    print(f"weight decay {λ:g} has the highest validation accuracy, and is tested")
    accuracy = (outputs.argmax(1) == test_set.labels).double().mean().item()
    final = rows[-1] | {"test_accuracy": accuracy, "test_loss": loss}
    epochs = [row for _, rows in runs for row in rows]
    console.write_metrics(flags.metrics, [*swept, *epochs, final])
    if flags.plots:
        draw(flags.plots / "digits.png", swept, epochs)
    print(console.last_line(accuracy, loss, time.perf_counter() - start, 1, world.device.type))


if __name__ == "__main__":
    cli.main(main, Flags)
