# SPDX-License-Identifier: MIT
# ruff: noqa: E402  # libraries read the environment when they are imported
"""The same work on every rung, from pure Python to several processes: ``python -m benchmarks.ladder``.

Five workloads: elementwise maximum, X·Xᵀ, linear+sigmoid, and an epoch of two digit classifiers. The result
of every call that is timed is checked against float64 (whole numbers: exactly), every batch's loss too.
Rungs take turns, and medians are quoted. Caches are flushed before maximum and X·Xᵀ; what linear+sigmoid
works on stays in them, as in training.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from benchmarks.idle_threads import shorten_spins

shorten_spins()

import torch

from benchmarks.report import provenance, write_csv
from benchmarks.scaling.plan import CORES
from benchmarks.scaling.ranks import start_ranks
from benchmarks.timing import Ceiling, measure_ceiling
from torchpar.errors import ConfigError
from torchpar.parallel.world import World

try:
    from rich.console import Console
    from rich.progress import Progress

    from benchmarks.ladder import operators, show, training, whole
    from torchpar.report import prepare_outputs
except ImportError as e:  # Numba raises it too, beside a NumPy that it does not know
    sys.exit(f"python -m benchmarks.ladder: {e}; pip install 'torchpar[baselines,examples]'")

from benchmarks.ladder.inputs import Training
from benchmarks.ladder.measure import CPU, Row, measure

ROUNDS = training.CHUNKS
ALONE = World(rank=0, local_rank=0, world_size=1, device=CPU)


class Plan(NamedTuple):
    """Shapes of the operators' inputs; epochs."""

    operators: Mapping[str, tuple[int, ...]]
    trainings: Sequence[Training]


FULL = Plan(
    {"maximum": (1000, 1000), "matmul_t": (1000, 1000), "linear_sigmoid": (64, 784, 128)},
    [Training((784, 30, 10), 10), Training((784, 128, 10), 64)],
)
QUICK = Plan(
    {"maximum": (100, 90), "matmul_t": (130, 70), "linear_sigmoid": (7, 33, 5)},
    [Training((784, 30, 10), 10, samples=405)],
)


def climb(plan: Plan, ceilings: Mapping[str, Ceiling]) -> list[list[Row]]:
    """The rows of each workload."""
    terminal = Console(stderr=True)
    with start_ranks(2) as ranks, Progress(console=terminal, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("ladder", total=ROUNDS * (len(plan.operators) + len(plan.trainings)))
        advance = partial(progress.advance, task)
        workloads = chain(
            (operators.workload(name, shape, ranks) for name, shape in plan.operators.items()),
            (training.workload(one, ranks, ALONE) for one in plan.trainings),
        )
        return [measure(workload, ceilings, ROUNDS, advance) for workload in workloads]


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.ladder", description="Climb the ladder.")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument(
        "--output", type=Path, default=Path("ladder"), metavar="DIR", help="for ladder.csv and pictures"
    )
    options = parser.parse_args()
    csv, bars, roofline = (options.output / name for name in ("ladder.csv", "ladder.png", "intensity.png"))
    try:
        prepare_outputs(ALONE, folders=[options.output], files=[csv, bars, roofline])
    except ConfigError as e:
        parser.error(str(e))
    plan = QUICK if options.quick else FULL
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    ceilings = {device: measure_ceiling(torch.device(device), [torch.float32]) for device in devices}
    try:
        ladder = climb(plan, ceilings)
    except ConfigError as e:  # of the samples
        sys.exit(f"python -m benchmarks.ladder: {e}")

    origin = provenance(CPU) | {"cores": CORES}
    gpu = provenance(torch.device("cuda")) if "cuda" in ceilings else {"device": "", "clocks": ""}
    origin |= {"gpu": gpu["device"], "gpu_clocks": gpu["clocks"]}
    csv.unlink(missing_ok=True)
    for rows in ladder:
        write_csv(csv, rows, **origin)
    by_operator = dict(zip(plan.operators, ladder, strict=False))

    console = Console(width=None if sys.stdout.isatty() else 150)
    for rows in ladder:
        console.print(show.table(rows))
    for one, rows in zip(plan.trainings, ladder[len(plan.operators) :], strict=True):
        steps = -(-(one.samples or 60_000) // one.batch_size)
        if line := show.overhead(rows, steps):
            console.print(line, soft_wrap=True, highlight=False)
    for thread in [threads for threads in operators.THREADS if threads > CORES]:
        console.print(f"not measured: njit with {thread} threads, of {CORES} core{'s' * (CORES > 1)}")
    for what, names in whole.NEEDS.items():
        if missing := [name for name in names if not whole.found(name)]:
            console.print(f"not measured: {what}, without {', '.join(missing)}")
    if "cuda" not in ceilings:
        console.print("not measured: a GPU, there is none")
    else:
        console.print(show.against_gpu(by_operator["maximum"]), soft_wrap=True, highlight=False)
    show.bars(ladder, bars, origin)
    cache = operators.cache_bandwidth()
    show.intensity(by_operator["matmul_t"], roofline, origin, ceilings["cpu"], cache)
    console.print(f"written: {options.output}/ladder.csv, ladder.png, intensity.png", soft_wrap=True)
    return 0 if all(row.ok for rows in ladder for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
