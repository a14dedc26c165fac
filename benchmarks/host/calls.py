# SPDX-License-Identifier: MIT
"""The calls of the benchmark `host`, made in a process of its own for each checkout.

``PYTHONPATH=CHECKOUT python -P calls.py cuda`` imports torchpar and its benchmarks from
there; ``calls.py cpu STUB`` puts a stub in the place of libcuda before. It writes the names of the
calls as a line of JSON. Then it answers each line "NAME COUNT" with the seconds of one of COUNT
calls: on "cuda" the host's, which does not wait for the GPU.

Both ways of a call are in one process: the C++ path is taken away for a call by Python, and put
back, with new tapes, for a call by C++. Each call by C++ is compared with Python's before any is
timed: on "cpu" its launches, on "cuda" its results.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

N = 16  # a call on 256 elements takes ATen on the CPU about as long as to issue its kernel
WARM_UP = 10  # calls that are not timed: others have used the caches, and tapes are recorded
LEAST_WARM_UP = 3
BY_CPP = " by C++"  # at the end of a contestant's name
Calls = dict[str, Callable[[], object]]
LIBRARY = torch.library.Library("torchpar_host", "DEF")
NO_GRADIENT, FORWARD, FULL = "no gradient", "forward", "full"  # the last one with backward


def operators_calls(device: str) -> Calls:
    """Calls of the records' operators, named "OPERATOR, MODE, CONTESTANT"; on "cpu" within the
    checkout's stand-in for a GPU.

    On "cuda" in sizes whose kernels mostly end before the next one is issued.
    """
    import torchpar

    calls: Calls = {}
    for operator, record in records().OPERATORS.items():
        if (call := record.host) is None:
            continue
        (rows,), dtype = (call.rows, call.dtype) if device == "cuda" else ([N], torch.float32)
        operands = [torch.ones(shape, dtype=dtype, device=device) for shape in call.shapes(rows)]
        leaves = [t.clone().requires_grad_() for t in operands]
        g = torch.ones_like(operands[0])
        contestants = {"ATen": call.aten}
        for name, module in (("torchpar", torchpar), ("torch.ops.torchpar", torch.ops.torchpar)):
            ours = getattr(module, operator)
            contestants[name] = partial(ours, **call.options) if call.options else ours
        for name, op in contestants.items():
            calls[f"{operator}, {NO_GRADIENT}, {name}"] = partial(op, *operands)
            calls[f"{operator}, {FORWARD}, {name}"] = partial(op, *leaves)
            calls[f"{operator}, {FULL}, {name}"] = partial(forward_and_backward, op, leaves, g)
    return calls


def launchers_calls(device: str) -> Calls:
    """Calls of the launchers, and the allocations of their results, after the operators' calls of
    tensors with the same layouts."""
    kernels: Any = import_module("torchpar.kernels")
    for name in ("linear_sigmoid", "matmul_t", "maximum"):
        with suppress(ImportError):  # up to version 0.4 one had another name
            import_module(f"torchpar.kernels.{name}")
    on_gpu = device == "cuda"
    small, large = (64, 1024) if on_gpu else (N, N)
    dtype, precision = (torch.bfloat16, "ieee") if on_gpu else (torch.float32, "tf32")
    a, b = torch.ones(2, small, small, device=device)
    x, weight = torch.ones(2, small, small, dtype=dtype, device=device)
    bias, square = (torch.ones(s, dtype=dtype, device=device) for s in ((small,), (large, large)))
    is_choosing = {"only_if_faster": on_gpu}
    if hasattr(kernels.maximum, "new_maximum"):
        launchers: Calls = {
            "maximum": lambda: kernels.maximum.new_maximum(a, b, torch.maximum),
            "matmul_t": lambda: kernels.matmul_t.matmul_t(square, precision, None, **is_choosing),
            "linear_sigmoid": lambda: kernels.linear_sigmoid.linear_sigmoid(
                x, weight, bias, precision, None, **is_choosing
            ),
        }
    elif hasattr(kernels.maximum, "maximum_again"):  # up to version 0.5
        launchers = {
            "maximum": lambda: kernels.maximum.maximum_again(a, b),
            "matmul_t": lambda: kernels.matmul_t.matmul_t_again(square, precision, on_gpu),
            "linear_sigmoid": lambda: kernels.linear_sigmoid.linear_sigmoid_again(
                x, weight, bias, precision, on_gpu
            ),
        }
    else:  # up to version 0.4
        matmul = import_module("torchpar.kernels.symmetric_matmul").symmetric_matmul
        launchers = {
            "maximum": lambda: kernels.maximum.maximum(a, b, torch.empty_like(a), None),
            "matmul_t": lambda: matmul(square, square, precision, None),
            "linear_sigmoid": lambda: kernels.linear_sigmoid.linear_sigmoid(
                x, weight, bias, precision, None
            ),
        }
    return {f"{name}, , launcher": call for name, call in launchers.items()}


def records() -> Any:
    """The records of this file's checkout, whose calls are made of each checkout alike."""
    return own_module("records", Path(__file__).parents[1] / "records" / "__init__.py")


