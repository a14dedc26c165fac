# SPDX-License-Identifier: MIT
"""Tests of the lessons on matrix products. Each lesson itself compares its formula with PyTorch's."""

import re

import pytest
import torch
from commands import lesson, rows_of
from samples import normal
from torch.nn import functional as F

pytest.importorskip("tyro", reason="tyro reads the flags")

import matmul_attention
import matmul_convolution
import matmul_regression
from matmul_convolution import windows
from support.accuracy import compare

from torchpar.errors import ConfigError


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


def test_attention_is_pytorchs():
    x = normal(2, 3, 7, 4)
    torch.testing.assert_close(matmul_attention.attention(x), F.scaled_dot_product_attention(x, x, x))


def test_more_than_twice_pytorchs_error_is_refused():
    x = normal(1000).float()
    exact = x.double().sin()
    native = (x.sin() - exact).abs().max().item()
    row = {"part": "sine", "error": native, "pytorch_error": native}
    assert compare("sine", x.sin(), torch.sin, x) == row
    compare("within", exact + 1.9 * native, torch.sin, x)
    for wrong in (exact + 2.1 * native, 1.001 * x.sin(), x.sin() * torch.nan):
        with pytest.raises(ConfigError, match=r"^sine has an error of .*, expected .* at most"):
            compare("sine", wrong, torch.sin, x)


@pytest.mark.parametrize(
    "module, part, name, wrong",
    [
        (matmul_regression, "gradient", "mse_gradient", lambda x, y, w: x.T @ (x @ w - y) / len(y)),
        (matmul_convolution, "convolution", "windows", lambda x, **at: windows(x, **at).flip(-1)),
        (matmul_attention, "attention", "matmul_t", lambda x: x @ x.mT * 1.01),
    ],
)
def test_a_lesson_stops_at_a_wrong_formula(monkeypatch, module, part, name, wrong):
    monkeypatch.setattr(module, name, wrong)
    code, _, err = lesson(module.__name__, "--device", "cpu")
    message = rf"{part} has an error of \S+, expected \S+ at most; mend its formula"
    assert code == 2
    assert re.fullmatch(rf"{module.__name__}\.py: error: {message}\n", err)
