# SPDX-License-Identifier: MIT
"""The symmetric product's kernel on a GPU, at sizes and with tiles that go by TMA where there is one.

The operators' tests are of small shapes, which take pointers or, where a table says so, the library.
"""

import math

import pytest
import torch
from samples import assert_accurate, assert_symmetric
from torch import Tensor
from torch.testing import assert_close

import torchpar

pytest.importorskip("triton", reason="the kernels are written in Triton")
from torchpar.kernels import matmul_t as kernels
from torchpar.kernels.tuning import Tiles
from torchpar.measure import fp32_precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels take a GPU; there is none")

BATCH, N, K = 2, 1040, 272  # partial tiles everywhere, whose rows begin on 16 bytes


def laid_out(t: Tensor, layout: str) -> Tensor:
    return t if layout == "N" else t.mT.contiguous().mT


@pytest.mark.parametrize("tma, persistent", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("layouts", ["NNN", "TTN", "NTT"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "tf32"])
def test_symmetric_product(precision: str, layouts: str, tma: bool, persistent: bool) -> None:
    if tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the GPU has no TMA")
    kind = "tf32" if precision == "tf32" else "ieee"
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, N, K, generator=generator, dtype=torch.float64) / math.sqrt(K)
    c = torch.randn(BATCH, N, N, generator=generator, dtype=torch.float64)
    a, b, c = (
        laid_out(t.to("cuda", dtype), layout) for t, layout in zip((x, x / 4, c + c.mT), layouts, strict=True)
    )
    out = a.new_full((BATCH, N, N), math.nan)
    tiles = Tiles(128, 128, 32 if dtype == torch.float32 else 64, 8, 3, tma, persistent)
    kernels.symmetric_product(a, b, out, kind, lambda kernel: kernel, c, 1 / 3, -0.5, tiles)
    with fp32_precision(kind):
        native = torch.baddbmm(c, a, b.mT, alpha=1 / 3, beta=-0.5)
    expected = a.double() @ b.double().mT / 3 - c.double() / 2
    assert_accurate(out, native, expected.cpu().numpy())
    assert_symmetric(out)


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