def own_module(name: str, path: Path) -> Any:
    """A module of this file's checkout, where `benchmarks` is another one's."""
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def muon_calls(device: str) -> Calls:
    """Steps of Muon for a matrix, and for GPT-2 small's 48; for a stand-in of a 48th of the size,
    with as much in a batch."""
    from torchpar.optim import Muon, matrices, newton_schulz

    n = 768 if device == "cuda" else N
    alone = [768, 2048] if device == "cuda" else [N]
    if device != "cuda":
        linear, cubic = n / 768, (n / 768) ** 3
        scales = {
            (matrices, "_PADDED_UP_TO"): linear,
            (matrices, "_BATCH_MULTIPLICATIONS"): cubic,
            (newton_schulz, "_GRAM_ROWS"): linear,
            (newton_schulz, "_GRAM_MULTIPLICATIONS"): cubic,
        }
        for (module, name), scale in scales.items():
            if hasattr(module, name):  # not in every checkout
                setattr(module, name, int(getattr(module, name) * scale))
        vars(newton_schulz)["has_bfloat16"] = lambda: True  # not asked on a GPU
    weights = {
        **{f"a matrix of {side}x{side}": [(side, side)] for side in alone},
        "GPT-2 small": [
            shape for one in ((n, n), (n, 3 * n), (n, 4 * n), (4 * n, n)) for shape in [one] * 12
        ],
    }
    calls: Calls = {}
    for name, shapes in weights.items():
        for contestant, make in {"ATen": torch.optim.Muon, "torchpar": Muon}.items():
            params = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
            for p in params:
                p.grad = torch.randn_like(p)
            calls[f"Muon, {name}, {contestant}"] = make(params).step
    return calls


def forward_and_backward(
    op: Callable[..., torch.Tensor], leaves: list[torch.Tensor], g: torch.Tensor
) -> object:
    return torch.autograd.grad(op(*leaves), leaves, g)


def layers(device: str) -> Calls:
    """Parts of calls: PyTorch's allocation, its dispatch to Python, and a call by `torch.ops`."""
    LIBRARY.define("same(Tensor x) -> Tensor")
    LIBRARY.impl("same", lambda x: x, "Autograd")
    x, same = torch.ones(N, N, device=device), torch.ops.torchpar_host.same
    return {
        "layers, , empty_like": lambda: torch.empty_like(x),
        "layers, , dispatch to Python": lambda: same(x),
        "layers, , torch.ops": lambda: torch.ops.aten.maximum(x, x),
    }


class Ways:
    """The two ways of a call: by Python alone, and by C++ where it was built.

    Attributes:
        module: the C++; None where it was not built, and in older checkouts.
    """

    def __init__(self, launch: int | None):
        """``launch`` is the address of a stub's cuLaunchKernelEx, for tensors on the CPU."""
        self.module: Any = None
        with suppress(ImportError):  # up to version 0.5
            self._core: Any = import_module("torchpar.library.player").core
            self._operators: Any = import_module("torchpar.library.tape").operators
            load = import_module("torchpar.library.build").load
            self.module = self._core.module or (load() if launch else None)
        if self.module is not None and launch:
            self.module.set_launch(launch)
            self._core.devices = ("CPU",)  # whose keys stand for CUDA's
        self._is_by_cpp: bool | None = None

    def take(self, by_cpp: bool) -> None:
        """Let the next calls go by C++, or by Python."""
        if self.module is None or by_cpp == self._is_by_cpp:
            return
        self._is_by_cpp = by_cpp
        self._core.module = self.module if by_cpp else None
        if not by_cpp:
            for op in self._operators.values():
                op._stop_player()

    def missed(self) -> int:
        """The calls by C++ so far that Python had to compute."""
        return int(self.module.counts()[1])


