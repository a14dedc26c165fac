# SPDX-License-Identifier: MIT
# ruff: noqa: E402  # libraries read the environment when they are imported
"""Do the same work on every rung, from pure Python to several processes: ``python -m benchmarks run ladder``.

Three workloads: elementwise maximum, X·Xᵀ and linear+sigmoid; `benchmarks.train` trains whole networks. The
result of every call that is timed is checked against float64 (whole numbers: exactly). Rungs take turns, and
medians are quoted. Caches are flushed before maximum and X·Xᵀ; what linear+sigmoid works on stays in them, as
in training.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.idle_threads import shorten_spins

shorten_spins()

import torch

from benchmarks.command import Command, run
from benchmarks.results import CORES, Table, print_results, provenance
from benchmarks.timing import CPU, measure_ceiling
from torchpar.errors import ConfigError
from torchpar.parallel.launch.local import start_ranks

THREADS = (1, 2, 4, 8)
COLUMNS = ("contestant", "note", "p50_ms", "over_pure_python", "over_rung_before")
RATES = ("gb_per_s", "gflop_per_s", "of_ceiling", "first_s", "ok")


class Plan(NamedTuple):
    """Shapes of the operators' inputs, and the most turns of a rung."""

    operators: Mapping[str, tuple[int, ...]]
    rounds: int


FULL = Plan(
    {"maximum": (1000, 1000), "matmul_t": (1000, 1000), "linear_sigmoid": (64, 784, 128)},
    rounds=20,
)
QUICK = Plan(
    {"maximum": (20, 30), "matmul_t": (33, 17), "linear_sigmoid": (7, 33, 5)},
    rounds=2,
)


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("ladder", "Do the same work on every rung.", ["numba"])
    options = command.parse(arguments)
    if options.output:
        command.require("matplotlib")
    plan = QUICK if options.quick else FULL
    try:
        from benchmarks.ladder import on_ranks, operators, rungs, show
    except ImportError as e:  # Numba raises it beside a NumPy that it does not know
        raise ConfigError(f"{e}; pip install 'torchpar[baselines]'") from e
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    ceilings = {name: measure_ceiling(torch.device(name), [torch.float32], options.quick) for name in devices}
    roofs = {"memory": ceilings["cpu"].bandwidth, "a core's cache": operators.cache_bandwidth(options.quick)}
    arithmetic = ceilings["cpu"].matmul[torch.float32]
    gpu = provenance(torch.device("cuda")) if "cuda" in devices else {"device": "", "clocks": ""}
    table = Table(
        command.csv(options),
        CPU,
        cores=CORES,
        gpu=gpu["device"],
        gpu_clocks=gpu["clocks"],
        memory_bytes_per_s=roofs["memory"],
        cache_bytes_per_s=roofs["a core's cache"],
        product_flop_per_s=arithmetic,
    )
    threads = [count for count in THREADS if count <= CORES]
    ladder = []
    with start_ranks(2) as ranks:
        for name, shape in plan.operators.items():
            workload = operators.workload(name, shape, ranks, threads, compiled=not options.quick)
            ladder.append(table.add(rungs.measure(workload, ceilings, plan.rounds)))
        ranks.run(on_ranks.forget)
    for rows in ladder:
        print_results(rows[0].case["workload"], rows, (*COLUMNS, *RATES))
    for count in THREADS:
        if count > CORES:
            print(f"not measured: njit with {count} threads, of {rungs.plural(CORES, 'core')}")
    if "cuda" not in devices:
        print("not measured: a GPU, there is none")
    if options.output:
        origin = provenance(CPU)
        machine = ", ".join(filter(None, (origin["device"], rungs.plural(CORES, "core"), gpu["device"])))
        title = f"{machine}; torch {origin['torch']}, NumPy {origin['numpy']}, {origin['date'][:10]}"
        (options.output / "ladder.md").write_text("\n".join(map(show.table, ladder)))
        show.bars(ladder, options.output / "ladder.png", title)
        product = ladder[list(plan.operators).index("matmul_t")]
        show.intensity(product, options.output / "intensity.png", title, roofs, arithmetic)
    return table.status


if __name__ == "__main__":
    run(main)
