# SPDX-License-Identifier: MIT
"""Train an MLP on MNIST in as few seconds as possible: ``python -m benchmarks.speedrun``.

Prints the seconds and the accuracies of the records, or of other recipes, over 20 seeds. docs/speedrun.md has
the rules, and the way to enter. Recipes take turns, seed by seed; the first turn, with seed 0, warms up. The
clock runs while a network is trained. The images are in memory as uint8 when it starts.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, pstdev

import torch

from benchmarks.command import Command, run
from benchmarks.ladder.rungs import plural
from benchmarks.report import Results, Row, number, picture, print_cells, provenance
from benchmarks.scaling.steps import CORES
from benchmarks.speedrun import attempt, recipes
from benchmarks.speedrun.attempt import Attempt
from benchmarks.timing import take_turns
from torchpar.parallel.launch.local import start_ranks
from torchpar.parallel.launch.world import join_world_of_one

THREADS = 2
SEEDS = 20
CLASSES = (0.98, 0.987)
PATIENCE = 400.0  # seconds, after which a slow recipe has no further seed


def measure(attempts: Mapping[str, Attempt], seeds: int) -> list[Row]:
    """A row for each recipe and seed."""
    accuracies: dict[str, list[float]] = {name: [] for name in attempts}

    def turn(name: str, seed: int) -> list[float]:
        seconds, accuracy = attempts[name](seed)
        accuracies[name].append(accuracy)
        return [seconds]

    turns = {name: lambda seed, name=name: turn(name, seed) for name in attempts}
    times = take_turns(turns, seeds, seconds=PATIENCE, label="seeds")
    rows = []
    for name, found in times.items():
        if found.reason:
            rows.append(Row(work={"recipe": name}, provider=name, ok=False, reason=found.reason))
        # The first accuracy is that of the warm-up.
        for seed, (seconds, accuracy) in enumerate(zip(found.all, accuracies[name][1:], strict=False), 1):
            score = {"seed": seed, "seconds": seconds, "accuracy": accuracy}
            rows.append(Row(work={"recipe": name}, provider=name, found=score))
    return rows


def summaries(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Mean and standard deviation of each recipe's seconds and accuracies."""
    lines = []
    for name in dict.fromkeys(row.provider for row in rows):
        scores = [row.found for row in rows if row.provider == name and row.ok]
        if not scores:
            continue
        seconds = [score["seconds"] for score in scores]
        accuracies = [100 * score["accuracy"] for score in scores]
        lines.append(
            {
                "recipe": Path(name).stem if name.endswith(".py") else name,
                "change": recipes.find(name).change,
                "seconds": f"{number(mean(seconds))} ± {pstdev(seconds):.2g}",
                "accuracy, %": f"{mean(accuracies):.2f} ± {pstdev(accuracies):.2f}",
                "seeds": str(len(scores)),
            }
        )
    return lines


def best(rows: Sequence[Row], accuracy: float) -> str:
    """The fastest recipe whose mean accuracy is at least ``accuracy``, as a line."""
    found = []
    for name in dict.fromkeys(row.provider for row in rows):
        scores = [row.found for row in rows if row.provider == name and row.ok]
        if scores and mean(score["accuracy"] for score in scores) >= accuracy:
            found.append((mean(score["seconds"] for score in scores), name))
    if not found:
        return f"{accuracy:.1%}: reached by none of these recipes"
    seconds, name = min(found)
    return f"{accuracy:.1%}: {number(seconds)} s, by {name}"


def markdown(rows: Sequence[Row]) -> str:
    lines = summaries(rows)
    heads = list(lines[0])
    table = [heads, ["---"] * len(heads), *([line[head] for head in heads] for line in lines)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Mean accuracy by mean seconds, with the standard deviation over the seeds."""
    with picture(path, 9, 5) as figure:
        axes = figure.subplots()
        axes.set_title(title, fontsize=9)
        for name in dict.fromkeys(row.provider for row in rows):
            scores = [row.found for row in rows if row.provider == name and row.ok]
            if not scores:
                continue
            seconds = mean(score["seconds"] for score in scores)
            accuracies = [100 * score["accuracy"] for score in scores]
            axes.errorbar(seconds, mean(accuracies), pstdev(accuracies), fmt="o", capsize=3)
            axes.annotate(f" {name}", (seconds, mean(accuracies)), fontsize=8, rotation=30)
        for accuracy in CLASSES:
            axes.axhline(100 * accuracy, color="black", lw=0.5, ls="--")
        axes.set(xscale="log", xlabel="seconds of training", ylabel="test accuracy, %")
        axes.margins(0.15, 0.2)


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("speedrun", "Train an MLP on MNIST in as few seconds as possible.", ["torchvision"])
    flag = command.parser.add_argument
    flag(
        "--recipe",
        action="append",
        metavar="NAME",
        help="a recipe, a file, or ladder; by default the records",
    )
    flag("--seeds", type=int, help=f"trainings of each recipe; by default {SEEDS}")
    flag("--ranks", type=int, choices=(1, 2), default=1, help="processes; one has two threads, two have one")
    flag("--validate", action="store_true", help="train on 50,000 training images and score the other 10,000")
    options = command.parse(arguments)
    if options.output:
        command.require("matplotlib")
    seeds = command.at_least(1, "seeds", options, quick=1, full=SEEDS)
    names = recipes.names(options.recipe)
    device = "cpu" if options.ranks > 1 else "auto"
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with ExitStack() as stack:
        world = stack.enter_context(join_world_of_one(device))
        if options.ranks > 1:
            ranks = stack.enter_context(start_ranks(options.ranks))
            stack.callback(ranks.run, attempt.forget)
            of = {name: attempt.on_ranks(name, ranks, options.validate, options.quick) for name in names}
        else:
            loaded = attempt.images(str(world.device), options.validate, options.quick)
            of = {name: attempt.local(name, world, *loaded) for name in names}
        threads = THREADS // options.ranks
        columns = {"cores": CORES, "ranks": options.ranks, "threads": threads, "validate": options.validate}
        results = Results(command.csv(options), world.device, **columns)
        results.add(measure(of, seeds))
        origin = provenance(world.device)
    torch.set_num_threads(before)
    scored = "10,000 training images left out" if options.validate else "test images"
    title = f"{origin['device']}, {plural(options.ranks, 'rank')} of {plural(threads, 'thread')}, {scored}"
    print_cells(f"{title}: mean ± standard deviation", summaries(results.rows))
    for row in results.rows:
        if not row.ok:
            print("not ok:", row.provider, row.reason)
    for accuracy in CLASSES:
        print(best(results.rows, accuracy))
    if options.output:
        (options.output / "speedrun.md").write_text(markdown(results.rows))
        draw(
            options.output / "speedrun.png",
            results.rows,
            f"{title}; torch {origin['torch']}, {origin['date'][:10]}",
        )
    return results.status


if __name__ == "__main__":
    run(main)
