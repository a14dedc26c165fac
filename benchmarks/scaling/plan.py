# SPDX-License-Identifier: MIT
"""Which training steps are measured: of which models and batches, and how they are spread over ranks."""

import os
from dataclasses import dataclass, replace
from math import log2
from typing import NamedTuple

from torchpar.parallel.reduction import Reduction

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Configuration:
    """A step: of which model and batch, on how many ranks and threads each."""

    sizes: tuple[int, ...]
    batch: int  # of all ranks
    dp: int = 1
    tp: int = 1
    threads: int = 1
    reduction: Reduction = "fast"

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    @property
    def alone(self) -> "Configuration":
        """The same step on one rank with one thread."""
        return Configuration(self.sizes, self.batch)

    @property
    def oversubscribed(self) -> bool:
        return self.ranks * self.threads > CORES

    @property
    def note(self) -> str:
        return "oversubscribed: correctness only" if self.oversubscribed else ""

    @property
    def model(self) -> str:
        return "-".join(map(str, self.sizes))

    @property
    def spread(self) -> str:
        if self.ranks == 1:
            return f"1 rank × {self.threads} thread{'s' if self.threads > 1 else ''}"
        return " × ".join(f"{name} {n}" for name, n in (("dp", self.dp), ("tp", self.tp)) if n > 1)


class Plan(NamedTuple):
    """What is measured: widths stand for 784-w-w-10, whose first two layers tensor parallelism splits."""

    sizes: tuple[int, ...]
    batches: list[int]
    widths: list[int]
    width_batch: int
    spreads: list[tuple[int, int]]  # dp, tp
    reduction_batch: int
    all_reduces: list[int]  # bytes
    rounds: int

    @property
    def by_batch(self) -> dict[int, Configuration]:
        return {batch: Configuration(self.sizes, batch) for batch in self.batches}

    @property
    def by_width(self) -> dict[int, Configuration]:
        first, last = self.sizes[0], self.sizes[-1]
        return {w: Configuration((first, w, w, last), self.width_batch) for w in self.widths}

    @property
    def between(self) -> dict[int, Configuration]:
        """Batches between and below the measured ones, at which the prediction is drawn."""
        first, last = (round(8 * log2(batch)) for batch in (self.batches[0], self.batches[-1]))
        batches = sorted({round(2 ** (i / 8)) for i in range(first - 24, last + 1)})
        return {batch: Configuration(self.sizes, batch) for batch in batches}

    @property
    def reductions(self) -> list[tuple[Configuration, Configuration]]:
        """Each spread with the fast reduction and with the invariant one."""
        most = max(dp * tp for dp, tp in self.spreads)
        spreads = [(dp, tp) for dp, tp in ((1, 1), (2, 1), (1, 2), (2, 2)) if dp * tp <= most]
        fast = [Configuration(self.sizes, self.reduction_batch, dp, tp) for dp, tp in spreads]
        return [(one, replace(one, reduction="invariant")) for one in fast]

    def ways(self, alone: Configuration) -> list[Configuration]:
        """A step on one rank, on one with two threads, and spread."""
        spread = [replace(alone, dp=dp, tp=tp) for dp, tp in self.spreads]
        return [alone, replace(alone, threads=2), *spread]

    def configurations(self) -> list[Configuration]:
        """What is timed, each once."""
        wide = list(self.by_width.values())
        found = [one for alone in [*self.by_batch.values(), *wide] for one in self.ways(alone)]
        found += [replace(one, batch=one.batch // 4) for one in wide]  # a second point for the fit
        found += [one for pair in self.reductions for one in pair]
        return list(dict.fromkeys(found))


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
QUICK = Plan((784, 64, 10), [32, 256], [64], 64, [(2, 1), (1, 2)], 64, [4, 4096, 2**18], 2)
