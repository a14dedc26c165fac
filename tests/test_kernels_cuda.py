# SPDX-License-Identifier: MIT
"""Kernels of products on a GPU, at sizes and with tiles that go by TMA where there is one.

The operators' tests are of small shapes, which take pointers or, where a table says so, the library.
"""

import math

import pytest
import torch
from operators import OPERATORS
from samples import arguments, assert_accurate, assert_symmetric, normal, widest_arguments
from torch import Tensor
from torch.testing import assert_close

import torchpar

pytest.importorskip("triton", reason="the kernels are written in Triton")
from torchpar.kernels import exact_matmul as exact_kernels
from torchpar.kernels import linear_sigmoid as linear_kernels
from torchpar.kernels import matmul_t as kernels
from torchpar.kernels.tiles import Tiles
from torchpar.ops import exact_digits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels take a GPU; there is none")

BATCH, N, K = 2, 1040, 272  # partial tiles everywhere, whose rows begin on 16 bytes


def laid_out(t: Tensor, layout: str) -> Tensor:
    return t if layout == "N" else t.mT.contiguous().mT


def choose(precision: str, tiles: Tiles) -> tuple[torch.dtype, str, Tiles]:
    """The dtype, the precision of its products, and tiles that fit; skip if this GPU lacks their variant."""
    if tiles.variant == "tma" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the GPU has no TMA")
    if precision != "tf32":
        return getattr(torch, precision), "ieee", tiles
    return torch.float32, "tf32", tiles._replace(block_k=tiles.block_k // 2, num_stages=3)


VARIANTS = {
    "pointers": Tiles(128, 128, 64, 8, 3),
    "TMA": Tiles(128, 128, 64, 8, 4, "tma"),
    "wide TMA": Tiles(128, 256, 64, 8, 4, "tma"),
    "small wide TMA": Tiles(64, 128, 64, 4, 4, "tma"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layouts", ["NNN", "TTN", "NTT"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "tf32"])
def test_symmetric_product(precision: str, layouts: str, variant: str) -> None:
    dtype, kind, tiles = choose(precision, VARIANTS[variant])
    x, c = normal(BATCH, N, K) / math.sqrt(K), normal(BATCH, N, N, seed=1)
    a, b, c = (
        laid_out(t.to("cuda", dtype), layout) for t, layout in zip((x, x / 4, c + c.mT), layouts, strict=True)
    )
    results = [a.new_full((BATCH, N, N), math.nan) for _ in range(3)]
    for out in results:  # the second and the third by the plan of the first
        kernels.symmetric_product(a, b, kind, None, c, 1 / 3, -0.5, out=out, tiles=tiles)
        assert torch.equal(out, results[0]), "two runs differ"
    with torch.backends.flags(fp32_precision=kind):
        native = torch.baddbmm(c, a, b.mT, alpha=1 / 3, beta=-0.5)
    expected = a.double() @ b.double().mT / 3 - c.double() / 2
    assert_accurate(out, native, expected.cpu().numpy())
    assert_symmetric(out)


LINEAR_VARIANTS = {
    "pointers": Tiles(128, 128, 64, 8, 3),
    "split-K": Tiles(64, 64, 64, 4, 4, "split_k"),
    "wide TMA": Tiles(128, 256, 64, 8, 4, "tma"),
    "small TMA": Tiles(64, 128, 64, 4, 4, "tma"),
}


@pytest.mark.parametrize("variant", LINEAR_VARIANTS)
@pytest.mark.parametrize("layout", ["N", "T"])
@pytest.mark.parametrize("m, n, k", [(1040, 1040, 272), (8, 1001, 2000), (64, 2056, 784)])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "tf32"])
def test_linear_sigmoid(precision: str, m: int, n: int, k: int, layout: str, variant: str) -> None:
    dtype, kind, tiles = choose(precision, LINEAR_VARIANTS[variant])
    if layout == "T" and n % 8:
        pytest.skip("no row of this weight, transposed, begins at 16 bytes")
    x, weight, bias = arguments(((m, k), (n, k), (n,)), dtype, "cuda")
    x, weight = laid_out(x, layout), laid_out(weight / math.sqrt(k), layout)
    results = [x.new_full((m, n), math.nan) for _ in range(3)]
    for out in results:  # the second and the third by the plan of the first
        linear_kernels.linear_sigmoid(x, weight, bias, kind, None, out=out, tiles=tiles)
        assert torch.equal(out, results[0]), "two runs differ"
    with torch.backends.flags(fp32_precision=kind):
        native = torch.nn.functional.linear(x, weight, bias).sigmoid()
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double()).sigmoid()
    assert_accurate(results[0], native, expected.cpu().numpy(), roundings=2)


