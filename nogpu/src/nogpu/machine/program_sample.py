# SPDX-License-Identifier: MIT
"""A sample of a launch's programs, and the counters of all of them by it.

Programs at an edge of the grid often do something else than others: they mask what lies outside.
So the grid has kinds of programs: in each dimension the first one, the last one, and those between.
Some of each kind are executed, spread evenly, and what they count is scaled to all of the kind.

A sector of global memory counts as distinct once, whichever programs touch it. How many distinct
ones there are is estimated from those that one program of the sample touches, and those that two
do (Chao and Lin, "Nonparametric Lower Bounds for Species Richness and Shared Species Richness under
Sampling without Replacement", Biometrics 68, 2012). It is exact where no two programs touch the
same sectors, and where each program touches the sectors of all.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import numpy as np

from nogpu.machine.allocation import Allocation, zeros
from nogpu.machine.instruction_counts import SECTOR, Column, Counts, Slots
from nogpu.machine.registers import Values

LEAST = 6  # programs of a sample: two of each kind of one dimension
SEED = 0  # a sample is the same each time
MOST_TIMES = 3  # to which it is counted how many programs touch a sector
Position = tuple[int, ...]


@dataclass
class Kind:
    """Programs of a part of the grid.

    Attributes:
        ranges: of their numbers in each dimension.
        executed: how many of them the sample has.
        table: what these have counted, as `Counts.table`.
    """

    ranges: tuple[range, ...]
    executed: int = 0
    table: Values | None = None

    @property
    def size(self) -> int:
        return math.prod(map(len, self.ranges))

    def position(self, n: int) -> Position:
        """Return the n-th program of the kind; x counts fastest."""
        found = []
        for one in self.ranges:
            n, rest = divmod(n, len(one))
            found.append(one[rest])
        return tuple(found)

    def spread(self, count: int, random: Random) -> Iterator[Position]:
        """Yield so many programs, one of each part; at random places of it, since programs may
        repeat with a period."""
        ends = [n * self.size // count for n in range(count + 1)]
        for begin, end in pairwise(ends):
            yield self.position(random.randrange(begin, end))


def kinds(programs: Iterable[int], most: int) -> list[Kind]:
    """Return the kinds of a grid's programs.

    Where a sample of ``most`` programs is too small for two of each kind, the last dimensions are
    not divided.
    """
    parts: list[list[range]] = []
    for n in programs:
        ends = [range(1), range(1, n - 1), range(n - 1, n)] if n > 1 else [range(n)]
        divided = [one for one in ends if len(one)]
        is_affordable = 2 * math.prod(map(len, parts)) * len(divided) <= most or not parts
        parts.append(divided if is_affordable else [range(n)])
    found: list[tuple[range, ...]] = [()]
    for divided in parts:
        found = [(*one, part) for one in found for part in divided]
    return [Kind(one) for one in found]


def shares(sizes: list[int], most: int) -> list[int]:
    """Return how many programs of each kind are executed.

    That is all of a kind of one or two, at least two of the others, and otherwise by their sizes.
    """
    least = [min(2, size) for size in sizes]
    left, rest = most - sum(least), sum(sizes) - sum(least)
    found = [one + (size - one) * left // rest for size, one in zip(sizes, least, strict=True)]
    for _ in range(most - sum(found)):
        found[max(range(len(sizes)), key=lambda n: sizes[n] - found[n])] += 1
    return found


class ProgramSample:
    """The programs of a launch that are executed, and what these have done.

    Args:
        programs: of the grid in each dimension, or its clusters.
        most: how many are executed; fewer than there are.

    Attributes:
        positions: of those that are executed, in the order of the grid.
    """

    def __init__(self, programs: tuple[int, int, int], most: int, counts: Counts):
        self.size, self.counts = math.prod(programs), counts
        self.kinds = kinds(programs, most)
        self._random, self._numbers = Random(SEED), dict[Position, int]()
        self._before = counts.table.copy()
        self._touches: dict[int, _Touches] = {}  # by the identity of the allocation
        self.positions = self.grow(most)

    def grow(self, most: int) -> list[Position]:
        """Let the sample have up to ``most`` programs, and return the new ones, in their order.

        Some that are drawn are in the sample already, so that there may be fewer.
        """
        before = set(self._numbers)
        counts = shares([one.size for one in self.kinds], most)
        for number, (kind, count) in enumerate(zip(self.kinds, counts, strict=True)):
            if count > kind.executed:
                more = kind.spread(count - kind.executed, self._random)
                self._numbers |= dict.fromkeys(more, number)
        return sorted(set(self._numbers) - before, key=lambda position: position[::-1])

    def end(self, position: Position, places: Iterable[Allocation]) -> None:
        """A program has ended: note what it alone has counted."""
        number = self._numbers[position]
        kind, table = self.kinds[number], self.counts.table
        done = table - self._before
        kind.table = done if kind.table is None else kind.table + done
        kind.executed += 1
        self._before = table.copy()
        for place in places:
            if place.touched is not None:
                if id(place) not in self._touches:
                    self._touches[id(place)] = _Touches(place, self.counts)
                self._touches[id(place)].add(number)

    @property
    def executed(self) -> int:
        return sum(kind.executed for kind in self.kinds)

    def give_back(self) -> None:
        """Let `Counts` count the distinct sectors: the others are executed, or a fault ended it."""
        for one in self._touches.values():
            one.give_back()

    def scale(self) -> None:
        """Let the counts be those of all programs, when `Counts` has ended."""
        table = np.zeros_like(self.counts.table)
        for kind in self.kinds:
            if kind.table is not None:
                table += (kind.table * kind.size + kind.executed // 2) // kind.executed
        most = Column.MOST_IN_FLIGHT
        table[:, most] = self.counts.table[:, most]
        self.counts.table[:] = table
        together = np.zeros(self.counts.slot_count + 2, np.int64)
        for one in self._touches.values():
            together += one.estimates(self.kinds)
        self.counts.distinct = together[:-2]
        self.counts.distinct_read, self.counts.distinct_written = together[-2:].tolist()


class _Touches:
    """How many programs touch each sector of an allocation.

    There is a row for each slot of the counters, one for reads and one for writes.
    """

    def __init__(self, place: Allocation, counts: Counts):
        assert place.touched is not None
        self.place, slots = place, counts.slot_count
        of_kernel: Slots = counts.kernel.slots
        self.reads, self.writes = of_kernel.reads, of_kernel.writes
        size = (slots + 2) * place.touched.shape[1]
        self.times, self.kinds = (self._by_page(zeros(size, np.uint8), slots + 2) for _ in "12")

    def _by_page(self, array: Values, rows: int) -> Values:
        return array.reshape(rows, 1 if self.place.pages is None else len(self.place.pages), -1)

    def add(self, kind: int) -> None:
        """Note what a program of a kind has touched."""
        assert self.place.touched is not None
        rows = self._by_page(self.place.touched, len(self.reads))
        pages = self.place.touched_pages()
        pages = pages[rows[:, pages].any((0, 2))]
        mine = rows[:, pages]
        rows[:, pages] = 0
        read, written = (mine[which].any(0, keepdims=True) for which in (self.reads, self.writes))
        mine = np.concatenate([mine, read, written])
        times, kinds = self.times[:, pages], self.kinds[:, pages]
        kinds[(times == 0) & (mine > 0)] = kind
        self.times[:, pages] = np.minimum(times + mine, MOST_TIMES)
        self.kinds[:, pages] = kinds

    def give_back(self) -> None:
        if self.place.touched is not None:
            rows = self._by_page(self.place.touched, len(self.reads))
            rows |= self.times[: len(rows)] > 0

    def estimates(self, of_grid: list[Kind]) -> Values:
        """Return of each row how many distinct sectors all programs touch.

        A kind's estimate has the sectors that its programs touch alone; the first program that
        touches a sector says whose it is. There are no more than the allocation has.
        """
        pages = self.place.touched_pages()
        times, kinds = self.times[:, pages], self.kinds[:, pages]
        found = (times > 0).sum((1, 2)).astype(np.float64)
        for number, kind in enumerate(of_grid):
            n, size = kind.executed, kind.size
            if n in (0, size):
                continue
            mine = kinds == number
            once, twice = (((times == t) & mine).sum((1, 2)) for t in (1, 2))
            share = n / size
            below = 2 * n / max(n - 1, 1) * twice + share / (1 - share) * once
            found += np.divide(
                once.astype(np.float64) ** 2, below, where=once > 0, out=np.zeros_like(found)
            )
        place = self.place
        there = -(-place.size // SECTOR) - (place.start - place.base) // SECTOR
        return np.minimum(np.rint(found).astype(np.int64), there)
