# SPDX-License-Identifier: MIT
"""Measure the speed-up of a training step on more ranks: ``python -m benchmarks run scaling``.

A step is forward, backward, exchange of gradients and SGD, on CPUs: data parallelism averages through shared
memory, tensor parallelism by gloo. It is compared with one process of one thread and one of two. The
gradients and the loss of every configuration are checked with a float64 oracle before it is timed. All ranks
live throughout; configurations take turns within a round, a few steps each. Medians are quoted, and means, in
which alone gloo's stalls show.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from benchmarks.command import Command, run
from benchmarks.results import Result, Table
from benchmarks.scaling import show, steps
from benchmarks.scaling.steps import CORES, Configuration, Prepared
from benchmarks.timing import CPU, Rejected, Times, take_turns
from torchpar.parallel.launch.local import Ranks, start_ranks
from torchpar.parallel.split.shared_memory import SUPPORTED

BLOCK_SECONDS = 0.15  # of steps of one configuration in a round, about
ALL_REDUCES = 20  # of a size in a round


class Plan(NamedTuple):
    """The steps and all-reduces to measure. A width w stands for the model 784-w-w-10."""

    sizes: tuple[int, ...]
    batches: list[int]
    widths: list[int]
    width_batch: int
    meshes: list[tuple[int, int]]  # dp, tp
    arithmetic_batch: int
    all_reduces: list[int]  # bytes
    rounds: int

    def configurations(self) -> Iterator[tuple[str, Configuration]]:
        """Each configuration under the tables that show it: "batch", "width" or "arithmetic"."""
        first, last = self.sizes[0], self.sizes[-1]
        by_batch = [Configuration(self.sizes, batch) for batch in self.batches]
        by_width = [Configuration((first, w, w, last), self.width_batch) for w in self.widths]
        for table, alone in [("batch", one) for one in by_batch] + [("width", one) for one in by_width]:
            yield table, alone
            yield table, replace(alone, threads=2)
            yield from ((table, replace(alone, dp=dp, tp=tp)) for dp, tp in self.meshes)
        most = max(dp * tp for dp, tp in self.meshes)
        for dp, tp in ((1, 1), (2, 1), (1, 2), (2, 2)):
            if dp * tp <= most:
                fast = Configuration(self.sizes, self.arithmetic_batch, dp, tp)
                yield from (("arithmetic", one) for one in (fast, replace(fast, arithmetic="exact")))


FULL = Plan(
    (784, 512, 10),
    [2**i for i in range(7, 14)],
    [512, 1024, 2048, 4096],
    512,
    [(2, 1), (1, 2), (4, 1), (1, 4)],
    1024,
    [4, 64, *(2**i for i in range(10, 25, 2))],
    12,
)
QUICK = Plan((784, 64, 10), [32, 256], [64], 64, [(2, 1), (1, 2)], 64, [4, 2**18], 1)


def slowest(times: Sequence[Sequence[float]]) -> list[float]:
    """For each call the time of the rank that took longest."""
    return [max(of_ranks) for of_ranks in zip(*times, strict=True)]


class StepTurn:
    """The turns of one configuration: check it, then time some steps in each round."""

    def __init__(self, configuration: Configuration, ranks: Ranks):
        self.configuration = configuration
        self.ranks = ranks
        self.prepared: list[Prepared] = []
        self.count = 1

    def __call__(self, index: int) -> list[float]:
        if index == 0:
            self.prepared = self.ranks.run(steps.prepare, self.configuration)
            for rank in self.prepared:
                if rank.reason:
                    raise Rejected(rank.reason)
            pilot = slowest(self.ranks.run(steps.time_steps, self.configuration, 1))[0]
            self.count = min(max(round(BLOCK_SECONDS / pilot), 1), 20)
            return []
        return slowest(self.ranks.run(steps.time_steps, self.configuration, self.count))

    def row(self, times: Times, alone: Times, tables: Sequence[str]) -> Result:
        """The row of this configuration, its speed-up over one rank with one thread."""
        one = self.configuration
        work = {"kind": "step", "sizes": one.model, "batch": one.batch, "dp": one.dp, "tp": one.tp}
        work |= {"threads": one.threads, "arithmetic": one.arithmetic}
        found = {"tables": " ".join(tables), "oversubscribed": one.oversubscribed}
        if self.prepared:
            first = self.prepared[0]._asdict()
            found |= {name: first[name] for name in first if name not in ("reason", "error")}
            found["error"] = max(rank.error for rank in self.prepared)
        return times.row(work, one.name, alone, **found)


def all_reduce_turn(
    ranks: Ranks, time: Callable[[int, int], list[float]], nbytes: int, index: int
) -> list[float]:
    return slowest(ranks.run(time, nbytes, ALL_REDUCES if index else 1))


def measure(plan: Plan, rounds: int, default_polling: bool) -> list[Result]:
    """Start the ranks, check every configuration, and time them in turn."""
    tables: dict[Configuration, list[str]] = {}
    for table, one in plan.configurations():
        tables.setdefault(one, []).append(table)
    with ExitStack() as stack:
        groups: dict[tuple[int, int], Ranks] = {}
        for one in tables:
            key = one.ranks, one.threads
            if key not in groups:
                groups[key] = stack.enter_context(start_ranks(*key))
                stack.callback(groups[key].run, steps.forget)
        ways = {"gloo": (groups[2, 1], steps.time_all_reduces)}
        if SUPPORTED:
            ways["shared memory"] = groups[2, 1], steps.time_shared_sums
        if default_polling:
            ranks = stack.enter_context(start_ranks(2))
            ranks.run(steps.use_default_polling)
            ways["gloo's default"] = ranks, steps.time_all_reduces
        turns = {one: StepTurn(one, groups[one.ranks, one.threads]) for one in tables}
        all_reduces = {
            (way, nbytes): partial(all_reduce_turn, ranks, time, nbytes)
            for way, (ranks, time) in ways.items()
            for nbytes in plan.all_reduces
        }
        times = take_turns({**all_reduces, **turns}, rounds, label="scaling")
    rows = [turns[one].row(times[one], times[one.one_rank], tables[one]) for one in tables]
    for way, nbytes in all_reduces:
        work = {"kind": "all_reduce", "nbytes": nbytes, "way": way}
        rows.append(times[way, nbytes].row(work, "2 ranks"))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("scaling", "Measure the speed-up of a training step on more ranks.")
    command.parser.add_argument("--rounds", type=int, help="turns of each configuration")
    command.parser.add_argument(
        "--default-polling",
        action="store_true",
        help="also time all-reduces with gloo's default thread scheduling",
    )
    options = command.parse(arguments)
    if options.output:
        command.require("matplotlib")
    plan = QUICK if options.quick else FULL
    rounds = command.at_least(1, "rounds", options, quick=QUICK.rounds, full=FULL.rounds)
    rows = measure(plan, rounds, options.default_polling)
    link = show.fit_link(rows)
    fitted = {"alpha_s": link.alpha, "beta_s_per_byte": link.beta} if link else {}
    table = Table(command.csv(options), CPU, cores=CORES, **fitted)
    table.add(rows)
    show.print_all(rows)
    if options.output:
        show.draw(options.output / "scaling.png", rows)
    return table.status


if __name__ == "__main__":
    run(main)
