# SPDX-License-Identifier: MIT
"""symmetric_matmul(a, b, c): for operands whose product is symmetric, all that a product of PyTorch's gives.

Two families of operands keep the promise. ``b = a·D`` with a diagonal D of powers of two keeps it exactly, in
any shape. Polynomials p(S), q(S) of one symmetric matrix, which are what it is for, keep it up to rounding;
the result is then the lower triangle, twice.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import (
    FLOATS,
    LAYOUTS,
    assert_accurate,
    assert_fakes_agree,
    assert_fresh,
    halves,
    normal,
    property_test,
    to_numpy,
)
from torch import Tensor
from torch.func import vmap
from torch.testing import assert_close

import torchpar

op = torch.ops.torchpar.symmetric_matmul.default
FACTORS = [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (-2.5, 1 / 3), (1 / 3, -2.5)]


def operands(*shape: int, make: Callable[..., Tensor] = halves, **kwargs: Any) -> tuple[Tensor, ...]:
    """a, b = a·D and a symmetric c."""
    a = make(*shape, **kwargs)
    c = make(*shape[:-1], shape[-2], seed=2, **kwargs)
    diagonal = 2.0 ** torch.arange(shape[-1], device=a.device).remainder(3).to(a)
    return a, a * diagonal, c.tril() + c.tril(-1).mT


def polynomials(n: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Of Newton and Schulz: rounded once each, from a symmetric matrix whose eigenvalues lie in [-1, 1]."""
    s = normal(n, n, device=device)
    s = (s + s.mT) / (s + s.mT).abs().sum(0).max()
    return (3.4445 * s - 4.7750 * s @ s).to(dtype), (s @ s @ s + 2.0315 * s).to(dtype)


def formula(a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """PyTorch's own."""
    rows = a.shape[-2]
    a3, b3 = (t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:]) for t in (a, b))
    c3 = a.new_zeros(()) if c is None else c.reshape(len(a3), rows, rows)
    return torch.baddbmm(c3, a3, b3.mT, alpha=alpha, beta=beta).view(*a.shape[:-1], rows)


def mirrored(c: Any) -> Any:
    """The lower triangle, twice."""
    lower = np.tril(c)
    return lower + np.swapaxes(np.tril(c, -1), -1, -2)


def oracle(a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Any:
    """In fp64; for fp64 itself in NumPy's long double, which has 11 bits more."""
    wide = np.longdouble if a.dtype == torch.float64 else np.float64
    product = alpha * (to_numpy(a).astype(wide) @ np.swapaxes(to_numpy(b).astype(wide), -1, -2))
    return mirrored(product if c is None or beta == 0 else product + beta * to_numpy(c).astype(wide))


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_contract(*args: Tensor | None, alpha: float = 1.0, beta: float = 0.0) -> None:
    """All that the operator promises about one call."""
    factors = {"alpha": alpha, "beta": beta}
    tensors = tuple(arg for arg in args if arg is not None)
    before = tuple(t.clone() for t in tensors)
    actual = torchpar.symmetric_matmul(*args, **factors)
    native = torch.from_numpy(mirrored(to_numpy(formula(*args, **factors))))
    scaled = alpha != 1 or len(tensors) == 3
    roundings = 3 if scaled else 1  # of the sum, of α times it, of βC added to it
    assert_accurate(actual, native, oracle(*args, **factors), roundings)
    assert actual.is_contiguous()
    assert torch.equal(bits(actual), bits(actual.mT))
    assert_fakes_agree(lambda *t: op(*t, **factors), tensors, actual)
    assert_fresh(actual, tensors)
    assert torch.equal(bits(torchpar.symmetric_matmul(*args, **factors)), bits(actual))  # the same bits twice
    assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)


SHAPES = [
    *[(0, 3), (0, 0), (1, 0), (1, 1), (1, 1000), (127, 256), (129, 257), (255, 1), (255, 255), (256, 0)],
    *[(256, 1), (256, 257), (257, 255), (257, 256), (600, 1), (1000, 0), (1000, 17)],
    *[(2, 0, 3), (0, 5, 3), (2, 3, 65, 4), (3, 129, 255), (0, 256, 9), (2, 256, 9), (2, 1, 257, 3)],
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_awkward_sizes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    a, b, c = operands(*shape, dtype=dtype, device=device)
    assert_contract(a, b)
    assert_contract(a, a, alpha=-2.5)
    for alpha, beta in FACTORS[: 2 if a.numel() > 40000 else None]:
        assert_contract(a, b, c, alpha=alpha, beta=beta)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(129, 1000), (256, 255), (2, 300, 257), (600, 100)], ids=str)
def test_rounding_errors(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    a, b, c = operands(*shape, make=normal, dtype=dtype, device=device)
    assert_contract(a, b)
    assert_contract(a, b, c, alpha=1 / 3, beta=-2.5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 127, 257])
def test_polynomials_of_a_symmetric_matrix(n: int, dtype: torch.dtype, device: str) -> None:
    a, b = polynomials(n, dtype, device)
    for args in ((a, b), (b, a), (a, a), (a, b, torch.eye(n).to(a))):
        assert_contract(*args, alpha=1 / 3)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (129, 257), (300, 9), (2, 300, 9), (600, 257)], ids=str)
