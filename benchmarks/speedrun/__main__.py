# SPDX-License-Identifier: MIT
"""Train an MLP on MNIST in as few seconds as possible: ``python -m benchmarks run speedrun``.

Prints the seconds and the accuracies of the records, or of other recipes, over 20 seeds. docs/speedrun.md has
the rules, and the way to enter. Recipes take turns, seed by seed; the first turn, with seed 0, warms up. The
clock runs while a network is trained. The images are in memory as uint8 when it starts.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, NamedTuple

import torch

from benchmarks.command import Command, run
from benchmarks.ladder.rungs import plural
from benchmarks.results import CORES, Result, Table, markdown, number, picture, print_cells, provenance
from benchmarks.speedrun import attempts, entries
from benchmarks.speedrun.attempts import Attempt
from benchmarks.speedrun.recipes import GROUPS
from benchmarks.timing import take_turns
from torchpar.parallel.launch.local import Ranks, start_ranks
from torchpar.parallel.launch.world import join_world_of_one

THREADS = 2
SEEDS = 20
AIMS = (0.98, 0.987)  # mean accuracies


class Summary(NamedTuple):
    """The scores of a recipe.

    Attributes:
        name, change: as in `benchmarks.speedrun.recipe.Entry`.
        seconds, accuracies: of each seed.
    """

    name: str
    change: str
    seconds: list[float]
    accuracies: list[float]

    @property
    def percents(self) -> list[float]:
        return [100 * accuracy for accuracy in self.accuracies]

    def cells(self) -> dict[str, str]:
        return {
            "recipe": self.name,
            "change": self.change,
            "seconds": f"{number(mean(self.seconds))} ± {pstdev(self.seconds):.2g}",
            "accuracy, %": f"{mean(self.percents):.2f} ± {pstdev(self.percents):.2f}",
            "seeds": str(len(self.seconds)),
        }


def measure(attempt_of: Mapping[str, Attempt], seeds: int) -> list[Result]:
    """A row for each recipe and seed."""
    accuracies: dict[str, list[float]] = {name: [] for name in attempt_of}

    def turn(name: str, seed: int) -> list[float]:
        seconds, accuracy = attempt_of[name](seed)
        accuracies[name].append(accuracy)
        return [seconds]

    turns = {name: partial(turn, name) for name in attempt_of}
    rows = []
    for name, times in take_turns(turns, seeds, label="seeds").items():
        work = {"recipe": entries.find(name).name}
        if times.reason:
            rows.append(Result(case=work, contestant=name, ok=False, reason=times.reason))
            continue
        # The first accuracy is that of the warm-up.
        for seed, score in enumerate(zip(times.all, accuracies[name][1:], strict=True), 1):
            found: dict[str, Any] = {"seed": seed, "seconds": score[0], "accuracy": score[1]}
            rows.append(Result(case=work, contestant=name, found=found))
    return rows


def summaries(rows: Sequence[Result]) -> list[Summary]:
    found: dict[str, Summary] = {}
    for row in rows:
        if row.ok:
            entry = entries.find(row.contestant)
            summary = found.setdefault(row.contestant, Summary(entry.name, entry.change, [], []))
            summary.seconds.append(row.found["seconds"])
            summary.accuracies.append(row.found["accuracy"])
    return list(found.values())


def fastest(found: Sequence[Summary], accuracy: float) -> str:
    """The fastest recipe with this mean accuracy, as a line."""
    reached = [summary for summary in found if mean(summary.accuracies) >= accuracy]
    if not reached:
        return f"{accuracy:.1%}: reached by none of these recipes"
    first = min(reached, key=lambda summary: mean(summary.seconds))
    return f"{accuracy:.1%}: {number(mean(first.seconds))} s, by {first.name}"


def as_markdown(found: Sequence[Summary]) -> str:
    """The summaries in Markdown."""
    lines = [summary.cells() for summary in found]
    return markdown([list(lines[0]), *(list(line.values()) for line in lines)])


def draw(path: Path, found: Sequence[Summary], title: str) -> None:
    """Mean accuracy by mean seconds, with the standard deviation over the seeds."""
    with picture(path, 9, 5.5) as figure:
        axes = figure.subplots()
        axes.set_title(title, fontsize=9)
        for summary in found:
            at = mean(summary.seconds), mean(summary.percents)
            axes.errorbar(*at, pstdev(summary.percents), fmt="o", capsize=3)
            axes.annotate(f"  {summary.name}", at, fontsize=8, rotation=30)
        for accuracy in AIMS:
            axes.axhline(100 * accuracy, color="black", lw=0.5, ls="--")
        axes.set(xscale="log", xlabel="seconds of training", ylabel="accuracy, %")
        axes.margins(0.1, 0.15)


def forget(ranks: Ranks) -> None:
    with suppress(BrokenProcessPool):  # a rank was killed
        ranks.run(attempts.forget)


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("speedrun", "Train an MLP on MNIST in as few seconds as possible.", ["torchvision"])
    flag = command.parser.add_argument
    chooses = f"a recipe, a .py file, or {', '.join(GROUPS)}; by default records"
    flag("--recipe", action="append", metavar="NAME", help=chooses)
    flag("--seeds", type=int, help=f"trainings of each recipe; by default {SEEDS}")
    flag("--ranks", type=int, choices=(1, 2), default=1, help="processes; one has two threads, two have one")
    flag("--validate", action="store_true", help="train on 50,000 training images and score the other 10,000")
    options = command.parse(arguments)
    if options.output:
        command.require("matplotlib")
    seeds = command.at_least(1, "seeds", options, quick=1, full=SEEDS)
    names = entries.chosen(options.recipe)
    threads, before = THREADS // options.ranks, torch.get_num_threads()
    which = (options.validate, options.quick)
    with ExitStack() as stack:
        world = stack.enter_context(join_world_of_one("cpu" if options.ranks > 1 else "auto"))
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(THREADS)
        if options.ranks > 1:
            ranks = stack.enter_context(start_ranks(options.ranks))
            stack.callback(forget, ranks)
            attempt_of = {name: attempts.on_ranks(name, ranks, *which) for name in names}
        else:
            images = attempts.load(str(world.device), *which)
            attempt_of = {name: attempts.local(name, world, *images) for name in names}
        groups = [name for name in options.recipe or () if name in GROUPS]
        ways = ["2-ranks"] * (options.ranks == 2) + ["validated"] * options.validate
        name = "-".join(["speedrun", *groups, *ways])
        columns = {"cores": CORES, "ranks": options.ranks, "threads": threads, "validate": options.validate}
        table = Table(command.csv(options, name), world.device, **columns)
        found = summaries(table.add(measure(attempt_of, seeds)))
        origin = provenance(world.device)
    scored = "images of the training set left out" if options.validate else "test images"
    title = f"{origin['device']}, {plural(options.ranks, 'rank')} of {plural(threads, 'thread')}, {scored}"
    print_cells(f"{title}; mean ± standard deviation", [summary.cells() for summary in found])
    for row in table.results:
        if not row.ok:
            print("not ok:", row.contestant, row.reason)
    for accuracy in AIMS:
        print(fastest(found, accuracy))
    if options.output and found:
        (options.output / f"{name}.md").write_text(as_markdown(found))
        draw(
            options.output / f"{name}.png", found, f"{title}; torch {origin['torch']}, {origin['date'][:10]}"
        )
    return table.status


if __name__ == "__main__":
    run(main)
