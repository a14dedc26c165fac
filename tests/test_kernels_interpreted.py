# SPDX-License-Identifier: MIT
"""Launches by Triton's interpreter: exact products, maxima, and operands that `test_ptx.py` does not execute.

Each check poisons the output, so that an element which no program writes fails, and takes the launcher's
``wrap``, through which the negative controls break the launch. bfloat16 needs a GPU: the interpreter
computes it wrongly.
"""

import math
from collections.abc import Iterator
from functools import partial
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

FLOATS = (torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
PLAIN = ("contiguous", "contiguous")


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


# X·Xᵀ

POINTERS = Tiles(16, 16, 16, 4, 2)


def check_products_added_in_place() -> None:
    torch.manual_seed(0)
    x = torch.randint(-3, 4, (3, 37, 20)).half()
    h = lower_twice(torch.randint(-99, 100, (3, 37, 37)).float())
    expected = 2 * h + 0.5 * x.float() @ x.float().mT
    args = (x, x, "ieee", directly, h, 0.5, 2.0)
    assert matmul_t.symmetric_product(*args, out=h, tiles=POINTERS, tma=False) is h
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


def check_tma_refuses_other_strides() -> None:
    x = torch.ones(16, 5)
    for launcher in (
        partial(matmul_t.symmetric_product, x, x, "ieee"),
        partial(linear_sigmoid.linear_sigmoid, x, x, None, "ieee"),
    ):
        with pytest.raises(ValueError, match="expected the variant pointers"):
            launcher(directly, tiles=Tiles(16, 16, 16, 4, 2, "tma"))


# Exact sums of products


def exact_sums(a: Tensor, b: Tensor) -> Tensor:
    """T of finite matrices by the CPU's formula, int64."""
    e, f = exact_digits.row_exponents(a), exact_digits.row_exponents(b)
    return exact_digits.sums(a, b, e, f)


def check_exact_product(a: Tensor, b: Tensor | None, wrap) -> None:
    """T, and the bits of the CPU's product, with its NaN. None: b is a, and the mirror is not computed."""
    second = a if b is None else b
    e, f = (exact_digits.row_exponents(t)[..., 0] for t in (a, second))
    expected = torchpar.exact_matmul(a, second)
    total = torch.full(expected.shape, -7)
    out, again = (torch.full(expected.shape, -7.0) for _ in range(2))  # a NaN may be right
    for result in (total, out, again):
        assert exact_matmul.exact_product(a, second, e, f, wrap, out=result) is result
    assert torch.equal(bits(out), bits(again)), "two runs differ"
    number = ~expected.isnan()
    assert torch.equal(bits(out[number]), bits(expected[number])), "bits differ"
    assert out[~number].isnan().all()
    if a.dim() == 2 and a.isfinite().all() and second.isfinite().all():
        assert torch.equal(total, exact_sums(a, second)), "T differs"


def on_gpu(capability: int, check, *args) -> None:
    """Run ``check`` with the digits and tiles for a GPU of ``capability``."""
    with patch.object(exact_matmul, "device", return_value=Device("", capability, 1)):
        check(*args)


def check_exact_product_of_shape(m, n, k, batch, layouts, wrap) -> None:
    torch.manual_seed(0)
    drawn = draw(*batch, m, k, dtype=torch.float32), draw(*batch, n, k, dtype=torch.float32)
    a, b = (LAYOUTS[layout](t) for layout, t in zip(layouts, drawn, strict=True))
    check_exact_product(a, b, wrap)
    if m == n:
        check_exact_product(a, None, wrap)


@pytest.mark.parametrize("capability", [80, pytest.param(103, marks=pytest.mark.slow)])  # int8, float16
@pytest.mark.parametrize(
    "m, n, k, batch, layouts",
    [
        (0, 3, 2, (), PLAIN),
        (2, 3, 0, (), PLAIN),
        (3, 3, 5, (0,), PLAIN),
        (33, 33, 35, (2,), ("stepped", "transposed")),
        (33, 5, 35, (2, 1), ("offset", "expanded")),
    ],
)
def test_exact_product(interpreter, capability, m, n, k, batch, layouts):
    interpreter(on_gpu, capability, check_exact_product_of_shape, m, n, k, batch, layouts, directly)


def special_rows(count: int) -> Tensor:
    torch.manual_seed(0)
    x = draw(count, 40, dtype=torch.float32).sign() * torch.rand(count, 40)
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


def check_exact_product_of_large_tiles_and_of_chains() -> None:
    """Chains of 64 terms; the formula, whose chain is longer, has the same T."""
    check_exact_product_of_shape(144, 144, 48, (), ("transposed", "contiguous"), directly)
    with patch.multiple(exact_matmul, CHAIN=64, FLOAT_CHAIN=64):
        check_exact_product_of_shape(3, 33, 129, (2,), ("contiguous", "transposed"), directly)
        check_exact_product_of_shape(33, 33, 65, (), ("stepped", "contiguous"), directly)


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


def test_longest_chain_fits(interpreter):
    chain = exact_matmul.FLOAT_CHAIN
    check = partial(interpreter, on_gpu)
    check(90, check_sums_of_extreme_digits, exact_matmul.CHAIN + 1, chain)
    check(103, check_sums_of_extreme_digits, 2 * chain + 1, chain)
    with pytest.raises(AssertionError, match="T differs"):
        check(103, check_sums_of_extreme_digits, 2 * chain + 1, 2 * chain)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 103])
