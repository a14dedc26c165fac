# SPDX-License-Identifier: MIT
"""Tests of the lessons on matrix products: equal to PyTorch's products, convolution and attention."""

import re

import pytest
import torch
from commands import lesson, rows_of
from samples import assert_accurate, normal, to_numpy
from torch.nn import functional as F

from torchpar import linear_sigmoid

pytest.importorskip("tyro", reason="tyro reads the flags")

import matmul_attention
import matmul_convolution
import matmul_regression
from support.accuracy import compare

from torchpar.errors import ConfigError


def with_gradients(function, dtype, inputs):
    leaves = [t.to(dtype).requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, normal(*y.shape, seed=9).to(dtype))]


def assert_as_accurate(ours, theirs, inputs, roundings):
    """Result and gradients in float32: an error of at most twice PyTorch's own, against float64."""
    runs = ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64))
    for actual, native, exact in zip(*(with_gradients(*run, inputs) for run in runs), strict=True):
        assert actual.shape == exact.shape
        assert_accurate(actual, native, to_numpy(exact), roundings)


@pytest.mark.parametrize("n", [1, 127])
def test_the_derived_gradient_is_autograds(n):
    x, y, w = normal(n, 8), normal(n, seed=1), normal(8, seed=2).requires_grad_()
    (expected,) = torch.autograd.grad(F.mse_loss(x @ w, y), w)
    slope = (2 * (x @ w - y) / n).abs()
    # A sum of n products errs by n·eps/2 of their size, and a slope by eps (Higham 2002, 3.1); two ways.
    bound = (n + 2) * torch.finfo(x.dtype).eps * (x.T.abs() @ slope)
    assert ((matmul_regression.mse_gradient(x, y, w) - expected).abs() <= bound).all()


def test_descent_makes_a_step_per_batch():
    x, true = normal(1024, 8), normal(8, seed=1)
    costs = matmul_regression.descend(x, x @ true, 127, 0.01)
    assert len(costs) == 9
    first = x[:127]
    w = 0.01 * 2 * first.T @ (first @ true) / 127  # the first step, by the formula
    assert costs[0] == pytest.approx(F.mse_loss(x @ w, x @ true).item())


def test_small_batches_and_a_larger_rate_reach_a_lower_cost(tmp_path):
    matmul_regression.main(matmul_regression.Flags(device="cpu", seed=1, metrics=tmp_path / "metrics"))
    (row,) = rows_of(tmp_path / "metrics")
    assert 0 <= row["error"] <= 2 * row["pytorch_error"] < 1e-3
    ends = {name: costs[-1] for name, costs in row["costs"].items()}
    assert ends["batch 4, learning rate 0.01"] < 0.1 < ends["batch 64, learning rate 0.01"]
    assert ends["batch 64, learning rate 0.1"] < ends["batch 64, learning rate 0.01"]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1, 1), (3, 3, 5, 3, 2, 6, 11)], ids=str)
def test_a_linear_layer_of_windows_is_a_convolution(shape):
    batch, channels, out, kernel, stride, height, width = shape
    x = normal(batch, channels, height, width)
    weight = normal(out, channels, kernel, kernel, seed=1) / kernel / channels**0.5

    def ours(x, weight, bias):
        rows = matmul_convolution.windows(x.movedim(1, 3), kernel, stride)
        return linear_sigmoid(rows, weight.flatten(1), bias).movedim(3, 1)

    def theirs(x, weight, bias):
        return F.conv2d(x, weight, bias, stride).sigmoid()

    inputs = (x, weight, normal(out, seed=2))
    # z + b, e⁻ᶻ, 1 + and 1/; backward 1 − y, two products and the stored sum.
    assert_as_accurate(ours, theirs, inputs, roundings=8)
    if kernel > 1:
        with pytest.raises(AssertionError):  # transposed kernels
            assert_as_accurate(lambda x, w, b: ours(x, w.mT, b), theirs, inputs, roundings=8)


def test_the_network_is_convolutions():
    torch.manual_seed(0)
    net = matmul_convolution.ConvNet().double()
    x = normal(3, 784).abs()
    y = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = y.view(3, 1, 28, 28)
    for layer, channels in ((net.first, 1), (net.second, 16)):
        y = F.conv2d(y, layer.weight.view(-1, channels, 5, 5), layer.bias, stride=2).sigmoid() - 0.5
    assert y.shape == (3, 32, 4, 4)
    expected = F.linear(y.movedim(1, 3).flatten(1), net.last.weight, net.last.bias)
    torch.testing.assert_close(net(x), expected)


def test_the_windows_of_a_convolution_take_more_memory():
    row = matmul_convolution.compare_with_conv2d(torch.device("cpu"))
    assert row["duplication"] == pytest.approx(4 * 4 * 25 / 144)  # 4×4 windows of 5×5 elements, of 12×12


@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 7, 4), (129, 8)], ids=str)
def test_attention(shape):
    x = normal(*shape)
    # A score s errs by at most s·eps, and e to its power by that in relation; so twice in the quotient.
    roundings = 4 * (x @ x.mT).abs().max().item() / shape[-1] ** 0.5 + 10

    def theirs(x):
        return F.scaled_dot_product_attention(x, x, x)

    assert_as_accurate(matmul_attention.attention, theirs, [x], roundings)
    if shape[-2] > 1:
        with pytest.raises(AssertionError):  # scaled by d in the place of √d
            assert_as_accurate(lambda x: (x @ x.mT / shape[-1]).softmax(-1) @ x, theirs, [x], roundings)


def test_a_lesson_stops_at_more_than_twice_pytorchs_error(monkeypatch):
    x = normal(1000).float()
    exact = x.double().sin()
    native = (x.sin() - exact).abs().max().item()
    row = {"part": "sine", "error": native, "pytorch_error": native}
    assert compare("sine", x.sin(), torch.sin, x) == row
    compare("within", exact + 1.9 * native, torch.sin, x)
    for wrong in (exact + 2.1 * native, 1.001 * x.sin(), x.sin() * torch.nan):
        with pytest.raises(ConfigError, match=r"^sine has an error of .*, expected .* at most"):
            compare("sine", wrong, torch.sin, x)
    monkeypatch.setattr(matmul_regression, "mse_gradient", lambda x, y, w: x.T @ (x @ w - y) / len(y))
    code, _, err = lesson("matmul_regression", "--device", "cpu")
    assert code == 2
    message = r"gradient has an error of \S+, expected \S+ at most; mend its formula"
    assert re.fullmatch(rf"matmul_regression\.py: error: {message}\n", err)
