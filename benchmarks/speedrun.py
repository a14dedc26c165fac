# SPDX-License-Identifier: MIT
"""Train an MLP on MNIST in as few seconds as possible: ``python -m benchmarks run speedrun``.

Prints the seconds and the accuracies of the records, or of other recipes, over 20 seeds.
docs/speedrun.md has the rules, and the way to enter a recipe. Recipes take turns, seed by seed; the
first turn, with seed 0, warms up. The clock runs while a network is trained. The images are in
memory as uint8 when it starts.
"""

import runpy
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from statistics import mean, pstdev
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from torchpar import data, training
from torchpar.data import Samples
from torchpar.errors import ConfigError, DivergedError, writing
from torchpar.nn import MLP, Hidden
from torchpar.ops.processor import has_bfloat16
from torchpar.parallel.launch.world import World
from torchpar.training.fused import FusedGradients

from .digits import DATA, Digits
from .flags import Command, require, run
from .processes import current_world, start_ranks
from .results import CORES, Result, Table, markdown, number, print_cells, print_failures
from .timing import CPU, take_turns

THREADS = 2  # of all ranks
SEEDS = 20
VALIDATION = 50_000  # the training images from here on score what is being chosen
QUICK = 2_000  # images
# Pixels by which the part that is kept moves: not at all in the last epoch, to the right in the one
# before.
SHIFTS = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)]


def has_fast_bfloat16() -> bool:
    """Return True if this CPU has instructions for bfloat16, whose products are faster than
    float32's."""
    return has_bfloat16() and bool(torch.cpu._is_avx512_bf16_supported())


class Trainable(Protocol):
    """A recipe of any kind. Each network takes the memory of the one before.

    Attributes:
        name: in tables.
        change: from the recipe before.
    """

    name: str
    change: str

    def prepare(self, samples: Samples, world: World) -> None:
        """Compile and allocate; compute nothing from ``samples``, the training images. No clock
        runs.

        ``world``'s ranks share each batch.
        """

    def train(self, seed: int) -> None:
        """Train a new network. The clock runs."""

    def outputs(self, samples: Samples) -> Tensor:
        """Return the outputs ``(n, classes)`` of that network for images ``(n, 28, 28)`` uint8."""
        ...


