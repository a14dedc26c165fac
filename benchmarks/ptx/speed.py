# SPDX-License-Identifier: MIT
"""Time executed kernels beside Triton's interpreter: ``python -m benchmarks run ptx``.

Each kernel is compiled for sm_90 and executed with all checks: by the core in C, and by Python
alone. The interpreter (TRITON_INTERPRET=1) runs the kernel's source with NumPy, without checks.
Each of the three is a process of its own; they take turns. The first turn compiles, and is not
timed.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks.flags import Command, run
from benchmarks.ptx.kernels import NAMES, WAYS
from benchmarks.results import Table, print_bounds, print_results
from benchmarks.timing import CPU, Rejected, take_turns

ROUNDS = 10
# Of Python's time over the core's, and of the interpreter's time over the core's.
BOUNDS = {"python": 20.0, "interpreter": 1.0}
CORE = WAYS[0]


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("ptx", "Time executed kernels beside Triton's interpreter.", ["triton"])
    options = command.parse(arguments)
    table = Table(command.csv(options), CPU)
    names = NAMES[:1] if options.quick else NAMES
    with ExitStack() as stack:
        workers = {way: stack.enter_context(_worker(way)) for way in WAYS}
        for name in names:
            turns = {way: partial(_turn, worker, name) for way, worker in workers.items()}
            times = take_turns(turns, 2 if options.quick else ROUNDS, label=name)
            for way, one in times.items():
                ratio: dict[str, Any] = {}
                if way != CORE:
                    ratio = {"ratio": times[CORE].ratio_over(one), "bound": BOUNDS[way]}
                table.add([one.result({"kernel": name}, way, times[CORE], **ratio)])
    columns = ["kernel", "contestant", "p20_ms", "p50_ms", "p80_ms", "ratio", "bound", "ok"]
    print_results("an executed kernel; ratio: its time over the core's", table.results, columns)
    return max(table.status, 0 if options.quick else print_bounds(table))


def _worker(way: str) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    if way == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.ptx.kernels", way],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _turn(worker: subprocess.Popen[str], name: str, index: int) -> list[float]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(f"{name}\n")
    worker.stdin.flush()
    said = worker.stdout.readline().strip()
    try:
        return [float(said)]
    except ValueError:
        raise Rejected(said or "the process has ended") from None


if __name__ == "__main__":
    run(main, "run ptx")
