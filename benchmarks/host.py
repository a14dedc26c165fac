# SPDX-License-Identifier: MIT
"""Time what the host does in a launch of X·Xᵀ, up to the driver: ``python -m benchmarks run host``.

A small kernel ends before the host has issued the next one; then only the host's time counts. A
launcher keeps what it decides for tensors of one layout, and "without a plan" it decides anew. A
stand-in for the driver does nothing, and tensors have no memory, so that no GPU is needed. Triton's
own launcher is left out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch

from benchmarks import driver
from benchmarks.command import Command, run
from benchmarks.results import Table, print_results
from benchmarks.timing import CPU, take_turns, time_calls

N = 4096
ROUNDS = 30
CALLS = 200


@contextmanager
def idle_driver(launched: Callable[..., object] = lambda *args: None) -> Iterator[None]:
    """Compile kernels for sm_90; ``launched`` takes what a launch passes to the driver."""

    class Idle(driver.Driver):
        utils = SimpleNamespace(
            # Module, function, registers, spills, threads.
            load_binary=lambda *args: (1, 1, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            unload_module=lambda module: None,
        )

        def launcher_cls(self, source: object, metadata: object) -> Callable[..., object]:
            return launched

    with patch.object(driver, "Driver", Idle), driver.target(90):
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("host", "Time what the host does in a launch of X·Xᵀ.", needs=["triton"])
    options = command.parse(arguments)
    from torchpar.kernels import symmetric_matmul

    def turn(wrap: driver.Wrap | None, index: int) -> list[float]:
        launch = partial(symmetric_matmul.symmetric_matmul, x, x, "ieee", out=out, wrap=wrap)
        return [time_calls(launch, calls=CALLS if index else 1).seconds()]

    x = torch.empty(N, N, dtype=torch.bfloat16, device="meta")
    out = torch.empty_like(x)
    turns = {"launch": partial(turn, None), "without a plan": partial(turn, lambda kernel: kernel)}
    with idle_driver():
        times = take_turns(turns, 2 if options.quick else ROUNDS)
    table = Table(command.csv(options), CPU)
    table.add(times[name].result({"operator": "matmul_t", "n": N}, name) for name in turns)
    print_results(f"a launch of matmul_t on the host, {N} rows", table.results)
    return table.status


if __name__ == "__main__":
    run(main)
