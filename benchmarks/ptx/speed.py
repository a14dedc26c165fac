# SPDX-License-Identifier: MIT
"""Time executed kernels beside Triton's interpreter: ``python -m benchmarks run ptx``.

Each kernel is compiled for sm_90 and executed with all checks: by the core in C, and by Python
alone. The interpreter (TRITON_INTERPRET=1) runs the kernel's source with NumPy, without checks.
Each of the three is a process of its own; they take turns. The first turn compiles, and is not
timed.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

from ..flags import Command, run
from ..processes import start_worker
from ..results import Table, print_bounds, print_results
from ..timing import CPU, take_turns
from .kernels import NAMES, seconds

ROUNDS = 10
# Of Python's time over the core's, and of the interpreter's time over the core's.
BOUNDS = {"python": 20.0, "interpreter": 1.0}
CORE = "core"
# What each way finds in the environment.
WAYS: dict[str, dict[str, str]] = {
    CORE: {},
    "python": {"NOGPU_EXECUTOR": "python"},
    "interpreter": {"TRITON_INTERPRET": "1"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("ptx", needs=["triton", "nogpu"])
    options = command.parse(arguments)
    table = Table(command.csv(options), CPU)
    names = NAMES[:1] if options.quick else NAMES
    with ExitStack() as stack:
        workers = {
            way: stack.enter_context(start_worker(**variables)) for way, variables in WAYS.items()
        }
        for name in names:
            turns = {way: partial(turn, worker, name) for way, worker in workers.items()}
            times = take_turns(turns, 2 if options.quick else ROUNDS, label=name)
            for way, one in times.items():
                ratio: dict[str, Any] = {}
                if way != CORE:
                    ratio = {"ratio": times[CORE].ratio_over(one), "bound": BOUNDS[way]}
                table.add([one.result({"kernel": name}, way, times[CORE], **ratio)])
    columns = ["kernel", "contestant", "p20_ms", "p50_ms", "p80_ms", "ratio", "bound", "ok"]
    print_results("an executed kernel; ratio: its time over the core's", table.results, columns)
    return max(table.status, 0 if options.quick else print_bounds(table))


def turn(worker: ProcessPoolExecutor, name: str, index: int) -> list[float]:
    return [worker.submit(seconds, name).result()]


if __name__ == "__main__":
    run(main, "run ptx")
