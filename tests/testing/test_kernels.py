# SPDX-License-Identifier: MIT
"""An operator's kernels are checked without a GPU, by its table.

The operator is a fused RMS norm, as a user would write it. Each of its faults is in a kernel, so
that the table of the CPU, whose kernels are PyTorch's, cannot see it.
"""

import functools
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from samples import normal
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.testing import OperatorTable, check_operator
from torchpar.testing.operators.compare import difference, farthest


@triton.jit
def norm_kernel(x, weight, out, scales, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < n
    values = tl.load(x + row * n + column, inside, other=0.0)
    scale = 1 / tl.sqrt(tl.sum(values * values) / n + 1e-6)
    tl.store(scales + row, scale)
    result = values * scale * tl.load(weight + column, inside)
    if FAULT == "mask":
        tl.store(out + row * n + column, result)
    elif FAULT == "boundary":
        tl.store(out + row * n + column, result, column <= n)
    else:
        tl.store(out + row * n + column, result, inside)


@triton.jit
def gradient_kernel(g, x, weight, scales, dx, dweight, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < n
    gradient = tl.load(g + row * n + column, inside, other=0.0)
    values = tl.load(x + row * n + column, inside, other=0.0)
    weighted = gradient * tl.load(weight + column, inside, other=0.0)
    scale = tl.load(scales + row)
    mean = tl.sum((gradient if FAULT == "formula" else weighted) * values) / n
    tl.store(dx + row * n + column, scale * (weighted - values * mean * scale * scale), inside)
    change = gradient * values * scale
    if FAULT == "race":
        tl.store(dweight + column, tl.load(dweight + column, inside) + change, inside)
    else:
        tl.atomic_add(dweight + column, change, inside)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


@functools.cache
def operator(fault: str):
    """The operator, whose kernels run on a GPU alone."""
    name = f"torchpar_tests::rms_norm_{fault or 'right'}"

    @torch.library.custom_op(name, mutates_args=(), device_types="cuda")
    def op(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        (rows, n), out = x.shape, torch.empty_like(x)
        scales = x.new_empty(rows)
        block = triton.next_power_of_2(n)
        norm_kernel[(rows,)](x, weight, out, scales, n, FAULT=fault, BLOCK=block)
        return out, scales

    @op.register_kernel("cpu")
    def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight), (x.square().mean(-1) + 1e-6).rsqrt()

    @torch.library.custom_op(f"{name}_backward", mutates_args=(), device_types="cuda")
    def backward_op(g: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        (rows, n), dx = x.shape, torch.empty_like(x)
        dweight = torch.empty_like(weight) if fault == "empty" else torch.zeros_like(weight)
        operands = g.contiguous(), x, weight, scales, dx, dweight
        gradient_kernel[(rows,)](*operands, n, FAULT=fault, BLOCK=triton.next_power_of_2(n))
        return dx, dweight

    @backward_op.register_kernel("cpu")
    def _(g: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        weighted, scale = g * weight, scales[:, None]
        mean = (weighted * x).mean(-1, keepdim=True)
        return scale * (weighted - x * mean * scale.square()), (g * x * scale).sum(0)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    op.register_autograd(
        lambda ctx, g, _: backward_op(g, *ctx.saved_tensors), setup_context=setup_context
    )
    return lambda x, weight: op(x, weight)[0]


ROWS = (
    "kernel values",
    "kernel gradients",
    "races",
    "bounds",
    "uninitialised memory",
    "execution",
    "registers and spills",
)


def table(fault: str, emulate: str | None = "sm_90", **how: object) -> OperatorTable:
    samples = [(torch.randn(3, 20, dtype=torch.float32), torch.randn(20))]
    rules = ROWS if emulate else ["values", "any of the gradients"]
    return check_operator(
        operator(fault), samples, reference=rms_norm, rules=rules, emulate=emulate, **how
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_right_kernels_have_no_wrong_row(arch):
    found = table("", arch)
    assert [row.rule for row in found.rows] == list(ROWS)
    assert found.ok
    assert found["kernel values"].outcome == found["kernel gradients"].outcome == "works"
    assert "norm_kernel" in str(found)
    assert found["registers and spills"].outcome in ("works", "not run")  # without ptxas


# The rows that see a fault, and the line that they name.
FAULTS = {
    "mask": ({"bounds", "kernel values", "races"}, "tl.store(out + row"),
    "boundary": ({"bounds", "races", "kernel values"}, "tl.store(out + row"),
    "formula": ({"kernel gradients"}, ""),
    "race": ({"races", "kernel gradients"}, "tl.store(dweight"),
    "empty": ({"uninitialised memory", "kernel gradients"}, "tl.atomic_add(dweight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_seen_by_the_emulated_table_alone(fault):
    assert table(fault, None).ok
    found = table(fault)
    assert not found.ok
    rows, code = FAULTS[fault]
    wrong = {row.rule for row in found.rows if row.outcome == "wrong"}
    assert wrong
    assert wrong <= rows
    if code:
        lines = Path(__file__).read_text("utf-8").splitlines()
        numbers = [n for n, line in enumerate(lines, 1) if line.strip().startswith(code)]
        said = [row.detail for row in found.rows]
        assert any(f"test_kernels.py:{n}," in detail for n in numbers for detail in said), found


def test_every_rule_may_run_the_kernels():
    samples = [(torch.randn(2, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64))]
    rules = ["values", "gradcheck", "changes after the call"]
    right = check_operator(operator(""), samples, reference=rms_norm, rules=rules, emulate="sm_90")
    assert [row.outcome for row in right.rows] == ["works"] * 3
    wrong = check_operator(
        operator("formula"), samples, reference=rms_norm, rules=rules, emulate="sm_90"
    )
    assert wrong["gradcheck"].outcome == "wrong"


def test_what_cannot_be_emulated_is_refused():
    with pytest.raises(ConfigError, match="arch is 'sm_75', expected one of sm_80"):
        table("", "sm_75")
    with pytest.raises(ConfigError, match="rows of kernels need emulate="):
        check_operator(operator(""), [(torch.ones(1, 1), torch.ones(1))], rules="races")


def test_without_a_launch_the_rows_of_kernels_are_not_run():
    found = check_operator(
        torch.add,
        [(torch.ones(2), torch.ones(2))],
        reference=torch.add,
        rules=ROWS,
        emulate="sm_90",
    )
    assert {row.outcome for row in found.rows} - {"works"} == {"not run"}
    detail = found["kernel values"].detail
    assert detail.startswith("no Triton kernel was launched; ")
    assert 'op.register_kernel("cpu")' in str(found)


def test_an_infinity_is_off_by_infinity():
    infinite, finite = torch.tensor([1.0, float("inf")]), torch.tensor([1.0, 2.0])
    where = "[1] of shape (2,) is inf, expected 2"
    assert difference(infinite, finite) == f"off by inf, of 2.0e+00: {where}"
    where = "[0] of shape (2,) is 1, expected 2"
    assert difference(infinite, infinite + finite) == f"off by 1.0e+00, of inf: {where}"


def test_the_element_that_is_farthest_is_named():
    expected = normal(3, 4)
    found = expected.clone()
    found[1, 2], found[2, 0] = expected[1, 2] + 2, expected[2, 0] + 1
    values = f"{found[1, 2]:.4g}, expected {expected[1, 2]:.4g}"
    assert farthest(found, expected) == f"[1, 2] of shape (3, 4) is {values}"
    one = torch.tensor(1.0)
    assert farthest(one, one + 2e-7) == "the number is 1, expected 1.0000002"
    assert farthest(one * torch.nan, one) == "the number is nan, expected 1"
    with_nan = torch.tensor([torch.nan, 1.0])  # NaN where NaN is right
    assert farthest(with_nan, with_nan + 1) == "[1] of shape (2,) is 1, expected 2"
    assert farthest(torch.tensor([1, 2 + 1j]), torch.tensor([1, 2 - 1j])) == (
        "[1] of shape (2,) is 2+1j, expected 2-1j"
    )
    large = torch.tensor([1, 2**53])
    assert farthest(large + torch.tensor([0, 1]), large) == (
        "[1] of shape (2,) is 9007199254740993, expected 9007199254740992"
    )
    assert farthest(torch.zeros(0), torch.zeros(0)) == ""
