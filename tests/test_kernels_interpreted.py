# SPDX-License-Identifier: MIT
"""Every launcher in `torchpar.kernels`, its arithmetic run on the CPU by Triton's interpreter.

Each check poisons the output, so that an element which no program writes fails, and takes the launcher's
``wrap``, through which the negative controls break the launch. bfloat16 needs a GPU: the interpreter
computes it wrongly.
"""

import math
from contextvars import copy_context
from importlib.metadata import version
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.testing import assert_close

from torchpar.kernels import candidates
from torchpar.kernels import exact_matmul as exact_kernels
from torchpar.kernels import linear_sigmoid as linear_sigmoid_kernels
from torchpar.kernels import matmul_t as matmul_t_kernels
from torchpar.kernels import maximum as maximum_kernels
from torchpar.kernels import sigmoid_backward as sigmoid_backward_kernels
from torchpar.kernels.candidates import Tiles
from torchpar.kernels.gemm import GROUP, triangle_by_rows, triangle_tile
from torchpar.ops import _exact
from torchpar.parallel.split.operands import Operand


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


pytestmark = pytest.mark.skipif(
    _release("triton") < (3, 7) and _release("numpy") >= (2, 4),
    reason="run-time loops fail in the interpreter of Triton < 3.7 beside NumPy >= 2.4",
)

FLOATS = (torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SIZES = (1, 2, 127, 128, 129)
PAIRS = ((1, 1), (1, 129), (2, 2), (2, 127), (127, 128), (128, 1), (128, 128), (129, 2), (129, 129))
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.stack((t, -t), -1).flatten(-2)[..., ::2],
    "unaligned": lambda t: torch.cat((t[..., :1], t), -1)[..., 1:],
    "expanded rows": lambda t: t[..., :1, :].expand_as(t),
    "expanded columns": lambda t: t[..., :1].expand_as(t),
    "expanded batch": lambda t: t[:1].expand_as(t),
}


def directly(kernel):
    return kernel


class WithoutLastProgram:
    """A broken launcher: its grid is one program short."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.kernel[(grid[0] - 1,)]


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def sum_rounding(dtype: torch.dtype, terms: int, magnitude: Tensor) -> float:
    """A bound for the rounding of a sum of ``terms`` whose absolute values add up to ``magnitude``.

    One rounding per term bounds the error of a sum of two, where PyTorch's own is a draw of chance, and is
    below the typical error of a longer one. In float64 the oracle rounds as well and PyTorch's error says
    nothing: there it is the bound for two sums in any order.
    """
    roundings = 2 * terms if dtype == torch.float64 else 1
    return roundings * unit_roundoff(accumulator(dtype)) * largest(magnitude)


def product_rounding(a: Tensor, b: Tensor) -> float:
    """`sum_rounding` of ``a @ b``, and the rounding of the result to its dtype."""
    a64, b64 = a.double(), b.double()
    result = unit_roundoff(a.dtype) * largest(a64 @ b64)
    return sum_rounding(a.dtype, a.shape[-1], a64.abs() @ b64.abs()) + result


def assert_as_accurate(result: Tensor, native: Tensor, oracle: Tensor, rounding: float) -> None:
    """The error against ``oracle`` (float64) is at most twice PyTorch's own, or ``rounding`` if more."""
    assert result.shape == oracle.shape, f"shape {tuple(result.shape)}, expected {tuple(oracle.shape)}"
    assert result.dtype == native.dtype, f"dtype {result.dtype}, expected {native.dtype}"
    error, native_error = largest(result.double() - oracle), largest(native.double() - oracle)
    # Written so that NaN fails.
    assert error <= max(2 * native_error, rounding), f"error {error}, PyTorch's {native_error}, {rounding=}"


# X·Xᵀ


def check_symmetric_product(dtype, shape, layout, wrap) -> None:
    torch.manual_seed(0)
    x = LAYOUTS[layout](draw(*shape, dtype=dtype))
    c, again = (poisoned(*shape[:-1], shape[-2], dtype=dtype) for _ in range(2))
    for out in (c, again):
        assert matmul_t_kernels.symmetric_product(x, x, "ieee", wrap, out=out) is out
    oracle = x.double() @ x.double().mT
    assert_as_accurate(c, x @ x.mT, oracle, product_rounding(x, x.mT))
    assert torch.equal(c, c.mT), "not symmetric"
    assert torch.equal(c, again), "two runs differ"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n, k", PAIRS)
def test_symmetric_product(interpreter, dtype, n, k):
    interpreter(check_symmetric_product, dtype, (n, k), "contiguous", directly)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0, 5), (0, 3, 2), (3, 2, 65, 33)], ids=str)
def test_symmetric_product_of_shape(interpreter, shape):
    interpreter(check_symmetric_product, torch.float16, shape, "contiguous", directly)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_symmetric_product_of_layout(interpreter, layout):
    interpreter(check_symmetric_product, torch.float32, (2, 65, 33), layout, directly)


def check_symmetric_product_of_two(dtype, shape, layout, tiles, alpha, beta, wrap) -> None:
    """``alpha·a @ b.mT + beta·c``; nothing above the diagonals of c and of the product may matter."""
    torch.manual_seed(0)
    a, b = (LAYOUTS[layout](draw(*shape, dtype=dtype)) for _ in range(2))
    c = LAYOUTS[layout](draw(*shape[:-1], shape[-2], dtype=dtype))
    lower = c.tril()
    above = torch.ones_like(c, dtype=torch.bool).triu(1)
    if layout != "expanded batch":
        c.masked_fill_(above, math.nan)
    out, again = (poisoned(*c.shape, dtype=dtype) for _ in range(2))
    for result in (out, again):
        matmul_t_kernels.symmetric_product(a, b, "ieee", wrap, c, alpha, beta, out=result, tiles=tiles)
    product = a.double() @ b.double().mT
    oracle = alpha * product + beta * lower.double()
    oracle = oracle.tril() + oracle.tril(-1).mT
    batches = [t.unsqueeze(0) if t.dim() == 2 else t.flatten(0, -3) for t in (lower, a, b.mT)]
    native = torch.baddbmm(*batches, alpha=alpha, beta=beta).view_as(out)
    native = native.tril() + native.tril(-1).mT
    # Both factors round, then the sum does.
    terms = abs(alpha) * largest(product) + abs(beta) * largest(lower) + largest(oracle)
    rounding = abs(alpha) * product_rounding(a, b.mT) + unit_roundoff(accumulator(dtype)) * terms
    rounding += unit_roundoff(dtype) * largest(oracle)
    assert_as_accurate(out, native, oracle, rounding)
    assert torch.equal(out, out.mT), "not symmetric"
    assert torch.equal(out, again), "two runs differ"


