# SPDX-License-Identifier: MIT
"""Time the CPU's products beside the plain calls, with bounds:
``python -m benchmarks run products``.

`torchpar.matmul_t` is timed beside ``x @ x.T`` alone and followed by a mirror image, and
`torchpar.linear_sigmoid` beside ``linear(x, w, b).sigmoid()``. Small products are called many times
in a row, so that operands lie in the cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks import operators
from benchmarks.command import Command, run
from benchmarks.compare import Mode, OperatorCase, compare
from benchmarks.operators import MIRRORED
from benchmarks.results import CORES, Result, Table, print_bounds, print_results
from benchmarks.timing import CPU

ROUNDS = 20
SECONDS = 1.0  # of a contestant's turns
SAMPLE = 2**31  # operations of a sample: as many calls as make so many, at least one
BOUND = 0.97
BOUNDED_FROM = 384  # rows of matmul_t; below, its call takes longer than it saves
ROWS = (64, 128, 256, 384, 512, 768, 1000, 1024, 2048)
MATMUL_T = [*((n, n) for n in ROWS), (300, 5000), (1024, 4096)]
LAYERS = [(64, 784, 128), (128, 784, 512), (1024, 1024, 1024), (4096, 2048, 2048)]


def cases(quick: bool) -> Iterator[tuple[OperatorCase, Mode]]:
    dtypes = [torch.float32] if quick else [torch.float32, torch.bfloat16, torch.float64]
    for dtype in dtypes:
        for shape in [(384, 64)] if quick else MATMUL_T:
            yield operators.make_case("matmul_t", shape, dtype, CPU), "forward"
    for layer in LAYERS[:1] if quick else LAYERS:
        case = operators.make_case("linear_sigmoid", layer, torch.float32, CPU)
        yield case, "forward"
        yield case, "full"


def measure(case: OperatorCase, mode: Mode, rounds: int) -> list[Result]:
    """Time one case; ``ratio`` is the time of the plain calls, with a mirror of a product, over
    ours."""
    contestants = operators.contestants(case, quick=True)
    plain = MIRRORED if case.operator == "matmul_t" else "eager"
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
    is_bounded = case.operator != "matmul_t" or int(case.shape.partition("x")[0]) >= BOUNDED_FROM
    bound = BOUND if is_bounded else None
    return [
        replace(one, columns={**one.columns, "ratio": one.columns[f"over {plain}"], "bound": bound})
        if one.contestant == "torchpar"
        else one
        for one in results
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("products", "Time the CPU's products beside the plain calls, with bounds.")
    options = command.parse(arguments)
    table = Table(command.csv(options), CPU)
    for threads in sorted({1, CORES}):
        torch.set_num_threads(threads)
        for case, mode in cases(options.quick):
            table.add(measure(case, mode, 2 if options.quick else ROUNDS))
    columns = ["operator", "mode", "shape", "dtype", "threads", "p20_ms", "gflop_per_s"]
    columns += ["over eager", "ratio", "bound", "ok"]
    ours = [one for one in table.results if one.contestant == "torchpar" or not one.ok]
    print_results("time of the plain call over ours, by lower quartiles", ours, columns)
    return max(table.status, 0 if options.quick else print_bounds(table))


if __name__ == "__main__":
    run(main)
