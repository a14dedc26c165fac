# SPDX-License-Identifier: MIT
"""The calls of the benchmark `host`, made in a process of its own for each checkout.

``PYTHONPATH=CHECKOUT python -P calls.py DEVICE`` imports torchpar and its benchmarks from
there. It writes the names of the calls as a line of JSON. Then it answers each line "NAME COUNT"
with the seconds of one of COUNT calls: on "cuda" the host's, which does not wait for the GPU.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

N = 16  # a call on 256 elements takes ATen on the CPU about as long as to issue its kernel
WARM_UP = 10  # calls that are not timed: another process has used the caches
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
    folder = Path(__file__).parents[1] / "records"
    spec = spec_from_file_location("records", folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["records"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def muon_calls(device: str) -> Calls:
    """Steps of Muon for a matrix, and for GPT-2 small's 48; for a stand-in of a 48th of the size,
    with as much in a batch."""
    from torchpar.optim import Muon, matrices, newton_schulz

    n = 768 if device == "cuda" else N
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
        f"a matrix of {n}x{n}": [(n, n)],
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
    """What each call contains: PyTorch's allocation, and its dispatch to a function in Python."""
    LIBRARY.define("same(Tensor x) -> Tensor")
    LIBRARY.impl("same", lambda x: x, "Autograd")
    x, same = torch.ones(N, N, device=device), torch.ops.torchpar_host.same
    return {
        "layers, , empty_like": lambda: torch.empty_like(x),
        "layers, , dispatch to Python": lambda: same(x),
    }


def main(device: str) -> None:
    stand_in: AbstractContextManager[object] = nullcontext()
    if device == "cpu":
        driver: Any = import_module("benchmarks.driver")  # the checkout's
        # Up to version 0.4 it was in another module.
        is_old = not hasattr(driver, "gpu_of_cpu_tensors")
        home: Any = import_module("benchmarks.host") if is_old else driver
        stand_in = home.gpu_of_cpu_tensors()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # both checkouts are timed on one core
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with stand_in:
        calls = operators_calls(device) | launchers_calls(device)
        calls |= muon_calls(device) | layers(device)
        for call in calls.values():
            call()
        print(json.dumps(list(calls)), flush=True)
        for line in sys.stdin:
            name, _, count = line.strip().rpartition(" ")
            call, numbers = calls[name], range(int(count))
            for _ in numbers[:WARM_UP]:
                call()
            if device == "cuda":
                torch.cuda.synchronize()
            began = perf_counter()
            for _ in numbers:
                call()
            print((perf_counter() - began) / len(numbers), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