PATHS = {
    "pointers": Tiles(16, 16, 16, 4, 2),
    "TMA": Tiles(16, 16, 16, 4, 2, "tma"),
    "wide TMA": Tiles(16, 32, 16, 4, 2, "tma"),
    "specialized": Tiles(16, 16, 16, 4, 2, "specialized"),
}


@pytest.mark.parametrize(
    "path, shape, layout",
    [
        (path, shape, layout)
        for path in PATHS
        for shape in ((1, 16, 4), (1, 36, 20), (1, 100, 52), (3, 68, 36), (2, 132, 16))
        for layout in ("contiguous", "transposed")
        if path != "specialized" or (shape[0] == 1 and layout == "contiguous")
    ],
)
def test_symmetric_product_of_two_by(interpreter, path, shape, layout):
    """Rows and columns of whole 16 bytes, as TMA takes them; few of these are whole tiles."""
    args = (torch.float32, shape, layout, PATHS[path], 0.5, -2.0)
    interpreter(check_symmetric_product_of_two, *args, directly)


@pytest.mark.parametrize("layout", ["sliced", "expanded batch"])
def test_symmetric_product_of_two_by_pointers(interpreter, layout):
    args = (torch.float32, (2, 36, 20), layout, PATHS["pointers"], 0.5, -2.0)
    interpreter(check_symmetric_product_of_two, *args, directly)


def check_symmetric_product_of_one(shape, tiles, wrap) -> None:
    """An operand that is both sides: its tiles on the diagonal are loaded once."""
    with patch.object(matmul_t_kernels, "chosen", return_value=tiles):
        check_symmetric_product(torch.float32, shape, "contiguous", wrap)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n, k", [(16, 4), (36, 20), (132, 36)])
def test_symmetric_product_of_one_by(interpreter, path, n, k):
    interpreter(check_symmetric_product_of_one, (n, k), PATHS[path], directly)


def check_one_pair_divides_by_no_zero() -> None:
    with np.errstate(divide="raise"):
        check_symmetric_product_of_one((20, 4), PATHS["wide TMA"], directly)


def test_one_pair_divides_by_no_zero(interpreter):
    """On a GPU a division by 0 has no defined result."""
    interpreter(check_one_pair_divides_by_no_zero)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (129, 33), (2, 3, 17, 127), (3, 0, 5)], ids=str)
def test_symmetric_product_of_two_of_shape(interpreter, dtype, shape):
    args = (dtype, shape, "contiguous", None, -1.5, 0.75)
    interpreter(check_symmetric_product_of_two, *args, directly)


def check_products_added_in_place(shape: tuple[int, ...]) -> None:
    """To float32; of integers the sums are exact."""
    torch.manual_seed(0)
    x = torch.randint(-3, 4, shape).half()
    h = torch.randint(-99, 100, (*shape[:-1], shape[-2])).float()
    h = h.tril() + h.tril(-1).mT
    expected = 2 * h + 0.5 * x.float() @ x.float().mT
    with patch.object(matmul_t_kernels, "chosen", return_value=PATHS["pointers"]):
        out = matmul_t_kernels.symmetric_product(x, x, "ieee", directly, h, 0.5, 2.0, out=h, tma=False)
    assert out is h
    assert torch.equal(h, expected)


@pytest.mark.parametrize("shape", [(1, 1), (37, 20), (3, 18, 5)], ids=str)
def test_products_are_added_to_float32_in_place(interpreter, shape):
    interpreter(check_products_added_in_place, shape)


def check_factors_are_exact() -> None:
    """In integers the product has no error, so that all there is comes from the factors."""
    torch.manual_seed(0)
    s = torch.randint(-2, 3, (17, 17), dtype=torch.float64)
    s = s + s.mT
    out = poisoned(17, 17, dtype=s.dtype)
    for alpha, beta in ((1 / 3, 0.0), (0.0, -1 / 3), (-1e300, 0.0)):
        matmul_t_kernels.symmetric_product(s, s @ s, "ieee", directly, s, alpha, beta, out=out)
        assert torch.equal(out, alpha * (s @ s @ s) + beta * s), (alpha, beta)
    nan = torch.full_like(s, math.nan)
    matmul_t_kernels.symmetric_product(s, s @ s, "ieee", directly, nan, 1.0, 0.0, out=out)
    assert torch.equal(out, s @ s @ s), "c was read, though beta is 0"


def test_factors_are_exact(interpreter):
    interpreter(check_factors_are_exact)


def check_allocator_is_the_users() -> None:
    """The memory for descriptors is ours for a launch; the allocator that is set stays as it is."""
    seen = []

    class Record:
        def __init__(self, kernel):
            pass

        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(dict(copy_context()))

    before = dict(copy_context())
    x = torch.ones(16, 4)
    matmul_t_kernels.symmetric_product(x, x, "ieee", Record, tiles=PATHS["wide TMA"])
    assert seen[0] != before
    assert dict(copy_context()) == before


def test_allocator_is_the_users(interpreter):
    interpreter(check_allocator_is_the_users)


# Exact sums of products


def exponents(x: Tensor) -> Tensor:
    """Of the rows ``(*, m, 1)``; above `LARGEST` where a row has a NaN or an infinity."""
    found = _exact.row_exponents(torch.where(x.isfinite(), x, 0))
    return torch.where(x.isfinite().all(-1, keepdim=True), found, exact_kernels.LARGEST.value + 1)


