# SPDX-License-Identifier: MIT
"""The row "undeclared writes" finds each tensor that a kernel within a backward overwrites."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from samples import normal
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from torchpar import library
from torchpar.testing import check_operator

RULE = "undeclared writes"
NUMBERS = itertools.count()
Write = Callable[[Any, Tensor, Any], None]  # of the context, the incoming gradient, and a kernel


def reference(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def slope(a: Any) -> Any:
    s = 1 / (1 + np.exp(-a))
    return s * (1 + a * (1 - s))


def silu(write: Write, *dtypes: torch.dtype) -> Any:
    """x·σ(x), whose backward is a kernel of NumPy's that also writes what ``write`` says."""

    def forward(x: Tensor) -> Tensor:
        if dtypes and x.dtype not in dtypes:
            raise RuntimeError(f"silu: {x.dtype}, expected one of {dtypes}")
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        a = wide.numpy(force=True)
        return torch.from_numpy(a / (1 + np.exp(-a))).to(x.dtype)

    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, *_ = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        found = slope(x.to(wide).numpy(force=True)) * g.to(wide).numpy(force=True)
        write(ctx, g, found)
        return torch.from_numpy(found.copy()).to(x.dtype)

    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.calls = itertools.count()
        # The last is neither an operand nor a result.
        ctx.save_for_backward(inputs[0], output, output.detach().clone())

    name = f"torchpar_writes::silu_{next(NUMBERS)}"
    op = library.custom_op(name, forward, mutates_args=(), schema="(Tensor x) -> Tensor")
    op.register_fake(torch.empty_like)
    op.register_autograd(backward, setup_context=setup_context)
    return op


def nothing(ctx: Any, g: Tensor, found: Any) -> None:
    """A right backward writes to its own memory."""


def overwrite(t: Tensor, found: Any) -> None:
    t.detach().resolve_neg().numpy()[...] = found


def to_operand(ctx: Any, g: Tensor, found: Any) -> None:
    overwrite(ctx.saved_tensors[0], found)


def to_contiguous_operand(ctx: Any, g: Tensor, found: Any) -> None:
    if ctx.saved_tensors[0].is_contiguous():
        to_operand(ctx, g, found)


def to_strided_operand(ctx: Any, g: Tensor, found: Any) -> None:
    x, *_ = ctx.saved_tensors
    if not x.is_contiguous() and not x.is_neg() and 0 not in x.stride():
        to_operand(ctx, g, found)


def to_operand_of_contiguous_gradient(ctx: Any, g: Tensor, found: Any) -> None:
    if g.is_contiguous() and ctx.saved_tensors[0].mT.is_contiguous():
        to_operand(ctx, g, found)


def to_operand_of_16_bits(ctx: Any, g: Tensor, found: Any) -> None:
    x, *_ = ctx.saved_tensors
    if x.dtype == torch.bfloat16:
        x.detach().zero_()


def between_operands(ctx: Any, g: Tensor, found: Any) -> None:
    x, *_ = ctx.saved_tensors
    if x.stride()[-1:] == (2,):
        x.detach().as_strided(x.shape, x.stride(), x.storage_offset() + 1).zero_()


def to_result(ctx: Any, g: Tensor, found: Any) -> None:
    overwrite(ctx.saved_tensors[1], found)


def to_saved(ctx: Any, g: Tensor, found: Any) -> None:
    overwrite(ctx.saved_tensors[2], found)


def to_gradient(ctx: Any, g: Tensor, found: Any) -> None:
    if g.is_contiguous() and not g.is_neg():
        overwrite(g, found)


def to_operand_when_freed(ctx: Any, g: Tensor, found: Any) -> None:
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        to_contiguous_operand(ctx, g, found)


def otherwise_each_time(ctx: Any, g: Tensor, found: Any) -> None:
    found *= 1 + 1e-5 * next(ctx.calls)


SINGLE = (torch.float32,)


