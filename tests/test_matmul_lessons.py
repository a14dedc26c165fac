# SPDX-License-Identifier: MIT
"""Tests of the lessons on matrix products: equal to PyTorch's, and run at reduced size."""

import re

import pytest
import torch
from commands import error_of, rows_of
from fake_data import fashion_mnist
from samples import assert_accurate, normal, to_numpy
from torch.nn import functional as F

from torchpar import linear_sigmoid

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("tyro", reason="tyro reads the flags")
pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")

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


@pytest.mark.parametrize("n", [1, 127, 1024])
def test_the_derived_gradient_is_autograds(n):
    x, y, w = normal(n, 8), normal(n, seed=1), normal(8, seed=2).requires_grad_()
    (expected,) = torch.autograd.grad(F.mse_loss(x @ w, y), w)
    slope = (2 * (x @ w - y) / n).abs()
    # A sum of n products errs by n·eps/2 of their size, and a slope by eps (Higham 2002, 3.1); two ways.
    bound = (n + 2) * torch.finfo(x.dtype).eps * (x.T.abs() @ slope)
    gradient = matmul_regression.mse_gradient(x, y, w)
    assert ((gradient - expected).abs() <= bound).all()
    assert not ((gradient / 2 - expected).abs() <= bound).all()


def test_gradients_of_small_batches_are_noisier_and_not_smaller():
    x, y, w = normal(1024, 8), normal(1024, seed=1), normal(8, seed=2)
    whole = matmul_regression.mse_gradient(x, y, w)
    parts = [matmul_regression.mse_gradient(*xy, w) for xy in zip(x.split(4), y.split(4), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole)
    assert torch.stack(parts).norm(dim=1).mean() > whole.norm()


@pytest.mark.parametrize("batch_size, steps", [(1024, 1), (127, 9), (1, 1024)])
def test_descent_makes_a_step_per_batch(batch_size, steps):
    x, true = normal(1024, 8), normal(8, seed=1)
    costs = matmul_regression.descend(x, x @ true, batch_size, 0.01)
    assert len(costs) == steps
    assert costs[-1] < (x @ true).square().mean()
    first = x[:batch_size]
    w = 0.01 * 2 * first.T @ (first @ true) / batch_size  # the first step, by the formula
    assert costs[0] == pytest.approx(F.mse_loss(x @ w, x @ true).item())


CONVOLUTIONS = [  # batch, in, out, kernel, stride, height, width
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 4, 1, 2, 6, 5),
    (3, 3, 5, 3, 1, 7, 11),
    (8, 16, 32, 5, 2, 12, 12),
]


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
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


def test_windows():
    """Each window equals the one cut out by hand. Columns that no window reaches are left out."""
    x = normal(2, 7, 8, 3)
    rows = matmul_convolution.windows(x, size=3, stride=2)
    assert rows.shape == (2, 3, 3, 27)
    for i in range(3):
        for j in range(3):
            window = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]  # (b, row, column, channel)
            assert torch.equal(rows[:, i, j], window.movedim(3, 1).flatten(1))


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


@pytest.mark.parametrize("shape", [(1, 1), (5, 49), (2, 3, 7, 4), (513, 8)], ids=str)
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


def test_compare_refuses_more_than_twice_the_error(capsys):
    x = normal(1000).float()
    exact = x.double().sin()
    native = (x.sin() - exact).abs().max().item()
    assert compare("sine", x.sin(), torch.sin, x) == {
        "part": "sine",
        "error": native,
        "pytorch_error": native,
    }
    assert capsys.readouterr().out == f"sine: error {native:.1e}, PyTorch's {native:.1e}\n"
    compare("within", exact + 1.9 * native, torch.sin, x)
    for wrong in (exact + 2.1 * native, 1.001 * x.sin(), x.sin() * torch.nan):
        with pytest.raises(ConfigError, match=r"^sine has an error of .*, expected .* at most"):
            compare("sine", wrong, torch.sin, x)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    fashion_mnist(root / "FashionMNIST" / "raw", train=1300, test=200)
    return root