def exact_sums(a: Tensor, b: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """T of finite rows by the CPU's formula, int64."""
    total = torch.zeros(*a.shape[:-1], b.shape[1], dtype=torch.int64)
    for i in range(len(total)):
        total[i] = _exact.Sums(_exact.digits(a[i], e[i]), _exact.digits(b[i], f[i])).long()
    return total


def check_operands_on_a_gpu() -> None:
    """Without digits, as on a GPU, operands give the bits that digits give."""
    torch.manual_seed(0)
    x = torch.ldexp(draw(33, 20, dtype=torch.float32), torch.randint(-130, 60, (33, 1)))
    y, z = (draw(*shape, dtype=torch.float32) for shape in ((17, 20), (33, 5)))
    results = []
    for on_gpu in (False, True):
        operands = [Operand(t, _exact.row_exponents(t)) for t in (x, y, z.T)]
        if on_gpu:
            for operand in operands:
                operand.digits = None
        a, b, c = operands
        columns = a.columns()
        results.append([a.sums(b), a.product(b), c.sums(columns), c.product(columns)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert results[0][1].any()
    assert results[0][3].any()


def test_operands_on_a_gpu(interpreter):
    interpreter(check_operands_on_a_gpu)


def check_exact_product(a: Tensor, b: Tensor | None, wrap) -> None:
    """The bits of T and of the float32 product; those of NaN and of infinities as PyTorch's. None: b is a."""
    second = a if b is None else b
    e, f = exponents(a), exponents(second)
    shape = (*a.shape[:-1], second.shape[-2])
    total = torch.full(shape, -7)
    out, again = (torch.full(shape, -7.0) for _ in range(2))  # a NaN may be right
    for result in (total, out, again):
        assert exact_kernels.exact_product(a, second, e[..., 0], f[..., 0], wrap, out=result) is result
    assert torch.equal(out.view(torch.int32), again.view(torch.int32)), "two runs differ"
    marked = (e > exact_kernels.LARGEST.value) | (f > exact_kernels.LARGEST.value).mT
    x, y, e, f = (t.flatten(0, -3) if t.dim() > 2 else t[None] for t in (a, second, e, f))
    finite = [torch.where(t.isfinite(), t, 0) for t in (x, y)]
    expected = exact_sums(*finite, e.clamp(max=129), f.clamp(max=129))
    assert torch.equal(total[~marked], expected.view(shape)[~marked]), "T differs"
    with np.errstate(over="ignore"):
        rounded = _exact.rounded(expected, e.clamp(max=129), f.clamp(max=129)).view(shape)
    assert torch.equal(out[~marked].view(torch.int32), rounded[~marked].view(torch.int32)), "bits differ"
    native = (a @ second.mT)[marked]
    assert_close(out[marked], native, rtol=0, atol=0, equal_nan=True, msg="not PyTorch's NaN and infinities")
    if b is None:  # its mirror is stored, not computed
        assert_close(out, out.mT, rtol=0, atol=0, equal_nan=True, msg="not symmetric")
        assert torch.equal(total, total.mT), "not symmetric"


def check_exact_product_of_shape(m, n, k, batch, layouts, wrap) -> None:
    torch.manual_seed(0)
    a, b = (
        LAYOUTS[layout](draw(*batch, rows, k, dtype=torch.float32))
        for rows, layout in zip((m, n), layouts, strict=True)
    )
    check_exact_product(a, b, wrap)
    if m == n:
        check_exact_product(a, None, wrap)


@pytest.mark.parametrize(
    "m, n, k",
    [
        *((0, 3, 2), (3, 0, 2), (2, 3, 0), (0, 0, 0), (1, 1, 1), (1, 129, 2), (2, 127, 129), (127, 1, 127)),
        *((129, 129, 2), (129, 2, 129), (33, 65, 64)),
    ],
)
def test_exact_product(interpreter, m, n, k):
    interpreter(check_exact_product_of_shape, m, n, k, (), ("contiguous",) * 2, directly)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact_product_of_layout(interpreter, layout):
    interpreter(check_exact_product_of_shape, 33, 33, 35, (2,), (layout, "contiguous"), directly)
    interpreter(check_exact_product_of_shape, 5, 3, 35, (2,), ("transposed", layout), directly)


@pytest.mark.parametrize("batch", [(0,), (3,), (2, 1, 2)], ids=str)
def test_exact_product_of_batch(interpreter, batch):
    interpreter(check_exact_product_of_shape, 34, 34, 3, batch, ("contiguous",) * 2, directly)


def check_exact_product_of_large_tiles(layouts, wrap) -> None:
    with patch.object(exact_kernels, "device", return_value=candidates.Device("", 90, 1)):
        check_exact_product_of_shape(144, 144, 48, (), layouts, wrap)


@pytest.mark.parametrize("layouts", [("contiguous", "contiguous"), ("transposed", "contiguous")], ids=str)
def test_exact_product_of_large_tiles(interpreter, layouts):
    interpreter(check_exact_product_of_large_tiles, layouts, directly)


def rows(case: str) -> Tensor:
    """Rows ``(6, 40)`` of which a float32 product would lose bits, or all of them."""
    torch.manual_seed(0)
    x = draw(6, 40, dtype=torch.float32)
    if case == "magnitudes":
        return torch.ldexp(x, torch.randint(-60, 60, x.shape))
    if case == "zeros":
        x[::2], x[:, ::3] = 0.0, -0.0
    elif case == "subnormal":
        x = torch.ldexp(x, torch.tensor([-149, -140, -130, -126, -100, 0])[:, None])
    elif case == "subnormal results":
        x = torch.ldexp(x, torch.tensor([-75, -74, -72, -70, -66, -64])[:, None])
    elif case == "largest":
        x[:3] = torch.finfo(torch.float32).max
        x[3:5], x[5, 0] = 2.0**127, -(2.0**128) * (1 - 2.0**-7)
    elif case == "overflow":
        x = torch.ldexp(x, torch.tensor([0, 60, 62, 63, 64, 126])[:, None]).clamp(-3e38, 3e38)
    elif case == "ties":  # of X, and of carries between its digits
        x = torch.randint(-(2**24), 2**24, x.shape) / 2.0**24
        x[:, 0], x[1:3] = 0.75, x[1:3] / torch.tensor([2.0**8, 2.0**9])[:, None]
        x[3, 1:] = torch.arange(1, 40) / 2.0**32 + 0.0
        x[4, 1:] = 127.5 / 128 * torch.tensor([1.0, -1.0, 2.0**-8]).repeat(13) * 0.99
    return x


@pytest.mark.parametrize(
    "case", ["magnitudes", "zeros", "subnormal", "subnormal results", "largest", "overflow", "ties"]
)
def test_exact_product_of_rows(interpreter, case):
    for b in (rows("magnitudes"), None):
        interpreter(check_exact_product, rows(case), b, directly)


def special_rows(count: int) -> Tensor:
    torch.manual_seed(0)
    x = draw(count, 40, dtype=torch.float32).sign() * torch.rand(count, 40)
    x[0, 3], x[1, 3], x[1, 5] = math.inf, math.inf, -math.inf
    x[2, 39], x[3, 0], x[4, 3] = math.nan, -math.inf, 0.0
    x[5:7] = 0.0
    x[6, 3] = math.inf
    return x


@pytest.mark.parametrize("count", [7, 80])
def test_exact_product_of_nan_and_infinities(interpreter, count):
    """80 rows: some tiles have no marked row."""
    finite = rows("ties")
    special = special_rows(count)
    for a, b in ((special, special_rows(7)), (finite, special), (special, None)):
        interpreter(check_exact_product, a, b, directly)


def check_exact_product_of_chains(k, wrap) -> None:
    """Chains of 64 terms; the formula, whose chain is longer, has the same T."""
    with patch.object(exact_kernels, "CHAIN", 64):
        check_exact_product_of_shape(3, 33, k, (2,), ("contiguous", "transposed"), wrap)
        check_exact_product_of_shape(33, 33, k, (), ("sliced", "contiguous"), wrap)


@pytest.mark.parametrize("k", [64, 65, 129])
def test_exact_product_of_chains(interpreter, k):
    interpreter(check_exact_product_of_chains, k, directly)


def check_longest_chain_fits() -> None:
    """One term more than a chain of terms whose digits are the least there are, −127 and −128."""
    k = exact_kernels.CHAIN + 1
    x = torch.full((1, k), -(127 * 2.0**24 + 128 * 2.0**16 + 128 * 2.0**8) / 2.0**31)
    e, total = exponents(x), torch.zeros(1, 1, dtype=torch.int64)
    exact_kernels.exact_product(x, x.clone(), e[0], e[0], directly, out=total)
    assert torch.equal(total[None], exact_sums(x[None], x[None], e[None], e[None]))


def test_longest_chain_fits(interpreter):
    interpreter(check_longest_chain_fits)


def test_exact_product_refuses_what_int64_does_not_hold():
    a, e = torch.zeros(1, 1).expand(1, 2**24), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="at most 8388608 terms"):
        exact_kernels.exact_product(a, a, e, e, directly, out=torch.zeros(1, 1))


_chain, _digits = exact_kernels.chain, exact_kernels.digits


@triton.jit
def sums_without_carry(a, b, a_in, b_in, e, f, k, a_col, b_col, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    return _chain(a, b, a_in, b_in, e, f, k, a_col, b_col, BLOCK_K, EVEN_K).to(tl.int32).to(tl.int64)


@triton.jit
def three_digits(x, first, second):
    d0, d1, d2, d3 = _digits(x, first, second)
    return d0, d1, d2, tl.zeros_like(d3)


@triton.jit
def truncated_digits(x, first, second):
    return _digits((x * first * second * 512.0).to(tl.int32).to(tl.float32) / 512.0, 1.0, 1.0)


@triton.jit
def sign_without_zero(x):
    return tl.where(tl.abs(x) < math.inf, tl.where(x >= 0.0, 1.0, -1.0), x).to(tl.float16)


def check_broken_exact_product(name, broken, a, b) -> None:
    with patch.object(exact_kernels, name, broken):
        check_exact_product(a, b, directly)


def sums_lose_their_carry():
    check_broken_exact_product("chain", sums_without_carry, rows("ties"), None)


def products_of_the_last_digit_are_missing():
    check_broken_exact_product("digits", three_digits, rows("ties"), None)


def elements_are_truncated():
    check_broken_exact_product("digits", truncated_digits, rows("ties"), None)


def results_are_twice_as_large():
    check_broken_exact_product("WEIGHT", tl.constexpr(37), rows("ties"), None)


def infinity_times_0_is_infinite():
    check_broken_exact_product("sign", sign_without_zero, special_rows(7), rows("zeros"))


def a_tile_is_missing():
    check_exact_product(rows("ties"), None, WithoutLastProgram)


@pytest.mark.parametrize(
    "broken, message",
    [
        (sums_lose_their_carry, "T differs"),
        (products_of_the_last_digit_are_missing, "T differs"),
        (elements_are_truncated, "T differs"),
        (results_are_twice_as_large, "bits differ"),
        (infinity_times_0_is_infinite, "not PyTorch's NaN"),
        (a_tile_is_missing, "T differs"),
    ],
)
def test_check_rejects_an_exact_product_of_which(interpreter, broken, message):
    with pytest.raises(AssertionError, match=message):
        interpreter(broken)


# (G + Gᵀ)/2 and the mirror


def check_half_sum(dtype, shape, layout, wrap) -> None:
    torch.manual_seed(0)
    g = LAYOUTS[layout](draw(*shape, dtype=dtype))
    total = poisoned(*shape, dtype=dtype)
    matmul_t_kernels.half_sum(g, wrap, out=total)
    wide = g.to(accumulator(dtype))
    assert torch.equal(total, (0.5 * wide + 0.5 * wide.mT).to(dtype)), "not the rounded half sum"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 65), (200, 200), (0, 0), (3, 2, 65, 65)], ids=str)
