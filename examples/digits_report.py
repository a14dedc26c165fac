# SPDX-License-Identifier: MIT
"""Width, batch size, rate and penalty of a digit classifier, chosen on a validation set.

    python examples/digits_report.py --plots pictures

The last sixth of the training file is held back to choose by. Width, batch size B and rate come first. An
epoch of n samples is n/B steps. A large batch uses the processor better, and the epoch ends sooner; but a
mean over many gradients is less noisy than one over few, not longer, and fewer steps lead less far.

The best is trained for longer with each λ of the loss −log softmax(y)[label] + λ/2·‖W‖². Training loss far
below validation loss (a quarter): samples are learnt by heart, more λ. Both high (training loss above what
a smaller λ has on samples it never saw): less λ. The best of those meets the test set, once.
"""

import time
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from math import inf
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from torchpar import cli, report, training
from torchpar.data import Dataset, Samples, load
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel.step import ReplicaStep
from torchpar.parallel.world import World, alone

Row = dict[str, Any]  # a choice, and what it had come to after an epoch
Trained = tuple[MLP, list[Row]]
CHOICE = ("hidden", "batch_size", "lr", "weight_decay")
CURVES = ("train_loss", "validation_loss", "validation_accuracy")
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
        if not all(getattr(self, name) for name in CHOICE):
            raise ConfigError("--hidden, --batch-size, --lr and --weight-decay take one value or more each")


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
    return model, rows


def sweep(flags: Flags, study: partial[Any]) -> list[Row]:
    """What every width, batch size and rate has come to; prints what the batch size does."""
    grid = product(flags.hidden, sorted(flags.batch_size), sorted(flags.lr), flags.weight_decay[:1])
    choices = [dict(zip(CHOICE, values, strict=True)) for values in grid]
    study(choices[0], 1)  # the first run of a process is slower than the others
    swept = [study(choice, flags.sweep_epochs)[1][-1] for choice in watched(choices, "sweep")]
    top = [max(rows, key=accuracy) for _, rows in groupby(swept, itemgetter("hidden", "batch_size"))]
    report.print_rows(top, (*CHOICE[:3], "validation_accuracy", "steps", "ms_per_step", "s_per_epoch"))
    rows = [row for row in top if row["hidden"] == max(swept, key=accuracy)["hidden"]]
    ratio, gain = rows[-1]["s_per_epoch"] / rows[0]["s_per_epoch"], accuracy(rows[-1]) - accuracy(rows[0])
    print(f"smallest to largest batch: {ratio:.2f}× the time of an epoch, accuracy {gain:+.4f}")
    return swept


def penalties(flags: Flags, study: partial[Any], chosen: Row) -> list[Trained]:
    """The chosen network with every λ; prints what the losses ask for."""
    runs = [study(chosen | {"weight_decay": λ}, flags.epochs) for λ in watched(flags.weight_decay, "λ")]
    lasts = [rows[-1] for _, rows in runs]
    for row in lasts:
        loss, λ = row["train_loss"], row["weight_decay"]
        high = loss > min((r["validation_loss"] for r in lasts if r["weight_decay"] < λ), default=inf)
        row["asks_for"] = "more λ" if loss < row["validation_loss"] / 4 else "less λ" if high else "this λ"
    report.print_rows(lasts, ("weight_decay", *CURVES, "asks_for"))
    return runs


def final_test(model: MLP, samples: Samples, world: World) -> Row:
    loss, outputs = training.evaluate(ReplicaStep(model), samples, world, "cross-entropy")
    return {"test_accuracy": (outputs.argmax(1) == samples.labels).double().mean().item(), "test_loss": loss}


def draw(path: Path, swept: list[Row], epochs: list[Row]) -> None:
    from torchpar import plots

    one_rate = [row for row in swept if row["lr"] == swept[0]["lr"]]
    panels = [
        plots.Panel(swept, "lr", ["validation_accuracy"], ["hidden", "batch_size"], log=True),
        plots.Panel(one_rate, "batch_size", ["s_per_epoch"], ["hidden"], log=True),
        *(plots.Panel(epochs, "epoch", ys, ["weight_decay"]) for ys in (CURVES[:2], CURVES[2:])),
    ]
    plots.save_panels(path, panels)


def main(flags: Flags) -> None:
    start = time.perf_counter()
    with alone(flags.device) as world:
        report.prepare_outputs(world, folders=[flags.plots], files=[flags.metrics])
        file, test_set = load(flags.dataset, flags.data, world)
        rest = len(file) - len(file) // 6
        study = partial(train, flags=flags, sets=(file[:rest][: flags.samples], file[rest:]), world=world)
        swept = sweep(flags, study)
        runs = penalties(flags, study, chosen=max(swept, key=accuracy))
        model, rows = max(runs, key=lambda run: accuracy(run[1][-1]))
        final = rows[-1] | final_test(model, test_set, world)
    epochs = [row for _, rows in runs for row in rows]
    if flags.metrics:
        report.write_metrics(flags.metrics, [*swept, *epochs, final])
    if flags.plots:
        draw(flags.plots / "digits.png", swept, epochs)
    found = (final["test_accuracy"], final["test_loss"], time.perf_counter() - start)
    print(report.last_line(*found, ranks=1, device=world.device.type))


if __name__ == "__main__":
    cli.main(main, Flags)