def check(calls: Calls, ways: Ways, stub: Any) -> None:
    """Compare calls by C++ with those by Python, and on "cuda" Python's with ATen's.

    On "cpu" no kernel computes: both ways launch the same kernels, in the same order, with the same
    grids, blocks and shared memory, and ATen's call launches nothing.
    """

    def observed(name: str, by_cpp: bool) -> Any:
        ways.take(by_cpp)
        call = calls[name]
        for _ in range(LEAST_WARM_UP):
            call()
        return call() if stub is None else stub.launches(call)

    by_python = {name: observed(name, False) for name in calls}
    for name, found in by_python.items():
        case, _, contestant = name.rpartition(", ")
        aten = by_python.get(f"{case}, ATen")
        if aten is None or contestant == "ATen":
            continue
        if stub is None:
            torch.testing.assert_close(found, aten, rtol=0.03, atol=0.03)
        elif aten or not found:
            raise SystemExit(f"{name}: {len(found)} launches, and {len(aten)} by ATen, expected 0")
        if ways.module is None:
            continue
        again = observed(name, True)
        if not (again == found if stub is not None else _is_equal(again, found)):
            raise SystemExit(f"{name}: by C++ it is not what it is by Python")


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return a is b is None or all(map(torch.equal, a, b))


def main(device: str, stub_path: str = "") -> None:
    stub: Any = None
    if stub_path:  # before torchpar is imported, which looks for the driver
        os.environ["TRITON_LIBCUDA_PATH"] = str(Path(stub_path).parent)
        stub = own_module("stub", Path(__file__).with_name("stub.py")).Stub(Path(stub_path))
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # both checkouts are timed on one core
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with ExitStack() as stack:
        if device == "cpu":
            driver: Any = import_module("benchmarks.driver")  # the checkout's
            # Up to version 0.4 it was in another module.
            is_old = not hasattr(driver, "gpu_of_cpu_tensors")
            home: Any = import_module("benchmarks.host") if is_old else driver
            stack.enter_context(home.gpu_of_cpu_tensors())
            import triton
            from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

            active = triton.runtime.driver.active  # with Triton's own utilities and launcher
            stack.enter_context(patch.object(active, "utils", CudaUtils()))
            stack.enter_context(patch.object(active, "launcher_cls", CudaLauncher))
        of_operators = operators_calls(device) | muon_calls(device)
        calls = of_operators | launchers_calls(device) | layers(device)
        ways = Ways(stub.launch if stub else None)
        check(of_operators, ways, stub)
        ways.take(False)
        for call in calls.values():
            call()
        names = list(calls)
        if ways.module is not None:
            names += [f"{name}{BY_CPP}" for name in of_operators if not name.endswith(", ATen")]
        print(json.dumps(names), flush=True)
        for line in sys.stdin:
            name, _, count = line.strip().rpartition(" ")
            print(seconds_of(calls, ways, name, int(count), device), flush=True)


def seconds_of(calls: Calls, ways: Ways, name: str, count: int, device: str) -> float:
    by_cpp, numbers = name.endswith(BY_CPP), range(count)
    ways.take(by_cpp)
    call = calls[name.removesuffix(BY_CPP)]
    for _ in range(max(LEAST_WARM_UP, min(count, WARM_UP))):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    before = ways.missed() if by_cpp else 0
    began = perf_counter()
    for _ in numbers:
        call()
    seconds = (perf_counter() - began) / count
    if by_cpp and ways.missed() != before:
        raise SystemExit(f"{name}: Python computed {ways.missed() - before} of {count} calls")
    return seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
