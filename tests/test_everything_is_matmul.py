# SPDX-License-Identifier: MIT
"""Regression, convolution and attention by matrix products, against PyTorch's own; and the lesson itself."""

import re
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from commands import ROOT, rows_of
from fake_data import fashion_mnist
from samples import assert_accurate, normal, to_numpy
from torch.func import functional_call
from torch.nn import functional as F

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("tyro", reason="tyro reads the flags")
pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    import everything_is_matmul

    return everything_is_matmul


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


@pytest.mark.parametrize("n", [1, 2, 127, 1024])
def test_the_derived_gradient_is_autograds(example, n):
    x, y, w = normal(n, 8), normal(n, seed=1), normal(8, seed=2).requires_grad_()
    (expected,) = torch.autograd.grad(F.mse_loss(x @ w, y), w)
    slope = (2 * (x @ w - y) / n).abs()
    # A sum of n products errs by n·eps/2 of their size, and a slope by eps (Higham 2002, 3.1); two ways.
    bound = (n + 2) * torch.finfo(x.dtype).eps * (x.T.abs() @ slope)
    for gradient, right in (
        (example.mse_gradient(x, y, w), True),
        (example.mse_gradient(x, y, w) / 2, False),
    ):
        assert bool(((gradient - expected).abs() <= bound).all()) is right


def test_small_batches_have_no_smaller_gradients(example):
    x, y, w = normal(1024, 8), normal(1024, seed=1), normal(8, seed=2)
    parts = [example.mse_gradient(*batch, w) for batch in zip(x.split(4), y.split(4), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(0), example.mse_gradient(x, y, w))
    noisy = torch.stack(parts).norm(dim=1).mean()
    assert noisy > example.mse_gradient(x, y, w).norm()


@pytest.mark.parametrize("batch_size, steps", [(1024, 1), (127, 9), (1, 1024)])
def test_descent_makes_a_step_per_batch(example, batch_size, steps):
    x, true = normal(1024, 8), normal(8, seed=1)
    losses = example.descend(x, x @ true, batch_size, 0.01)
    assert len(losses) == steps
    assert losses[-1] < F.mse_loss(torch.zeros(1024).double(), x @ true).item()
    # The first step, by the formula.
    first = x[:batch_size]
    w = 0.01 * 2 * first.T @ (first @ true) / batch_size
    assert losses[0] == pytest.approx(F.mse_loss(x @ w, x @ true).item())


CONVOLUTIONS = [  # batch, in, out, kernel, stride, height, width
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 4, 1, 2, 6, 5),
    (1, 1, 16, 5, 2, 28, 28),
    (3, 3, 5, 3, 1, 7, 11),
    (2, 3, 7, 3, 2, 9, 6),
    (4, 1, 2, 5, 1, 5, 8),
    (8, 16, 32, 5, 2, 12, 12),
]


def convolution(example, shape):
    batch, channels, out, kernel, stride, height, width = shape
    conv = example.ConvSigmoid(channels, out, kernel, stride)
    inputs = (
        normal(batch, channels, height, width),
        normal(out, channels, kernel, kernel, seed=1) / kernel / channels**0.5,
        normal(out, seed=2),
    )
    return conv, inputs, lambda x, weight, bias: F.conv2d(x, weight, bias, stride).sigmoid()


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_convolution(example, shape):
    conv, inputs, theirs = convolution(example, shape)

    def ours(x, weight, bias):
        return functional_call(conv, {"weight": weight, "bias": bias}, (x,))

    # z + b, e⁻ᶻ, 1 + and 1/; backward 1 − y, two products and the stored sum.
    assert_as_accurate(ours, theirs, inputs, roundings=8)
    weight = inputs[1]
    if weight.shape[2] > 1:  # kernels that lie on their side
        with pytest.raises(AssertionError):
            assert_as_accurate(lambda x, w, b: ours(x, w.mT, b), theirs, inputs, roundings=8)


