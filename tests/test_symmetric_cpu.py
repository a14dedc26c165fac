# SPDX-License-Identifier: MIT
"""Symmetric products on CPUs: whole and in blocks, by PyTorch's BLAS library and by oneDNN."""

import sys
from unittest.mock import patch

import pytest
import torch

import torchpar
from torchpar.ops import processor, symmetric_cpu
from torchpar.tune import check, reference


@pytest.fixture(params=["blas", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    has_onednn = request.param == "onednn" and torch.backends.mkldnn.is_available()
    monkeypatch.setattr(processor, "has_onednn", lambda: has_onednn)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_products_in_blocks_are_right(
    library: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of few rows: the last blocks of 1100 rows and of 129 rows begin at odd numbers."""
    monkeypatch.setattr(symmetric_cpu, "is_halved", lambda x: x.shape[-2] >= 128)
    for shape in ((128, 1), (129, 7), (257, 300), (515, 64), (1100, 3), (2, 130, 9)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        found = torchpar.matmul_t(x)
        for one, own in zip(found.view(-1, *found.shape[-2:]), x.view(-1, *shape[-2:]), strict=True):
            check(one, reference(own.double() @ own.double().T, own @ own.T, own.shape[1]), library)
        h = found.clone()
        expected = h.double() + 2 * x.double() @ x.double().mT
        torchpar.symmetric_matmul(x, x, h, alpha=2.0, beta=1.0, out=h)
        # Each sum of float32 and float64 rounds at most once for a term; those of bfloat16 are of float32.
        bound = (shape[-1] + 2 if dtype != torch.bfloat16 else 4) * torch.finfo(dtype).eps
        assert (h.double() - expected).abs().max() <= bound * expected.abs().max()
        assert torch.equal(h, h.mT)


def test_small_products_are_whole(library: str) -> None:
    with patch.object(symmetric_cpu, "_halved", None):  # which is not called
        torchpar.matmul_t(torch.ones(383, 2))
        torchpar.matmul_t(torch.ones(767, 2).bfloat16())
    with patch.object(symmetric_cpu, "_halved", None), pytest.raises(TypeError):
        torchpar.matmul_t(torch.ones(384, 2))


# Of PyTorch's own flags (2.15).
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_onednn_that_is_off_does_not_matter_to_later_calls() -> None:
    x = torch.randn(400, 300)
    expected = torchpar.matmul_t(x)
    with torch.backends.mkldnn.flags(enabled=False):
        torchpar.matmul_t(x)
    assert torch.equal(torchpar.matmul_t(x), expected)


def test_products_of_bfloat16_are_of_float32_where_those_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(130, 40).bfloat16(), torch.randn(30, 40).bfloat16().requires_grad_()
    bias = torch.randn(30).bfloat16()
    for name in ("symmetric_cpu", "linear_sigmoid"):
        monkeypatch.setattr(sys.modules[f"torchpar.ops.{name}"], "has_bfloat16", lambda: False)
    wide = x.float()
    assert torch.equal(torchpar.matmul_t(x), symmetric_cpu.symmetric_product(wide, wide).bfloat16())
    y = torchpar.linear_sigmoid(x, weight, bias)
    assert torch.equal(y, torch.nn.functional.linear(wide, weight.float(), bias.float()).sigmoid().bfloat16())
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    dz = torch.ops.aten.sigmoid_backward(torch.ones_like(y), y.detach())
    assert torch.equal(gradient, (dz.float().T @ wide).bfloat16())
