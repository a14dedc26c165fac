# SPDX-License-Identifier: MIT
"""More than 2³¹ elements: offsets that no longer fit in 32 bits, of arguments and of results.

The values are exact in bfloat16 and int8, so every comparison is for equality. Strides that large
are tested in the interpreter.
"""

from functools import partial

import pytest
import torch
from samples import halves
from torch import Tensor

import torchpar

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="too large for the CPU; there is no GPU"
)
BEYOND = 2**31 + 2**10
draw = partial(halves, dtype=torch.bfloat16, device="cuda")


def zeros(*shape: int, gib: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros for a test that takes ``gib`` GiB."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] >> 30
    if free < gib:
        pytest.skip(f"takes {gib} GiB of GPU memory, of which {free} GiB are free")
    return torch.zeros(*shape, dtype=dtype, device="cuda")


def test_maximum() -> None:
    a = zeros(BEYOND, gib=24, dtype=torch.int8)
    a[-1000:] = torch.arange(1000, device="cuda") % 100
    strided = zeros(2**12, BEYOND // 2**12 + 1, gib=16, dtype=torch.int8).mT
    strided[-3:, -1000:] = torch.arange(1000, device="cuda") % 100
    row = torch.arange(strided.shape[1], device="cuda").to(torch.int8)
    for args in ((a, a.flip(0)), (strided, row), (strided, strided.flip(0).contiguous())):
        assert torch.equal(torchpar.maximum(*args), torch.maximum(*args))


def test_maximum_backward() -> None:
    a = zeros(BEYOND, gib=32)
    a[-1000:] = draw(1000)
    b = a.new_zeros(())
    for g in (a, a.new_ones(()).expand_as(a)):
        gradients = torch.ops.torchpar.maximum_backward(g, a, b.expand_as(a))
        last = torch.ops.torchpar.maximum_backward(g[-1000:], a[-1000:], b.expand(1000))
        for whole, part in zip(gradients, last, strict=True):
            assert torch.equal(whole[-1000:], part)
        assert torch.equal(gradients[0][:2000], g[:2000] / 2)


def test_sums_of_the_gradients_of_maximum() -> None:
    a = zeros(BEYOND // 2**10, 2**10, gib=24)
    a[-1:] = draw(1, 2**10)
    for b in (a.new_zeros(2**10), a.new_zeros(len(a), 1), a.new_zeros(())):
        da, db = torch.ops.torchpar.maximum_backward(a, a, b)
        last = b[-1:] if b.dim() == 2 else b
        expected = torch.ops.torchpar.maximum_backward(a[-1:], a[-1:], last)
        assert torch.equal(da[-1:], expected[0])
        assert torch.equal(db[-1:] if b.dim() == 2 else db, expected[1])
        assert not da[:-1].any()


def test_matmul_t_and_its_backward() -> None:
    g = zeros(46400, 46400, gib=20)
    x = draw(46400, 16)
    c = torchpar.matmul_t(x)
    for rows in (slice(0, 300), slice(-300, None)):
        assert torch.equal(c[rows], x[rows] @ x.mT)
        assert torch.equal(c[:, rows], c[rows].mT)
    g[-300:, :] = 1
    rows = slice(-400, None)
    symmetrized = g[rows].double() + g[:, rows].mT.double()
    dx = torch.ops.torchpar.matmul_t_backward(g, x)
    assert torch.equal(dx[rows], (symmetrized @ x.double()).bfloat16())


def test_linear_sigmoid_and_its_backward() -> None:
    x, weight, bias = zeros(2**21 + 1, 8, gib=32), draw(1024, 8, seed=1), draw(1024, seed=2)
    x[-300:] = draw(300, 8)
    y = torchpar.linear_sigmoid(x, weight, bias)
    for rows in (slice(-300, None), slice(0, 1)):
        assert torch.equal(y[rows], torchpar.linear_sigmoid(x[rows], weight, bias))
    g = torch.zeros_like(y)
    g[-300:] = 1
    dz, db = torch.ops.torchpar.linear_sigmoid_backward(g, y)
    assert torch.equal(dz[-300:], torch.ops.torchpar.linear_sigmoid_backward(g[-300:], y[-300:])[0])
    assert not dz[:-300].any()
    assert db.isfinite().all()
