# SPDX-License-Identifier: MIT
"""Compare two recorded trainings: ``python -m torchpar compare run1 run2``.

The command names the first tensor that differs, or that one run alone has, in the order in which
the first run computed its tensors. The exit status is 0 if the trainings are the same, 1 if they
differ, and 2 if they cannot be compared.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchpar.console import in_columns
from torchpar.errors import ConfigError
from torchpar.exact.divergence.recorded_files import (
    KINDS,
    Described,
    RecordedRank,
    RecordedStep,
    read_ranks,
)

Key = tuple[str, str]  # kind and name of a tensor
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
FIRST = ("first", "second")
ALONE = "look at what is called, computed or left out in one run and not in the other"
# Kinds that a compiled module does not show, so that one run can lack them in each of its steps.
HIDDEN = {"input", "activation", "activation's gradient", "loss", "operator"}
FIRST_WEIGHT = "look at the seed before the model is made, and at the weights that were loaded"


@dataclass(frozen=True)
class Pair:
    """A tensor of one step in both runs, or in one alone, and its checksums."""

    a: Described | None
    b: Described | None
    sum_a: int = 0
    sum_b: int = 0

    @property
    def tensor(self) -> Described:
        """The tensor, by its kind and name."""
        tensor = self.a or self.b
        assert tensor is not None
        return tensor

    @property
    def is_alone(self) -> bool:
        return self.a is None or self.b is None

    @property
    def is_same(self) -> bool:
        if self.a is None or self.b is None:
            return False
        return (self.sum_a, self.a.shape, self.a.dtype) == (self.sum_b, self.b.shape, self.b.dtype)

    def __str__(self) -> str:
        only = "" if not self.is_alone else f", which the {FIRST[self.a is None]} run alone has"
        return f"{self.tensor}{only}"


@dataclass
class Compared:
    """A step of two ranks: the tensors that both have, in the order of the first run. Those that
    one alone has stand where that run has them."""

    step: int
    ranks: tuple[int, int]
    pairs: list[Pair]
    unseen: set[Key] = field(default_factory=set)  # kinds and names that one run never shows

    @property
    def count(self) -> int:
        """The number of tensors that both have."""
        return sum(not one.is_alone for one in self.pairs)

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
    """Print what two runs have in common, and where they part. Return the exit status.

    Raises:
        ConfigError: the runs cannot be compared.
    """
    ranks_a, ranks_b = read_ranks(a), read_ranks(b)
    steps = sorted(set.intersection(*(set(one.steps) for one in (*ranks_a, *ranks_b))))
    if ranks_a[0].has_operators != ranks_b[0].has_operators:
        raise ConfigError(
            f"of {a} and {b} one was recorded with operators=True, expected both or none"
        )
    if not steps:
        raise ConfigError(f"{a} and {b} have no step in common; record at least one step of each")
    compared = [
        one
        for rank_a, rank_b in pairs_of(ranks_a, ranks_b)
        for one in compare_ranks(rank_a, rank_b, steps, len(ranks_a) == len(ranks_b))
    ]
    if not (count := sum(one.count for one in compared)):
        raise ConfigError(f"{a} and {b} have no tensor in common; record the same training twice")
    for line in notes(ranks_a, ranks_b, compared):
        print(line)
    parted = [one for one in compared if one.first() < len(one.pairs)]
    if not parted:
        steps_of_both = min(length(ranks_a), length(ranks_b))
        calls = after_steps(ranks_a) and after_steps(ranks_b) and has_as_many(ranks_a, ranks_b)
        if not (steps_of_both or calls):
            print(f"no step is complete in both; the {count:,} checksums of both are the same")
            return 2
        after = " and the calls after them" if steps_of_both else "the calls of modules"
        where = counted(steps_of_both, "step") * bool(steps_of_both) + after * calls
        print(f"the same in {where}, by {count:,} checksums")
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


def compare_ranks(
    a: RecordedRank, b: RecordedRank, steps: Sequence[int], is_same_mesh: bool
) -> list[Compared]:
    """Compare the steps of two ranks.

    A tensor that one run alone has is a difference. It is none if `never_shown` says that the other
    run cannot show it, if a graph is replayed in the step, or if it is an optimizer's state, which
    unlike numbers of ranks divide.

    Raises:
        ConfigError: the weights have other names, shapes or dtypes.
    """
    check_same_model(a, b, steps)
    unseen = never_shown(a, b, steps) | never_shown(b, a, steps)
    compared = []
    for step in steps:
        step_a, step_b = a.steps[step], b.steps[step]
        left_out = set(() if is_same_mesh else ("state",))
        if step_a.is_replayed or step_b.is_replayed:
            left_out |= {*HIDDEN, "gradient"}
        one = Compared(step, (a.rank, b.rank), [])
        for pair in pairs_of_step(step_a, step_b, is_same_mesh):
            key = pair.tensor.kind, pair.tensor.name
            if pair.is_alone and (key in unseen or key[0] in left_out):
                one.unseen.add(key)
            else:
                one.pairs.append(pair)
        compared.append(one)
    return compared


def never_shown(shown: RecordedRank, other: RecordedRank, steps: Sequence[int]) -> set[Key]:
    """Kinds and names of tensors that each step of a run shows, and no step of the other one.

    Modules that are compiled in the other run are an example. The other run then shows no names of
    its own.
    """
    every, of_other = ever_shown(shown, steps), ever_shown(other, steps)
    renamed = {kind for kind, _ in of_other - every if kind in ("input", "activation", "loss")}
    return {key for key in always_shown(shown, steps) - of_other if key[0] in HIDDEN - renamed}


def always_shown(rank: RecordedRank, steps: Sequence[int]) -> set[Key]:
    """Kinds and names of tensors that each step has which an optimizer has ended."""
    taken = [rank.steps[step] for step in steps if rank.steps[step].is_taken]
    return set.intersection(*map(keys_of, taken or [RecordedStep([], [])]))


def ever_shown(rank: RecordedRank, steps: Sequence[int]) -> set[Key]:
    return set[Key]().union(*(keys_of(rank.steps[step]) for step in steps))


def keys_of(step: RecordedStep) -> set[Key]:
    return {(one.kind, one.name) for one in step.tensors}


def pairs_of_step(a: RecordedStep, b: RecordedStep, is_same_mesh: bool) -> list[Pair]:
    """Pair the tensors of a step by kind and name, and by their order among those of one name."""
    # Of a step that an error has ended, what both have.
    is_broken = a.is_broken or b.is_broken
    kinds = set(KINDS) if is_same_mesh else set(OF_ALL_RANKS)
    if not is_broken and not (a.is_complete and b.is_complete and a.is_taken == b.is_taken):
        kinds = {"weight"}
    by_name_b = by_name(b)
    places: list[tuple[tuple[int, int], Pair]] = []
    place_in_a = dict[int, int]()  # by the place in b
    for key, of_a in by_name(a).items():
        of_b = by_name_b.get(key, [])
        if key[0] not in kinds:
            continue
        for (place, one, sum_a), (other_place, other, sum_b) in zip(of_a, of_b, strict=False):
            places.append(((place, -1), Pair(one, other, sum_a, sum_b)))
            place_in_a[other_place] = place
        if not is_broken:
            places += [((one[0], -1), Pair(one[1], None)) for one in of_a[len(of_b) :]]
    before = -1
    for i, one in enumerate(b.tensors):
        if i in place_in_a:
            before = place_in_a[i]
        elif one.kind in kinds and not is_broken:
            places.append(((before, i), Pair(None, one)))
    places.sort(key=lambda one: one[0])
    return [pair for _, pair in places]


def by_name(step: RecordedStep) -> dict[Key, list[tuple[int, Described, int]]]:
    """Place, description and checksum of the tensors of each kind and name."""
    found = defaultdict(list)
    for place, (one, checksum) in enumerate(zip(step.tensors, step.checksums, strict=True)):
        found[one.kind, one.name].append((place, one, checksum))
    return found


def check_same_model(a: RecordedRank, b: RecordedRank, steps: Sequence[int]) -> None:
    """Raise a ConfigError if the ranks have other weights, as each has them first."""
    of_a, of_b = ({key: t.size for key, t in first_weights(one, steps).items()} for one in (a, b))
    for name in (*of_a, *of_b):
        if of_a.get(name) != of_b.get(name):
            raise ConfigError(
                f"the models differ: weight {name} is {of_a.get(name, 'missing')} in {a.path} and "
                f"{of_b.get(name, 'missing')} in {b.path}; record the same model twice"
            )


def first_weights(rank: RecordedRank, steps: Sequence[int]) -> Mapping[str, Described]:
    weights: dict[str, Described] = {}
    for step in steps:
        for t in rank.steps[step].tensors:
            if t.kind == "weight":
                weights.setdefault(t.name, t)
    return weights


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
    for name, ranks in zip(FIRST, (ranks_a, ranks_b), strict=True):
        if broken := {n for rank in ranks for n, step in rank.steps.items() if step.is_broken}:
            yield (
                f"an error ended the {name} run in step {min(broken)}; the tensors that both runs "
                "have in it are compared"
            )
        if len({one.length for one in ranks}) > 1:
            lengths = " and ".join(str(one.length) for one in ranks)
            yield f"the ranks of the {name} run have {lengths} steps; those of all are compared"
    of_a, of_b = length(ranks_a), length(ranks_b)
    if of_a != of_b and min(of_a, of_b):
        first = "the first is" if min(of_a, of_b) == 1 else f"the first {min(of_a, of_b)} are"
        yield f"{of_a} and {of_b} steps: {first} compared"
    calling = [
        f"the {name} run calls"
        for name, ranks in zip(FIRST, (ranks_a, ranks_b), strict=True)
        if after_steps(ranks)
    ]
    if len(calling) == 1 or (calling and not has_as_many(ranks_a, ranks_b)):
        who = calling[0] if len(calling) == 1 else "each run calls"
        yield (
            f"{who} modules after its last step, as an evaluation does; these calls are not "
            "compared"
        )
    unseen = sorted(set[Key]().union(*(one.unseen for one in compared)))
    if unseen:
        named = "; ".join(
            f"{kind} {shortened([name for of, name in unseen if of == kind])}"
            for kind in KINDS
            if kind in {of for of, _ in unseen}
        )
        yield f"not compared, because only one run has them: {named}"


def shortened(names: Sequence[str], most: int = 4) -> str:
    """Names, of which there may be many: "0, 1, 2, 3 and 5 others"."""
    others = f" and {len(names) - most} others" if len(names) > most + 1 else ""
    return ", ".join(names[:most] if others else names) + others


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
    """The number of steps of a run, on the rank that has the fewest."""
    return min(one.length for one in ranks)


def has_as_many(ranks_a: Sequence[RecordedRank], ranks_b: Sequence[RecordedRank]) -> bool:
    """Whether both runs have the same number of steps."""
    return length(ranks_a) == length(ranks_b)


def after_steps(ranks: Sequence[RecordedRank]) -> bool:
    """Whether a run calls modules after its last step, on all ranks."""
    return all(
        any(one.is_complete and not one.is_taken for one in rank.steps.values()) for rank in ranks
    )


def report(found: Compared, of_step: Sequence[Compared]) -> str:
    """Say where two runs part: a sentence, and a table of the step."""
    pair = found.pairs[found.first()]
    kind = pair.tensor.kind
    is_first_weight = kind == "weight" and found.step == 0
    ranks = [one.ranks for one in of_step]
    hint = ALONE if pair.is_alone else FIRST_WEIGHT if is_first_weight else HINTS[kind]
    lines = [f"parted in step {found.step}{of_rank(found.ranks)}: {pair}", hint]
    if before := found.first():
        verb = "is" if before == 1 else "are"
        lines.append(f"the {counted(before, 'tensor')} before it in this step {verb} the same")
    if others := [of_rank(one).strip() for one in ranks if one != found.ranks]:
        lines.append(f"later in this step: {', '.join(others)}")
    rows = [("kind", "compared", "parted", "first parted", "in a", "in b")]
    for kind in dict.fromkeys(one.tensor.kind for one in found.pairs):
        pairs = [one for one in found.pairs if one.tensor.kind == kind]
        parted = [one for one in pairs if not one.is_same]
        row = (kind, str(len(pairs)), str(len(parted)))
        rows.append((*row, *described(parted[0])) if parted else (*row, "", "", ""))
    return "\n".join([*lines, in_columns(rows)])


def counted(number: int, noun: str) -> str:
    """A number of things, such as "1 step" or "1,024 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def described(pair: Pair) -> tuple[str, str, str]:
    """The name of a tensor that differs, and the values in both runs if it is one number."""
    if pair.a is None or pair.b is None:
        in_a, in_b = ("missing" if one is None else one.size for one in (pair.a, pair.b))
        return pair.tensor.name, in_a, in_b
    if pair.a.size != pair.b.size:
        return pair.a.name, pair.a.size, pair.b.size
    return pair.a.name, pair.a.value(pair.sum_a), pair.b.value(pair.sum_b)


def of_rank(ranks: tuple[int, int]) -> str:
    if ranks == (0, 0):
        return ""
    return (
        f" on rank {ranks[0]}" if ranks[0] == ranks[1] else f" on ranks {ranks[0]} and {ranks[1]}"
    )
