# SPDX-License-Identifier: MIT
"""Compare two recorded trainings: ``python -m torchpar compare run1 run2``.

The command names the first tensor that differs, in the order in which the first run computed its
tensors. The exit status is 0 if the trainings are the same, 1 if they differ, and 2 if they cannot
be compared.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchpar.console import in_columns
from torchpar.errors import ConfigError
from torchpar.exact.divergence.recorded_files import (
    Described,
    RecordedRank,
    RecordedStep,
    read_ranks,
)

COMMAND = "python -m torchpar compare"
# What ranks that share a batch have in common, however many they are.
OF_ALL_RANKS = ("weight", "gradient", "setting", "state")
HINTS = {
    "weight": "look at the optimizer's step before this one, and at what else writes weights",
    "input": "look at the samples, their order, and the seed of the loader",
    "activation": "look at this module: its dropout, its seeds, and operators that are not "
    "deterministic",
    "loss": "look at the labels, and at the function of the loss",
    "activation's gradient": "look at the backward pass of what uses this activation",
    "gradient": "look at the backward pass, and at what adds, averages or clips gradients",
    "setting": "look at the arguments of the optimizer, and at the schedule",
    "state": "look at this optimizer, and at the state that was loaded",
    "operator": "look at this operator: its seeds, its library, and whether it is deterministic",
}
FIRST_WEIGHT = "look at the seed before the model is made, and at the weights that were loaded"


@dataclass(frozen=True)
class Pair:
    """A tensor of one step in both runs."""

    a: Described
    b: Described
    sum_a: int
    sum_b: int

    @property
    def is_same(self) -> bool:
        return (self.sum_a, self.a.shape, self.a.dtype) == (self.sum_b, self.b.shape, self.b.dtype)


@dataclass
class Compared:
    """A step of two ranks: the tensors that both have, in the order of the first."""

    step: int
    ranks: tuple[int, int]
    pairs: list[Pair]
    alone: Counter[str] = field(default_factory=Counter)  # tensors that only one run has, by kind

    def first(self) -> int:
        """The place of the first pair that differs, or the number of pairs."""
        return next((i for i, one in enumerate(self.pairs) if not one.is_same), len(self.pairs))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        COMMAND,
        description="Name the first tensor in which two trainings differ that "
        "torchpar.exact.record has recorded. The exit status is 0 if they are the same, 1 if they "
        "differ, and 2 if they cannot be compared.",
    )
    parser.add_argument("a", type=Path, help="a folder that was recorded, or a file of one rank")
    parser.add_argument("b", type=Path, help="another one")
    options = parser.parse_args(arguments)
    try:
        return compare(options.a, options.b)
    except ConfigError as e:
        print(f"{COMMAND}: error: {e}", file=sys.stderr)
        return 2


def compare(a: Path, b: Path) -> int:
    """Print what two runs have in common, and where they part. Return the exit status."""
    ranks_a, ranks_b = read_ranks(a), read_ranks(b)
    steps = sorted(set.intersection(*(set(one.steps) for one in (*ranks_a, *ranks_b))))
    if ranks_a[0].has_operators != ranks_b[0].has_operators:
        raise ConfigError(
            f"of {a} and {b} one was recorded with operators=True, expected both or none"
        )
    if not steps:
        raise ConfigError(f"{a} and {b} have no step in common; record at least one step of each")
    compared = [
        compare_step(step, one, other, len(ranks_a) == len(ranks_b))
        for step in steps
        for one, other in pairs_of(ranks_a, ranks_b)
    ]
    if not any(one.pairs for one in compared):
        raise ConfigError(f"{a} and {b} have no tensor in common; record the same training twice")
    for line in notes(ranks_a, ranks_b, compared):
        print(line)
    parted = [one for one in compared if one.first() < len(one.pairs)]
    if not parted:
        count = sum(len(one.pairs) for one in compared)
        if not (both := min(length(ranks_a), length(ranks_b))):
            print(f"no step is complete in both; the {count:,} checksums of both are the same")
            return 2
        print(f"the same in {counted(both, 'step')}, by {count:,} checksums")
        return 0
    if unlike(ranks_a, ranks_b):
        print(
            "outside of torchpar.exact.mode() other machines or threads alone can change bits: "
            "record both in the mode, or with the same of these; if they still part:"
        )
    if len(ranks_a) != len(ranks_b):
        print("record both on the same number of ranks to compare inputs and activations, too")
    earliest = min(parted, key=lambda one: (one.step, one.first(), one.ranks))
    print(report(earliest, [one for one in parted if one.step == earliest.step]))
    return 1


def pairs_of(
    ranks_a: Sequence[RecordedRank], ranks_b: Sequence[RecordedRank]
) -> Iterator[tuple[RecordedRank, RecordedRank]]:
    """Each rank of the longer list beside one of the shorter."""
    for i in range(max(len(ranks_a), len(ranks_b))):
        yield ranks_a[i % len(ranks_a)], ranks_b[i % len(ranks_b)]


def compare_step(step: int, a: RecordedRank, b: RecordedRank, is_same_mesh: bool) -> Compared:
    """Pair the tensors of a step by kind and name, and by their order among those of one name.

    Raises:
        ConfigError: the weights have other names, shapes or dtypes.
    """
    check_same_model(a, b, step)
    of_step = a.steps[step], b.steps[step]
    by_name_a, by_name_b = map(by_name, of_step)
    # Of a step that an error has ended, what both have.
    is_broken = any(one.is_broken for one in of_step)
    if not (is_broken or all(one.is_complete for one in of_step)):
        kinds = {"weight"}
    else:
        kinds = set(HINTS) if is_same_mesh else set(OF_ALL_RANKS)
    alone: Counter[str] = Counter()
    places: list[tuple[int, Pair]] = []
    for key, of_a in by_name_a.items():
        of_b = by_name_b.get(key, [])
        if key[0] not in kinds:
            continue
        if len(of_a) != len(of_b) and not is_broken:
            alone[key[0]] += abs(len(of_a) - len(of_b))
            continue
        for (place, one, sum_a), (_, other, sum_b) in zip(of_a, of_b, strict=not is_broken):
            places.append((place, Pair(one, other, sum_a, sum_b)))
    for key, of_b in by_name_b.items():
        if key not in by_name_a and key[0] in kinds and not is_broken:
            alone[key[0]] += len(of_b)
    places.sort(key=lambda one: one[0])
    return Compared(step, (a.rank, b.rank), [pair for _, pair in places], alone)


def by_name(step: RecordedStep) -> dict[tuple[str, str], list[tuple[int, Described, int]]]:
    """Place, description and checksum of the tensors of each kind and name."""
    found = defaultdict(list)
    for place, (one, checksum) in enumerate(zip(step.tensors, step.checksums, strict=True)):
        found[one.kind, one.name].append((place, one, checksum))
    return found


def check_same_model(a: RecordedRank, b: RecordedRank, step: int) -> None:
    weights = []
    for one in (a, b):
        tensors = one.steps[step].tensors
        weights.append({t.name: t.size for t in tensors if t.kind == "weight"})
    of_a, of_b = weights
    for name in (*of_a, *of_b):
        if of_a.get(name) != of_b.get(name):
            raise ConfigError(
                f"the models differ: weight {name} is {of_a.get(name, 'missing')} in {a.path} and "
                f"{of_b.get(name, 'missing')} in {b.path}; record the same model twice"
            )


def notes(
    ranks_a: Sequence[RecordedRank],
    ranks_b: Sequence[RecordedRank],
    compared: Sequence[Compared],
) -> Iterator[str]:
    """Say in what the machines differ, and what is not compared."""
    if differences := unlike(ranks_a, ranks_b):
        yield f"the runs differ in {', '.join(differences)}"
    if len(ranks_a) != len(ranks_b):
        kinds = ", ".join(f"{kind}s" for kind in OF_ALL_RANKS)
        yield f"{len(ranks_a)} and {len(ranks_b)} ranks: only {kinds} are compared"
    for name, ranks in (("first", ranks_a), ("second", ranks_b)):
        if broken := {n for rank in ranks for n, step in rank.steps.items() if step.is_broken}:
            yield (
                f"an error ended the {name} run in step {min(broken)}, of which that is compared "
                "which both have"
            )
    of_a, of_b = (length(ranks) for ranks in (ranks_a, ranks_b))
    if of_a != of_b and min(of_a, of_b):
        first = "the first is" if min(of_a, of_b) == 1 else f"the first {min(of_a, of_b)} are"
        yield f"{of_a} and {of_b} steps: {first} compared"
    alone = sum((one.alone for one in compared), Counter[str]())
    if alone:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in alone.items())
        yield f"not compared, because only one run has them: {kinds}"


def unlike(ranks_a: Sequence[RecordedRank], ranks_b: Sequence[RecordedRank]) -> list[str]:
    """The differences between the machines of two runs, such as "threads (2 and 1) on rank 1"."""
    pairs = list(pairs_of(ranks_a, ranks_b))
    ranks: dict[str, list[int]] = {}
    for rank, (a, b) in enumerate((one.machine, other.machine) for one, other in pairs):
        for key in a:
            if key in b and a[key] != b[key]:
                ranks.setdefault(f"{key} ({a[key]} and {b[key]})", []).append(rank)
    return [
        text if len(at) == len(pairs) else f"{text} on rank {' and '.join(map(str, at))}"
        for text, at in ranks.items()
    ]


def length(ranks: Sequence[RecordedRank]) -> int:
    """The number of complete steps of a run, on the rank that has the fewest."""
    return min(sum(one.is_complete for one in rank.steps.values()) for rank in ranks)


def report(found: Compared, of_step: Sequence[Compared]) -> str:
    """Say where two runs part: a sentence, and a table of the step."""
    pair = found.pairs[found.first()]
    is_first_weight = pair.a.kind == "weight" and found.step == 0
    ranks = [one.ranks for one in of_step]
    lines = [
        f"parted in step {found.step}{of_rank(found.ranks)}: {pair.a}",
        FIRST_WEIGHT if is_first_weight else HINTS[pair.a.kind],
    ]
    if before := found.first():
        verb = "is" if before == 1 else "are"
        lines.append(f"the {counted(before, 'tensor')} before it in this step {verb} the same")
    if others := [of_rank(one).strip() for one in ranks if one != found.ranks]:
        lines.append(f"later in this step: {', '.join(others)}")
    rows = [("kind", "compared", "parted", "first parted", "in a", "in b")]
    for kind in dict.fromkeys(one.a.kind for one in found.pairs):
        pairs = [one for one in found.pairs if one.a.kind == kind]
        parted = [one for one in pairs if not one.is_same]
        row = (kind, str(len(pairs)), str(len(parted)))
        rows.append((*row, *described(parted[0])) if parted else (*row, "", "", ""))
    return "\n".join([*lines, in_columns(rows)])


def counted(number: int, noun: str) -> str:
    """A number of things, such as "1 step" or "1,024 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def described(pair: Pair) -> tuple[str, str, str]:
    """The name of a tensor that differs, and the values in both runs if it is one number."""
    if pair.a.size != pair.b.size:
        return pair.a.name, pair.a.size, pair.b.size
    return pair.a.name, pair.a.value(pair.sum_a), pair.b.value(pair.sum_b)


def of_rank(ranks: tuple[int, int]) -> str:
    if ranks == (0, 0):
        return ""
    return (
        f" on rank {ranks[0]}" if ranks[0] == ranks[1] else f" on ranks {ranks[0]} and {ranks[1]}"
    )