@pytest.mark.parametrize("layouts", ["NN", "TN", "TT"])
@pytest.mark.parametrize(
    "m, n, k", [(2064, 1040, 272), (129, 127, 129), (2064, 1001, 272), (65, 33, exact_kernels.CHAIN + 17)]
)
def test_exact_product(m: int, n: int, k: int, layouts: str) -> None:
    """The CPU's bits, by large tiles and by small ones; of A·Bᵀ and A·Aᵀ, finite or not."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, k, generator=generator) for rows in (m, n))
    x = torch.ldexp(x, torch.randint(-90, 60, (m, 1), generator=generator))
    y = torch.ldexp(y, torch.randint(-70, 60, y.shape, generator=generator))
    for second in (y, x):
        e, f = (exact_digits.row_exponents(t) for t in (x, second))
        total = exact_digits.sums(x, second, e, f)
        expected = exact_digits.rounded(total, e, f)
        a, b = (laid_out(t.cuda(), layout) for t, layout in zip((x, second), layouts, strict=True))
        b = a if second is x else b
        e, f = e.cuda(), f.cuda()
        for result in (total, expected, expected):  # the last by the plan of the one before
            out = torch.full_like(result, -7, device="cuda")
            exact_kernels.exact_product(a, b, e, f, None, out=out)
            assert torch.equal(out.cpu(), result)
        a = a.clone()
        a[1, 0], a[-1, -1] = math.inf, math.nan
        e[[1, -1]] = exact_kernels.MAX_EXPONENT.value + 1
        b, f = (a, e) if second is x else (b, f)
        exact_kernels.exact_product(a, b, e, f, None, out=out)
        finite = (e <= exact_kernels.MAX_EXPONENT.value) & (f <= exact_kernels.MAX_EXPONENT.value).mT
        assert torch.equal(out[finite].cpu(), expected[finite.cpu()])
        native = a @ b.mT
        assert_close(out[~finite], native[~finite], rtol=0, atol=0, equal_nan=True)


def test_a_product_by_tma_is_captured_and_compiled() -> None:
    x = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    expected = torchpar.matmul_t(x)  # compiles the kernel before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torchpar.matmul_t(x)
    graph.replay()
    assert_close(captured, expected, rtol=0, atol=0)
    compiled = torch.compile(torchpar.matmul_t, fullgraph=True, dynamic=True)
    assert_close(compiled(x), expected, rtol=0, atol=0)
    assert_close(compiled(x[:768]), expected[:768, :768], rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_forward_and_a_backward_in_a_cuda_graph(name: str) -> None:
    operator = OPERATORS[name]
    made = operator.operands(*widest_arguments(name, operator.small[0], "cuda"))
    args = [t.detach().requires_grad_() for t in made]

    def step() -> tuple[Tensor, ...]:
        y = operator.function(*args, **operator.factors(len(args)))
        return y.detach(), *torch.autograd.grad(y, args, torch.ones_like(y))

    step()  # compiles the kernels before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in args:
            t.mul_(2)  # a replay reads them anew
    graph.replay()
    assert_close(captured, step())
