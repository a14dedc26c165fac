# SPDX-License-Identifier: MIT
"""Launches by Triton's interpreter, of dtypes, layouts and sizes that `test_ptx.py` does not execute.

Each check poisons the output, so that an element which no program writes fails. bfloat16 needs a GPU: the
interpreter computes it wrongly.
"""

import math
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from samples import LAYOUTS, bits, lower_twice
from test_exact_matmul import HARD
from torch import Tensor
from torch.testing import assert_close

import torchpar
from torchpar.kernels import exact_matmul, linear_sigmoid, matmul_t, maximum, sigmoid_backward
from torchpar.kernels.gemm import triangle_tile
from torchpar.kernels.tiles import Device, Tiles
from torchpar.ops import exact_digits

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
ROUNDS_TWICE = TRITON < (3, 9)  # the interpreter's fma
pytestmark = pytest.mark.skipif(
    TRITON < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="run-time loops fail in the interpreter of Triton < 3.7 beside NumPy >= 2.4",
)
slow = pytest.mark.slow

FLOATS = (torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def directly(kernel):
    """A launcher's ``wrap``."""
    return kernel


class WithoutLastProgram:
    """A broken one: its grid is one program short."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.kernel[(grid[0] - 1,)]


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


# X·Xᵀ


def check_products_added_in_place() -> None:
    torch.manual_seed(0)
    x = torch.randint(-3, 4, (3, 37, 20)).half()
    h = lower_twice(torch.randint(-99, 100, (3, 37, 37)).float())
    expected = 2 * h + 0.5 * x.float() @ x.float().mT
    args = (x, x, "ieee", directly, h, 0.5, 2.0)
    assert matmul_t.symmetric_product(*args, out=h, tiles=Tiles(16, 16, 16, 4, 2), tma=False) is h
    assert torch.equal(h, expected)


def check_factors_are_exact() -> None:
    """In integers the product has no error, so that all there is comes from the factors."""
    torch.manual_seed(0)
    s = torch.randint(-2, 3, (17, 17), dtype=torch.float64)
    s = s + s.mT
    out = poisoned(17, 17, dtype=s.dtype)
    for alpha, beta in ((1 / 3, 0.0), (0.0, -1 / 3), (-1e300, 0.0)):
        matmul_t.symmetric_product(s, s @ s, "ieee", directly, s, alpha, beta, out=out)
        assert torch.equal(out, alpha * (s @ s @ s) + beta * s), (alpha, beta)
    nan = torch.full_like(s, math.nan)
    matmul_t.symmetric_product(s, s @ s, "ieee", directly, nan, 1.0, 0.0, out=out)
    assert torch.equal(out, s @ s @ s), "c was read, though beta is 0"


# Exact products by float16 digits; the executor of PTX has those of int8


def check_exact_product(a: Tensor, b: Tensor | None, wrap) -> None:
    """T, and the bits of the CPU's product, with its NaN. None: b is a, and the mirror is not computed."""
    second = a if b is None else b
    e, f = (exact_digits.row_exponents(t) for t in (a, second))
    expected = torchpar.exact_matmul(a, second)
    total = torch.full(expected.shape, -7)
    out, again = (torch.full(expected.shape, -7.0) for _ in range(2))  # a NaN may be right
    for result in (total, out, again):
        assert exact_matmul.exact_product(a, second, e[..., 0], f[..., 0], wrap, out=result) is result
    assert torch.equal(bits(out), bits(again)), "two runs differ"
    number = ~expected.isnan()
    assert torch.equal(bits(out[number]), bits(expected[number])), "bits differ"
    assert out[~number].isnan().all()
    if a.dim() == 2 and a.isfinite().all() and second.isfinite().all():
        assert torch.equal(total, exact_digits.sums(a, second, e, f)), "T differs"


def on_gpu(capability: int, check, *args) -> None:
    """Run ``check`` with the digits and tiles for a GPU of ``capability``: 103 has float16, 90 int8."""
    with patch.object(exact_matmul, "device", return_value=Device("", capability, 1)):
        check(*args)


def check_shape(m: int, n: int, k: int, batch=(), a_layout="contiguous", b_layout="contiguous") -> None:
    torch.manual_seed(0)
    a, b = LAYOUTS[a_layout](torch.randn(*batch, m, k)), LAYOUTS[b_layout](torch.randn(*batch, n, k))
    check_exact_product(a, b, directly)
    if m == n:
        check_exact_product(a, None, directly)


def special_rows(count: int) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(count, 40).sign() * torch.rand(count, 40)
    x[0, 3], x[1, 3], x[1, 5] = math.inf, math.inf, -math.inf
    x[2, 39], x[3, 0], x[4, 3] = math.nan, -math.inf, 0.0
    x[5:7] = 0.0
    x[6, 3] = math.inf
    return x


def check_hard_and_special_rows() -> None:
    special, finite = special_rows(80), HARD["wide"][0]
    pairs = (special_rows(7), special), (special, special[20:]), (special, None), (finite, None)
    for a, b in (*HARD.values(), *pairs):
        check_exact_product(a, b, directly)


def check_large_tiles_and_short_chains() -> None:
    """Chains of 64 terms; the formula, whose chain is longer, has the same T."""
    check_shape(144, 144, 48, (), "transposed")
    with patch.object(exact_matmul, "FLOAT_CHAIN", 64):
        check_shape(3, 33, 129, (2,), "contiguous", "transposed")
        check_shape(33, 33, 65, (), "stepped")


def rows_of_extreme_digits(k: int, odd: int) -> Tensor:
    """Rows of the digits with the largest sums. In the first column only digit ``odd`` is not 0."""
    extreme = torch.tensor([[-126, -128, -128, -128], [126, 127, 127, 0], [127, -128, -128, -128]])
    digits = extreme[:, :, None].repeat(1, 1, k)
    digits[:, :, 0] = 127 * (torch.arange(4) == odd)
    x = (digits * 256.0 ** -torch.arange(4)[:, None]).sum(1) / 128
    assert torch.equal(exact_digits.digits(x, exact_digits.row_exponents(x)), digits)
    return x


def check_sums_of_extreme_digits(k: int, float_chain: int) -> None:
    """S₃ of the first chain is odd: above 2²⁴ a float32 would lose its last bit."""
    tiles = Tiles(16, 16, 256, 4, 3)  # few steps
    with patch.multiple(exact_matmul, FLOAT_CHAIN=float_chain, _tiles=lambda *_: tiles):
        check_exact_product(rows_of_extreme_digits(k, 1), rows_of_extreme_digits(k, 2), directly)


FLOAT_CHAIN = exact_matmul.FLOAT_CHAIN
EXACT = [
    (check_shape, 0, 3, 2),
    (check_shape, 2, 3, 0),
    (check_shape, 3, 3, 5, (0,)),
    (check_shape, 33, 33, 35, (2,), "stepped", "transposed"),
    (check_shape, 33, 5, 35, (2, 1), "offset", "expanded"),
    (check_sums_of_extreme_digits, 2 * FLOAT_CHAIN + 1, FLOAT_CHAIN),
    pytest.param((check_hard_and_special_rows,), marks=slow),
    pytest.param((check_large_tiles_and_short_chains,), marks=slow),
]


@pytest.mark.parametrize("check", EXACT)
def test_exact_product(interpreter, check):
    interpreter(on_gpu, 103, *check)


def test_longest_chain_of_int8_fits(interpreter):
    interpreter(on_gpu, 90, check_sums_of_extreme_digits, exact_matmul.CHAIN + 1, FLOAT_CHAIN)


# σ(X·Wᵀ + b)


def check_sigmoid() -> None:
    """Far below 0 and above as well, the relative error is that of a few roundings."""
    for dtype in FLOATS:
        x = torch.linspace(-80, 20, 997).to(dtype)[:, None]
        special = torch.tensor([-math.inf, -1e4, 0.0, 1e4, math.inf, math.nan], dtype=dtype)[:, None]
        one = torch.ones(1, 1, dtype=dtype)
        y, limits = (linear_sigmoid.linear_sigmoid(t, one, None, "ieee", directly) for t in (x, special))
        assert_close(limits, special.sigmoid(), rtol=0, atol=0, equal_nan=True)
        oracle = x.double().sigmoid()
        # Of 16 bits, −z·log2(e) is rounded to float32 and not corrected: an error of 80·2⁻²³ at most. Nor can
        # it be corrected in float32 where the interpreter's fma rounds twice, as before Triton 3.9.
        is_corrected = dtype == torch.float64 or (dtype == torch.float32 and not ROUNDS_TWICE)
        computed = torch.finfo(torch.float32 if dtype == torch.float16 else dtype)
        stored = torch.finfo(dtype).eps / 2 * (oracle + torch.finfo(dtype).tiny)
        bound = (3 if is_corrected else 80) * computed.eps * oracle + stored
        assert ((y.double() - oracle).abs() <= bound).all()
        assert not ((1.01 * y.double() - oracle).abs() <= bound).all()


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


REVERSED = (5, 4, 3, 2, 1, 0)
OPERANDS = {  # by a function that draws one
    "scalars": lambda d: (d(), d()),
    "no element": lambda d: (d(3, 0), d(3, 1)),
    "129": lambda d: (d(129), d(129)),
    "a last block of one": lambda d: (d(8193), d(8193)),
    "same permutation": lambda d: (d(5, 6, 7).permute(2, 0, 1), d(5, 6, 7).permute(2, 0, 1)),
    "a scalar": lambda d: (d(4099), d()),
    "permuted": lambda d: (d(5, 6, 7, 3), d(3, 5, 7, 6).permute(1, 3, 2, 0)),
    "a row": lambda d: (d(33, 129), d(129)),
    "a column": lambda d: (d(129, 33), d(129, 1)),
    "a long row": lambda d: (d(3, 2049), d(1, 2049)),
    "outer": lambda d: (d(65, 1), d(1, 129)),
    "4 dimensions": lambda d: (d(3, 1, 5, 1), d(1, 4, 1, 7)),
    "5 dimensions": lambda d: (d(2, 1, 4, 1, 3), d(1, 5, 1, 6, 1)),  # in two launches
    "6 dimensions": lambda d: (d(3, 1, 2, 1, 2, 1).permute(REVERSED), d(1, 2, 1, 3, 1, 2).permute(REVERSED)),
}
MIXED = (
    (torch.float16, torch.int64),
    (torch.float64, torch.bool),
    (torch.bool, torch.int8),
    (torch.float32, torch.float16),
    (torch.int8, torch.uint8),
)


def incoming(g: Tensor) -> Iterator[Tensor]:
    """Gradients of the layouts that follow an operation, a sum, and a sum over rows; and of others."""
    yield g
    if g.numel() > 0:
        yield g.flatten()[:1].view(()).expand_as(g)
    if g.dim() > 0:
        yield g[:1].expand_as(g)
    yield g.contiguous()
    if g.dim() == 2:
        yield g.T.contiguous().T


def check_maximum(case: str, dtypes, wrap) -> None:
    """Compare with `torch.maximum` and its gradients, bit for bit."""
    torch.manual_seed(0)
    drawn = iter(dtypes)
    a, b = OPERANDS[case](lambda *shape: draw_any(*shape, dtype=next(drawn)))
    y = torch.maximum(a, b)
    out = poison(torch.empty_like(y))
    assert out.stride() == y.stride()
    maximum.maximum(a.expand(y.shape), b.expand(y.shape), out, wrap)
    results, expected = (t.view(torch.uint8) if y.dtype == torch.bool else t for t in (out, y))
    assert_close(results, expected, rtol=0, atol=0, equal_nan=True)
    if not y.is_floating_point():
        return
    gradient = (torch.randn(y.shape, dtype=torch.float64) * 1000).to(y.dtype)
    gradient.flatten()[:1] *= 2.0**-24  # the half of the least float16 is rounded
    for g in incoming(torch.empty_like(y).copy_(gradient)):
        wide = [t.to(y.dtype).expand(y.shape).clone().requires_grad_() for t in (a, b)]
        gradients = [poison(torch.empty_like(y)) for _ in wide]
        maximum.maximum_backward(g, a.expand(y.shape), b.expand(y.shape), *gradients, wrap)
        expected = list(torch.autograd.grad(torch.maximum(*wide), wide, g))
        assert_close(gradients, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", OPERANDS)
def test_maximum(interpreter, case):
    every = case in ("a last block of one", "a row", "a column")
    for dtypes in (*((t, t) for t in (*FLOATS, *INTEGERS)), *MIXED) if every else MIXED[:3]:
        interpreter(check_maximum, case, dtypes, directly)


# Offsets beyond 2³¹


def check_far_apart() -> None:
    """Rows 2³⁰ elements apart, of which an int32 counts two. Memory that is not touched costs nothing."""
    step = 2**30
    torch.manual_seed(0)
    far = torch.empty(2 * step + 8, dtype=torch.float16).as_strided((3, 8), (step, 1))
    far.copy_(torch.randint(-4, 5, (3, 8)))
    for x in (far, far.mT):  # small integers: every result is exact
        n, k = x.shape
        near = x.clone()
        c, y, dz = (poisoned(*shape, dtype=x.dtype) for shape in ((n, n), (n, n), (n, k)))
        matmul_t.symmetric_product(x, x, "ieee", directly, out=c)
        product = (near.double() @ near.double().mT).half()
        assert torch.equal(c, product)
        linear_sigmoid.linear_sigmoid(x, x, None, "ieee", directly, out=y)
        assert torch.equal(y, product.double().sigmoid().half())
        sigmoid_backward.sigmoid_backward(x, x, dz, directly)
        assert torch.equal(dz, near * near * (1 - near))
        out, da, db = (poisoned(n, k, dtype=x.dtype) for _ in range(3))
        maximum.maximum(x, -x.flip(0), out, directly)
        assert torch.equal(out, torch.maximum(near, -near.flip(0)))
        maximum.maximum_backward(x, x, x, da, db, directly)
        assert torch.equal(da, near / 2)
        assert torch.equal(db, near / 2)
    for g in (far[:, :3], far[:, :3].mT):
        assert torch.equal(matmul_t.half_sum(g, directly), (g + g.mT) / 2)


# The lower triangle's tiles


@triton.jit
def triangle_tile_kernel(tile_ptr, row_ptr, col_ptr, tile_rows, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, col = triangle_tile(tl.load(tile_ptr + offsets), tile_rows, GROUP)
    tl.store(row_ptr + offsets, row)
    tl.store(col_ptr + offsets, col)


def check_ends_of_rows() -> None:
    """The first and the last tile of each row that an int32 counts to its end, in groups of one row.

    The float estimate of the row rises with the tile, so a row is right throughout if its ends are.
    """
    rows = torch.arange(2**16 - 1).repeat(2).view(2, -1)
    tiles = rows * (rows + 1) // 2 + torch.tensor([[0], [1]]) * rows
    row, col = (torch.full((2**17,), -1) for _ in range(2))
    padded = torch.cat((tiles.flatten(), tiles.new_zeros(2))).int()
    triangle_tile_kernel[(2,)](padded, row, col, rows.shape[1], BLOCK=2**16, GROUP=1)
    assert torch.equal(row[:-2].view_as(rows), rows)
    assert torch.equal(col[:-2].view_as(rows), torch.tensor([[0], [1]]) * rows)


@pytest.mark.parametrize(
    "check",
    [
        check_products_added_in_place,
        check_factors_are_exact,
        check_sigmoid,
        check_far_apart,
        check_ends_of_rows,
    ],
)
def test_special_case(interpreter, check):
    interpreter(check)


@pytest.mark.parametrize(
    "check",
    [
        (check_exact_product, HARD["wide"][0], None, WithoutLastProgram),
        (on_gpu, 103, check_sums_of_extreme_digits, 2 * FLOAT_CHAIN + 1, 2 * FLOAT_CHAIN),
        *(
            (check_maximum, "129", (t, t), WithoutLastProgram)
            for t in (torch.float32, torch.bool, torch.int8)
        ),
    ],
)
def test_check_rejects(interpreter, check):
    with pytest.raises(AssertionError):
        interpreter(*check)