def test_the_regression_lesson(tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    for seed in range(5):  # the comparison holds for any seed
        plots = tmp_path if seed == 4 else None
        flags = matmul_regression.Flags(device="cpu", seed=seed, metrics=metrics, plots=plots)
        matmul_regression.main(flags)
    (row,) = rows_of(metrics)
    assert 0 <= row["error"] <= 2 * row["pytorch_error"] < 1e-3
    out = capsys.readouterr().out
    for name, costs in row["costs"].items():
        assert f"{name}: cost {costs[-1]:.4f} after {len(costs)} steps\n" in out
    ends = {name: costs[-1] for name, costs in row["costs"].items()}
    assert ends["batch 4, learning rate 0.01"] < 0.1 < ends["batch 64, learning rate 0.01"]
    assert ends["batch 64, learning rate 0.1"] < ends["batch 64, learning rate 0.01"]
    assert (tmp_path / "regression.png").read_bytes().startswith(b"\x89PNG")


def test_the_convolution_lesson(root, tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    small = {"data": root, "dataset": "fashion-mnist", "samples": 1200, "epochs": 3, "batch_size": 20}
    flags = matmul_convolution.Flags(device="cpu", metrics=metrics, plots=tmp_path / "plots", **small)
    matmul_convolution.main(flags)
    out = capsys.readouterr().out
    first, *rows = rows_of(metrics)
    # 4×4 windows of 5×5 elements, of 12×12.
    assert first["duplication"] == pytest.approx(4 * 4 * 25 / 144)
    assert f"take {4 * 4 * 25 / 144:.1f} times the {8 * 16 * 12 * 12 * 4:,} bytes" in out
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    last = rows[-1]
    assert last["test_accuracy"] > 0.9
    ending = f"test accuracy {last['test_accuracy']:.4f} | loss {last['test_loss']:.4f} | "
    assert re.fullmatch(re.escape(ending) + r"\d+\.\d s \| 1 rank \| cpu", out.splitlines()[-1])
    assert (tmp_path / "plots" / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_the_attention_lesson(root, tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    flags = {"data": root, "dataset": "fashion-mnist", "device": "cpu"}
    matmul_attention.main(matmul_attention.Flags(metrics=metrics, plots=tmp_path / "plots", **flags))
    (row,) = rows_of(metrics)
    assert row["to_own_class"] > 0.5  # about 0.1 by chance
    assert f"{row['to_own_class']:.0%} of the weight" in capsys.readouterr().out
    assert (tmp_path / "plots" / "attention.png").read_bytes().startswith(b"\x89PNG")


WRONG = [
    (matmul_regression, "gradient", "mse_gradient", lambda x, y, w: x.T @ (x @ w - y) / len(y)),
    (
        matmul_convolution,
        "convolution",
        "windows",
        lambda x, size, stride: x.unfold(1, size, stride).unfold(2, size, stride).mT.flatten(3),
    ),
    (matmul_attention, "attention", "matmul_t", lambda x: x @ x.mT * 1.01),
]


@pytest.mark.parametrize("lesson, part, name, wrong", WRONG, ids=[case[1] for case in WRONG])
def test_a_lesson_stops_at_a_wrong_formula(root, monkeypatch, capsys, lesson, part, name, wrong):
    monkeypatch.setattr(lesson, name, wrong)
    data = "" if lesson is matmul_regression else f"--data {root} --dataset fashion-mnist"
    error = error_of(lesson, f"--device cpu {data}", monkeypatch, capsys)
    message = rf"{part} has an error of \S+, expected \S+ at most; mend its formula"
    assert re.fullmatch(rf"{lesson.__name__}\.py: error: {message}", error)


def test_lists_may_not_be_empty(monkeypatch, capsys):
    error = error_of(matmul_regression, "--lr", monkeypatch, capsys)
    assert "--lr and --batch-size take one value or more each" in error
