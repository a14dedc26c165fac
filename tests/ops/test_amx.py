# SPDX-License-Identifier: MIT
"""16-bit products on a processor that reads beyond the ends of rows, as AMX does.

A stand-in computes PyTorch's products on the CPU. It multiplies what lies behind the rows of the
left operand by 0, as oneDNN does with AMX: https://github.com/uxlfoundation/oneDNN/issues/5717
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from samples import halves
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.records import OPERATORS

NAMES = ("matmul_t", "symmetric_matmul", "linear_sigmoid")
# Rows, columns, and rows of a weight, none of them a multiple of 32. The results of the second are
# larger than the operands.
SIZES, THIN = (70, 100, 45), (200, 33, 150)
DTYPES = (torch.bfloat16, torch.float16)
Operator = Callable[..., Tensor]


# PyTorch's products


def behind(a: Tensor) -> Tensor:
    """``(n, 1)``: 0 times what lies behind the rows of ``a (n, k)``, up to the end of a tile."""
    n, k = a.shape
    count = -k % 32 if k > 32 else k % 2
    if a.dtype.itemsize != 2 or a.stride(1) != 1 or not count:
        return a.new_zeros(n, 1)
    memory = torch.empty(0, dtype=a.dtype).set_(a.untyped_storage())
    ends = a.storage_offset() + a.stride(0) * torch.arange(n)[:, None] + k
    at = ends + torch.arange(count)
    return (memory[at.clamp(max=len(memory) - 1)] * (at < len(memory)) * 0).sum(1, keepdim=True)


def mm(a: Tensor, b: Tensor) -> Tensor:
    with np.errstate(invalid="ignore"):
        exact = torch.from_numpy(a.detach().double().numpy() @ b.detach().double().numpy())
    return exact.to(a.dtype) + behind(a)


def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return alpha * mm(a, b) + (beta * c if beta else 0)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([mm(*pair) for pair in zip(a, b, strict=True)])


def baddbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return alpha * bmm(a, b) + (beta * c if beta else 0)


def into_out(compute: Operator) -> Operator:
    return lambda *args, out, **factors: out.copy_(compute(*args, **factors))


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor with AMX."""
    for name, answers in (
        ("matrix", ["has_amx"]),
        ("cpu", ["has_amx", "has_bfloat16"]),
        ("linear_sigmoid", ["has_bfloat16"]),
    ):
        for answer in answers:
            monkeypatch.setattr(sys.modules[f"torchpar.ops.{name}"], answer, lambda: True)
    library = torch.library.Library("aten", "IMPL")
    for compute in (mm, addmm, bmm, baddbmm):
        name = compute.__name__
        library.impl(name, compute, "CPU", allow_override=True)
        library.impl(f"{name}.out", into_out(compute), "CPU", allow_override=True)
    yield
    library._destroy()


# Calls


def pulled_back(op: Operator, *args: Tensor) -> list[Tensor]:
    """The result, and gradients of an incoming gradient with an infinity."""
    leaves = [t.clone().requires_grad_() for t in args]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, incoming(y))]


def incoming(y: Tensor) -> Tensor:
    g = (torch.arange(y.numel()) % 5 / 2 - 1).to(y.dtype).view(y.shape)
    g[1, 1] = torch.inf
    return g


def in_a_mode(op: Operator, *args: Tensor) -> list[Tensor]:
    with FlopCounterMode(display=False):
        return pulled_back(op, *args)


def second(op: Operator, *args: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in args]
    y = op(*leaves)
    first = torch.autograd.grad(y, leaves, halves(*y.shape, dtype=y.dtype), create_graph=True)
    directions = [halves(*t.shape, dtype=t.dtype, seed=7) for t in first]
    directions[0][1, 1] = torch.inf
    return list(torch.autograd.grad(first, leaves, directions, materialize_grads=True))


def batched(op: Operator, *args: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in args]
    y = op(*leaves)
    two = torch.stack((incoming(y), torch.ones_like(y)))
    return torch.autograd.grad(y, leaves, two, is_grads_batched=True)


def functional(op: Operator, *args: Tensor) -> list[Tensor]:
    y, pull = vjp(op, *args)
    return [y, *pull(incoming(y))]


def forward(op: Operator, *args: Tensor) -> tuple[Tensor, ...]:
    return jvp(op, args, tuple(t.nan_to_num(1, 1, 1) for t in args))


def mapped(op: Operator, *args: Tensor) -> tuple[Tensor, ...]:
    """The gradients of two samples."""
    return vmap(lambda *one: tuple(functional(op, *one)))(*(torch.stack((t, t)) for t in args))


def compiled(op: Operator, *args: Tensor) -> list[Tensor]:
    compiler = torch.compile(op, backend="aot_eager", dynamic=True)
    return pulled_back(compiler, *args)


CALLS: dict[str, Callable[..., Any]] = {
    "eager": pulled_back,
    "in a mode": in_a_mode,
    "batched gradients": batched,
    "second derivatives": second,
    "torch.func": functional,
    "forward mode": forward,
    "vmap": mapped,
    "torch.compile": compiled,
}


def operands(
    name: str, dtype: torch.dtype, value: float, sizes: tuple[int, int, int] = SIZES
) -> tuple[Tensor, ...]:
    """Operands of which one row, of the first, holds ``value``."""
    n, k, m = sizes
    x = halves(n, k, dtype=dtype)
    x[n // 2, 3] = value
    if name == "matmul_t":
        return (x,)
    if name == "symmetric_matmul":
        return x, x.clone()
    return x, halves(m, k, dtype=dtype, seed=1) / 16, halves(m, dtype=dtype, seed=2)


@pytest.mark.parametrize(
    "name, call",
    [
        pytest.param(
            name,
            call,
            # One compiled operator shows how operands are completed in a graph.
            marks=[pytest.mark.slow] * (call == "torch.compile" and name != "linear_sigmoid"),
        )
        for name in NAMES
        for call in CALLS
    ],
)
def test_results_are_nan_where_those_of_float64_are(name: str, call: str, amx: None) -> None:
    operator, compute = OPERATORS[name], CALLS[call]
    torch.compiler.reset()
    # A compiled graph does not depend on the values.
    for dtype in DTYPES[: 1 if call == "torch.compile" else None]:
        for value, sizes in ((torch.inf, SIZES), (torch.nan, SIZES), (torch.inf, THIN)):
            args = operands(name, dtype, value, sizes)
            found = compute(operator.function, *args)
            # (G + Gᵀ)·X and G·X + Gᵀ·X are NaN at different places.
            expected = [
                compute(op, *(t.double() for t in args))
                for op in (operator.function, operator.native)
            ]
            assert any(are_nan_alike(found, exact) for exact in expected), (dtype, value)
            assert any(not exact.isnan().all() for exact in expected[0])


def are_nan_alike(found: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    return all(torch.equal(a.isnan(), e.isnan()) for a, e in zip(found, exact, strict=True))


def test_pytorchs_products_have_more_nan(amx: None) -> None:
    """The stand-in does what AMX does, so that the test above can fail."""
    for name in NAMES:
        native, args = OPERATORS[name].native, operands(name, torch.bfloat16, torch.inf)
        found, expected = native(*args), native(*(t.double() for t in args))
        assert found.isnan().sum() > expected.isnan().sum()
