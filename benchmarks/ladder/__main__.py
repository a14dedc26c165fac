# SPDX-License-Identifier: MIT
"""The same work on every rung, from pure Python to several processes: ``python -m benchmarks.ladder``.

Five workloads: elementwise maximum, X·Xᵀ, linear+sigmoid, and an epoch of two digit classifiers. The result
of every call that is timed is checked against float64 (whole numbers: exactly), every batch's loss too.
Rungs take turns, and medians are quoted. Caches are flushed before an operator's call.
"""

import argparse
import os
import sys
from pathlib import Path

# An idle OpenMP thread would spin, for up to a scheduler's turn, on a core that the next rung needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from benchmarks.report import provenance, write_csv
from benchmarks.scaling.plan import CORES
from benchmarks.scaling.ranks import start_ranks
from benchmarks.timing import measure_ceiling
from torchpar.parallel.world import World

try:
    from rich.console import Console
    from rich.progress import Progress

    from benchmarks.ladder import operators, show, training
except ModuleNotFoundError as e:
    sys.exit(f"python -m benchmarks.ladder: {e}; pip install 'torchpar[baselines,examples]'")

from benchmarks.ladder.inputs import Training
from benchmarks.ladder.measure import CPU, Row, measure

OPERATORS = {"maximum": (1000, 1000), "matmul_t": (1000, 1000), "linear_sigmoid": (64, 784, 128)}
QUICK_OPERATORS = {"maximum": (100, 90), "matmul_t": (130, 70), "linear_sigmoid": (7, 33, 5)}
TRAININGS = [Training((784, 30, 10), 10), Training((784, 128, 10), 64)]
QUICK_TRAININGS = [Training((784, 30, 10), 10, samples=405)]


def climb(quick: bool) -> list[list[Row]]:
    """The rows of each workload."""
    ceilings = {"cpu": measure_ceiling(CPU, [torch.float32])}
    if torch.cuda.is_available():
        ceilings["cuda"] = measure_ceiling(torch.device("cuda"), [torch.float32])
    alone = World(rank=0, local_rank=0, world_size=1, device=CPU)
    rounds = training.CHUNKS
    terminal = Console(stderr=True)
    found = []
    with start_ranks(2) as ranks, Progress(console=terminal, disable=not terminal.is_terminal) as progress:
        jobs = QUICK_OPERATORS if quick else OPERATORS
        trainings = QUICK_TRAININGS if quick else TRAININGS
        task = progress.add_task("ladder", total=rounds * (len(jobs) + len(trainings)))
        for name, shape in jobs.items():
            workload = operators.workload(name, shape, ranks)
            found.append(measure(workload, ceilings, rounds, lambda: progress.advance(task)))
        for one in trainings:
            workload = training.workload(one, ranks, alone)
            found.append(measure(workload, ceilings, rounds, lambda: progress.advance(task)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.ladder", description="Climb the ladder.")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument(
        "--output", type=Path, default=Path("ladder"), metavar="DIR", help="for ladder.csv and pictures"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(CORES)
    ladder = climb(options.quick)
    origin = provenance(CPU)
    path = options.output / "ladder.csv"
    path.unlink(missing_ok=True)
    for rows in ladder:
        write_csv(path, rows, cores=CORES, **origin)
    show.bars(ladder, path.with_suffix(".png"), origin, CORES)
    console = Console(width=None if sys.stdout.isatty() else 150)
    for rows in ladder:
        console.print(show.table(rows))
    return 0 if all(row.ok for rows in ladder for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