def test_oblong_kernels_and_strides(example):
    conv = example.ConvSigmoid(2, 3, (2, 3), (2, 1)).double()
    x = normal(2, 2, 7, 8)
    torch.testing.assert_close(conv(x), torch.nn.Conv2d.forward(conv, x).sigmoid())


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 49), (3, 65, 16), (2, 3, 7, 4), (513, 8)], ids=str)
def test_attention(example, shape):
    x = normal(*shape)
    # A score s errs by at most s·eps, and e to its power by that in relation; so twice in the quotient.
    scores = (x @ x.mT).abs().max().item() / shape[-1] ** 0.5
    roundings = 4 * scores + 10

    def theirs(x):
        return F.scaled_dot_product_attention(x, x, x)

    assert_as_accurate(lambda x: example.attention_weights(x) @ x, theirs, [x], roundings)
    if shape[-2] > 1:
        with pytest.raises(AssertionError):  # scaled by d in the place of √d
            assert_as_accurate(lambda x: (x @ x.mT / shape[-1]).softmax(-1) @ x, theirs, [x], roundings)


def test_check_compares_results_and_gradients(example, capsys):
    x = normal(5).requires_grad_()
    example.check("sine", x.sin(), x.sin(), x)
    assert capsys.readouterr().out == "sine: result and gradients are PyTorch's, within 0e+00\n"
    with pytest.raises(AssertionError):
        example.check("another result", x.sin(), 1.001 * x.sin(), x)
    with pytest.raises(AssertionError):
        example.check("another gradient", x.sin(), x.sin().detach() + 0 * x, x)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    fashion_mnist(root / "FashionMNIST" / "raw", train=1300, test=200)
    return root


def test_the_lesson(example, root, tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    flags = example.Flags(
        data=root,
        dataset="fashion-mnist",
        device="cpu",
        samples=1200,
        epochs=3,
        batch_size=20,
        metrics=metrics,
        plots=tmp_path / "plots",
    )
    example.main(flags)
    out = capsys.readouterr().out
    assert len(re.findall(r"^\w+: result and gradients are PyTorch's, within \de[-+]\d\d$", out, re.M)) == 3
    assert re.search(r"batch 4, rate 0\.01: loss 0\.0\d+ at step 256", out)
    # 4×4 windows of 5×5 elements, of 12×12.
    assert f"take {4 * 4 * 25 / 144:.1f} times the {8 * 16 * 12 * 12 * 8:,} bytes" in out
    share = int(re.search(r"(\d+)% of what a digit gives", out)[1])
    assert share > 50  # 9% by chance
    rows = rows_of(metrics)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    last = rows[-1]
    assert last["test_accuracy"] > 0.9
    ending = f"test accuracy {last['test_accuracy']:.4f} | loss {last['test_loss']:.4f} | "
    assert re.fullmatch(re.escape(ending) + r"\d+\.\d s \| 1 rank \| cpu", out.splitlines()[-1])
    assert (tmp_path / "plots" / "everything_is_matmul.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("mse_gradient", lambda x, y, w: x.T @ (x @ w - y) / len(y)),
        ("linear_sigmoid", lambda x, w, b: torch.sigmoid(x.flip(-1) @ w.mT + b)),
        ("matmul_t", lambda x: x @ x.mT * 1.01),
    ],
)
def test_the_lesson_stops_at_what_is_wrong(example, root, monkeypatch, name, wrong):
    monkeypatch.setattr(example, name, wrong)
    with pytest.raises(AssertionError):
        example.main(example.Flags(data=root, dataset="fashion-mnist", device="cpu", samples=20, epochs=1))


def test_several_ranks_are_refused(example, root, monkeypatch):
    monkeypatch.setattr(example, "join_world", lambda device: nullcontext(SimpleNamespace(world_size=2)))
    with pytest.raises(example.ConfigError, match="2 ranks were started, expected one"):
        example.main(example.Flags(data=root, dataset="fashion-mnist"))
