# SPDX-License-Identifier: MIT
"""Time what the host does in a launch, up to the driver: ``python -m benchmarks run host``.

A small kernel ends before the host has issued the next one; then only the host's time counts. A launcher
keeps what it decides for tensors of one layout, and "without a plan" it decides anew. A stand-in for the
driver does nothing, and tensors have no memory, so that no GPU is needed. Triton's own launcher is left out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import autotune
from benchmarks.command import Command, run
from benchmarks.results import Table, print_results
from benchmarks.timing import CPU, Turn, take_turns, time_calls

SIZES = (512, 4096)
ROUNDS = 30
CALLS = 200


@contextmanager
def idle_driver(launched: Callable[..., object] = lambda *args: None) -> Iterator[None]:
    """Compile kernels for sm_90; ``launched`` takes what a launch passes to the driver."""

    class Idle(autotune.Driver):
        utils = SimpleNamespace(
            load_binary=lambda *args: (1, 1, 0, 0, 1024),  # module, function, registers, spills, threads
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            unload_module=lambda module: None,
        )

        def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., object]:
            return launched

    with patch.object(autotune, "Driver", Idle), autotune.target(90):
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("host", "Time what the host does in a launch.", needs=["triton"])
    options = command.parse(arguments)
    from torchpar.kernels import linear_sigmoid, matmul_t, maximum

    def turn(launch: Callable[[], object], index: int) -> list[float]:
        return [time_calls(launch, calls=CALLS if index else 1).seconds()]

    table = Table(command.csv(options), CPU)
    with idle_driver():
        for n in SIZES[: 1 if options.quick else None]:
            x = torch.empty(n, n, dtype=torch.bfloat16, device="meta")
            launches: dict[str, Callable[..., object]] = {
                "matmul_t": partial(matmul_t.symmetric_product, x, x, "ieee", out=x.clone()),
                "linear_sigmoid": partial(linear_sigmoid.linear_sigmoid, x, x, x[0], "ieee", out=x.clone()),
                "maximum": partial(maximum.maximum, x, x, x.clone()),
            }
            for operator, launch in launches.items():
                turns: dict[str, Turn] = {
                    "launch": partial(turn, partial(launch, wrap=None)),
                    "without a plan": partial(turn, partial(launch, wrap=lambda kernel: kernel)),
                }
                times = take_turns(turns, 2 if options.quick else ROUNDS, label=f"{operator} {n}")
                table.add(times[name].row({"operator": operator, "n": n}, name) for name in turns)
    print_results("launches on the host", table.results)
    return table.status


if __name__ == "__main__":
    run(main)