@pytest.mark.parametrize(
    "check", [check_hard_and_special_rows, check_exact_product_of_large_tiles_and_of_chains]
)
def test_exact_product_of_hard_rows_and_of_chains(interpreter, capability, check):
    interpreter(on_gpu, capability, check)


def test_exact_product_refuses_what_int64_does_not_hold():
    a, e = torch.zeros(1, 1).expand(1, 2**24), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="at most 8388608 terms"):
        exact_matmul.exact_product(a, a, e, e, directly, out=torch.zeros(1, 1))


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


FLAT, STRIDED = "flat_kernel", "strided_kernel"
REVERSED = (5, 4, 3, 2, 1, 0)
OPERANDS = {  # what makes the operands from a draw, the kernel that serves them, and how often it is launched
    "scalars": (lambda d: (d(), d()), FLAT, 1),
    "no element": (lambda d: (d(3, 0), d(3, 1)), None, 0),
    "129": (lambda d: (d(129), d(129)), FLAT, 1),
    "a last block of one": (lambda d: (d(8193), d(8193)), FLAT, 1),
    "same permutation": (lambda d: (d(5, 6, 7).permute(2, 0, 1), d(5, 6, 7).permute(2, 0, 1)), FLAT, 1),
    "a scalar": (lambda d: (d(4099), d()), FLAT, 1),
    "permuted": (lambda d: (d(5, 6, 7, 3), d(3, 5, 7, 6).permute(1, 3, 2, 0)), STRIDED, 1),
    "a row": (lambda d: (d(33, 129), d(129)), STRIDED, 1),
    "a column": (lambda d: (d(129, 33), d(129, 1)), STRIDED, 1),
    "a long row": (lambda d: (d(3, 2049), d(1, 2049)), STRIDED, 1),
    "outer": (lambda d: (d(65, 1), d(1, 129)), STRIDED, 1),
    "4 dimensions": (lambda d: (d(3, 1, 5, 1), d(1, 4, 1, 7)), STRIDED, 1),
    "5 dimensions": (lambda d: (d(2, 1, 4, 1, 3), d(1, 5, 1, 6, 1)), STRIDED, 2),
    "6 dimensions": (
        lambda d: (d(3, 1, 2, 1, 2, 1).permute(REVERSED), d(1, 2, 1, 3, 1, 2).permute(REVERSED)),
        STRIDED,
        6,
    ),
}


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


def check_maximum(case: str, dtypes, wrap) -> list[list[str]]:
    """Compare with `torch.maximum` and its gradients, bit for bit; return the kernels of each call."""
    torch.manual_seed(0)
    launched = []

    def recording(kernel):
        launched[-1].append(kernel.fn.__name__)
        return wrap(kernel)

    drawn = iter(dtypes)
    a, b = OPERANDS[case][0](lambda *shape: draw_any(*shape, dtype=next(drawn)))
    y = torch.maximum(a, b)
    out = poison(torch.empty_like(y))
    assert out.stride() == y.stride()
    launched.append([])
    maximum.maximum(a.expand(y.shape), b.expand(y.shape), out, recording)
    results, expected = (t.view(torch.uint8) if y.dtype == torch.bool else t for t in (out, y))
    assert_close(results, expected, rtol=0, atol=0, equal_nan=True)
    if not y.is_floating_point():
        return launched
    drawn_gradient = torch.empty_like(y).copy_(draw(*y.shape, dtype=torch.float64) * 1000)
    drawn_gradient.flatten()[:1] *= 2.0**-24  # the half of the least float16 is rounded
    for g in incoming(drawn_gradient):
        wide = [t.to(y.dtype).expand(y.shape).clone().requires_grad_() for t in (a, b)]
        gradients = [poison(torch.empty_like(y)) for _ in wide]
        launched.append([])
        args = (g, a.expand(y.shape), b.expand(y.shape), *gradients)
        maximum.maximum_backward(*args, recording)
        expected = list(torch.autograd.grad(torch.maximum(*wide), wide, g))
        assert_close(gradients, expected, rtol=0, atol=0, equal_nan=True)
    return launched


MIXED = (
    (torch.float32, torch.float16),
    (torch.float16, torch.int64),
    (torch.float64, torch.bool),
    (torch.bool, torch.int8),
    (torch.int8, torch.uint8),
)


@pytest.mark.parametrize("case", OPERANDS)
def test_maximum(interpreter, case):
    _, kernel, launches = OPERANDS[case]
    alike = tuple((dtype, dtype) for dtype in (*FLOATS, *INTEGERS))
    every = case in ("a last block of one", "a row", "a column")
    for dtypes in alike + MIXED if every else MIXED[1:4]:
        forward, *backward = interpreter(check_maximum, case, dtypes, directly)
        assert forward == [f"maximum_{kernel}"] * launches
        for names in backward[:2]:  # a gradient that is one number is read once
            assert names == [f"maximum_backward_{kernel}"] * launches


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
        check_tma_refuses_other_strides,
        check_sigmoid,
        check_far_apart,
        check_ends_of_rows,
    ],
)
def test_special_case(interpreter, check):
    interpreter(check)


# What the checks must reject


@pytest.mark.parametrize(
    "check, args",
    [
        (check_exact_product, (HARD["wide"][0], None)),
        *((check_maximum, ("129", (dtype, dtype))) for dtype in (torch.float32, torch.bool, torch.int8)),
    ],
)
def test_check_rejects(interpreter, check, args):
    with pytest.raises(AssertionError):
        interpreter(check, *args, WithoutLastProgram)
