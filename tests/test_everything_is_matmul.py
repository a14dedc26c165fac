# SPDX-License-Identifier: MIT
"""Regression, convolution and attention by matrix products, against PyTorch's own; and the lesson itself."""

import re
import sys
from contextlib import nullcontext

import pytest
import torch
from commands import ROOT, rows_of
from fake_data import fashion_mnist
from samples import assert_accurate, normal, to_numpy
from torch.nn import functional as F

from torchpar import linear_sigmoid

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


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_a_linear_layer_of_windows_is_a_convolution(example, shape):
    batch, channels, out, kernel, stride, height, width = shape
    x = normal(batch, channels, height, width)
    weight = normal(out, channels, kernel, kernel, seed=1) / kernel / channels**0.5

    def ours(x, weight, bias):
        rows = example.windows(x.movedim(1, 3), kernel, stride)
        return linear_sigmoid(rows, weight.flatten(1), bias).movedim(3, 1)

    def theirs(x, weight, bias):
        return F.conv2d(x, weight, bias, stride).sigmoid()

    inputs = (x, weight, normal(out, seed=2))
    # z + b, e⁻ᶻ, 1 + and 1/; backward 1 − y, two products and the stored sum.
    assert_as_accurate(ours, theirs, inputs, roundings=8)
    if kernel > 1:  # kernels that lie on their side
        with pytest.raises(AssertionError):
            assert_as_accurate(lambda x, w, b: ours(x, w.mT, b), theirs, inputs, roundings=8)


def test_windows(example):
    """Against each window cut out by hand; the columns that no window reaches are left out."""
    x = normal(2, 7, 8, 3)
    rows = example.windows(x, size=3, stride=2)
    assert rows.shape == (2, 3, 3, 27)
    for i in range(3):
        for j in range(3):
            window = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]  # (b, row, column, channel)
            assert torch.equal(rows[:, i, j], window.movedim(3, 1).flatten(1))


def test_the_network_is_convolutions(example):
    """The shapes of its layers, and its output by PyTorch's own convolutions."""
    torch.manual_seed(0)
    net = example.ConvNet().double()
    x = normal(3, 784).abs()
    y = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    for layer, channels in ((net.first, 1), (net.second, 16)):
        kernels = layer.weight.view(-1, channels, 5, 5)
        y = y.view(3, 1, 28, 28) if channels == 1 else y
        y = F.conv2d(y, kernels, layer.bias, stride=2).sigmoid() - 0.5
    assert y.shape == (3, 32, 4, 4)
    expected = F.linear(y.movedim(1, 3).flatten(1), net.last.weight, net.last.bias)
    torch.testing.assert_close(net(x), expected)


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


def test_check_refuses_more_than_twice_the_error(example, capsys):
    x = normal(1000).float()
    exact = x.double().sin()
    native = (x.sin() - exact).abs().max().item()
    part = example.check("sine", x.sin(), torch.sin, x)
    assert part == {"part": "sine", "error": native, "pytorch_error": native}
    assert capsys.readouterr().out == f"sine: errs by {native:.1e}, PyTorch by {native:.1e}\n"
    example.check("within", exact + 1.9 * native, torch.sin, x)
    for wrong in (exact + 2.1 * native, 1.001 * x.sin(), x.sin() * torch.nan):
        with pytest.raises(example.ConfigError, match=r"^sine errs by .*, expected .* at most"):
            example.check("sine", wrong, torch.sin, x)


@pytest.mark.parametrize("seed", range(20))
def test_parts_pass_with_any_seed(example, seed):
    torch.manual_seed(seed)
    for part in (example.regression, example.convolution):
        row = part(torch.device("cpu"))
        assert 0 <= row["error"] <= 2 * row["pytorch_error"] < 1e-3


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
    errors = r"^(\w+): errs by \d\.\de-\d\d, PyTorch by \d\.\de-\d\d$"
    assert re.findall(errors, out, re.M) == ["regression", "convolution", "attention"]
    assert re.search(r"batch 4, rate 0\.01: loss 0\.0\d+ at step 256", out)
    # 4×4 windows of 5×5 elements, of 12×12.
    assert f"take {4 * 4 * 25 / 144:.1f} times the {8 * 16 * 12 * 12 * 4:,} bytes" in out
    share = int(re.search(r"(\d+)% of what a digit gives", out)[1])
    assert share > 50  # 9% by chance
    regression, convolution, attention, *rows = rows_of(metrics)
    assert (regression["part"], convolution["part"], attention["part"]) == (
        "regression",
        "convolution",
        "attention",
    )
    for name, losses in regression["losses"].items():
        assert f"  {name}: loss {losses[-1]:.4f} at step {len(losses)}\n" in out
    assert convolution["duplication"] == pytest.approx(4 * 4 * 25 / 144)
    assert round(100 * attention["to_own_class"]) == share
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    last = rows[-1]
    assert last["test_accuracy"] > 0.9
    ending = f"test accuracy {last['test_accuracy']:.4f} | loss {last['test_loss']:.4f} | "
    assert re.fullmatch(re.escape(ending) + r"\d+\.\d s \| 1 rank \| cpu", out.splitlines()[-1])
    for name in ("kernels", "attention"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def on_their_side(x, size, stride):
    return x.unfold(1, size, stride).unfold(2, size, stride).mT.flatten(3)


@pytest.mark.parametrize(
    "part, name, wrong",
    [
        ("regression", "mse_gradient", lambda x, y, w: x.T @ (x @ w - y) / len(y)),
        ("convolution", "windows", on_their_side),
        ("attention", "matmul_t", lambda x: x @ x.mT * 1.01),
    ],
)
def test_the_lesson_stops_at_what_is_wrong(example, root, monkeypatch, capsys, part, name, wrong):
    """With one line and status 2, as a user sees it."""
    from torchpar import cli

    monkeypatch.setattr(example, name, wrong)
    flags = f"--data {root} --dataset fashion-mnist --device cpu --samples 20 --epochs 1"
    monkeypatch.setattr(sys, "argv", ["everything_is_matmul.py", *flags.split()])
    with pytest.raises(SystemExit) as caught:
        cli.main(example.main, example.Flags)
    assert caught.value.code == 2
    message = (
        rf"everything_is_matmul\.py: error: {part} errs by \S+, expected \S+ at most; mend its formula\n"
    )
    assert re.fullmatch(message, capsys.readouterr().err)


def test_several_ranks_are_refused(example, monkeypatch):
    from torchpar.parallel import world

    two = world.World(0, 0, 2, torch.device("cpu"))
    monkeypatch.setattr(world, "join_world", lambda device: nullcontext(two))
    with pytest.raises(example.ConfigError, match=r"^2 processes were started"):
        example.main(example.Flags())