def test_half_sum(interpreter, dtype, shape):
    interpreter(check_half_sum, dtype, shape, "contiguous", directly)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_sum_of_layout(interpreter, layout):
    interpreter(check_half_sum, torch.float32, (2, 65, 65), layout, directly)


def check_half_sum_overflows_no_sum() -> None:
    g = torch.full((2, 2), 3e38)
    assert torch.equal(matmul_t_kernels.half_sum(g, directly), g)


def test_half_sum_overflows_no_sum(interpreter):
    """G + Gᵀ may exceed the largest float32, as a scaled loss makes it, where the result does not."""
    interpreter(check_half_sum_overflows_no_sum)


def check_mirror(dtype, shape, wrap) -> None:
    torch.manual_seed(0)
    c = draw(*shape, dtype=dtype)
    lower = c.tril()
    above = torch.ones_like(c, dtype=torch.bool).triu(1)
    expected = lower + lower.tril(-1).mT
    assert matmul_t_kernels.mirror(c.masked_fill_(above, math.nan), wrap) is c
    assert torch.equal(c, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 65), (200, 200), (0, 0), (3, 2, 65, 65)], ids=str)
def test_mirror(interpreter, dtype, shape):
    interpreter(check_mirror, dtype, shape, directly)


# σ(X·Wᵀ + b)


