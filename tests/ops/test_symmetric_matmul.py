# SPDX-License-Identifier: MIT
"""Symmetric products beyond their record: factors, broken promises, ``check=True``, and ``out``."""

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from commands import blocks, execute
from samples import (
    LAYOUTS,
    arguments,
    assert_accurate,
    assert_contract,
    assert_symmetric,
    halves,
    normal,
    oracle,
)
from torch import Tensor
from torch.func import vjp, vmap
from torch.library import opcheck
from torch.profiler import profile
from torch.testing import assert_close

import torchpar
from benchmarks.records.record import FLOATS
from benchmarks.records.symmetric_matmul import symmetric_operands
from torchpar import reference, symmetric_matmul
from torchpar.ops import cpu

# Of PyTorch's own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

op = torch.ops.torchpar.symmetric_matmul.default
by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def operands(
    *shape: int, make: Callable[..., Tensor] = halves, **kwargs: Any
) -> tuple[Tensor, ...]:
    """a (*shape), b = a·D and a symmetric c."""
    return symmetric_operands(
        *arguments((shape, shape, (*shape[:-1], shape[-2])), make=make, **kwargs)
    )


def contract(*args: Tensor | None, **factors: float) -> None:
    assert_contract("symmetric_matmul", args, **factors)


def test_matmul_t_beside_its_plain_reference(device: str) -> None:
    for shape in ((0, 3), (3, 0), (129, 33)):
        x = normal(*shape, dtype=torch.float32, device=device)
        plain = reference.matmul_t(x)
        assert torch.equal(plain, plain.mT)
        assert_accurate(torchpar.matmul_t(x), plain, oracle("matmul_t", (x,)))


@by_dtype
def test_vmap_keeps_the_product_symmetric(dtype: torch.dtype, device: str) -> None:
    for shape in ((3, 129, 70), (2, 2, 600, 9)):
        x = normal(*shape, dtype=dtype, device=device)
        assert_symmetric(vmap(torchpar.matmul_t, in_dims=1)(x.movedim(0, 1)))