def test_a_broken_promise_gives_the_lower_triangle_twice(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    # What a sum over shards of k relies on: no shard's product is symmetric, only their sum is.
    a, b = (normal(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    assert_contract(a, b)
    assert_contract(a, b, normal(*shape[:-1], shape[-2], dtype=dtype, device=device, seed=2))


def test_zeros_of_either_sign_are_symmetric_bit_for_bit(device: str) -> None:
    for n in (2, 37, 300):
        a = torch.zeros(n, 1, device=device)
        b = torch.tensor([1.0, -1.0], device=device).repeat(n)[:n, None]
        c = op(a, b)  # symmetric, since 0 = -0
        assert torch.equal(bits(c), bits(c.mT))


values = [name for name in LAYOUTS if not name.startswith("expanded")]
pairs = st.one_of(
    st.tuples(*[st.sampled_from(values)] * 2), st.sampled_from([(name, name) for name in LAYOUTS])
)


@given(
    st.lists(st.sampled_from([0, 1, 2, 3]), max_size=2),
    *[st.sampled_from([0, 1, 2, 3, 7, 16, 17, 33])] * 2,
    st.sampled_from(FLOATS),
    pairs,
    st.none() | st.sampled_from(values),
    *[st.sampled_from([0, 1, -2.5, 1 / 3])] * 2,
)
@property_test
def test_anything(device: str, batch, n, k, dtype, layouts, c_layout, alpha, beta) -> None:
    a, b, c = operands(*batch, n, k, dtype=dtype, device=device)
    a, b = LAYOUTS[layouts[0]](a), LAYOUTS[layouts[1]](b)
    assert_contract(a, b, None if c_layout is None else LAYOUTS[c_layout](c), alpha=alpha, beta=beta)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_any_layout_in_blocks(dtype: torch.dtype, layout: str, device: str) -> None:
    for shape in ((300, 7), (2, 257, 5)):
        a, b, c = operands(*shape, dtype=dtype, device=device)
        a, b = LAYOUTS[layout](a), LAYOUTS[layout](b)
        c = LAYOUTS[layout](c) if layout in values else c[..., :1, :1].expand_as(c)
        assert_contract(a, b, c, alpha=-2.5, beta=1 / 3)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [5, 300])
def test_what_is_not_finite(n: int, dtype: torch.dtype, device: str) -> None:
    a, b, c = operands(n, 3, dtype=dtype, device=device)
    expected = op(a, b)
    for k in (3, 0):
        nothing = torch.full_like(c, math.nan)  # with beta=0 it is not read
        assert_close(op(a[:, :k], b[:, :k], nothing, beta=0), op(a[:, :k], b[:, :k]), rtol=0, atol=0)
    c[0, 1] = c[1, 0] = math.nan
    assert torch.equal(op(a, b, c, beta=1).isnan(), c.isnan())
    a[0, 0], a[1, 1], a[n - 1, 2], a[2, 0] = math.inf, -math.inf, math.nan, math.inf
    b = a * torch.tensor([1, 2, 0.5]).to(a)
    actual = op(a, b)
    assert_close(actual, a @ b.mT, equal_nan=True)
    assert_close(actual, actual.mT, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # addmm's own bfloat16 is NaN
@pytest.mark.parametrize("n", [5, 257, 400])
def test_a_product_times_0_is_not_looked_at(n: int, dtype: torch.dtype, device: str) -> None:
    x, c = torch.full((n, 3), math.nan, dtype=dtype, device=device), torch.eye(n, dtype=dtype, device=device)
    assert torch.equal(op(x, x, c, alpha=0, beta=2), 2 * c)


@pytest.mark.parametrize("n", [4, 300])
def test_fp16_products_that_overflow_before_alpha(n: int, device: str) -> None:
    a = torch.full((n, 4), 300.0, dtype=torch.float16, device=device)
    assert op(a, a).isinf().all()
    expected = torch.full((n, n), 360000 / 64, dtype=torch.float16, device=device)
    functions = {
        "eager": lambda a: op(a, a, alpha=1 / 64),
        "vmap": lambda a: vmap(lambda a: op(a, a, alpha=1 / 64))(a[None])[0],
        "jvp": lambda a: torch.func.jvp(lambda a: op(a, a, alpha=1 / 64), (a,), (a,))[0],
        "compiled": torch.compile(lambda a: op(a, a, alpha=1 / 64), backend="aot_eager"),
    }
    for name, function in functions.items():
        assert_close(function(a), expected, msg=lambda text, name=name: f"{name}: {text}")


# Negative controls: each clause of the contract rejects what it is there to reject.


def lower_twice(c: Tensor) -> Tensor:
    return c.tril() + c.tril(-1).mT


def right(*args: Tensor, **factors: float) -> Tensor:
    return lower_twice(formula(*args, **factors))


WRONG: dict[str, Callable[..., Tensor]] = {
    "not symmetric": formula,
    "the upper triangle": lambda *args, **factors: lower_twice(formula(*args, **factors).mT),
    "no c": lambda a, b, c, alpha, beta: lower_twice(formula(a, b, None, alpha)),
    "no alpha": lambda a, b, c, alpha, beta: lower_twice(formula(a, b, c, 1.0, beta)),
    "in float16": lambda *args, **factors: lower_twice(formula(*(t.half() for t in args), **factors)).float(),
    "not contiguous": lambda *args, **factors: LAYOUTS["stepped"](right(*args, **factors)),
    "in place": lambda a, b, c, **factors: c.copy_(right(a, b, c, **factors)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_contract_rejects(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = (normal(9, size, dtype=torch.float32, seed=seed) for seed, size in enumerate((5, 5, 9)))
    for product, verdict in ((right, nullcontext()), (WRONG[wrong], pytest.raises(AssertionError))):
        monkeypatch.setattr(torchpar, "symmetric_matmul", product)
        with verdict:
            assert_contract(a, b, c, alpha=-2.5, beta=1 / 3)
