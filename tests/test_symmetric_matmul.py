# SPDX-License-Identifier: MIT
"""`symmetric_matmul` beyond its record: blocks, factors, broken promises, and ``check=True``."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operators import FLOATS, SYMMETRIC_MATMUL, symmetric_operands
from samples import (
    LAYOUTS,
    arguments,
    assert_contract,
    assert_symmetric,
    halves,
    normal,
)
from torch import Tensor
from torch.func import vjp, vmap
from torch.testing import assert_close

from torchpar import symmetric_matmul

# Of PyTorch's own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

op = torch.ops.torchpar.symmetric_matmul.default
native = SYMMETRIC_MATMUL.native


def operands(*shape: int, make: Callable[..., Tensor] = halves, **kwargs: Any) -> tuple[Tensor, ...]:
    """a (*shape), b = a·D and a symmetric c."""
    return symmetric_operands(*arguments((shape, shape, (*shape[:-1], shape[-2])), make=make, **kwargs))


def contract(*args: Tensor | None, **factors: float) -> None:
    assert_contract("symmetric_matmul", args, **factors)


def polynomials(n: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Two polynomials of Newton–Schulz, rounded once each, in a matrix with eigenvalues in [-1, 1]."""
    s = normal(n, n, device=device)
    s = (s + s.mT) / (s + s.mT).abs().sum(0).max()
    return (3.4445 * s - 4.7750 * s @ s).to(dtype), (s @ s @ s + 2.0315 * s).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(129, 257), (2, 300, 9)], ids=str)
def test_a_broken_promise_gives_the_lower_triangle_twice(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    # A sum over shards of k relies on it: the product of a shard is not symmetric, only the sum is.
    a, b = (normal(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    contract(a, b)
    contract(a, b, normal(*shape[:-1], shape[-2], dtype=dtype, device=device, seed=2), beta=1.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 0, 2), (0, 3), (2, 7, 3), (2, 257, 5)], ids=str)
def test_any_factors(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    a, b, c = operands(*shape, dtype=dtype, device=device)
    for alpha, beta in itertools.product((0, 1, -2.5), (0, 1, 1 / 3)):
        contract(a, b, alpha=alpha)
        contract(a, b, c, alpha=alpha, beta=beta)
        contract(a, b, LAYOUTS["stepped"](c), alpha=alpha, beta=beta)


# PyTorch's own addmm gives NaN in bfloat16 for alpha = 0, and in float32, from 40 rows on, numbers for NaN.
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (2, 40, 16), (400, 3)], ids=str)
def test_factors_that_are_0_or_not_finite(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = torch.ones(shape, dtype=dtype, device=device)
    c = torch.eye(shape[-2], dtype=dtype, device=device).expand(*shape[:-1], -1)
    for bad in (math.inf, math.nan):
        assert torch.equal(op(bad * x, x, c, alpha=0, beta=2), 2 * c)
        assert not op(bad * x, x, alpha=0).any()
        assert torch.equal(op(x, x, bad * c, beta=0), op(x, x))
        for function in (op, vmap(op), lambda *t, **kw: vmap(vmap(op))(*(s[None] for s in t), **kw)[0]):
            args = (x, x, c) if function is op else (x[None], x[None], c[None])
            assert_close(function(*args[:2], alpha=bad), torch.full_like(args[2], bad), equal_nan=True)
            assert_close(function(*args, alpha=bad, beta=1), torch.full_like(args[2], bad), equal_nan=True)
        assert torch.equal(op(x, x, c, beta=math.nan).isnan(), torch.ones_like(c).bool())


@pytest.mark.parametrize("n", [4, 300])
def test_fp16_products_that_overflow_before_alpha(n: int, device: str) -> None:
    a = torch.full((n, 4), 300.0, dtype=torch.float16, device=device)
    assert op(a, a).isinf().all()
    expected = torch.full((n, n), 360000 / 64, dtype=torch.float16, device=device)
    assert_close(op(a, a, alpha=1 / 64), expected)
    assert_close(vmap(lambda a: op(a, a, alpha=1 / 64))(a[None])[0], expected)
    assert_close(torch.func.jvp(lambda a: op(a, a, alpha=1 / 64), (a,), (a,))[0], expected)


def test_vmap_of_the_formula_reads_no_uninitialised_memory(device: str) -> None:
    x = normal(3, 4, 2, device=device)
    torch.use_deterministic_algorithms(True)  # poisons torch.empty
    try:
        y = vmap(lambda t: vjp(lambda t: op(t, t, alpha=2.0), t)[0])(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(y, 2 * x @ x.mT)


# check=True: the operands are tested.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_check_accepts_polynomials_after_several_roundings(dtype: torch.dtype, device: str) -> None:
    a, b = polynomials(64, dtype, device)
    for _ in range(3):
        product = symmetric_matmul(a, b, check=True)
        a, b = symmetric_matmul(a, b, product, alpha=0.5, beta=-0.25, check=True), product.clone()
    assert a.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k", [1, 4096])
def test_the_check_rejects_a_product_that_is_not_symmetric(k: int, dtype: torch.dtype, device: str) -> None:
    a, b = (normal(64, k, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    with pytest.raises(RuntimeError, match=r"symmetric_matmul: a @ b\.mT is not symmetric") as caught:
        symmetric_matmul(a, b, check=True)
    assert "\n" not in str(caught.value)
    assert_symmetric(op(a, b))  # without the check, the caller is trusted
    c = torch.eye(64).to(a)
    symmetric_matmul(a, a, c, beta=1, check=True)
    c[3, 5] = 0.5
    with pytest.raises(RuntimeError, match="symmetric_matmul: c is not symmetric: it differs"):
        symmetric_matmul(a, a, c, beta=1, check=True)
    symmetric_matmul(a, a, c, beta=0, check=True)  # c is not read


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 2), (5, 3), (300, 3)], ids=str)
def test_the_check_of_a_compiled_call_and_of_empty_operands(shape: tuple[int, ...], device: str) -> None:
    def checked(a: Tensor, b: Tensor) -> Tensor:
        return symmetric_matmul(a, b, check=True)

    a, b, c = operands(*shape, device=device)
    assert_close(symmetric_matmul(a, b, c, beta=1, check=True), op(a, b, c, beta=1))
    compiled = torch.compile(checked, fullgraph=True, backend="aot_eager")
    for function in (compiled, lambda *args: vmap(checked)(*(t[None] for t in args))[0]):
        assert_close(function(a, b), a @ b.mT)
        function(a, b.flip(0))  # is not checked
