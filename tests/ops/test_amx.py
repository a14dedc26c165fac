# SPDX-License-Identifier: MIT
"""16-bit products where a processor reads beyond the ends of rows, as AMX does.

A stand-in computes PyTorch's products on the CPU here. It multiplies what lies behind the rows of
the left operand by 0, as oneDNN does on AMX: https://github.com/uxlfoundation/oneDNN/issues/5717
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from operators import OPERATORS
from samples import halves
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from torchpar.ops import matrix
from torchpar.ops.matrix import missing

NAMES = ("matmul_t", "symmetric_matmul", "linear_sigmoid")
SIZES = (70, 100, 45)  # rows, columns, and rows of a weight: none is a multiple of 32
DTYPES = (torch.bfloat16, torch.float16)
products: list[int] = []
"""The columns of the left operands that the stand-in has multiplied."""


def behind(a: Tensor) -> Tensor:
    """``(n, 1)``: 0 times what lies behind the rows of ``a (n, k)`` up to the end of a tile."""
    n, k = a.shape
    fill = -k % 32 if k > 32 else k % 2
    if a.dtype.itemsize != 2 or a.stride(1) != 1 or not fill:
        return a.new_zeros(n, 1)
    memory = torch.empty(0, dtype=a.dtype).set_(a.untyped_storage())
    at = a.storage_offset() + a.stride(0) * torch.arange(n)[:, None] + k + torch.arange(fill)
    return (memory[at.clamp(max=len(memory) - 1)] * (at < len(memory)) * 0).sum(1, keepdim=True)


def mm(a: Tensor, b: Tensor) -> Tensor:
    products.append(a.shape[1])
    a, b, rest = a.resolve_neg(), b.resolve_neg(), behind(a)
    exact = torch.from_numpy(a.double().numpy() @ b.double().numpy())
    return exact.to(a.dtype) + rest


def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return alpha * mm(a, b) + (beta * c if beta else 0)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    rows = [mm(*pair) for pair in zip(a, b, strict=True)]
    return torch.stack(rows) if rows else a.new_zeros(0, a.shape[1], b.shape[2])


def baddbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return alpha * bmm(a, b) + (beta * c if beta else 0)


def into(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, out, **factors: out.copy_(compute(*args, **factors))


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor with AMX."""
    for module in ("matrix", "symmetric_cpu"):
        monkeypatch.setattr(sys.modules[f"torchpar.ops.{module}"], "has_amx", lambda: True)
    for module in ("linear_sigmoid", "symmetric_cpu"):
        monkeypatch.setattr(sys.modules[f"torchpar.ops.{module}"], "has_bfloat16", lambda: True)
    products.clear()
    library = torch.library.Library("aten", "IMPL")
    for compute in (mm, addmm, bmm, baddbmm):
        for name, function in (
            (compute.__name__, compute),
            (f"{compute.__name__}.out", into(compute)),
        ):
            library.impl(name, function, "CPU", allow_override=True)
    yield
    library._destroy()


def operands(name: str, dtype: torch.dtype, value: float) -> tuple[Tensor, ...]:
    """Operands in which one row of the first holds ``value``."""
    n, k, m = SIZES
    x = halves(n, k, dtype=dtype)
    x[n // 2, 3] = value
    if name == "matmul_t":
        return (x,)
    if name == "symmetric_matmul":
        return x, x.clone()
    return x, halves(m, k, dtype=dtype, seed=1) / 16, halves(m, dtype=dtype, seed=2)


def same_places(found: Any, expected: Any) -> None:
    """The results are NaN where those of float64 are, and nowhere else."""
    for ours, exact in zip(found, expected, strict=True):
        assert torch.equal(ours.isnan(), exact.isnan())
        assert not exact.isnan().all()


def grads(op: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    """The result and its gradients."""
    leaves = [t.clone().requires_grad_() for t in args]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, incoming(y))]


def incoming(y: Tensor) -> Tensor:
    g = halves(*y.shape, dtype=torch.float64, seed=5)
    g[1, 1] = torch.inf
    return g.to(y.dtype)


def second(op: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in args]
    y = op(*leaves)
    found = torch.autograd.grad(y, leaves, halves(*y.shape, dtype=y.dtype), create_graph=True)
    direction = [halves(*t.shape, dtype=t.dtype, seed=7) for t in found]
    direction[0][1, 1] = torch.inf
    return list(torch.autograd.grad(found, leaves, direction, materialize_grads=True))


WAYS: dict[str, Callable[..., Any]] = {
    "values": lambda op, *args: [op(*args)],
    "counted": lambda op, *args: counted(op, *args),
    "gradients": grads,
    "second derivatives": second,
    "torch.func.vjp": lambda op, *args: functional(op, *args),
    "jvp": lambda op, *args: jvp(op, args, tuple(t.nan_to_num(1, 1, 1) for t in args)),
    "vmap": lambda op, *args: [vmap(op)(*(torch.stack((t, t)) for t in args))],
    "vmap of a gradient": lambda op, *args: [
        vmap(lambda *a: vjp(op, *a)[1](incoming(op(*args)))[0])(
            *(torch.stack((t, t)) for t in args)
        )
    ],
    "compiled": lambda op, *args: grads(torch.compile(op, backend="aot_eager"), *args),
    "compiled for any sizes": lambda op, *args: grads(
        torch.compile(op, backend="aot_eager", dynamic=True), *args
    ),
}


def counted(op: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    with FlopCounterMode(display=False):
        return grads(op, *args)


def functional(op: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    y, pull = vjp(op, *args)
    return [y, *pull(incoming(y))]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_hold_numbers_have_numbers(name: str, way: str, amx: None) -> None:
    operator = OPERATORS[name]
    for dtype in DTYPES:
        for value in (torch.inf, torch.nan):
            torch.compiler.reset()
            args = operands(name, dtype, value)
            products.clear()
            found = WAYS[way](operator.op, *args)
            assert products, "PyTorch's products are not the stand-in's"
            wide = [t.double() for t in args]
            same_places(found, WAYS[way](operator.native, *wide))
