# SPDX-License-Identifier: MIT
"""Time what the host does in a call, up to the driver: ``python -m benchmarks run host``.

A small kernel ends before the host has issued the next one; then only the host's time counts. A
stub of libcuda does nothing, and small tensors on the CPU stand for a GPU's, so that no GPU is
needed, and no driver's time is in a row. A call passes through the dispatcher, autograd, the
launcher and Triton's own, or through the C++ path that ``python -m torchpar build`` compiles.
Left out are the questions which GPU and which stream are current.

A call is compared with ATen's on 256 elements on the CPU. ATen's kernels for CUDA cannot be called
on the stub: PyTorch's CUDA runtime needs a driver that makes contexts and memory. To compute 256
elements takes about as long as to issue a kernel.

``--device cuda`` times the calls on this machine's GPU, the driver included, and does not wait for
the kernels. ``--before CHECKOUT`` times the same calls of another checkout of this
project, in turn with this one's. Each has a process of its own (`benchmarks.host.calls`).

Then a launch of X·Xᵀ by itself. A launcher keeps what it decides for tensors of one layout, and
"without a plan" it decides anew.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from torchpar.errors import ConfigError
from torchpar.kernels import Wrap
from torchpar.library.build import cache_folder

from ..driver import idle_driver
from ..flags import Command, run
from ..results import Result, Table, number, print_cells, print_failures, print_results
from ..timing import take_turns, time_calls
from .calls import BY_CPP
from .stub import build_stub, find_compiler

HERE = Path(__file__).parents[2]
N = 4096
ROUNDS = 30
CALLS = 200
SMALL_ROUNDS = 100
SMALL_CALLS = 50  # at a time
BEFORE = ", before"
OF_PYTORCH = ("ATen", "empty_like", "dispatch to Python", "torch.ops")  # the same before


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("host", needs=["triton"])
    command.parser.add_argument(
        "--before", type=Path, metavar="CHECKOUT", help="time another checkout's calls, too"
    )
    command.parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cpu: without a GPU"
    )
    command.parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"of turns, by default {ROUNDS} or more"
    )
    options = command.parse(arguments)
    if options.rounds is not None and options.rounds < 1:
        raise ConfigError(f"--rounds is {options.rounds}, expected at least 1")
    device = torch.device(options.device)
    stub = None
    if device.type == "cpu":
        if not find_compiler():
            raise ConfigError(
                "there is no C compiler for the stub of libcuda; install one such as gcc, or name "
                "it by CC"
            )
        stub = build_stub(cache_folder())
    if options.before and not (options.before / "benchmarks" / "driver.py").exists():
        raise ConfigError(
            f"--before {options.before} is no checkout of this project: it has no "
            "benchmarks/driver.py; name the folder of another commit"
        )
    torch.set_num_threads(1)
    rounds = 2 if options.quick else ROUNDS
    small_rounds = rounds if options.quick or device.type == "cuda" else SMALL_ROUNDS
    if options.rounds:
        rounds = small_rounds = options.rounds
    table = Table(command.csv(options), device)
    with ExitStack() as stack:
        caller = stack.enter_context(calls_of(HERE, device, stub))
        before = None
        if options.before:
            before = stack.enter_context(calls_of(options.before, device, stub))
        if not any(name.endswith(BY_CPP) for name in caller.names):
            print("There is no C++ path of calls here; python -m torchpar build makes it.")
        for case in dict.fromkeys(name.rpartition(", ")[0] for name in caller.names):
            table.add(time_case(case, caller, before, small_rounds))
    print_calls(table.results)
    if device.type == "cpu":
        launches = table.add(time_launch(rounds))
        print_results(f"a launch of matmul_t on the host, {N} rows", launches)
    return table.status


class Caller:
    """A process that makes the calls of a checkout.

    Attributes:
        names: of its calls: "OPERATOR, MODE, CONTESTANT".
    """

    def __init__(self, process: "subprocess.Popen[str]"):
        assert process.stdin is not None
        assert process.stdout is not None
        self._to, self._from = process.stdin, process.stdout
        answer = self._from.readline()
        if not answer:
            raise ConfigError("the process that makes the calls has ended, see its error above")
        self.names: list[str] = json.loads(answer)

    def seconds(self, name: str, index: int) -> list[float]:
        """The seconds of a call, in round ``index``."""
        # A GPU takes in about a thousand launches before the host must wait; PyTorch's Muon makes
        # more than that for GPT-2 small.
        calls = 1 if "GPT-2" in name else SMALL_CALLS // 10 if "Muon" in name else SMALL_CALLS
        print(f"{name} {calls if index else 1}", file=self._to, flush=True)
        return [float(self._from.readline())]


@contextmanager
def calls_of(checkout: Path, device: torch.device, stub: Path | None) -> Iterator[Caller]:
    script = Path(__file__).with_name("calls.py")
    command = [sys.executable, "-P", str(script), device.type, *([str(stub)] if stub else [])]
    path = filter(None, [str(checkout.resolve()), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        yield Caller(process)


def time_case(case: str, caller: Caller, before: Caller | None, rounds: int) -> list[Result]:
    """One operator's calls in one mode; ``us``, ``over_us``, ``over_aten`` and ``of_before`` are of
    lower quartiles."""
    operator, mode = case.split(", ")
    contestants = [n.rpartition(", ")[2] for n in caller.names if n.startswith(f"{case}, ")]
    turns = {}
    for name in contestants:
        full = f"{case}, {name}"
        turns[name] = partial(caller.seconds, full)
        if before is not None and full in before.names and name not in OF_PYTORCH:
            turns[name + BEFORE] = partial(before.seconds, full)
    times = take_turns(turns, rounds, label=case)
    aten = times["ATen"].lower_quartile if "ATen" in times else None
    results = []
    for name, one in times.items():
        own = one.lower_quartile
        columns = {"us": 1e6 * own}
        if aten is not None and name != "ATen":
            columns |= {"over_us": 1e6 * (own - aten), "over_aten": own / aten}
        if name + BEFORE in times:
            columns["of_before"] = own / times[name + BEFORE].lower_quartile
        results.append(one.result({"operator": operator, "mode": mode}, name, None, **columns))
    return results


def print_calls(results: Sequence[Result]) -> None:
    """Print a line for each call, with both ways of it beside ATen's."""
    rows = {(*one.case.values(), one.contestant): one.columns for one in results}
    lines = []
    for (operator, mode, name), columns in rows.items():
        if name == "ATen" or name.endswith((BY_CPP, BEFORE)):
            continue
        by_cpp = rows.get((operator, mode, name + BY_CPP), {})
        aten = rows.get((operator, mode, "ATen"), {})
        numbers = {
            "Python": columns.get("us"),
            "C++": by_cpp.get("us"),
            "ATen": aten.get("us"),
            "Python/ATen": columns.get("over_aten"),
            "C++/ATen": by_cpp.get("over_aten"),
            "Python of before": columns.get("of_before"),
            "C++ of before": by_cpp.get("of_before"),
        }
        lines.append(
            {"operator": operator, "mode": mode, "call": name}
            | {header: number(value) for header, value in numbers.items()}
        )
    print_cells("a call on the host, in µs by both ways and by ATen", lines)
    print_failures(results)


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
        times = take_turns(turns, rounds, label="launches")
    return [times[name].result({"operator": "matmul_t", "n": N}, name) for name in turns]


if __name__ == "__main__":
    run(main, "run host")
