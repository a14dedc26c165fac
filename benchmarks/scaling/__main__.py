# SPDX-License-Identifier: MIT
"""What more ranks bring to a training step, and should: ``python -m benchmarks.scaling``.

A step is forward, backward, exchange of gradients and SGD, on CPUs by gloo. Its rivals are one process
with one thread and one with two. Every configuration is checked before it is timed: its gradients and
its loss against one process's, by a float64 oracle. All ranks live throughout; configurations take turns
within a round, a few steps each. Medians are quoted, and means, in which alone gloo's stalls show.
"""

import argparse
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from benchmarks.report import provenance, write_csv
from benchmarks.scaling import ranks
from benchmarks.scaling.plan import CORES, FULL, QUICK, Configuration, Plan
from benchmarks.scaling.results import Results, Steps

try:
    from rich.console import Console
    from rich.progress import track

    from benchmarks.scaling import show
except ModuleNotFoundError as e:
    sys.exit(f"python -m benchmarks.scaling needs rich and matplotlib, pip install them: {e}")

BLOCK_SECONDS = 0.15  # of steps of one configuration in a round, about
ALL_REDUCES = 20  # of a size in a round


def measure(plan: Plan, rounds: int, uncalmed: bool) -> Results:
    """Start the ranks, check every configuration, and time them in turn."""
    terminal = Console(stderr=True)
    bar = partial(track, console=terminal, disable=not terminal.is_terminal, transient=True)
    wanted = plan.configurations()
    with ExitStack() as stack:
        groups = {
            key: stack.enter_context(ranks.start_ranks(*key))
            for key in dict.fromkeys((one.ranks, one.threads) for one in wanted)
        }
        pairs = {"batch": groups[2, 1]}
        if uncalmed:
            pairs["default"] = stack.enter_context(ranks.start_ranks(2, calm=False))

        steps: dict[Configuration, Steps] = {}
        counts: dict[Configuration, int] = {}
        for one in bar(wanted, "check"):
            group = groups[one.ranks, one.threads]
            steps[one] = Steps(group.all(ranks.prepare, one), [])
            if not steps[one].reason:
                pilot = group.slowest(ranks.time_steps, one, 1)[0]
                counts[one] = min(max(round(BLOCK_SECONDS / pilot), 1), 20)

        all_reduces: dict[tuple[str, int], list[float]]
        all_reduces = {(polling, nbytes): [] for polling in pairs for nbytes in plan.all_reduces}
        for _ in bar(range(rounds), "measure"):
            for (polling, nbytes), times in all_reduces.items():
                times += pairs[polling].slowest(ranks.time_all_reduces, nbytes, ALL_REDUCES)
            for one, count in counts.items():
                group = groups[one.ranks, one.threads]
                steps[one].rounds.append(group.slowest(ranks.time_steps, one, count))

        expected = {one: found.prepared[0].expected for one, found in steps.items()}
        for dp, tp in plan.spreads:
            for batch in plan.between:
                one = Configuration(plan.sizes, batch, dp, tp)
                if not one.oversubscribed:
                    expected[one] = groups[one.ranks, 1].all(ranks.expected, one)[0]
    return Results(plan, steps, all_reduces, expected)


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description="Measure how steps scale.")
    parser.add_argument("--quick", action="store_true", help="two ranks, small sizes: does it run?")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write scaling.csv and scaling.png there")
    parser.add_argument("--rounds", type=int, help="times that each configuration has its turn")
    parser.add_argument(
        "--uncalmed",
        action="store_true",
        help="time all-reduces also in a group whose polling thread is scheduled as gloo leaves it",
    )
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    rounds = plan.rounds if options.rounds is None else options.rounds
    if rounds < 1:
        parser.error(f"--rounds {rounds}: there must be one")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    results = measure(plan, rounds, options.uncalmed)
    rows = results.rows()
    if options.output:
        path, origin, link = options.output / "scaling.csv", provenance(torch.device("cpu")), results.link
        path.unlink(missing_ok=True)
        write_csv(path, rows, alpha_s=link.alpha, beta_s_per_byte=link.beta, cores=CORES, **origin)
        show.plot(results, path.with_suffix(".png"), origin)
    console = Console(width=None if sys.stdout.isatty() else 170)
    for table in show.tables(results):
        console.print(table)
    for line in show.lines(results):
        console.print(line, soft_wrap=True, highlight=False)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