def check_linear_sigmoid(dtype, m, n, k, layout, has_bias, wrap) -> None:
    torch.manual_seed(0)
    x, weight = LAYOUTS[layout](draw(m, k, dtype=dtype)), LAYOUTS[layout](draw(n, k, dtype=dtype))
    bias = draw(2 * n, dtype=dtype)[::2] if has_bias else None
    y, again = (poisoned(m, n, dtype=dtype) for _ in range(2))
    for out in (y, again):
        assert linear_sigmoid_kernels.linear_sigmoid(x, weight, bias, "ieee", wrap, out=out) is out
    z = x.double() @ weight.double().mT + (bias.double() if has_bias else 0)
    # σ' ≤ 1/4 scales the error of z, the bias included; e⁻ᶻ, the sum and the quotient round; then y ≤ 1 does.
    u = unit_roundoff(accumulator(dtype))
    rounding = (product_rounding(x, weight.mT) + u * largest(z)) / 4 + 3 * u + unit_roundoff(dtype)
    assert_as_accurate(y, torch.nn.functional.linear(x, weight, bias).sigmoid(), z.sigmoid(), rounding)
    assert torch.equal(y, again), "two runs differ"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "m, n, k",
    [
        (1, 1, 1),
        (1, 129, 2),
        (2, 2, 127),
        (2, 127, 128),
        (127, 128, 129),
        (128, 1, 2),
        (128, 128, 128),
        (129, 129, 1),
    ],
)
def test_linear_sigmoid(interpreter, dtype, m, n, k):
    interpreter(check_linear_sigmoid, dtype, m, n, k, "contiguous", True, directly)


@pytest.mark.parametrize("m, n, k", [(0, 3, 2), (3, 0, 2), (65, 33, 70)])
def test_linear_sigmoid_without_bias(interpreter, m, n, k):
    interpreter(check_linear_sigmoid, torch.float16, m, n, k, "contiguous", False, directly)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_sigmoid_of_layout(interpreter, layout):
    interpreter(check_linear_sigmoid, torch.float32, 129, 65, 33, layout, True, directly)


LINEAR_PATHS = {
    "pointers": Tiles(16, 32, 16, 4, 2),
    "split-K": Tiles(16, 16, 16, 4, 2, "split_k"),
    "TMA": Tiles(16, 32, 16, 4, 2, "tma"),
}


def check_linear_sigmoid_with_tiles(path, dtype, m, n, k, layout, has_bias, wrap) -> None:
    with patch.object(linear_sigmoid_kernels, "chosen", return_value=LINEAR_PATHS[path]):
        check_linear_sigmoid(dtype, m, n, k, layout, has_bias, wrap)


@pytest.mark.parametrize("path", LINEAR_PATHS)
@pytest.mark.parametrize(
    "m, n, k, layout",
    [
        (2, 4, 4, "contiguous"),
        (16, 12, 260, "contiguous"),  # one tile, and so split
        (13, 15, 132, "contiguous"),
        (36, 20, 52, "contiguous"),
        (33, 17, 260, "contiguous"),  # rows of the result begin at no multiple of 16 bytes
        (36, 132, 260, "transposed"),
    ],
)
def test_linear_sigmoid_with_tiles(interpreter, path, m, n, k, layout):
    """Operands of whole 16 bytes, as TMA takes them."""
    for has_bias in (True, False):
        interpreter(check_linear_sigmoid_with_tiles, path, torch.float32, m, n, k, layout, has_bias, directly)


@pytest.mark.parametrize("path", LINEAR_PATHS)
def test_linear_sigmoid_of_float16_with_tiles(interpreter, path):
    interpreter(
        check_linear_sigmoid_with_tiles, path, torch.float16, 40, 72, 272, "contiguous", True, directly
    )


def check_split_k() -> None:
    """The cases above of one tile have several parts; the last part is shorter here."""
    tiles = LINEAR_PATHS["split-K"]
    assert candidates.split_k(tiles, candidates.device(torch.empty(0)), 1, 4, 4) == (1, 16)
    assert candidates.split_k(tiles, candidates.device(torch.empty(0)), 16, 16, 260) == (3, 96)


def test_split_k(interpreter):
    interpreter(check_split_k)


def check_tma_refuses() -> None:
    x = torch.ones(16, 5)
    with pytest.raises(ValueError, match="expected the variant pointers"):
        linear_sigmoid_kernels.linear_sigmoid(x, x, None, "ieee", directly, tiles=LINEAR_PATHS["TMA"])


def test_tma_refuses_other_strides(interpreter):
    interpreter(check_tma_refuses)


