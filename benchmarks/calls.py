# SPDX-License-Identifier: MIT
"""Time calls of small operators, by each way to make one: ``python -m benchmarks run calls``.

First the sigmoid of a vector, computed in place in a copy. Its reference is a bare
`torch.autograd.Function`, which no part of PyTorch but autograd supports. Then torchpar's operators
at 64 × 64, beside the calls of ATen that compute the same: what a call takes more.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

import torchpar.library
from torchpar.library.rules import Context

from .flags import Command, run
from .operators import draw
from .records import OPERATORS
from .records.record import Operator, SmallCall
from .results import Result, Table, print_bounds, print_results
from .timing import CPU, Rejected, Times, take_turns, time_calls

REFERENCE, OWN, TORCH = "torch.autograd.Function", "torchpar.library", "torch.library"
ROUNDS = 200
CALLS = 50
MODES = ("no gradient", "forward", "full")  # "full" is forward and backward
# Of what ours may take more than ATen's calls, in µs; the backward passes differ in what they
# compute.
BOUNDS = {"no gradient": 6.0, "forward": 10.0}


def compute(x: Tensor) -> Tensor:
    return x.clone().sigmoid_()


def setup_context(ctx: Context, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def backward(ctx: Context, g: Tensor) -> Tensor:
    (y,) = ctx.saved_tensors
    return torch.ops.aten.sigmoid_backward(g, y)  # type: ignore[no-any-return]


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        y = compute(x)
        ctx.save_for_backward(y)
        return y

    backward = staticmethod(backward)


def registered(library: ModuleType, name: str) -> Callable[..., Tensor]:
    """Register the small operator by ``library.custom_op``."""
    op = library.custom_op(f"torchpar_benchmarks::{name}", compute, mutates_args=())
    op.register_fake(torch.empty_like)
    op.register_autograd(backward, setup_context=setup_context)
    return op  # type: ignore[no-any-return]


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("calls")
    options = command.parse(arguments)
    torch.set_num_threads(1)
    rounds = 2 if options.quick else ROUNDS
    table = Table(command.csv(options), CPU)
    table.add(time_registrations(rounds))
    for operator in OPERATORS.values():
        if operator.call is not None:
            for rows in operator.call.rows:
                table.add(time_operator(operator, operator.call, rows, rounds))
    first = len(MODES[1:]) * 4
    print_results("a call of a small operator", table.results[:first])
    columns = [
        "operator",
        "mode",
        "rows",
        "contestant",
        "p20_ms",
        "p50_ms",
        "over_us",
        "bound_us",
        "ok",
    ]
    print_results(
        "a call of an operator, and its µs more than ATen's", table.results[first:], columns
    )
    return max(table.status, 0 if options.quick else print_bounds(table))


def time_registrations(rounds: int) -> list[Result]:
    """The small operator by each way; ``ratio`` of ours is over torch.library's."""
    contestants: dict[str, Callable[..., Tensor]] = {
        REFERENCE: Function.apply,
        "PyTorch's own sigmoid": torch.sigmoid,
        OWN: registered(torchpar.library, "moved"),
        TORCH: registered(torch.library, "own"),
    }
    x = torch.linspace(-3, 3, 16, requires_grad=True)
    g = torch.linspace(1, 2, 16)
    expected = {"forward": x.sigmoid(), "full": torch.ops.aten.sigmoid_backward(g, x.sigmoid())}
    results = []
    for mode in MODES[1:]:
        times = time_contestants(contestants, [x], g, mode, expected[mode], rounds)
        for name, one in times.items():
            bound = {"ratio": one.ratio_over(times[TORCH]), "bound": 1.0} if name == OWN else {}
            results.append(one.result({"mode": mode}, name, times[REFERENCE], **bound))
    return results


def time_operator(operator: Operator, call: SmallCall, rows: int, rounds: int) -> list[Result]:
    """An operator beside ATen; ``over_us`` is what its call takes more, by lower quartiles."""
    operands = call.operands(*draw(0, torch.float32, CPU, call.shapes(rows)))
    ours = partial(operator.function, **call.options) if call.options else operator.function
    contestants = {"ATen": call.aten, "torchpar": ours}
    expected = call.aten(*operands)
    g = torch.ones_like(expected)
    results = []
    for mode in MODES if call.differentiable else MODES[:1]:
        inputs = operands if mode == MODES[0] else [t.clone().requires_grad_() for t in operands]
        wanted = expected if mode != "full" else None
        times = time_contestants(contestants, inputs, g, mode, wanted, rounds)
        over = 1e6 * (times["torchpar"].lower_quartile - times["ATen"].lower_quartile)
        for contestant, one in times.items():
            columns = (
                {"over_us": over, "bound_us": BOUNDS.get(mode)} if contestant == "torchpar" else {}
            )
            case = {"operator": operator.name, "mode": mode, "rows": rows}
            results.append(one.result(case, contestant, times["ATen"], **columns))
    return results


def time_contestants(
    contestants: dict[str, Callable[..., Tensor]],
    inputs: Sequence[Tensor],
    g: Tensor,
    mode: str,
    expected: Tensor | None,
    rounds: int,
    calls: int = CALLS,
) -> dict[str, Times]:
    """Time calls in turn, and compare the result, or the gradients' dtype and shape, with
    ``expected``."""

    def forward_and_backward(op: Callable[..., Tensor]) -> Tensor:
        return torch.autograd.grad(op(*inputs), inputs, g)[0]

    def turn(op: Callable[..., Tensor], index: int) -> list[float]:
        call = partial(forward_and_backward, op) if mode == "full" else partial(op, *inputs)
        timed = time_calls(call, calls=calls if index else 1)
        if expected is not None and not torch.allclose(timed.result, expected):
            raise Rejected("another result than ATen's")
        return [timed.seconds()]

    turns = {name: partial(turn, op) for name, op in contestants.items()}
    return take_turns(turns, rounds, label=mode)


if __name__ == "__main__":
    run(main)