@dataclass(kw_only=True, eq=False)
class Recipe:
    """A `Trainable`: the settings of a training of a `torchpar.nn.MLP`, and the loop that follows
    them."""

    name: str  # in tables
    change: str  # from the recipe before
    epochs: int
    batch_size: int = 128
    hidden: tuple[int, ...] = (512,)  # widths of the hidden layers
    activation: Hidden = "relu"
    optimizer: Literal["adam", "muon"] = "adam"  # "muon": for the weights, and SGD for the biases
    lr: float = 1e-3  # the highest
    momentum: float = 0.8  # of Muon and SGD
    ns_steps: int = 5  # iterations of Newton–Schulz in a step of Muon
    warmup: float = 0.0  # the part of the steps in which the rate rises to ``lr``
    decay: bool = False  # let the rate fall linearly to 0 afterwards
    fused: bool = False  # compute gradients by hand, else by autograd
    # Of the images and of the products; another one needs ``fused``. On a processor without
    # instructions for bfloat16, it is float32.
    dtype: torch.dtype = torch.float32
    crop: int = 0  # pixels to leave out on each side of an image
    pool: int = 1  # side of the squares of pixels that are averaged to one
    shift: bool = False  # move the images in each epoch, as `SHIFTS` says; needs a ``crop``
    label_smoothing: float = 0.0
    # Decay of a moving average of the parameters, which is then scored; 0 for none.
    average: float = 0.0

    def but(self, name: str, change: str, **settings: Any) -> "Recipe":
        """The recipe with other settings."""
        return replace(self, name=name, change=change, **settings)

    def prepare(self, samples: Samples, world: World) -> None:
        if not self.fused and (world.world_size > 1 or self.dtype != torch.float32):
            raise ConfigError(
                f"{self.name} computes gradients by autograd, here on one rank and in float32 "
                "alone; set fused, or take --ranks 1 and float32"
            )
        if self.dtype == torch.bfloat16 and world.device.type == "cpu" and not has_fast_bfloat16():
            self.dtype = torch.float32
        self.raw, self.share = samples, world.share
        shape, device = self.pooled(samples[:1]).features.shape[1:], samples.labels.device
        features = torch.empty(len(samples), *shape, dtype=self.dtype, device=device)
        self.samples = Samples(features, samples.labels, samples.classes)
        sizes = (shape.numel(), *self.hidden, len(samples.classes))
        self.model = MLP(sizes, self.activation, device=device)
        self.scored: torch.nn.Module = self.model
        if self.fused:
            self.gradients = FusedGradients(self.model, world, self.label_smoothing, self.dtype)
        self.update: Optimizer
        if self.optimizer == "adam":
            self.update = torch.optim.Adam(self.model.parameters(), self.lr)
        else:
            steps = self.ns_steps
            self.update = training.muon(
                self.model, self.lr, self.momentum, weight_decay=0, ns_steps=steps
            )
        self.lrs = [group["lr"] for group in self.update.param_groups]
        self.take_step = training.graphed(self.step, self.update)  # on a GPU one launch

    def train(self, seed: int) -> None:
        torch.manual_seed(seed)
        for layer in self.model.layers:
            layer.reset_parameters()  # type: ignore[operator]
        for state in self.update.state.values():
            for value in state.values():
                value.zero_()
        if self.average:
            self.scored = average = AveragedModel(
                self.model, multi_avg_fn=get_ema_multi_avg_fn(self.average)
            )
        steps, step = self.epochs * -(-len(self.raw) // self.batch_size), count()
        for epoch in range(1, self.epochs + 1):
            if epoch == 1 or self.shift:
                shift = SHIFTS[(self.epochs - epoch) % len(SHIFTS)] if self.shift else (0, 0)
                self.samples.features.copy_(self.pooled(self.raw, shift).features)
            for batch in data.batches(
                self.samples, self.batch_size, seed=seed, epoch=epoch, share=self.share
            ):
                factor = self.lr_factor(next(step), steps)
                for group, lr in zip(self.update.param_groups, self.lrs, strict=True):
                    group["lr"] = lr * factor
                self.take_step(*batch)
                if self.average:
                    average.update_parameters(self.model)

    def outputs(self, samples: Samples) -> Tensor:
        x = self.pooled(samples).inputs(slice(None)).float()
        return self.scored(x)  # type: ignore[no-any-return]

    def pooled(self, samples: Samples, shift: tuple[int, int] = (0, 0)) -> Samples:
        return samples.pooled(self.crop, self.pool, shift=shift, dtype=self.dtype)

    def lr_factor(self, step: int, steps: int) -> float:
        """Return the learning rate of step 0, 1, … relative to ``lr``."""
        rising = self.warmup * steps
        if step < rising:
            return min((step + 1) / rising, 1.0)
        return (steps - step) / (steps - rising) if self.decay else 1.0

    def step(self, x: Tensor, labels: Tensor, global_size: int) -> None:
        if self.fused:
            self.gradients(x, labels, global_size)
        else:
            smoothing = self.label_smoothing
            loss = cross_entropy(self.model(x), labels, reduction="sum", label_smoothing=smoothing)
            (loss / global_size).backward()
        self.update.step()
        self.update.zero_grad()


class Tutorial:
    """The script that most tutorials teach: a DataLoader with transforms, layers of torch.nn, and
    Adam."""

    name, change = "tutorial", "DataLoader, ToTensor, torch.nn, Adam"

    def prepare(self, samples: Samples, world: World) -> None:
        if world.world_size > 1:
            raise ConfigError("the tutorial script is one process; take --ranks 1")
        self.digits = Digits(samples.to("cpu"))

    def train(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(784, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10)
        )
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        loader = DataLoader(self.digits, batch_size=128, shuffle=True)
        for _ in range(10):
            for images, labels in loader:
                optimizer.zero_grad()
                cross_entropy(self.model(images), labels).backward()
                optimizer.step()

    def outputs(self, samples: Samples) -> Tensor:
        return self.model(samples.features.cpu() / 255)  # type: ignore[no-any-return]


# They were chosen by the last 10,000 training images, on which none of them was trained
# (``--validate``).
change = "one tensor of images, `torchpar.nn.MLP`; 8 epochs, not 10"
RECIPES = [Recipe(name="in-memory", change=change, epochs=8)]


def then(name: str, change: str, **settings: Any) -> None:
    """Add the last recipe with other settings."""
    RECIPES.append(RECIPES[-1].but(name, change, **settings))


then("by-hand", "gradients by hand, not autograd", fused=True)
then("falling-rate", "a rate of 0.002 that falls to 0; 5 epochs", decay=True, lr=0.002, epochs=5)
change = "Muon for the weights; batches of 512, 2 epochs"
then("muon", change, optimizer="muon", lr=0.1, batch_size=512, epochs=2)
then("pixels", "11 × 11 pixels: 3 less on each side, then averages of 2 × 2", crop=3, pool=2)
then("smoothing", "label smoothing of 0.1", label_smoothing=0.1)
change = "batches of 1536, a rate of 0.3; 320 units, not 512"
then("large-batches", change, batch_size=1536, lr=0.3, hidden=(320,))
then("bfloat16", "products in bfloat16", dtype=torch.bfloat16)
then("record-98.0", "3 iterations of Newton–Schulz, not 5", ns_steps=3)
change = "6 epochs, each with the images at another place; 512 units"
then("record-98.7", change, shift=True, hidden=(512,), epochs=6)
LADDER: list[Trainable] = [Tutorial(), *RECIPES]
RECORD_98, RECORD_98_7 = RECIPES[-2:]
# For GPUs, where more units cost little.
RECORD_99 = RECORD_98_7.but("record-99.0", "18 epochs; 1024 units", hidden=(1024,), epochs=18)
TRIED = [  # the 98.0% record with another choice
    RECORD_98.but("sigmoid", "sigmoid layers, a rate of 1", activation="sigmoid", lr=1.0),
    RECORD_98.but("28x28", "all pixels", crop=0, pool=1),
    RECORD_98.but("14x14", "14 × 14 pixels: averages of 2 × 2 alone", crop=0),
    RECORD_98.but("10x10", "10 × 10 pixels: 4 less on each side", crop=4),
    RECORD_98.but("no-smoothing", "no label smoothing", label_smoothing=0.0),
    RECORD_98.but("two-iterations", "2 iterations of Newton–Schulz", ns_steps=2),
    RECORD_98.but("two-layers", "two hidden layers of 256", hidden=(256, 256)),
    RECORD_98.but("one-epoch", "1 epoch in batches of 768", epochs=1, batch_size=768),
    RECORD_98.but("larger-batches", "batches of 3072, a rate of 0.4", batch_size=3072, lr=0.4),
    RECORD_98.but("warm-up", "the rate rises in the first fifth of the steps", warmup=0.2),
    RECORD_98.but("averaged", "an exponential moving average of the weights", average=0.9),
    RECORD_98.but("adam", "Adam, a rate of 0.01", optimizer="adam", lr=0.01),
    RECORD_98.but("shifted", "the images are moved in the first epoch", shift=True),
]
# The first training of README, whose loop is examples/train_ddp.py. Here the gradients are computed
# by hand, which makes a step faster.
LESSON = Recipe(
    name="train_ddp",
    change="the defaults of examples/train_ddp.py",
    activation="sigmoid",
    hidden=(512,),
    epochs=3,
    batch_size=1024,
    optimizer="muon",
    lr=0.5,
    momentum=0.8,
    decay=True,
    label_smoothing=0.05,
    crop=3,
    pool=2,
    fused=True,
)
LESSON_TRIED = [  # the same with another choice
    LESSON.but("train_ddp-relu", "ReLU layers, a rate of 0.2", activation="relu", lr=0.2),
    LESSON.but("train_ddp-tanh", "tanh layers, a rate of 0.2", activation="tanh", lr=0.2),
    LESSON.but(
        "train_ddp-maxout", "maxout layers, a rate of 0.2", activation="maxout", lr=0.2, fused=False
    ),
    LESSON.but("train_ddp-320", "320 units", hidden=(320,)),
    LESSON.but("train_ddp-1024", "1024 units", hidden=(1024,)),
    LESSON.but("train_ddp-two-layers", "two hidden layers of 256", hidden=(256, 256)),
    LESSON.but("train_ddp-rate-0.3", "a rate of 0.3", lr=0.3),
    LESSON.but("train_ddp-rate-0.4", "a rate of 0.4", lr=0.4),
    LESSON.but("train_ddp-rate-0.7", "a rate of 0.7", lr=0.7),
    LESSON.but("train_ddp-momentum", "a momentum of 0.9", momentum=0.9),
    LESSON.but("train_ddp-2-epochs", "2 epochs", epochs=2),
    LESSON.but("train_ddp-4-epochs", "4 epochs, a rate of 0.4", epochs=4, lr=0.4),
    LESSON.but("train_ddp-768-samples", "batches of 768", batch_size=768),
    LESSON.but("train_ddp-1536-samples", "batches of 1536", batch_size=1536),
    LESSON.but("train_ddp-no-smoothing", "no label smoothing", label_smoothing=0.0),
    LESSON.but("train_ddp-smoothing", "label smoothing of 0.1", label_smoothing=0.1),
    LESSON.but("train_ddp-14x14", "14 × 14 pixels: averages of 2 × 2 alone", crop=0),
    LESSON.but("train_ddp-10x10", "10 × 10 pixels: 4 less on each side", crop=4),
]
GROUPS: dict[str, list[Trainable]] = {
    "records": [RECORD_98, RECORD_98_7],
    "ladder": LADDER,
    "tried": [RECORD_98, *TRIED],
    "lesson": [LESSON, *LESSON_TRIED],
    "gpu": [RECORD_98, RECORD_99],
}


@cache
def find(name: str) -> Trainable:
    """Return the recipe of this name, or the ``recipe`` that a Python file of this name defines.

    Raises:
        ConfigError: there is none.
    """
    known = {recipe.name: recipe for group in GROUPS.values() for recipe in group}
    if name in known:
        return known[name]
    if not name.endswith(".py"):
        expected = ", ".join([*GROUPS, *known])
        raise ConfigError(f"no recipe is called {name!r}, expected a .py file or one of {expected}")
    try:
        defined: dict[str, Trainable] = runpy.run_path(name)
    except (Exception, SystemExit) as e:
        raise ConfigError(f"{name} cannot be read ({type(e).__name__}: {e})") from e
    recipe = defined.get("recipe")
    needs = ("name", "change", "prepare", "train", "outputs")
    missing = [part for part in needs if not hasattr(recipe, part)]
    if recipe is None or missing:
        raise ConfigError(
            f"{name} defines no recipe with {', '.join(missing)}; see docs/speedrun.md"
        )
    return recipe


@cache
def images(device: str, validate: bool, quick: bool) -> tuple[Samples, Samples]:
    """Return the images to train on and to score."""
    train, test = data.load("mnist", DATA, device)
    if validate:
        train, test = train[:VALIDATION], train[VALIDATION:]
    return (train[:QUICK], test[:QUICK]) if quick else (train, test)


@cache
def prepared(name: str, validate: bool, quick: bool) -> Trainable:
    recipe, world = find(name), current_world()
    recipe.prepare(images(str(world.device), validate, quick)[0], world)
    return recipe


def score(name: str, validate: bool, quick: bool, seed: int) -> tuple[float, float]:
    """Train a network on this rank by the clock, then score it: the seconds, and the accuracy."""
    recipe, world = prepared(name, validate, quick), current_world()
    test = images(str(world.device), validate, quick)[1]
    if world.world_size > 1:
        dist.barrier()
    start = time.perf_counter()
    recipe.train(seed)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        unlabeled = Samples(test.features, torch.zeros_like(test.labels), test.classes)
        outputs = recipe.outputs(unlabeled).cpu()
    if outputs.shape != (expected := (len(test), len(test.classes))):
        raise ConfigError(f"outputs are {tuple(outputs.shape)}, expected {expected}")
    if not outputs.isfinite().all():
        raise DivergedError("an output is not finite; take a smaller learning rate")
    return seconds, (outputs.argmax(1) == test.labels.cpu()).double().mean().item()


def measure(
    names: Sequence[str], seeds: int, ranks: int, validate: bool, quick: bool
) -> list[Result]:
    """Train each recipe in processes of their own: a result for each recipe and seed."""
    accuracies: dict[str, list[float]] = {name: [] for name in names}
    device = "cpu" if ranks > 1 else "auto"
    with start_ranks(ranks, THREADS // ranks, device=device) as started:

        def turn(name: str, seed: int) -> list[float]:
            scores = started.run(score, name, validate, quick, seed)
            accuracies[name].append(scores[0][1])
            return [max(seconds for seconds, _ in scores)]  # the slowest rank's

        turns = {name: partial(turn, name) for name in names}
        times = take_turns(turns, seeds, label="the speedrun")
        with suppress(BrokenProcessPool):  # a rank was killed
            started.run(forget)
    results = []
    for name, one in times.items():
        contestant = find(name).name
        if one.reason:
            results.append(Result(case={}, contestant=contestant, ok=False, reason=one.reason))
        else:  # the first accuracy is that of the warm-up
            for seed, (seconds, accuracy) in enumerate(
                zip(one.all, accuracies[name][1:], strict=True), 1
            ):
                columns = {"seed": seed, "seconds": seconds, "accuracy": accuracy}
                results.append(Result(case={}, contestant=contestant, columns=columns))
    return results


def forget() -> None:
    """Drop the recipes, before the ranks leave."""
    prepared.cache_clear()


def summary(results: Sequence[Result], changes: dict[str, str]) -> list[dict[str, str]]:
    """Return a line for each recipe: mean ± standard deviation over the seeds."""
    lines = []
    for name in dict.fromkeys(one.contestant for one in results if one.ok):
        scores = [one.columns for one in results if one.ok and one.contestant == name]
        seconds = [score["seconds"] for score in scores]
        percents = [100 * score["accuracy"] for score in scores]
        lines.append(
            {
                "recipe": name,
                "change": changes[name],
                "seconds": f"{number(mean(seconds))} ± {pstdev(seconds):.2g}",
                "accuracy, %": f"{mean(percents):.2f} ± {pstdev(percents):.2f}",
                "seeds": str(len(scores)),
            }
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("speedrun")
    flag = command.parser.add_argument
    chooses = f"a recipe, a .py file, or {', '.join(GROUPS)}; by default records"
    flag("--recipe", action="append", metavar="NAME", help=chooses)
    flag(
        "--ranks",
        type=int,
        choices=(1, 2),
        default=1,
        help="processes; one has two threads, two have one",
    )
    flag(
        "--validate",
        action="store_true",
        help="train on 50,000 training images and score the other 10,000",
    )
    flag(
        "--seeds",
        type=int,
        default=SEEDS,
        help=f"trainings of each recipe; by default {SEEDS}, as a score has",
    )
    options = command.parse(arguments)
    if options.seeds < 1:
        raise ConfigError(f"--seeds is {options.seeds}, expected at least 1")
    seeds = 1 if options.quick else options.seeds
    chosen: dict[str, str] = {}  # the recipe's name, and the one that finds it
    for given in options.recipe or ["records"]:
        for name in [recipe.name for recipe in GROUPS[given]] if given in GROUPS else [given]:
            if chosen.setdefault(find(name).name, name) != name:
                raise ConfigError(
                    f"two recipes are called {find(name).name}; give them other names"
                )
    if Tutorial.name in chosen:
        require("torchvision")
    groups = [name for name in options.recipe or () if name in GROUPS]
    suffixes = ["2-ranks"] * (options.ranks == 2) + ["validated"] * options.validate
    name = "-".join(["speedrun", *groups, *suffixes])
    device = torch.device("cuda") if torch.cuda.is_available() and options.ranks == 1 else CPU
    threads = THREADS // options.ranks
    columns = {"ranks": options.ranks, "threads": threads, "validate": options.validate}
    table = Table(command.csv(options, name), device, cores=CORES, **columns)
    results = table.add(
        measure(list(chosen.values()), seeds, options.ranks, options.validate, options.quick)
    )
    scored = "images of the training set left out" if options.validate else "test images"
    processes = "1 rank of 2 threads" if options.ranks == 1 else "2 ranks of 1 thread"
    lines = summary(results, {name: find(file).change for name, file in chosen.items()})
    print_cells(f"{processes}, {scored}; mean ± standard deviation", lines)
    print_failures(results)
    if options.output and lines:
        text = markdown([list(lines[0]), *(list(line.values()) for line in lines)])
        with writing(file := options.output / f"{name}.md", "--output"):
            file.write_text(text, "utf-8")
    return table.status


if __name__ == "__main__":
    run(main)
