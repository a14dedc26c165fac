# SPDX-License-Identifier: MIT
"""More than 2³¹ elements: offsets that no longer fit in 32 bits, of arguments and of results.

The values are exact in bfloat16 and int8, so every comparison is for equality. Strides that large are tested
in the interpreter.
"""

import pytest
import torch
from samples import halves

import torchpar

BEYOND = 2**31 + 2**10

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="too large for the CPU; there is no GPU"
)


def need(gib: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] >> 30
    if free < gib:
        pytest.skip(f"takes {gib} GiB of GPU memory, of which {free} GiB are free")


def test_maximum_of_many_elements() -> None:
    need(gib=12)
    a = torch.zeros(BEYOND, dtype=torch.int8, device="cuda")
    a[-1000:] = torch.arange(1000, device="cuda") % 100
    b = a.flip(0)
    assert torch.equal(torchpar.maximum(a, b), torch.maximum(a, b))


def test_backward_of_maximum_of_many_elements() -> None:
    need(gib=32)
    a = torch.zeros(BEYOND, dtype=torch.bfloat16, device="cuda")
    a[-1000:] = halves(1000, dtype=torch.bfloat16, device="cuda")
    b = a.new_zeros(())
    for g in (a, a.new_ones(()).expand_as(a)):
        da, db = torch.ops.torchpar.maximum_backward(g, a, b)
        last = torch.ops.torchpar.maximum_backward(g[-1000:], a[-1000:].clone(), b)
        assert torch.equal(da[-1000:], last[0])
        assert torch.equal(db[-1000:], last[1])
        assert torch.equal(da[:2000], g[:2000] / 2)


def test_maximum_of_many_elements_strided() -> None:
    need(gib=16)
    a = torch.zeros(2**12, BEYOND // 2**12 + 1, dtype=torch.int8, device="cuda").mT
    a[-3:, -1000:] = torch.arange(1000, device="cuda") % 100
    b = torch.arange(a.shape[1], device="cuda").to(torch.int8)
    for args in ((a, b), (a, a.flip(0).contiguous())):
        assert torch.equal(torchpar.maximum(*args), torch.maximum(*args))


def test_matmul_t_with_a_large_result() -> None:
    need(gib=16)
    x = halves(46400, 16, dtype=torch.bfloat16, device="cuda")
    c = torchpar.matmul_t(x)
    assert c.numel() > 2**31
    for rows in (slice(0, 300), slice(-300, None)):
        assert torch.equal(c[rows], x[rows] @ x.mT)
        assert torch.equal(c[:, rows], c[rows].mT)


def test_matmul_t_backward_of_a_large_gradient() -> None:
    need(gib=16)
    x = halves(46400, 16, dtype=torch.bfloat16, device="cuda")
    g = torch.zeros(46400, 46400, dtype=torch.bfloat16, device="cuda")
    g[-300:, :] = 1
    dx = torch.ops.torchpar.matmul_t_backward(g, x)
    rows = slice(-400, None)
    symmetrized = g[rows].double() + g[:, rows].mT.double()
    assert torch.equal(dx[rows], (symmetrized @ x.double()).bfloat16())


def test_matmul_t_of_a_large_batch() -> None:
    need(gib=12)
    x = torch.zeros(2**15 + 1, 256, 256, dtype=torch.bfloat16, device="cuda")
    x[-2:] = halves(2, 256, 256, dtype=torch.bfloat16, device="cuda")
    c = torchpar.matmul_t(x)
    assert torch.equal(c[-2:], torchpar.matmul_t(x[-2:].clone()))
    assert not c[:-2].any()


def test_linear_sigmoid_with_a_large_result() -> None:
    need(gib=32)
    x = torch.zeros(2**21 + 1, 8, dtype=torch.bfloat16, device="cuda")
    x[-300:] = halves(300, 8, dtype=torch.bfloat16, device="cuda")
    weight = halves(1024, 8, dtype=torch.bfloat16, device="cuda", seed=1)
    bias = halves(1024, dtype=torch.bfloat16, device="cuda", seed=2)
    y = torchpar.linear_sigmoid(x, weight, bias)
    assert y.numel() > 2**31
    assert torch.equal(y[-300:], torchpar.linear_sigmoid(x[-300:], weight, bias))
    assert torch.equal(y[:1], torchpar.linear_sigmoid(x[:1], weight, bias))
    g = torch.zeros_like(y)
    g[-300:] = 1
    dz, db = torch.ops.torchpar.linear_sigmoid_backward(g, y)
    assert torch.equal(dz[-300:], torch.ops.torchpar.linear_sigmoid_backward(g[-300:], y[-300:])[0])
    assert not dz[:-300].any()
    assert torch.equal(db.isfinite(), torch.ones_like(db, dtype=torch.bool))