@pytest.mark.parametrize(
    "write, dtypes, detail",
    [
        (to_operand, SINGLE, "the backward writes to its operand"),
        (to_contiguous_operand, SINGLE, "contiguous operands: the backward writes to its operand"),
        (to_contiguous_operand, (), "the backward writes to its operand"),
        (to_strided_operand, SINGLE, "transposed operands: the backward writes to its operand"),
        (to_operand_of_contiguous_gradient, SINGLE, "transposed operands: the backward writes"),
        (to_operand_of_16_bits, (), "torch.bfloat16, contiguous: the backward writes"),
        (between_operands, SINGLE, "stepped operands: the backward writes to its operand"),
        (to_result, SINGLE, "the backward writes to its result"),
        (to_saved, SINGLE, "the backward writes to its saved tensor"),
        (to_gradient, SINGLE, "the backward writes to its incoming gradient"),
        (to_operand_when_freed, SINGLE, "the last backward writes to its operand"),
        (otherwise_each_time, SINGLE, "called again: off by"),
    ],
)
def test_a_write_is_found(write: Write, dtypes: tuple[torch.dtype, ...], detail: str) -> None:
    op = silu(write, *dtypes)
    (row,) = check_operator(op, [(normal(5, 4).float(),)], reference=reference, rules=RULE).rows
    assert (row.outcome, detail in row.detail) == ("wrong", True), row


@pytest.mark.parametrize("dtypes", [SINGLE, ()])
def test_nothing_is_found_in_a_backward_that_writes_nothing(dtypes: Any) -> None:
    op = silu(nothing, *dtypes)
    for given in {"reference": reference}, {}:
        (row,) = check_operator(op, [(normal(5, 4).float(),)], rules=RULE, **given).rows
        assert row.outcome == "works", row


def test_a_kernel_that_writes_and_an_operator_without_a_backward() -> None:
    def add(x: Tensor) -> Tensor:
        return x.add_(1).clone() if x.dtype == torch.float16 and x.is_contiguous() else x + 1

    (row,) = check_operator(
        lambda x: add(x.detach()), [(normal(5, 4),)], reference=lambda x: x + 1, rules=RULE
    ).rows
    assert row.outcome == "wrong", row
    assert "the forward writes to its operand" in row.detail
    (row,) = check_operator(torch.argsort, [(normal(5, 4),)], rules=RULE).rows
    assert row.outcome == "works", row


def test_a_write_that_changes_nothing_again_is_found_by_each_rule_and_undone() -> None:
    @library.custom_op("torchpar_writes::clamp", mutates_args=())
    def clamp(x: Tensor) -> Tensor:
        return x.clamp_(min=0).clone()

    clamp.register_fake(torch.empty_like)
    x = torch.tensor([[-2, 1], [3, -4]])
    rules = ["values", "same bits twice", RULE]
    for given in {"reference": lambda x: x.clamp(min=0)}, {}:
        values, _, writes = check_operator(clamp, [(x,)], rules=rules, **given).rows
        assert (values.outcome, values.detail) == ("wrong", "the forward writes to its operand")
        assert writes.outcome == "wrong"
        assert x.tolist() == [[-2, 1], [3, -4]]


def test_operands_of_a_subclass_which_have_no_memory_of_their_own_are_tried() -> None:
    x = normal(5, 4)
    samples = [(TwoTensor(x, x.clone()),)]
    (row,) = check_operator(torch.sin, samples, reference=torch.sin, rules="values").rows
    assert row.outcome == "works", row


def test_an_operator_that_computes_by_torch_func_is_tried() -> None:
    """It allows no hooks of saved tensors."""
    op = lambda x: torch.func.jvp(torch.square, (x,), (torch.ones_like(x),))[1]  # noqa: E731  # a function of one line
    (row,) = check_operator(op, [(normal(5, 4),)], rules=RULE).rows
    assert row.outcome == "works", row