def check_linear_sigmoid_saturates(dtype: torch.dtype) -> None:
    x = torch.tensor([[-math.inf], [-1e4], [0.0], [1e4], [math.inf], [math.nan]], dtype=dtype)
    y = poisoned(6, 1, dtype=dtype)
    linear_sigmoid_kernels.linear_sigmoid(x, torch.ones(1, 1, dtype=dtype), None, "ieee", directly, out=y)
    torch.testing.assert_close(y, x.sigmoid(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear_sigmoid_saturates(interpreter, dtype):
    interpreter(check_linear_sigmoid_saturates, dtype)


# dZ = G·Y·(1 - Y) and its sum over the rows


def check_sigmoid_backward(dtype, m, n, layout, wrap) -> None:
    torch.manual_seed(0)
    g, y = LAYOUTS[layout](draw(m, n, dtype=dtype)), LAYOUTS[layout](draw(m, n, dtype=dtype).sigmoid())
    dz, again = (poisoned(m, n, dtype=dtype) for _ in range(2))
    torch.use_deterministic_algorithms(True)  # poisons torch.empty, where the partial sums go
    db = sigmoid_backward_kernels.sigmoid_backward(g, y, dz, wrap)
    torch.use_deterministic_algorithms(False)
    db_again = sigmoid_backward_kernels.sigmoid_backward(g, y, again, wrap)
    oracle = g.double() * y.double() * (1 - y.double())
    native = torch.ops.aten.sigmoid_backward(g, y)
    # One rounding of 1 - y and one of each product; then those of the sum; at last those of the results.
    products = 3 * unit_roundoff(accumulator(dtype))
    assert_as_accurate(dz, native, oracle, (products + unit_roundoff(dtype)) * largest(oracle))
    magnitude, total = oracle.abs().sum(0), oracle.sum(0)
    rounding = products * largest(magnitude) + sum_rounding(dtype, m, magnitude)
    assert_as_accurate(db, native.sum(0), total, rounding + unit_roundoff(dtype) * largest(total))
    assert torch.equal(dz, again), "two runs differ"
    assert torch.equal(db, db_again), "two runs differ"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m, n", [(0, 3), (3, 0), *PAIRS, (257, 65), (513, 1)])
def test_sigmoid_backward(interpreter, dtype, m, n):
    interpreter(check_sigmoid_backward, dtype, m, n, "contiguous", directly)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sigmoid_backward_of_layout(interpreter, layout):
    interpreter(check_sigmoid_backward, torch.float32, 129, 65, layout, directly)


# max(A, B)


def draw_any(*shape: int, dtype: torch.dtype) -> Tensor:
    """Few different values, so that ties are many; none is the least of its dtype; some are NaN."""
    if dtype == torch.bool:
        values = [False, True]
    elif dtype.is_floating_point:
        values = [-math.inf, -2.5, -1, 0, 0.5, 3, math.inf, math.nan]
    else:
        limits = torch.iinfo(dtype)
        values = [limits.min + 1, limits.max // 2, limits.max // 2 + 1, limits.max, *range(2, 9)]
    return torch.tensor(values, dtype=dtype)[torch.randint(len(values), shape)]


def poison(out: Tensor) -> Tensor:
    if out.dtype == torch.bool:
        out.view(torch.uint8).fill_(7)
        return out
    return out.fill_(math.nan if out.is_floating_point() else torch.iinfo(out.dtype).min)


FLAT, STRIDED = "flat_kernel", "strided_kernel"
OPERANDS = {  # what makes the operands from a draw, the kernel that serves them, and how often it is launched
    "scalars": (lambda d: (d(), d()), FLAT, 1),
    "one element": (lambda d: (d(1), d(1)), FLAT, 1),
    "no element": (lambda d: (d(3, 0), d(3, 1)), None, 0),
    "127": (lambda d: (d(127), d(127)), FLAT, 1),
    "129": (lambda d: (d(129), d(129)), FLAT, 1),
    "whole blocks": (lambda d: (d(8192), d(8192)), FLAT, 1),
    "a last block of one": (lambda d: (d(8193), d(8193)), FLAT, 1),
    "a last block one short": (lambda d: (d(8191), d(8191)), FLAT, 1),
    "unaligned": (lambda d: (d(4100)[1:], d(4101)[2:]), FLAT, 1),
    "same permutation": (lambda d: (d(5, 6, 7).permute(2, 0, 1), d(5, 6, 7).permute(2, 0, 1)), FLAT, 1),
    "transposed": (lambda d: (d(65, 33), d(33, 65).mT), STRIDED, 1),
    "permuted": (lambda d: (d(5, 6, 7, 3), d(3, 5, 7, 6).permute(1, 3, 2, 0)), STRIDED, 1),
    "sliced": (lambda d: (d(33, 40)[:, ::2], d(66, 20)[::2]), STRIDED, 1),
    "a row": (lambda d: (d(33, 129), d(129)), STRIDED, 1),
    "a column": (lambda d: (d(129, 33), d(129, 1)), STRIDED, 1),
    "a long row": (lambda d: (d(3, 2049), d(1, 2049)), STRIDED, 1),
    "outer": (lambda d: (d(127, 1), d(1, 129)), STRIDED, 1),
    "a long column": (lambda d: (d(2049, 3), d(2049, 1)), STRIDED, 1),
    "a row for each of a batch": (lambda d: (d(3, 5, 20), d(3, 1, 20)), STRIDED, 1),
    "a scalar": (lambda d: (d(4099), d()), FLAT, 1),
    "every second": (lambda d: (d(258)[::2], d(129)), STRIDED, 1),
    "4 dimensions": (lambda d: (d(3, 1, 5, 1), d(1, 4, 1, 7)), STRIDED, 1),
    "5 dimensions": (lambda d: (d(2, 1, 4, 1, 3), d(1, 5, 1, 6, 1)), STRIDED, 2),
    "6 dimensions": (lambda d: (d(2, 1, 4, 1, 3, 1), d(1, 5, 1, 2, 1, 6)), STRIDED, 10),
    "6 dimensions, permuted": (
        lambda d: (
            d(6, 1, 3, 1, 2, 1).permute(5, 4, 3, 2, 1, 0),
            d(1, 2, 1, 3, 1, 2).permute(5, 4, 3, 2, 1, 0),
        ),
        STRIDED,
        12,
    ),
}


class Recording:
    """``wrap``, which notes the kernels that it is given."""

    def __init__(self, wrap):
        self.wrap = wrap
        self.launched: list[str] = []

    def __call__(self, kernel):
        self.launched.append(kernel.fn.__name__)
        return self.wrap(kernel)


def check_maximum(case: str, a_dtype, b_dtype, wrap) -> list[str]:
    """Compare with `torch.maximum`, bit for bit; return the kernels launched."""
    torch.manual_seed(0)
    dtypes = iter((a_dtype, b_dtype))
    a, b = OPERANDS[case][0](lambda *shape: draw_any(*shape, dtype=next(dtypes)))
    expected = torch.maximum(a, b)
    out = poison(torch.empty_like(expected))
    assert out.stride() == expected.stride()
    wrap = Recording(wrap)
    maximum_kernels.maximum(a.expand(out.shape), b.expand(out.shape), out, wrap)
    if out.dtype == torch.bool:
        out, expected = out.view(torch.uint8), expected.view(torch.uint8)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    return wrap.launched


INCOMING = {  # gradients of the layouts that follow an operation, and of others
    "like the result": lambda g: g,
    "of a sum": lambda g: g.flatten()[:1].view(()).expand_as(g),
    "of a sum over rows": lambda g: g[:1].expand_as(g) if g.dim() else g,
    "contiguous": lambda g: g.contiguous(),
    "transposed": lambda g: g.T.contiguous().T if g.dim() == 2 else g,
}


def check_maximum_backward(case: str, incoming: str, a_dtype, b_dtype, wrap) -> list[str]:
    """Compare with the gradients of `torch.maximum`, bit for bit; return the kernels launched."""
    torch.manual_seed(0)
    dtypes = iter((a_dtype, b_dtype))
    a, b = OPERANDS[case][0](lambda *shape: draw_any(*shape, dtype=next(dtypes)))
    y = torch.maximum(a, b)
    g = INCOMING[incoming](torch.empty_like(y).copy_(draw(*y.shape, dtype=torch.float64) * 1000))
    g.flatten()[:1] *= 2.0**-24  # the half of the least float16 is rounded
    wide = [t.to(y.dtype).expand(y.shape).clone().requires_grad_() for t in (a, b)]
    expected = torch.autograd.grad(torch.maximum(*wide), wide, g)
    da, db = poison(torch.empty_like(y)), poison(torch.empty_like(y))
    wrap = Recording(wrap)
    maximum_kernels.maximum_backward(g, a.expand(y.shape), b.expand(y.shape), da, db, wrap)
    torch.testing.assert_close((da, db), expected, rtol=0, atol=0, equal_nan=True)
    return wrap.launched


@pytest.mark.parametrize("case", OPERANDS)
def test_maximum(interpreter, case):
    _, kernel, launches = OPERANDS[case]
    for dtype in (*FLOATS, *INTEGERS):
        assert interpreter(check_maximum, case, dtype, dtype, directly) == [f"maximum_{kernel}"] * launches


@pytest.mark.parametrize(
    "a_dtype, b_dtype",
    [
        (torch.float32, torch.float16),
        (torch.float64, torch.float32),
        (torch.int64, torch.float16),
        (torch.int32, torch.float64),
        (torch.bool, torch.float32),
        (torch.bool, torch.int8),
        (torch.uint8, torch.int8),
        (torch.uint8, torch.int16),
        (torch.int64, torch.int32),
    ],
    ids=str,
)
def test_maximum_of_mixed_dtypes(interpreter, a_dtype, b_dtype):
    for case in ("127", "a last block of one", "a row", "transposed", "a scalar", "5 dimensions"):
        interpreter(check_maximum, case, a_dtype, b_dtype, directly)
        interpreter(check_maximum, case, b_dtype, a_dtype, directly)


@pytest.mark.parametrize("case", OPERANDS)
def test_maximum_backward(interpreter, case):
    _, kernel, launches = OPERANDS[case]
    for dtype in FLOATS:
        args = (case, "like the result", dtype, dtype, directly)
        assert interpreter(check_maximum_backward, *args) == [f"maximum_backward_{kernel}"] * launches


@pytest.mark.parametrize("incoming", INCOMING)
def test_maximum_backward_of_layout(interpreter, incoming):
    for case in ("scalars", "129", "a scalar", "a row", "a column", "transposed", "permuted", "6 dimensions"):
        for dtypes in (
            (torch.float32, torch.float32),
            (torch.int64, torch.float16),
            (torch.float64, torch.bool),
        ):
            interpreter(check_maximum_backward, case, incoming, *dtypes, directly)


def test_the_gradient_of_a_sum_is_read_once(interpreter):
    for case in ("129", "a scalar", "same permutation"):
        args = (case, "of a sum", torch.float32, torch.float32, directly)
        assert interpreter(check_maximum_backward, *args) == ["maximum_backward_flat_kernel"]


# Offsets beyond 2³¹


def check_far_apart() -> None:
    """Rows further apart than an int32 can count. Their pages are never touched, so they cost no memory."""
    step = 2**31 + 64
    torch.manual_seed(0)

    far = torch.empty(step + 8, dtype=torch.uint8).as_strided((2, 8), (step, 1))
    near = draw_any(2, 8, dtype=torch.uint8)
    far.copy_(draw_any(2, 8, dtype=torch.uint8))
    out = poison(torch.empty_like(near))
    maximum_kernels.maximum(far, near, out, directly)
    assert torch.equal(out, torch.maximum(far, near))
    del far

    far = torch.empty(step + 8, dtype=torch.float16).as_strided((2, 8), (step, 1))
    far.copy_(torch.randint(-4, 5, (2, 8)))
    for x in (far, far.mT):  # small integers: every result is exact
        n, k = x.shape
        c, y, dz = (poisoned(*shape, dtype=x.dtype) for shape in ((n, n), (n, n), (n, k)))
        matmul_t_kernels.symmetric_product(x, x, "ieee", directly, out=c)
        assert torch.equal(c, x @ x.mT)
        linear_sigmoid_kernels.linear_sigmoid(x, x, None, "ieee", directly, out=y)
        assert torch.equal(y, (x @ x.mT).float().sigmoid().half())
        sigmoid_backward_kernels.sigmoid_backward(x, x, dz, directly)
        assert torch.equal(dz, x * x * (1 - x))
        da, db = (poisoned(n, k, dtype=x.dtype) for _ in range(2))
        maximum_kernels.maximum_backward(x, x, x, da, db, directly)
        assert torch.equal(da, x / 2)
        assert torch.equal(db, x / 2)
    for g in (far[:, :2], far[:, :2].mT):
        total = poisoned(2, 2, dtype=g.dtype)
        matmul_t_kernels.half_sum(g, directly, out=total)
        assert torch.equal(total, (g + g.mT) / 2)


def test_offsets_beyond_int32(interpreter):
    interpreter(check_far_apart)


# The lower triangle's tiles


@triton.jit
def triangle_by_rows_kernel(tile_ptr, row_ptr, col_ptr, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    row, col = triangle_by_rows(tl.load(tile_ptr + offsets, mask=mask, other=0))
    tl.store(row_ptr + offsets, row, mask=mask)
    tl.store(col_ptr + offsets, col, mask=mask)


def check_triangle_by_rows(tiles: Tensor, rows: Tensor, cols: Tensor) -> None:
    row, col = (torch.full_like(tiles, -1) for _ in range(2))
    block = 2**16
    triangle_by_rows_kernel[(triton.cdiv(len(tiles), block),)](tiles, row, col, len(tiles), BLOCK=block)
    wrong = ((row != rows) | (col != cols)).nonzero().flatten().tolist()
    found = [(tiles[i].item(), row[i].item(), col[i].item()) for i in wrong[:3]]
    assert not wrong, f"{len(wrong)} wrong; the first (tile, row, column): {found}"


def test_triangle_by_rows_enumerates_the_triangle(interpreter):
    rows, cols = torch.tril_indices(2048, 2048, dtype=torch.int32)
    interpreter(check_triangle_by_rows, torch.arange(len(rows), dtype=torch.int32), rows, cols)


def test_triangle_by_rows_at_the_ends_of_every_row(interpreter):
    # The float estimate of the row rises with the tile, so a row is right throughout if its ends are.
    rows = torch.arange(65535)  # the rows that an int32 counts to their ends
    first = rows * (rows + 1) // 2
    tiles = torch.stack((first, first + rows)).to(torch.int32)
    cols = torch.stack((torch.zeros_like(rows), rows)).to(torch.int32)
    rows = rows.to(torch.int32).expand_as(tiles)
    interpreter(check_triangle_by_rows, tiles.flatten(), rows.flatten(), cols.flatten())


def test_triangle_by_rows_check_rejects_a_wrong_column(interpreter):
    rows, cols = torch.tril_indices(8, 8, dtype=torch.int32)
    cols[-1] += 1
    with pytest.raises(AssertionError, match="1 wrong"):
        interpreter(check_triangle_by_rows, torch.arange(len(rows), dtype=torch.int32), rows, cols)


@triton.jit
def triangle_tile_kernel(row_ptr, col_ptr, tile_rows, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < tile_rows * (tile_rows + 1) // 2
    row, col = triangle_tile(offsets, tile_rows, GROUP)
    tl.store(row_ptr + offsets, row, mask=mask)
    tl.store(col_ptr + offsets, col, mask=mask)


def check_triangle_tile(tile_rows: int, group: int) -> None:
    row, col = (torch.full((tile_rows * (tile_rows + 1) // 2,), -1) for _ in range(2))
    triangle_tile_kernel[(1,)](row, col, tile_rows, BLOCK=4096, GROUP=group)
    found = list(zip(row.tolist(), col.tolist(), strict=True))
    assert sorted(found) == [(r, c) for r in range(tile_rows) for c in range(r + 1)]
    rows = [r // GROUP for r, _ in found]
    assert rows == sorted(rows), "a group is left and entered again"
    for (r, c), (below, right) in pairwise(found):
        if r // GROUP == below // GROUP and c < r // GROUP * GROUP:
            assert (below, right) == (r + 1, c) or right in (c, c + 1), "a group is not walked by columns"


@pytest.mark.parametrize("tile_rows", [1, 7, 8, 9, 16, 35, 64])
def test_triangle_tile_takes_every_tile_once_and_groups_together(interpreter, tile_rows):
    interpreter(check_triangle_tile, tile_rows, GROUP)


def test_triangle_tile_check_rejects_other_groups(interpreter):
    with pytest.raises(AssertionError, match="a group is"):
        interpreter(check_triangle_tile, 35, 3)


# The tiles of large products


def check_with_large_tiles(check, *args) -> None:
    large = Tiles(128, 128, 16, 8, 3)
    with (
        patch.object(matmul_t_kernels, "chosen", return_value=large),
        patch.object(linear_sigmoid_kernels, "chosen", return_value=large),
    ):
        check(*args, directly)


@pytest.mark.parametrize(
    "check, args",
    [
        (check_symmetric_product, (torch.float32, (259, 65), "contiguous")),
        (check_linear_sigmoid, (torch.float32, 259, 130, 65, "transposed", True)),
    ],
)
def test_large_tiles(interpreter, check, args):
    """On operands smaller than those they are chosen for, which would take the interpreter minutes."""
    interpreter(check_with_large_tiles, check, *args)


# What the checks must reject


@pytest.mark.parametrize(
    "check, args",
    [
        (check_symmetric_product, (torch.float32, (129, 33), "contiguous")),
        (
            check_symmetric_product_of_two,
            (torch.float32, (36, 20), "contiguous", PATHS["pointers"], 0.5, -2.0),
        ),
        (check_half_sum, (torch.float32, (129, 129), "contiguous")),
        (check_mirror, (torch.float32, (200, 200))),
        (check_linear_sigmoid, (torch.float32, 129, 129, 33, "contiguous", True)),
        (check_linear_sigmoid_with_tiles, ("split-K", torch.float32, 16, 15, 260, "contiguous", True)),
        (check_sigmoid_backward, (torch.float32, 129, 129, "contiguous")),
        *((check_maximum, ("129", dtype, dtype)) for dtype in (*FLOATS, *INTEGERS)),
        *(
            (check_maximum, (case, torch.int32, torch.int32))  # of floats, NaN is the poison and a value
            for case in ("a row", "a column", "a scalar")
        ),
        *(
            (check_maximum_backward, (case, "like the result", torch.float32, torch.float32))
            for case in ("129", "a scalar", "a row", "a column", "6 dimensions")
        ),
        (check_maximum, ("6 dimensions", torch.int8, torch.int8)),
    ],
)
def test_check_rejects_a_missing_program(interpreter, check, args):
    with pytest.raises(AssertionError):
        interpreter(check, *args, WithoutLastProgram)


class FourRowsShort(WithoutLastProgram):
    """A broken launch of persistent programs, of which any number does all the work."""

    def __getitem__(self, grid):
        rows = self.kernel.arg_names.index("n" if "batches" in self.kernel.arg_names else "m")

        def run(*args, **options):
            self.kernel[grid](*args[:rows], args[rows] - 4, *args[rows + 1 :], **options)

        return run


@pytest.mark.parametrize("path", ["TMA", "wide TMA", "specialized"])
def test_check_rejects_missing_rows(interpreter, path):
    args = (torch.float32, (36, 20), "contiguous", PATHS[path], 0.5, -2.0, FourRowsShort)
    with pytest.raises(AssertionError):
        interpreter(check_symmetric_product_of_two, *args)


def test_check_rejects_missing_rows_of_linear_sigmoid(interpreter):
    with pytest.raises(AssertionError):
        interpreter(
            check_linear_sigmoid_with_tiles,
            "TMA",
            torch.float32,
            36,
            20,
            52,
            "contiguous",
            True,
            FourRowsShort,
        )


def test_tolerance_rejects_operands_of_lower_precision():
    torch.manual_seed(0)
    x = draw(129, 128, dtype=torch.float32)
    low = x.half().float()
    with pytest.raises(AssertionError, match="PyTorch's"):
        assert_as_accurate(low @ low.mT, x @ x.mT, x.double() @ x.double().mT, product_rounding(x, x.mT))
