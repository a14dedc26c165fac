# SPDX-License-Identifier: MIT
"""The calls of the benchmark `host`, made in a process of its own for each checkout.

``PYTHONPATH=CHECKOUT python -P host_calls.py`` imports torchpar and its benchmarks from there. It
writes the names of the calls as a line of JSON. Then it answers each line "NAME COUNT" with the
seconds of one of COUNT calls.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch

N = 16  # a call on 256 elements takes ATen on the CPU about as long as to issue its kernel
WARM_UP = 10  # calls that are not timed: another process has used the caches
Calls = dict[str, Callable[[], object]]
LIBRARY = torch.library.Library("torchpar_host", "DEF")
NO_GRADIENT, FORWARD, FULL = "no gradient", "forward", "full"  # the last one with backward


def own_calls() -> Calls:
    """Calls of this checkout, named "OPERATOR, MODE, CONTESTANT", within its stand-in for a GPU."""
    import torchpar
    from torchpar.kernels import linear_sigmoid, maximum

    x, y, bias, g = torch.ones(N, N), torch.ones(N, N), torch.ones(N), torch.ones(N, N)
    calls: Calls = {}

    def add(operator: str, native: Callable[..., torch.Tensor], *operands: torch.Tensor) -> None:
        leaves = [t.clone().requires_grad_() for t in operands]
        contestants = {
            "ATen": native,
            "torchpar": getattr(torchpar, operator),
            "torch.ops.torchpar": getattr(torch.ops.torchpar, operator),
        }
        if operator == "symmetric_matmul":
            options = {"alpha": 0.5, "beta": 2.0}
            for name in ("torchpar", "torch.ops.torchpar"):
                contestants[name] = partial(contestants[name], **options)
        for name, op in contestants.items():
            calls[f"{operator}, {NO_GRADIENT}, {name}"] = partial(op, *operands)
            calls[f"{operator}, {FORWARD}, {name}"] = partial(op, *leaves)
            calls[f"{operator}, {FULL}, {name}"] = partial(forward_and_backward, op, leaves, g)

    add("maximum", torch.maximum, x, y)
    add("linear_sigmoid", lambda x, w, b: torch.nn.functional.linear(x, w, b).sigmoid(), x, y, bias)
    add("matmul_t", lambda x: x @ x.mT, x)
    add("symmetric_matmul", lambda a, b, c: torch.addmm(c, a, b.mT, beta=2, alpha=0.5), x, x, g)

    # The launcher, and the allocation of its result.
    if hasattr(maximum, "maximum_again"):
        from torchpar.kernels import matmul_t

        launchers: Calls = {
            "maximum": lambda: maximum.maximum_again(x, y),
            "matmul_t": lambda: matmul_t.matmul_t_again(x, "tf32"),
            "linear_sigmoid": lambda: linear_sigmoid.linear_sigmoid_again(x, y, bias, "tf32"),
        }
    else:  # up to version 0.4
        from importlib import import_module

        product = import_module("torchpar.kernels.symmetric_matmul").symmetric_matmul
        launchers = {
            "maximum": lambda: maximum.maximum(x, y, torch.empty_like(x), None),
            "matmul_t": lambda: product(x, x, "tf32", None),
            "linear_sigmoid": lambda: linear_sigmoid.linear_sigmoid(x, y, bias, "tf32", None),
        }
    return calls | {f"{name}, , launcher": call for name, call in launchers.items()}


def forward_and_backward(
    op: Callable[..., torch.Tensor], leaves: list[torch.Tensor], g: torch.Tensor
) -> object:
    return torch.autograd.grad(op(*leaves), leaves, g)


def layers() -> Calls:
    """What each call contains: PyTorch's allocation, and its dispatch to a function in Python."""
    LIBRARY.define("same(Tensor x) -> Tensor")
    LIBRARY.impl("same", lambda x: x, "Autograd")
    x, same = torch.ones(N, N), torch.ops.torchpar_host.same
    return {
        "layers, , empty_like": lambda: torch.empty_like(x),
        "layers, , dispatch to Python": lambda: same(x),
    }


def main() -> None:
    from benchmarks.host import gpu_of_cpu_tensors

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # both checkouts are timed on one core
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with gpu_of_cpu_tensors():
        calls = own_calls() | layers()
        for call in calls.values():
            call()
        print(json.dumps(list(calls)), flush=True)
        for line in sys.stdin:
            name, _, count = line.strip().rpartition(" ")
            call, numbers = calls[name], range(int(count))
            for _ in range(WARM_UP):
                call()
            began = perf_counter()
            for _ in numbers:
                call()
            print((perf_counter() - began) / len(numbers), flush=True)


if __name__ == "__main__":
    main()
