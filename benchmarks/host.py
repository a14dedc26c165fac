# SPDX-License-Identifier: MIT
"""The host's part of a call of each operator: ``python -m benchmarks run host``.

A small kernel ends before the host has issued the next one; then only the host's time counts.

    dispatch         PyTorch finds the operator's implementation, which checks and allocates
    launch           the launcher, up to the call of the driver
    without a plan   the same, as for tensors of a layout that it has not met

On a GPU there are also whole calls, the driver's part included, and those of PyTorch's product or maximum
alone. Without one a stand-in for the driver does nothing, and the tensors have no memory. It leaves out what
Triton's own launcher does before the driver, which for TMA is to allocate memory. The dispatch is that of
tensors without memory, which PyTorch allocates more slowly than others.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.functional import linear

import torchpar
from benchmarks.command import Command, run
from benchmarks.results import Result, Table, print_results
from benchmarks.timing import Turn, take_turns, time_calls

SIZES = (512, 4096)
ROUNDS = 30
CALLS = 200  # in a row, fewer than a GPU's queue takes
META = torch.device("meta")


@contextmanager
def idle_driver(launched: Callable[..., object] = lambda *args: None) -> Iterator[None]:
    """Compile kernels for sm_90; ``launched`` takes what a launch passes to the driver."""
    from benchmarks import compiled

    class Idle(compiled.Driver):
        utils = SimpleNamespace(
            load_binary=lambda *args: (1, 1, 0, 0, 1024),  # module, function, registers, spills, threads
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            unload_module=lambda module: None,
        )

        def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., object]:
            return launched

    with patch.object(compiled, "Driver", Idle), compiled.target(90):
        yield


def calls_of(operator: str, n: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """The parts of a call for n×n bfloat16 matrices."""
    from torchpar.kernels import linear_sigmoid, matmul_t, maximum

    x, out = (torch.empty(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    bias = x[0].clone()
    inputs: tuple[torch.Tensor, ...]
    whole: Callable[..., object]
    native: Callable[..., object]
    launch: Callable[..., object]
    if operator == "matmul_t":
        inputs, whole, native = (x,), torchpar.matmul_t, lambda x: x @ x.mT
        launch = partial(matmul_t.symmetric_product, x, x, "ieee", out=out)
    elif operator == "linear_sigmoid":
        inputs, whole, native = (x, x, bias), torchpar.linear_sigmoid, linear
        launch = partial(linear_sigmoid.linear_sigmoid, x, x, bias, "ieee", out=out)
    else:
        inputs, whole, native = (x, x), torchpar.maximum, torch.maximum
        launch = partial(maximum.maximum, x, x, out)
    found: dict[str, Callable[[], object]] = {
        "dispatch": partial(whole, *(t.to(META) for t in inputs)),
        "launch": partial(launch, wrap=None),
        "without a plan": partial(launch, wrap=lambda kernel: kernel),
    }
    if device.type == "cuda":
        found |= {"whole call": partial(whole, *inputs), "PyTorch": partial(native, *inputs)}
    return found


def measure(operator: str, n: int, device: torch.device, rounds: int) -> list[Result]:
    def turn(call: Callable[[], object], index: int) -> list[float]:
        timed = time_calls(call, device, CALLS if index else 1)
        timed.seconds()  # empty the queue
        return [timed.host]

    turns: dict[str, Turn] = {
        name: partial(turn, call) for name, call in calls_of(operator, n, device).items()
    }
    times = take_turns(turns, rounds, label=f"{operator} {n}")
    return [times[name].row({"operator": operator, "n": n}, name) for name in turns]


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("host", "Show the host's part of a call.", needs=["triton"])
    options = command.parse(arguments)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda") if on_gpu else META
    table = Table(command.csv(options), device)
    with nullcontext() if on_gpu else idle_driver():
        for operator in ("matmul_t", "linear_sigmoid", "maximum"):
            for n in SIZES[: 1 if options.quick else None]:
                table.add(measure(operator, n, device, 2 if options.quick else ROUNDS))
    columns = ("operator", "n", "contestant", "p20_ms", "p50_ms", "p80_ms")
    print_results("the host's part of a call", table.results, columns)
    if not on_gpu:
        print("no GPU: a stand-in took the launches")
    return table.status


if __name__ == "__main__":
    run(main)
