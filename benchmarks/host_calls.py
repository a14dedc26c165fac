# SPDX-License-Identifier: MIT
"""The calls of the benchmark `host`, made in a process of its own for each checkout.

``PYTHONPATH=CHECKOUT python -P host_calls.py DEVICE`` imports torchpar and its benchmarks from
there. It writes the names of the calls as a line of JSON. Then it answers each line "NAME COUNT"
with the seconds of one of COUNT calls: on "cuda" the host's, which does not wait for the GPU.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import perf_counter

import torch

N = 16  # a call on 256 elements takes ATen on the CPU about as long as to issue its kernel
WARM_UP = 10  # calls that are not timed: another process has used the caches
Calls = dict[str, Callable[[], object]]
LIBRARY = torch.library.Library("torchpar_host", "DEF")
NO_GRADIENT, FORWARD, FULL = "no gradient", "forward", "full"  # the last one with backward


def own_calls(device: str) -> Calls:
    """Calls of this checkout, named "OPERATOR, MODE, CONTESTANT"; on "cpu" within its stand-in for
    a GPU.

    On "cuda" in sizes whose kernels mostly end before the next one is issued: 64², and 1024² for
    products.
    """
    import torchpar
    from torchpar.kernels import linear_sigmoid, maximum

    on_gpu = device == "cuda"
    small, large = (64, 1024) if on_gpu else (N, N)
    matrix_dtype = torch.bfloat16 if on_gpu else torch.float32
    precision = "ieee" if on_gpu else "tf32"

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=matrix_dtype, device=device)

    a, b = torch.ones(2, small, small, device=device)
    x, weight, bias = ones(small, small), ones(small, small), ones(small)
    square, c = ones(large, large), ones(large, large)
    calls: Calls = {}

    def add(operator: str, native: Callable[..., torch.Tensor], *operands: torch.Tensor) -> None:
        leaves = [t.clone().requires_grad_() for t in operands]
        g = torch.ones_like(operands[0])  # the results have this shape, too
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

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias).sigmoid()

    def product(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.addmm(c, a, b.mT, beta=2, alpha=0.5)

    add("maximum", torch.maximum, a, b)
    add("linear_sigmoid", layer, x, weight, bias)
    add("matmul_t", lambda x: x @ x.mT, square)
    add("symmetric_matmul", product, square, square, c)

    # The launcher, and the allocation of its result.
    if hasattr(maximum, "maximum_again"):
        from torchpar.kernels import matmul_t

        launchers: Calls = {
            "maximum": lambda: maximum.maximum_again(a, b),
            "matmul_t": lambda: matmul_t.matmul_t_again(square, precision, on_gpu),
            "linear_sigmoid": lambda: linear_sigmoid.linear_sigmoid_again(
                x, weight, bias, precision, on_gpu
            ),
        }
    else:  # up to version 0.4
        from importlib import import_module

        matmul = import_module("torchpar.kernels.symmetric_matmul").symmetric_matmul
        launchers = {
            "maximum": lambda: maximum.maximum(a, b, torch.empty_like(a), None),
            "matmul_t": lambda: matmul(square, square, precision, None),
            "linear_sigmoid": lambda: linear_sigmoid.linear_sigmoid(
                x, weight, bias, precision, None
            ),
        }
    return calls | {f"{name}, , launcher": call for name, call in launchers.items()}


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
        from benchmarks.host import gpu_of_cpu_tensors

        stand_in = gpu_of_cpu_tensors()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # both checkouts are timed on one core
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with stand_in:
        calls = own_calls(device) | muon_calls(device) | layers(device)
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
