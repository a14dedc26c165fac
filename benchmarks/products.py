# SPDX-License-Identifier: MIT
"""Time the CPU's products beside the plain calls, with bounds:
``python -m benchmarks run products``.

`torchpar.matmul_t` is timed beside ``x @ x.T`` alone and followed by a mirror image, and
`torchpar.linear_sigmoid` beside ``linear(x, w, b).sigmoid()``. Small products are called many times
in a row, so that operands lie in the cache.
"""

from collections.abc import Iterator, Sequence

import torch

from .compare import OperatorCase, compare
from .flags import Command, run
from .operators import make_case
from .records import workloads
from .records.record import Bounded, Workload
from .results import CORES, Result, Table, print_bounds, print_results
from .timing import CPU

ROUNDS = 20
SECONDS = 1.0  # of a contestant's turns
SAMPLE = 2**31  # operations of a sample: as many calls as make so many, at least one
BOUND = 0.97


def cases(quick: bool) -> Iterator[tuple[Workload, Bounded, OperatorCase, bool]]:
    """Every case, and whether its bound holds."""
    for one in workloads().values():
        if (bounded := one.bounded) is None:
            continue
        for dtype in bounded.dtypes[:1] if quick else bounded.dtypes:
            for sizes in bounded.quick if quick else bounded.sizes:
                is_bounded = sizes[0] >= bounded.bounded_from
                yield one, bounded, make_case(one, sizes, dtype, CPU), is_bounded


def measure(
    workload: Workload, bounded: Bounded, case: OperatorCase, is_bounded: bool, rounds: int
) -> Iterator[Result]:
    """Time one case; ``ratio`` is the time of the plain calls, with a mirror of a product, over
    ours."""
    plain = bounded.plain
    rivals = {name: rival.function for name, rival in workload.rivals.items()}
    contestants = {"eager": workload.native, **rivals, "torchpar": workload.ours}
    for mode in bounded.modes:
        results = compare(
            case,
            {name: contestants[name] for name in ("eager", plain, "torchpar")},
            reference="eager",
            rivals=[plain],
            mode=mode,
            rounds=rounds,
            seconds=SECONDS,
            calls=max(SAMPLE // case.work(mode).flops, 1),
        )
        for one in results:
            if one.contestant == "torchpar":
                bound = BOUND if is_bounded else None
                one = one.plus(ratio=one.columns[f"over {plain}"], bound=bound)
            yield one


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("products")
    options = command.parse(arguments)
    table = Table(command.csv(options), CPU)
    for threads in sorted({1, CORES}):
        torch.set_num_threads(threads)
        for case in cases(options.quick):
            table.add(measure(*case, 2 if options.quick else ROUNDS))
    columns = ["operator", "mode", "shape", "dtype", "threads", "p20_ms", "gflop_per_s"]
    columns += ["over eager", "ratio", "bound", "ok"]
    ours = [one for one in table.results if one.contestant == "torchpar" or not one.ok]
    print_results("time of the plain call over ours, by lower quartiles", ours, columns)
    return max(table.status, 0 if options.quick else print_bounds(table))


if __name__ == "__main__":
    run(main)
