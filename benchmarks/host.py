# SPDX-License-Identifier: MIT
"""Time what the host does in a call, up to the driver: ``python -m benchmarks run host``.

A small kernel ends before the host has issued the next one; then only the host's time counts. A
stand-in for the driver does nothing, and small tensors on the CPU stand for a GPU's, so that no GPU
is needed. A call passes through the dispatcher, autograd and the launcher. It is compared with
ATen's call on 256 elements on the CPU, which takes about as long as to issue ATen's kernel. Left
out are Triton's own launcher, and the question which GPU is current.

Then a launch of X·Xᵀ by itself. A launcher keeps what it decides for tensors of one layout, and
"without a plan" it decides anew.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch

from benchmarks import driver
from benchmarks.calls import MODES, time_contestants
from benchmarks.command import Command, run
from benchmarks.operators import NATIVE, OURS
from benchmarks.results import Result, Table, print_results
from benchmarks.timing import CPU, take_turns, time_calls
from torchpar.kernels import Wrap

N = 4096
ROUNDS = 30
CALLS = 200
SMALL = 16
SMALL_ROUNDS = 400
SMALL_CALLS = 10  # at a time, which other programs seldom interrupt


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


@contextmanager
def gpu_of_cpu_tensors() -> Iterator[None]:
    """Let operators launch kernels for tensors on the CPU, and launchers keep plans for them.

    In TF32, for PyTorch computes `linear_sigmoid` of float32 without it.
    """
    from triton.runtime import driver as active

    from torchpar.kernels.launch import forget_plans

    with (
        idle_driver(),
        patch.object(active._active, "emulator", None, create=True),
        torch.backends.flags(fp32_precision="tf32"),
    ):
        yield
        forget_plans()


def main(arguments: Sequence[str] | None = None) -> int:
    description = "Time what the host does in a call of an operator, up to the driver."
    command = Command("host", description, needs=["triton"])
    options = command.parse(arguments)
    torch.set_num_threads(1)
    rounds = 2 if options.quick else ROUNDS
    table = Table(command.csv(options), CPU)
    with gpu_of_cpu_tensors():
        for name in ("maximum", "linear_sigmoid", "matmul_t"):
            table.add(time_operator(name, 2 if options.quick else SMALL_ROUNDS))
    columns = ("operator", "mode", "contestant", "p20_ms", "p50_ms", "over_us", "over_aten", "ok")
    title = "a call of an operator on the host, and its µs more than ATen's"
    print_results(title, table.results, columns)
    launches = table.add(time_launch(rounds))
    print_results(f"a launch of matmul_t on the host, {N} rows", launches)
    return table.status


def time_operator(name: str, rounds: int) -> list[Result]:
    """Calls of an operator beside ATen's; ``over_us`` and ``over_aten`` are of lower quartiles."""
    shapes = [(SMALL, SMALL), (SMALL, SMALL), (SMALL,)]
    count = {"maximum": 2, "linear_sigmoid": 3, "matmul_t": 1}[name]
    operands = [torch.ones(shape) for shape in shapes[:count]]
    contestants = {
        "ATen": NATIVE[name],
        "torchpar": OURS[name],
        "torch.ops.torchpar": getattr(torch.ops.torchpar, name),
    }
    g = torch.ones(SMALL, SMALL)
    results = []
    for mode in MODES:
        inputs = operands if mode == MODES[0] else [t.clone().requires_grad_() for t in operands]
        times = time_contestants(contestants, inputs, g, mode, None, rounds, SMALL_CALLS)
        aten = times["ATen"].lower_quartile
        for contestant, one in times.items():
            own = one.lower_quartile
            over = {"over_us": 1e6 * (own - aten), "over_aten": own / aten}
            columns = {} if contestant == "ATen" else over
            case = {"operator": name, "mode": mode, "n": SMALL}
            results.append(one.result(case, contestant, None, **columns))
    return results


def time_launch(rounds: int) -> list[Result]:
    """A launch of X·Xᵀ with a plan that was kept, and with a new one."""

    from torchpar.kernels.matmul_t import matmul_t

    def turn(wrap: Wrap, index: int) -> list[float]:
        launch = partial(matmul_t, x, "ieee", out=out, wrap=wrap)
        return [time_calls(launch, calls=CALLS if index else 1).seconds()]

    x = torch.empty(N, N, dtype=torch.bfloat16, device="meta")
    out = torch.empty_like(x)
    turns = {"launch": partial(turn, None), "without a plan": partial(turn, lambda kernel: kernel)}
    with idle_driver():
        times = take_turns(turns, rounds)
    return [times[name].result({"operator": "matmul_t", "n": N}, name) for name in turns]


if __name__ == "__main__":
    run(main)
