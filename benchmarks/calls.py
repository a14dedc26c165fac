# SPDX-License-Identifier: MIT
"""Time the call of a small custom operator, by each way to make one: ``python -m benchmarks run calls``.

The operator is the sigmoid of a vector, computed in place in a copy. The reference is a bare
`torch.autograd.Function`, which no part of PyTorch but autograd supports.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import torchpar.library
from benchmarks.command import Command, run
from benchmarks.results import Table, print_results
from benchmarks.timing import CPU, Rejected, take_turns, time_calls

REFERENCE = "torch.autograd.Function"
ROUNDS = 200
CALLS = 50


def compute(x: Tensor) -> Tensor:
    return x.clone().sigmoid_()


def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def backward(ctx: Any, g: Tensor) -> Tensor:
    (y,) = ctx.saved_tensors
    return torch.ops.aten.sigmoid_backward(g, y)  # type: ignore[no-any-return]


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = compute(x)
        ctx.save_for_backward(y)
        return y

    backward = staticmethod(backward)


def registered(decorator: Callable[..., Any], name: str) -> Callable[..., Any]:
    op = decorator(f"torchpar_benchmarks::{name}", compute, mutates_args=())
    op.register_fake(torch.empty_like)
    op.register_autograd(backward, setup_context=setup_context)
    return op  # type: ignore[no-any-return]


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("calls", "Time the call of a small custom operator, by each way to make one.")
    options = command.parse(arguments)
    torch.set_num_threads(1)
    contestants: dict[str, Callable[..., Any]] = {
        REFERENCE: Function.apply,
        "PyTorch's own sigmoid": torch.sigmoid,
        "torchpar.library": registered(torchpar.library.custom_op, "moved"),
        "torch.library": registered(torch.library.custom_op, "own"),
    }
    x = torch.linspace(-3, 3, 16, requires_grad=True)
    g = torch.linspace(1, 2, 16)

    def forward_and_backward(op: Callable[..., Any]) -> Tensor:
        return torch.autograd.grad(op(x), x, g)[0]

    def turn(op: Callable[..., Any], mode: str, index: int) -> list[float]:
        call = partial(op, x) if mode == "forward" else partial(forward_and_backward, op)
        timed = time_calls(call, calls=CALLS if index else 1)
        expected = x.sigmoid() if mode == "forward" else torch.ops.aten.sigmoid_backward(g, x.sigmoid())
        if not torch.equal(timed.result, expected):
            raise Rejected("another result than PyTorch's")
        return [timed.seconds()]

    table = Table(command.csv(options), CPU)
    for mode in ("forward", "full"):
        turns = {name: partial(turn, op, mode) for name, op in contestants.items()}
        times = take_turns(turns, 2 if options.quick else ROUNDS, label=mode)
        table.add(one.result({"mode": mode}, name, times[REFERENCE]) for name, one in times.items())
    print_results("a call of a small operator", table.results)
    return table.status


if __name__ == "__main__":
    run(main)