@by_dtype
@pytest.mark.parametrize("shape", [(129, 257), (2, 300, 9)], ids=str)
def test_a_broken_promise_gives_the_lower_triangle_twice(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    # A sum over shards of k relies on it: the product of a shard is not symmetric, only the sum is.
    a, b = (normal(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    contract(a, b)
    contract(a, b, normal(*shape[:-1], shape[-2], dtype=dtype, device=device, seed=2), beta=1.0)


@by_dtype
@pytest.mark.parametrize("shape", [(3, 0, 2), (0, 3), (2, 7, 3), (2, 257, 5)], ids=str)
def test_any_factors(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    a, b, c = operands(*shape, dtype=dtype, device=device)
    for alpha, beta in itertools.product((0, 1, -2.5), (0, 1, 1 / 3)):
        contract(a, b, alpha=alpha)
        contract(a, b, c, alpha=alpha, beta=beta)
        contract(a, b, LAYOUTS["stepped"](c), alpha=alpha, beta=beta)


# PyTorch's own addmm gives NaN in bfloat16 for alpha = 0, and in float32, from 40 rows on, numbers
# for NaN.
@by_dtype
@pytest.mark.parametrize("shape", [(5, 3), (2, 40, 16), (400, 3)], ids=str)
def test_factors_that_are_0_or_not_finite(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x = torch.ones(shape, dtype=dtype, device=device)
    c = torch.eye(shape[-2], dtype=dtype, device=device).expand(*shape[:-1], -1)
    for bad in (math.inf, math.nan):
        assert torch.equal(op(bad * x, x, c, alpha=0, beta=2), 2 * c)
        assert not op(bad * x, x, alpha=0).any()
        assert torch.equal(op(x, x, bad * c, beta=0), op(x, x))
        for function in (
            op,
            vmap(op),
            lambda *t, **kw: vmap(vmap(op))(*(s[None] for s in t), **kw)[0],
        ):
            args = (x, x, c) if function is op else (x[None], x[None], c[None])
            assert_close(
                function(*args[:2], alpha=bad), torch.full_like(args[2], bad), equal_nan=True
            )
            assert_close(
                function(*args, alpha=bad, beta=1), torch.full_like(args[2], bad), equal_nan=True
            )
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


# check=True: the operands are tested


@by_dtype
def test_the_check_accepts_polynomials_after_several_roundings(
    dtype: torch.dtype, device: str
) -> None:
    s = normal(64, 64, device=device)
    s = (s + s.mT) / (s + s.mT).abs().sum(0).max()  # eigenvalues in [-1, 1]
    # Polynomials of Newton–Schulz, rounded once each.
    a, b = (3.4445 * s - 4.7750 * s @ s).to(dtype), (s @ s @ s + 2.0315 * s).to(dtype)
    for _ in range(3):
        product = symmetric_matmul(a, b, check=True)
        a, b = symmetric_matmul(a, b, product, alpha=0.5, beta=-0.25, check=True), product.clone()
    assert a.isfinite().all()


@by_dtype
@pytest.mark.parametrize("k", [1, 4096])
def test_the_check_rejects_a_product_that_is_not_symmetric(
    k: int, dtype: torch.dtype, device: str
) -> None:
    a, b = (normal(64, k, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    c = torch.eye(64).to(a)
    for out in (None, torch.empty_like(c)):
        with pytest.raises(
            RuntimeError, match=r"symmetric_matmul: a @ b\.mT is not symmetric"
        ) as caught:
            symmetric_matmul(a, b, check=True, out=out)
    assert "\n" not in str(caught.value)
    assert_symmetric(op(a, b))  # without the check, the caller is trusted
    symmetric_matmul(a, a, c, beta=1, check=True)
    c[3, 5] = 0.5
    with pytest.raises(RuntimeError, match="symmetric_matmul: c is not symmetric: it differs"):
        symmetric_matmul(a, a, c, beta=1, check=True)
    symmetric_matmul(a, a, c, beta=0, check=True)  # c is not read


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 2), (5, 3), (300, 3)], ids=str)
def test_the_check_of_a_compiled_call_and_of_empty_operands(
    shape: tuple[int, ...], device: str
) -> None:
    def checked(a: Tensor, b: Tensor) -> Tensor:
        return symmetric_matmul(a, b, check=True)

    a, b, c = operands(*shape, device=device)
    assert_close(symmetric_matmul(a, b, c, beta=1, check=True), op(a, b, c, beta=1))
    compiled = torch.compile(checked, fullgraph=True, backend="aot_eager")
    for function in (compiled, lambda *args: vmap(checked)(*(t[None] for t in args))[0]):
        assert_close(function(a, b), a @ b.mT)
        function(a, b.flip(0))  # is not checked


# out: products are added to a matrix in place, also to float32 from bfloat16


PAIRS = [(dtype, dtype) for dtype in FLOATS]
PAIRS += [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


def into(shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype, device: str) -> list[Tensor]:
    x = normal(*shape, dtype=dtype, device=device)
    h = normal(*shape[:-1], shape[-2], dtype=out, device=device, seed=1)
    return [x, h.tril() + h.tril(-1).mT]


USUAL = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
# Of the larger shapes, the other dtypes are slow tests.
SHAPES_AND_PAIRS = [
    pytest.param(
        shape,
        *pair,
        marks=[pytest.mark.slow] * (max(shape) > 100 and pair not in USUAL),
    )
    for shape in [(5, 3), (800, 30), (2, 400, 20), (0, 4), (4, 0)]
    for pair in PAIRS
]


@pytest.mark.parametrize("shape, dtype, out", SHAPES_AND_PAIRS, ids=str)
def test_the_error_is_at_most_twice_torchs(shape, dtype, out, device):
    for alpha, beta in ((1.0, 1.0), (-0.5, 2.0), (2.0, 0.0), (0.0, 0.5), (0.0, 0.0)):
        x, h = into(shape, dtype, out, device)
        exact = oracle("symmetric_matmul", (x, x, h), alpha=alpha, beta=beta)
        theirs = beta * h + alpha * (x.to(out) @ x.to(out).mT)
        pointer = h.data_ptr()
        assert symmetric_matmul(x, x, h, alpha=alpha, beta=beta, out=h) is h
        assert h.data_ptr() == pointer
        assert_symmetric(h)
        assert_accurate(h, theirs, exact, roundings=2)


def test_an_out_of_any_layout_that_is_not_c(device):
    """NaN in it is not read, nor is what lies above the diagonal of an out that is c."""
    a = normal(300, 40, dtype=torch.float32, device=device)
    b = a * 2
    c = torch.eye(300, device=device)
    expected = symmetric_matmul(a, b, c, alpha=3.0, beta=2.0)
    wide = torch.zeros(300, 600, device=device)
    for out in (torch.full_like(c, torch.nan), torch.full_like(c, torch.nan).mT, wide[:, ::2]):
        symmetric_matmul(a, b, c, alpha=3.0, beta=2.0, out=out)
        assert_close(out, expected)
        symmetric_matmul(a, b, alpha=3.0, out=out.fill_(torch.nan))
        assert_close(out, expected - 2 * c)
        symmetric_matmul(
            a, b, out.copy_(c + c.new_full(c.shape, 1e9).triu(1)), alpha=3.0, beta=2.0, out=out
        )
        assert_close(out, expected)
    assert not wide[:, 1::2].any()


def largest_allocation(function: Callable[[], Any]) -> int:
    """The most bytes that an operator allocates, other operators within it not counted."""
    with profile(profile_memory=True, acc_events=True) as profiled:
        function()
    return max(event.self_cpu_memory_usage for event in profiled.events())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_matrix_of_the_results_size_is_made(dtype):
    x, h = into((2048, 8), dtype, torch.float32, "cpu")
    own = largest_allocation(lambda: cpu.symmetric_matmul(x, x, h, 1.0, 1.0, h))
    assert 0 < own <= h.nbytes / 4
    assert largest_allocation(lambda: h.copy_(h + x.float() @ x.float().mT)) >= h.nbytes


def test_small_products_are_whole_on_a_cpu() -> None:
    with patch.multiple(cpu, _halved=None, has_bfloat16=lambda: True):  # `_halved` is not called
        for has_amx in (False, True):
            with patch.object(cpu, "has_amx", lambda has_amx=has_amx: has_amx):
                torchpar.matmul_t(torch.ones(383, 2))
                torchpar.matmul_t(torch.ones(767 if has_amx else 511, 2).bfloat16())
                with pytest.raises(TypeError):
                    torchpar.matmul_t(torch.ones(384, 128))


def test_products_of_bfloat16_are_of_float32_where_those_are_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight = torch.randn(130, 40).bfloat16(), torch.randn(30, 40).bfloat16().requires_grad_()
    bias = torch.randn(30).bfloat16()
    for name in ("cpu", "linear_sigmoid"):
        monkeypatch.setattr(sys.modules[f"torchpar.ops.{name}"], "has_bfloat16", lambda: False)
    wide = x.float()
    assert torch.equal(torchpar.matmul_t(x), cpu.symmetric_matmul(wide, wide).bfloat16())
    y = torchpar.linear_sigmoid(x, weight, bias)
    assert torch.equal(
        y, torch.nn.functional.linear(wide, weight.float(), bias.float()).sigmoid().bfloat16()
    )
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    dz = torch.ops.aten.sigmoid_backward(torch.ones_like(y), y.detach())
    assert torch.equal(gradient, (dz.float().T @ wide).bfloat16())


def test_gradients_are_refused(device):
    x, h = into((4, 3), torch.float32, torch.float32, device)
    for a, out in ((x.clone().requires_grad_(), h), (x, h.clone().requires_grad_())):
        with pytest.raises(
            RuntimeError, match="don't support automatic differentiation, but one of the arg"
        ):
            symmetric_matmul(a, a, out, beta=1.0, out=out)
        with torch.no_grad():
            symmetric_matmul(a, a, out, beta=1.0, out=out)
    square = (h.clone().requires_grad_() * h).sum()
    symmetric_matmul(x, x, h, beta=1.0, out=h)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()
    for transform, text in (
        (torch.func.grad, "don't support automatic differentiation"),
        (lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), r"torch\.func and forward mode cannot"),
    ):
        with pytest.raises(RuntimeError, match=text):
            transform(lambda x: symmetric_matmul(x, x, out=h).sum())(x)


def test_an_out_that_does_not_fit_is_refused():
    x, out, square = torch.ones(4, 3, dtype=torch.bfloat16), torch.zeros(4, 4), torch.zeros(4, 4)
    for a, wrong, text in (
        (x, out.double(), r"out is \(4, 4\), torch\.float64 on cpu, expected \(4, 4\)"),
        (
            x,
            out[:3, :3],
            r"out is \(3, 3\), torch\.float32 on cpu, expected \(4, 4\), torch\.bfloat16 or",
        ),
        (x, torch.zeros(1, 4).expand(4, 4), "elements of out share memory"),
        (square, square, "out shares its storage with a or b"),
    ):
        with pytest.raises(RuntimeError, match=text):
            symmetric_matmul(a, a, out=wrong)
    with pytest.raises(RuntimeError, match="c is given without beta, pass both"):
        symmetric_matmul(x, x, out, out=out)
    for c in (torch.ones(()), torch.ones(4, 4, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="expected"):
            symmetric_matmul(x, x, c, beta=1.0, out=out)
    assert not torch.cat([out, square]).any()


def test_the_documented_covariance_is_torchs():
    (block,) = (block for block in blocks("docs/symmetric_matmul.md") if "def covariance" in block)
    names = execute("import torch, torchpar", block)
    batches = [normal(70, 300, dtype=torch.float32, seed=seed) + 3 for seed in range(5)]
    expected = torch.cov(torch.cat(batches).double().T)
    theirs = (torch.cov(torch.cat(batches).T).double() - expected).abs().max()
    assert (names["covariance"](batches).double() - expected).abs().max() <= 10 * theirs


def test_it_compiles_and_keeps_pytorchs_rules(device):
    def update(h: Tensor, x: Tensor) -> Tensor:
        symmetric_matmul(x, x, h, alpha=0.5, beta=0.9, out=h)
        return h.diagonal().sum()

    for n in (5, 300):
        x, h = into((n, 3), torch.bfloat16, torch.float32, device)
        opcheck(torch.ops.torchpar.symmetric_addmm_.default, (h, x, x), {"alpha": 0.5, "beta": 2.0})
        eager = h.clone()
        expected = update(eager, x)
        found = torch.compile(update, fullgraph=True, backend="aot_eager")(h, x)
        assert_close((found, h), (expected, eager), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(10, 20), (2, 10, 20), (2, 3, 5, 4), (400, 200)])
@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_a_result_without_a_gradient_may_be_changed_in_place(shape, alpha):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factor = torch.tensor(3.0, requires_grad=True)
    y = torchpar.symmetric_matmul(x, x, alpha=alpha)
    total = y.sum()
    y.mul_(factor).sum().backward()
    assert_close(factor.grad, total)


def test_out_may_be_negated_by_a_bit():
    a = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(20, 20, dtype=torch.complex64).conj().imag
    assert out.is_neg()
    assert_close(torchpar.symmetric_matmul(a, a, out=out), torchpar.matmul_t(a))
    torchpar.symmetric_matmul(a, a, out, beta=1.0, out=out)
    assert_close(out.resolve_neg(), 2 * torchpar.matmul_t(a))


@pytest.mark.parametrize(
    "shape, halved",
    [
        ((384, 128), True),
        ((384, 127), False),
        ((512, 1), True),
        ((383, 2047), False),
        ((192, 2048), True),
        ((191, 9999), False),
    ],
)
def test_narrow_matrices_are_halved_from_more_rows_on(shape, halved):
    assert cpu.is_halved(torch.empty(shape)) == halved


@pytest.mark.parametrize("n", [192, 300, 383, 512, 1000, 1024, 2049])
def test_the_parts_of_a_lower_triangle_cover_it_once(n):
    blocks = round(n / 128)
    parts = list(cpu._lower_triangle(0, n, blocks))
    computed = torch.zeros(n, n, dtype=torch.int32)
    for rows, columns in parts:
        computed[rows, columns] += 1
        assert rows.start % 32 == columns.start % 32 == 0
        assert columns.stop <= rows.stop, "no part is above the diagonal alone"
    assert computed.tril().equal(torch.ones_like(computed).tril())
    assert computed.triu(160).count_nonzero() == 0, "beside the diagonal blocks"
