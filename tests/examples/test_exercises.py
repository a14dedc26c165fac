# SPDX-License-Identifier: MIT
"""Exercises: their data, their choices, their formulas, and Amdahl's law.

`test_examples` runs them by their command lines.
"""

import re
import time
import types
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from commands import LAST_LINE, lesson, rows_of
from fake_data import fashion_mnist
from samples import normal
from torch.nn.functional import binary_cross_entropy, cross_entropy, linear

pytest.importorskip("tyro", reason="tyro reads the flags")

from support.checks import compare, compare_gradients, result_of
from support.measure import peak_bytes

import matmul_attention
import matmul_convolution
import matmul_regression
import quadrants
import train_by_hand
from matmul_convolution import windows
from quadrants import Epoch, Way
from train_by_hand import MARGIN, draw

from torchpar import console
from torchpar.data import Batch, batches
from torchpar.errors import ConfigError

# The quadrants


def test_labels_are_those_of_the_quadrants():
    points = quadrants.draw(4000, 0)
    x, y = points.features.T
    for right, up, label in (
        (True, True, 0),
        (False, True, 1),
        (False, False, 0),
        (True, False, 1),
    ):
        quadrant = ((x > 0) == right) & ((y > 0) == up)
        assert 900 < quadrant.sum() < 1100  # 1000 ± 4 standard deviations
        assert points.labels[quadrant].eq(label).all()
    nearest = points.features.abs().min()
    assert MARGIN <= nearest < MARGIN + 0.001  # the points are no farther than promised
    assert points.features.abs().max() <= 1
    noisy = quadrants.draw(4000, 0, 0.1)
    assert torch.equal(points.features, noisy.features)
    assert 324 < (points.labels != noisy.labels).sum() < 476  # 400 ± 4 standard deviations


@pytest.mark.slow
def test_noise_is_learnt_by_wide_networks_and_not_under_a_penalty(monkeypatch, tmp_path, capsys):
    metrics = tmp_path / "metrics"
    monkeypatch.setattr(quadrants, "WIDTHS", (1, 32))
    monkeypatch.setattr(quadrants, "PENALTIES", (0.0, 1e-2, 1e-1))
    quadrants.main(quadrants.Flags(noise=True, epochs=30, device="cpu", metrics=metrics))
    rows = rows_of(metrics)
    assert len(rows) == 6
    of = {(row["width"], row["penalty"]): row for row in rows}
    gap = {key: row["validation_loss"] - row["train_loss"] for key, row in of.items()}
    assert gap[32, 0.0] > 2 * gap[32, 1e-2]
    assert of[32, 1e-2]["validation_loss"] < of[32, 0.0]["validation_loss"]
    assert of[1, 0.0]["train_loss"] > 2 * of[32, 0.0]["train_loss"]  # too narrow
    assert of[32, 0.1]["train_loss"] > 2 * of[32, 0.0]["train_loss"]  # too large a λ
    assert rows[-1]["validation_loss"] == min(row["validation_loss"] for row in rows)
    width, penalty = max(gap, key=gap.__getitem__)
    assert (
        f"furthest above its training loss: width {width}, λ {penalty:g} ("
        in capsys.readouterr().out
    )


# Layers by hand


def test_layers_by_hand_compute_what_autograd_computes():
    """Loss and gradients, in float64: of probabilities that are 0 and 1, too, and of logits."""
    for hidden, output, fused in product(train_by_hand.ACTIVATIONS, ("sigmoid", ""), (True, False)):
        torch.manual_seed(0)
        network = train_by_hand.build_network([5, 4, 3, 1 if output else 3], hidden, output, fused)
        x, labels = 200 * normal(7, 5).float(), torch.tensor([0, 1, 1, 0, 1, 0, 1])
        loss = train_by_hand.BinaryCrossEntropy() if output else train_by_hand.SoftmaxCrossEntropy()
        found = loss.forward(network.forward(x), labels)
        network.backward(loss.backward())
        leaves = [p.clone().requires_grad_() for p in network.parameters().values()]
        y = x
        for i, (weight, bias) in enumerate(zip(leaves[::2], leaves[1::2], strict=True)):
            y = linear(y, weight, bias)
            function = hidden if i < 2 else output
            y = getattr(torch, function)(y) if function else y
        expected = (
            binary_cross_entropy(y[:, 0], labels.to(y)) if output else cross_entropy(y, labels)
        )
        gradients = torch.autograd.grad(expected, leaves)
        torch.testing.assert_close([found, *network.gradients().values()], [expected, *gradients])


def named(function: Any, name: str, module: str = "train_by_hand") -> Any:
    """``function`` as a function of a lesson that a reader has changed."""
    function.__name__, function.__module__ = name, module
    return function


WRONG = [
    ("ReLU", "input", "backward", lambda self, g: g),
    ("Tanh", "input", "backward", lambda self, g: g * (1 - self.y)),
    ("Sigmoid", "input", "forward", lambda self, x: setattr(self, "y", x.sigmoid()) or 2 * self.y),
    (
        "Linear",
        "bias",
        "gradients",
        lambda self: {"weight": self.weight_gradient, "bias": self.bias_gradient / 6},
    ),
    (
        "Linear",
        "weight",
        "gradients",
        lambda self: {"weight": self.weight_gradient.T, "bias": self.bias_gradient},
    ),
    ("BinaryCrossEntropy", "input", "backward", lambda self: (self.p - self.t) / len(self.p)),
    ("SoftmaxCrossEntropy", "input", "backward", lambda self: self.p - self.t),
    ("LinearSigmoid", "input", "backward", train_by_hand.Linear.backward),
]


@pytest.mark.parametrize("layer, part, method, wrong", WRONG)
def test_a_wrong_layer_is_found_by_differences(monkeypatch, layer, part, method, wrong):
    monkeypatch.setattr(getattr(train_by_hand, layer), method, wrong)
    code, out, err = lesson("train_by_hand", "--device", "cpu")
    message = (
        rf"{layer}: the gradient of its {part} is off by \S+, expected 1e-07 at most: "
        rf"(\[\d.* of shape .*|its shape) is .*, expected .*; mend its forward .*"
    )
    assert code == 2
    assert ("its shape is " in err) == ("off by inf" in err)
    assert re.fullmatch(rf"train_by_hand\.py: error: {message}\n", err)
    assert "epoch" not in out


def assigned(**gradients: object) -> Any:
    """The `Linear.gradients` of a reader whose backward keeps other ``gradients``."""
    right = train_by_hand.Linear.gradients
    return lambda self: right(self) | gradients


NUMBERS = np.zeros(4)
OF_INPUT = "expected a tensor of shape (6, 5) and torch.float64; mend what it returns"
FORWARD = {name: getattr(train_by_hand, name).forward for name in ("Linear", "Sigmoid", "Tanh")}
RESULTS = [
    ("Linear", "backward", lambda *_: None, f"returns None, {OF_INPUT}"),
    ("Tanh", "backward", lambda *_: None, f"returns None, {OF_INPUT}"),
    (
        "Tanh",
        "backward",
        lambda self, g: g.sum(),
        f"returns a tensor of shape () and torch.float64, {OF_INPUT}",
    ),
    ("Tanh", "forward", lambda *_: None, f"returns None, {OF_INPUT}"),
    (
        "Sigmoid",
        "forward",
        lambda self, x: FORWARD["Sigmoid"](self, x).numpy(),
        f"returns an object of type ndarray and shape (6, 5), {OF_INPUT}",
    ),
    ("BinaryCrossEntropy", "backward", lambda _: None, f"returns None, {OF_INPUT}"),
    ("SoftmaxCrossEntropy", "forward", lambda *_: None, f"returns None, {OF_INPUT}"),
    (
        "Linear",
        "gradients",
        assigned(weight=None),
        "returns None for 'weight', expected a tensor of shape (4, 5); mend what backward keeps",
    ),
    (
        "Linear",
        "gradients",
        assigned(bias=NUMBERS),
        "returns an object of type ndarray and shape (4,) for 'bias', expected a tensor of shape "
        "(4,); mend what backward keeps",
    ),
    (
        "Linear",
        "gradients",
        train_by_hand.Layer.gradients,
        "returns those of [], expected those of the parameters ['weight', 'bias']; return the "
        "gradient of each by its name",
    ),
    (
        "Linear",
        "gradients",
        lambda _: None,
        "returns None, expected those of the parameters ['weight', 'bias']; return the gradient "
        "of each by its name",
    ),
    (
        "Linear",
        "parameters",
        lambda self: [self.weight],
        "returns an object of type list, expected a dictionary; return the parameters by name",
    ),
    (
        "Tanh",
        "forward",
        lambda self, x: FORWARD["Tanh"](self, x.exp_()),
        "changes its input: [.*] of shape (6, 5) is .*, expected .*; compute into a new tensor",
    ),
    (
        "Sigmoid",
        "backward",
        lambda self, g: g.mul_(self.y * (1 - self.y)),
        "changes its input: [.*] of shape (6, 5) is .*, expected .*; compute into a new tensor",
    ),
    (
        "Linear",
        "backward",
        lambda self, g: self.x.zero_() + g @ self.weight,
        "changes the input of its forward pass: [.*] of shape (6, 5) is 0, expected .*; compute "
        "into a new tensor",
    ),
]


@pytest.mark.parametrize("layer, method, wrong, found", RESULTS)
def test_a_pass_that_returns_or_changes_something_else_is_named(
    monkeypatch, layer, method, wrong, found
):
    kind = getattr(train_by_hand, layer)
    monkeypatch.setattr(kind, method, named(types.FunctionType(*parts_of(wrong)), method))
    shape = {"BinaryCrossEntropy": "(6, 1)", "SoftmaxCrossEntropy": "()"}.get(layer, "(6, 5)")
    found = re.escape(found.replace("(6, 5) and torch", f"{shape} and torch")).replace(
        r"\.\*", ".*"
    )
    with pytest.raises(ConfigError) as error:
        train_by_hand.check_gradients(torch.device("cpu"))
    assert re.fullmatch(rf"{layer}\.{method} in train_by_hand\.py {found}", str(error.value))


def parts_of(function: Any) -> tuple[Any, ...]:
    """What makes a copy of a function, whose name can change."""
    names = "code", "globals", "name", "defaults", "closure"
    return tuple(getattr(function, f"__{name}__") for name in names)


def test_a_layer_that_lacks_a_pass_is_named(monkeypatch):
    class Half(train_by_hand.Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    Half.__module__ = "train_by_hand"
    for kind, message in (
        (Half, "Half in train_by_hand.py has no backward, expected both passes; write it"),
        (len, "ACTIVATIONS['mine'] is <built-in function len>, expected a class; derive one from"),
    ):
        monkeypatch.setitem(train_by_hand.ACTIVATIONS, "mine", kind)
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
            train_by_hand.make_activations()


def test_a_gradient_of_zero_is_right_where_the_loss_is_constant():
    torch.manual_seed(0)
    x = normal(6, 5)

    class Constant(train_by_hand.Layer):
        wrong = 0.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.softmax(1).sum(1, keepdim=True).expand_as(x).contiguous()

        def backward(self, g: torch.Tensor) -> torch.Tensor:
            return torch.full_like(g, self.wrong)

    layer = Constant()
    assert train_by_hand.check_layer(layer, x, 6, 5) == {"input": 0}
    layer.forward = torch.zeros_like  # type: ignore[method-assign]
    assert train_by_hand.check_layer(layer, x, 6, 5) == {"input": 0}
    layer.wrong = 1e-9
    assert train_by_hand.check_layer(layer, x, 6, 5) == {"input": torch.inf}


def test_a_slow_layer_is_not_silent(monkeypatch):
    monkeypatch.setattr(console, "SILENCE", 0.1)
    monkeypatch.setattr(
        train_by_hand.Tanh,
        "forward",
        lambda self, x: time.sleep(0.004) or FORWARD["Tanh"](self, x),
    )
    flags = "--device", "cpu", "--activation", "tanh", "--epochs", "1", "--samples", "3000"
    code, _, err = lesson("train_by_hand", *flags)
    assert code == 0
    assert re.match(r"\d of 7 layers and losses checked after \d+ s\n", err)
    assert re.search(r"^\d of 1 epochs after \d+ s$", err, re.MULTILINE)


class Leaky(train_by_hand.Layer):
    """A layer that a reader adds, and its slope below 0 in the backward pass."""

    slope = 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x
        return torch.where(x > 0, x, 0.1 * x)

    def backward(self, g: torch.Tensor) -> torch.Tensor:
        return torch.where(self.x > 0, g, self.slope * g)


def test_a_layer_that_a_reader_adds_is_checked_and_trained(monkeypatch):
    monkeypatch.setitem(train_by_hand.ACTIVATIONS, "leaky", Leaky)
    flags = "--device", "cpu", "--activation", "leaky", "--epochs", "10"
    code, out, err = lesson("train_by_hand", *flags)
    assert code == 0, err
    assert re.search(r"^Linear → Leaky → Linear → Sigmoid → BinaryCrossEntropy$", out, re.MULTILINE)
    assert float(out.splitlines()[-1].split()[2]) > 0.98
    monkeypatch.setattr(Leaky, "slope", 0.0)
    code, _, err = lesson("train_by_hand", *flags)
    assert code == 2
    assert "Leaky: the gradient of its input is off by" in err


@pytest.mark.parametrize(
    "flags", ["--lr 0.05", "--lr 0.05 --activation tanh", "--activation sigmoid --fused"]
)
def test_layers_by_hand_learn_images(tmp_path, flags):
    given = (
        f"--dataset fashion-mnist --data {fashion_mnist(tmp_path, train=600, test=100)} --device "
        f"cpu"
    )
    code, out, err = lesson("train_by_hand", *given.split(), "--batch-size", "20", *flags.split())
    assert code == 0, err
    last = "LinearSigmoid → Linear" if "fused" in flags else "Linear → (ReLU|Tanh) → Linear"
    assert re.search(rf"^{last} → SoftmaxCrossEntropy$", out, re.MULTILINE)
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1])
    assert float(out.splitlines()[-1].split()[2]) > 0.5


# Digits

CHOICE = ("hidden", "batch_size", "lr")


def study(root: Path) -> list[dict[str, Any]]:
    """The metrics of a small study of the data in ``root``."""
    flags = "--dataset fashion-mnist --device cpu --sweep-epochs 1 --epochs 2 --hidden 4 8"
    flags += " --batch-size 64 16 --lr 0.2 0.002 --weight-decay 0 0.03"
    files = [f"--data={root}", f"--metrics={root / 'metrics'}"]
    assert lesson("digits_report", *files, *flags.split())[0] == 0
    return rows_of(root / "metrics")


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row["validation_accuracy"])


def test_the_choice_is_the_best_on_the_validation_set_and_not_by_the_test_set(tmp_path):
    """Other test labels change the test figures alone, and two runs give the same figures."""
    rows = study(fashion_mnist(tmp_path, train=600, test=100))
    swept, epochs, final = rows[:8], rows[8:-1], rows[-1]
    assert len({tuple(row[name] for name in CHOICE) for row in swept}) == 8
    assert {row["weight_decay"] for row in swept} == {0.0}
    assert [(row["weight_decay"], row["epoch"]) for row in epochs] == [
        (0, 1),
        (0, 2),
        (0.03, 1),
        (0.03, 2),
    ]
    assert len({row["validation_accuracy"] for row in swept}) > 2  # there is something to choose
    # 500 samples: 7 and a rest.
    assert {row["steps"] for row in swept if row["batch_size"] == 64} == {8}
    assert all(row[name] == best(swept)[name] for name in CHOICE for row in epochs)
    assert epochs[3]["train_loss"] > epochs[1]["train_loss"]  # under a penalty
    chosen = best([row for row in epochs if row["epoch"] == 2])
    assert {key: final[key] for key in chosen} == chosen

    path = tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:8] + bytes((label + 1) % 10 for label in content[8:]))
    changed = set()
    for row, other in zip(rows, study(tmp_path), strict=True):
        changed |= {name for name in row if row[name] != other[name]}
    assert changed - {"ms_per_step", "s_per_epoch"} == {"test_accuracy", "test_loss"}


# Matrix products


def test_small_batches_and_a_larger_rate_reach_a_lower_cost(tmp_path):
    matmul_regression.main(
        matmul_regression.Flags(device="cpu", seed=1, metrics=tmp_path / "metrics")
    )
    *checks, whole, middle, small, last = rows_of(tmp_path / "metrics")
    assert [row["part"] for row in checks] == [
        "forward of a batch",
        "forward of each sample",
        "gradient",
    ]
    assert all(0 <= row["error"] < 1e-3 for row in checks)
    assert [row["steps_of_a_pass"] for row in (whole, middle, small)] == [1, 16, 256]
    assert whole["spread"] == 0 < middle["spread"] < small["spread"]
    # Noisier, but not smaller.
    assert whole["mean_norm"] <= middle["mean_norm"] <= small["mean_norm"]
    assert min(last["ms_batch"], last["ms_each"]) > 0
    ends = {name: costs[-1] for name, costs in last["costs"].items()}
    assert ends["batch 4, learning rate 0.01"] < 0.1 < ends["batch 64, learning rate 0.01"]
    assert ends["batch 64, learning rate 0.1"] < ends["batch 64, learning rate 0.01"]


def test_more_than_twice_pytorchs_error_is_refused():
    x = normal(1000).float()
    exact = x.double().sin()
    native = (x.sin() - exact).abs().max().item()
    assert [*compare("sine", x.sin(), torch.sin, x).values()] == ["sine", native, native]
    compare("within", exact + 1.9 * native, torch.sin, x)
    compare("within", (exact + 9 * native).float(), torch.sin, x, terms=100)
    for wrong in (exact + 2.1 * native, 1.001 * x.sin(), x.sin() * torch.nan):
        with pytest.raises(ConfigError, match=r"^sine is off by .*, expected .* at most"):
            compare("sine", wrong, torch.sin, x)


def test_what_cannot_be_compared_is_refused():
    x = torch.full((3,), 100.0)  # of which exp is infinite in float32
    assert torch.isfinite(x.double().exp()).all()
    with pytest.raises(ConfigError, match=r"own result in torch.float32 is off by inf, so that no"):
        compare("exp", torch.zeros(3), torch.exp, x)
    compare("exp", (x / 2).exp(), torch.exp, x / 2)
    with pytest.raises(ConfigError, match=r"^a result of shape \(0,\) has nothing to compare$"):
        compare("exp", x[:0], torch.exp, x[:0])
    with pytest.raises(ConfigError, match=r"^sum has no inputs, expected one at least"):
        compare_gradients("sum", torch.sum, torch.sum, {})


def test_the_path_of_a_line_ends_at_its_weights():
    torch.manual_seed(0)
    x, y = matmul_regression.make_samples(torch.tensor(matmul_regression.LINE))
    costs, path = matmul_regression.descend(x, y, 4, 0.05)
    assert path.shape == (257, 2)
    torch.testing.assert_close(path[-1], torch.tensor(matmul_regression.LINE), rtol=0, atol=0.05)
    w, b = path[0]
    off = w * x[:4, 0] + b - y[:4]
    # ∂C/∂w = 2x(a − y), ∂C/∂b = 2(a − y).
    step = torch.stack([(2 * x[:4, 0] * off).mean(), (2 * off).mean()])
    torch.testing.assert_close(path[1], path[0] - 0.05 * step)
    assert costs[-1] < 0.02 < costs[0]


def test_gradients_are_compared_and_must_exist():
    x, w = normal(3, 4), normal(5, 4)
    rows = compare_gradients("product", lambda x, w: x @ w.T, linear, {"x": x, "w": w}, terms=4)
    assert [row["part"] for row in rows] == ["product, gradient of x", "product, gradient of w"]
    for wrong, message in (
        (lambda x, w: x.detach() @ w.T, "product, gradient of x is off by"),
        (lambda x, w: (x @ w.T).detach(), "product has no gradient, expected one"),
        (lambda x, w: x @ w.T + 1e-9 * w.sum(), "product, gradient of w is off by"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare_gradients("product", wrong, linear, {"x": x, "w": w}, terms=4)


def test_the_most_bytes_of_a_call():
    x = torch.ones(1000)
    device = torch.device("cpu")
    assert peak_bytes(lambda: x.exp(), device) == x.nbytes
    assert peak_bytes(lambda: x.exp().sin().cos(), device) == 2 * x.nbytes  # two of them at a time
    assert peak_bytes(lambda: x[:10], device) == 0


def test_windows_take_more_memory_than_conv2d(capsys):
    rows = matmul_convolution.compare_costs(torch.device("cpu"))
    of = {(row["layer"], row["way"]): row for row in rows}
    assert len(of) == 4
    copied, output = 4 * 64 * 4 * 4 * 16 * 25, 4 * 64 * 4 * 4 * 32
    assert of["second", "windows"]["allocated_bytes"] == copied + output
    assert output <= of["second", "conv2d"]["allocated_bytes"] < copied + output
    assert f"{copied + output:,}" in capsys.readouterr().out


def test_a_causal_row_does_not_depend_on_later_rows():
    x, wq, wk, wv = normal(2, 5, 6), normal(3, 6), normal(3, 6), normal(3, 6)
    y = matmul_attention.causal_attention(x, wq, wk, wv)
    x[:, 3:] += 1
    changed = matmul_attention.causal_attention(x, wq, wk, wv)
    assert torch.equal(y[:, :3], changed[:, :3])
    assert not torch.isclose(y[:, 3:], changed[:, 3:]).any(-1).any()


def test_a_sparse_row_depends_on_the_rows_that_it_sees():
    q, k, v = normal(2, 8, 6), normal(2, 8, 6), normal(2, 8, 6)
    window, block = matmul_attention.outside_window(8, 1), matmul_attention.outside_block(8, 4)
    assert (~window).sum() == 8 + 7 + 7
    assert (~block).sum() == 2 * 4 * 4

    def outputs() -> list[torch.Tensor]:
        masked = [matmul_attention.masked_weights(q, k, m) @ v for m in (window, block)]
        return [*masked, matmul_attention.block_attention(q, k, v, 4)]

    before = outputs()
    torch.testing.assert_close(before[1], before[2])
    k[:, 3] += 1  # rows 2 to 4 have it in their windows, rows 0 to 3 in their block
    for first, end, y, changed in zip((2, 0, 0), (5, 4, 4), before, outputs(), strict=True):
        same = torch.isclose(y, changed).all(-1).all(0)
        assert [i for i in range(8) if not same[i]] == [*range(first, end)]


def test_a_block_that_divides_no_image_is_refused():
    for flag, value in (("block", 5), ("block", 0), ("window", 28)):
        code, _, err = lesson("matmul_attention", f"--{flag}", str(value))
        assert code == 2
        assert re.search(
            rf"error: --{flag} is {value}, expected (a divisor of 28|at least 1|less than 28)\n$",
            err,
        )


CAUSAL = matmul_attention.causal_weights
CONVOLUTION = matmul_convolution.convolution


def test_a_gradient_of_nan_is_not_hidden_by_that_of_another_layer():
    t = torch.ones(2, dtype=torch.float64)
    gradients = [("weight", t, 2 * t * torch.nan), ("weight", t, 2 * t)]
    (error,) = train_by_hand.compare_gradients(lambda: t.square().sum(), gradients).values()
    assert (error, error.where) == (torch.inf, "[0] of shape (2,) is nan, expected 2")


@pytest.mark.parametrize(
    "module, part, name, wrong",
    [
        (matmul_regression, "forward of a batch", "predict", lambda x, w: x @ w.flip(0)),
        (
            matmul_convolution,
            "convolution, gradient of kernels",
            "linear",
            lambda x, w: x @ (2 * w - w.detach()).T,
        ),
        (matmul_attention, "causal attention", "causal_weights", lambda q, k: CAUSAL(k, q)),
        pytest.param(
            matmul_attention,
            "causal attention",
            "causal_weights",
            lambda q, k: (q @ k.mT / 4).softmax(-1),
            marks=pytest.mark.slow,
        ),
        (
            matmul_attention,
            "causal attention, gradient of x",
            "causal_weights",
            lambda q, k: CAUSAL(q, k).detach(),
        ),
        (
            matmul_attention,
            "products of blocks",
            "block_attention",
            lambda q, k, v, block: (q @ k.mT / 4).softmax(-1) @ v,
        ),
        (matmul_regression, "gradient", "mse_gradient", lambda x, y, w: x.T @ (x @ w - y) / len(y)),
        (matmul_convolution, "convolution", "windows", lambda x, **at: windows(x, **at).flip(-1)),
        (matmul_convolution, "convolution", "convolution", lambda x, k: CONVOLUTION(x, k) + 1),
        (matmul_attention, "attention", "matmul_t", lambda x: x @ x.mT * 1.01),
    ],
)
def test_a_lesson_stops_at_a_wrong_formula(monkeypatch, module, part, name, wrong):
    monkeypatch.setattr(module, name, wrong)
    code, _, err = lesson(module.__name__, "--device", "cpu")
    message = (
        rf"{part} is off by \S+, expected \S+ at most: \[\d.*\] of shape .* is \S+, expected \S+; "
        rf"mend its formula, and do not let it change its inputs"
    )
    assert code == 2
    assert re.fullmatch(rf"{module.__name__}\.py: error: {message}\n", err)


OUTSIDE = matmul_attention.outside_window, matmul_attention.outside_block


@pytest.mark.parametrize(
    "name, wrong, found",
    [
        ("window", lambda n, size: ~OUTSIDE[0](n, size), "[0, 0] of shape (28, 28) is True"),
        ("window", lambda n, size: OUTSIDE[0](n, size - 1), "[0, 2] of shape (28, 28) is True"),
        ("window", lambda n, size: OUTSIDE[0](n, n), "[0, 3] of shape (28, 28) is False"),
        ("block", lambda n, size: OUTSIDE[1](n, size).tril(), "[0, 7] of shape (28, 28) is False"),
    ],
)
def test_a_wrong_mask_is_named_with_its_first_element(monkeypatch, name, wrong, found):
    monkeypatch.setattr(
        matmul_attention, f"outside_{name}", named(wrong, f"outside_{name}", "matmul_attention")
    )
    with pytest.raises(ConfigError) as error:
        matmul_attention.checked_masks(2, 7)
    assert str(error.value) == (
        f"outside_{name} in matmul_attention.py is wrong: {found}, expected {'True' not in found}; "
        "mend its formula"
    )


@pytest.mark.parametrize("window, block", [(0, 1), (1, 4), (27, 28)])
def test_the_masks_are_those_of_their_plain_definition(window, block):
    near, same = matmul_attention.checked_masks(window, block)
    assert (near.diagonal().any(), same.diagonal().any()) == (False, False)
    assert (~same).sum() == 28 * block


def test_the_scores_of_blocks_are_counted(monkeypatch, capsys):
    qkv = [normal(3, 28, 16).float() for _ in "qkv"]
    rows = matmul_attention.compare_sparse(qkv, 2, 7)
    assert [row["scores"] for row in rows] == [784, 784, 196]

    def in_full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int) -> torch.Tensor:
        return matmul_attention.masked_weights(q, k, OUTSIDE[1](28, block)) @ v

    def by_sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int) -> torch.Tensor:
        weights = (q[..., None, :] * k[..., None, :, :]).sum(-1) / 4
        weights = weights.masked_fill(OUTSIDE[1](28, block), -torch.inf).softmax(-1)
        return (weights[..., None] * v[..., None, :, :]).sum(-2)

    for way, text in (
        (in_full, "784 scores of an image are computed"),
        (by_sums, "no product is counted"),
    ):
        monkeypatch.setattr(matmul_attention, "block_attention", way)
        matmul_attention.compare_sparse(qkv, 2, 7)
        assert f"\nproducts of blocks: {text}, 196 are shown\n" in capsys.readouterr().out


def test_slow_attention_is_not_silent(monkeypatch):
    weights = matmul_attention.attention_weights
    monkeypatch.setattr(console, "SILENCE", 0.1)
    monkeypatch.setattr(
        matmul_attention, "attention_weights", lambda x: time.sleep(0.15) or weights(x)
    )
    code, _, err = lesson("matmul_attention", "--device", "cpu")
    assert code == 0
    assert re.match(r"still computing attention after \d+ s\n", err)


NO_TENSORS = {
    "None": None,
    "an object of type ndarray and shape (8, 4)": np.zeros((8, 4)),
    "a tensor of shape (8,) and torch.float64": torch.zeros(8, dtype=torch.float64),
}


@pytest.mark.parametrize(
    "module, name, found, expected",
    [
        *((matmul_convolution, "windows", found, "(8, 4, 4, 400)") for found in NO_TENSORS),
        *((matmul_convolution, "convolution", found, "(8, 32, 4, 4)") for found in NO_TENSORS),
        (matmul_regression, "predict", "None", "()"),
        (matmul_regression, "mse_gradient", "None", "(8,)"),
        (matmul_attention, "causal_weights", "None", "(100, 28, 28)"),
        (matmul_attention, "block_attention", [*NO_TENSORS][1], "(100, 28, 16)"),
        (matmul_attention, "attention_weights", [*NO_TENSORS][1], "(100, 100)"),
        (matmul_attention, "outside_window", "None", "(28, 28) and torch.bool"),
        (matmul_attention, "outside_block", [*NO_TENSORS][1], "(28, 28) and torch.bool"),
    ],
)
def test_a_function_that_returns_no_tensor_is_named(monkeypatch, module, name, found, expected):
    mine = named(lambda *_, **__: NO_TENSORS[found], name, module.__name__)
    monkeypatch.setattr(module, name, mine)
    code, _, err = lesson(module.__name__, "--device", "cpu")
    file = f"{module.__name__}.py"
    kind = "" if "torch." in expected else " and torch.float32"
    assert (code, err) == (
        2,
        f"{file}: error: {name} in {file} returns {found}, expected a tensor of shape {expected}"
        f"{kind}; mend what it returns\n",
    )


def test_a_function_that_changes_its_input_is_named(monkeypatch):
    mine = named(lambda x, k: CONVOLUTION(x.mul_(2), k), "convolution", "matmul_convolution")
    monkeypatch.setattr(matmul_convolution, "convolution", mine)
    code, _, err = lesson("matmul_convolution", "--device", "cpu")
    assert code == 2
    assert re.fullmatch(
        r"matmul_convolution\.py: error: convolution in matmul_convolution\.py changes its input: "
        r"\[.*\] of shape \(8, 16, 12, 12\) is \S+, expected \S+; compute into a new tensor\n",
        err,
    )
    for change, found in (
        (lambda x: x.unsqueeze_(0), "its shape is (1, 2), expected (2,)"),
        (lambda x: x.zero_(), "[1] of shape (2,) is 0, expected 1"),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"changes its input: {found}; compute")):
            result_of(change, torch.tensor([0.0, 1.0]))
    kept = torch.tensor([torch.nan, 1.0])
    assert result_of(lambda x: x, kept) is kept


# Amdahl's law


def test_fit_is_the_least_squares_of_relative_times():
    speedups = {1: 1.0, 2: 1.7, 4: 3.3, 8: 4.0}  # which lie on no curve of the law
    law = np.array([[1 - 1 / n, 1 - 1 / s] for n, s in speedups.items()])
    (best,), *_ = np.linalg.lstsq(law[:, :1], law[:, 1])
    assert quadrants.fit(speedups) == pytest.approx(best, abs=1e-12)
    assert quadrants.fit({2: 0.5}) == 0  # p stays a share
    assert quadrants.fit({2: 2.5}) == 1


@pytest.mark.parametrize(
    "cores, counts", [(1, (1, 2)), (2, (1, 2)), (6, (1, 2, 4)), (64, (1, 2, 4, 8))]
)
def test_the_report_takes_at_most_eight_processes(cores, counts):
    assert quadrants.process_counts(cores) == counts


def test_the_report_fits_the_medians_of_all_rounds_but_the_first(monkeypatch, capsys):
    parts = {("ReLU", "forward"): 0.2, ("ReLU", "backward"): 0.4, ("Linear", "forward"): 1.0}
    parts |= {("Linear", "backward"): 2.0}
    first = Epoch(9.0, 0.5, dict.fromkeys(parts, 9.0))
    two = Way(64, processes=2)
    rounds = {
        Way(64): [first, *(Epoch(seconds, 0.1) for seconds in (2.0, 1.0, 3.0))],
        two: [first, *(Epoch(seconds, 0.1) for seconds in (1.25, 1.0, 7.0))],
        Way(64, threads=2): [first, Epoch(2.0, 0.1)],
        Way(64, profiled=True): [
            first,
            Epoch(4.0, 0.1, parts),
            Epoch(8.0, 0.1, {k: 2 * s for k, s in parts.items()}),
        ],
    }
    monkeypatch.setattr(quadrants, "measure", lambda flags: rounds)
    report = partial(quadrants.report, quadrants.Flags(processes=(1, 2), sizes=(64,), device="cpu"))
    gain, *fitted = report()
    # p = (0.2 + 0.4 + 1 + 2) / 4
    times = {
        "ms_on_1": 2000.0,
        "predicted": 1 / (0.1 + 0.9 / 2),
        "N_processes": 1.6,
        "N_threads": 1.0,
    }
    assert gain == pytest.approx({"batch_size": 64, "N": 2} | times)
    for row, by, p in zip(fitted, ("profile", "processes", "threads"), (0.9, 0.75, 0), strict=True):
        assert (row["batch_size"], row["by"]) == (64, by)
        assert (row["p"], row["limit"]) == pytest.approx((p, 1 / (1 - p)))
    out = capsys.readouterr().out
    lines = [re.findall(r"[\w%.:]+", line) for line in out.splitlines() if line.startswith("│")][:3]
    assert lines[0] == ["Linear", "25.00%", "50.00%", "75.00%"]
    assert lines[1] == ["ReLU", "5.00%", "10.00%", "15.00%"]
    assert lines[2] == ["all:", "p", "30.00%", "60.00%", "90.00%"]
    # 1/(0.1 + 0.9/768), and 1/(0.0199 + 0.9801/768) of the report's p
    assert (
        "by Amdahl's law 768 threads would gain 9.88 times with p = 0.9000, and 47.22 times with "
        "p = 0.9801\n"
    ) in out
    assert "left out: the speed-up from CPU to GPU, as --device is cpu" in out
    assert re.search(r"│ 64 +│ processes │ 0\.75 +│ 4 +│", out)
    assert re.search(r"│ 64 +│ threads +│ \? +│ \? +│", out)  # they gain nothing
    rounds[two][1:] = [Epoch(1.0, 0.1)]
    assert report()[2]["limit"] is None  # everything is divided
    assert re.search(r"│ 64 +│ processes │ 1 +│ ∞ +│", capsys.readouterr().out)
    # A half of the time on two processes is the most that the law allows.
    rounds[two][1:] = [Epoch(0.9, 0.1)]
    report()
    out = capsys.readouterr().out
    assert re.search(r"│ 64 +│ processes │ \? +│ \? +│", out)
    assert "?: no p fits, as N took longer than one, or less than an N-th of its time, " in out
    rounds[two][0] = Epoch(9.0, 0.5001)
    with pytest.raises(ConfigError, match="is off by 2e-04 of that on one"):
        report()


def test_the_report_times_the_gpu_where_there_is_one(monkeypatch, capsys):
    """The first of its epochs is not counted."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seconds = iter([9.0, *[0.5] * quadrants.ROUNDS])
    monkeypatch.setattr(quadrants, "time_epoch", lambda *args, device: Epoch(next(seconds), 0.1))
    rows = quadrants.compare_devices(quadrants.Flags(sizes=(64,)), {Way(64): 2000.0})
    assert rows == [{"batch_size": 64, "ms_on_1": 2000.0, "ms_on_GPU": 500.0, "speedup": 4.0}]
    assert "left out" not in capsys.readouterr().out


def time_a_short_epoch(way: Way) -> Epoch:
    """An epoch of the report in float64, with a quarter of its points."""
    with patch.object(quadrants, "draw", lambda n, *seed, **on: draw(n // 4, *seed, **on)):
        return quadrants.time_epoch(0, way, 1, torch.float64)


def shares_of_an_epoch() -> tuple[list[int], float]:
    """The sizes of a rank's shares of the batches, and the loss after the epoch."""
    sizes = []

    def counted(*args: Any, **options: Any) -> Iterator[Batch]:
        for batch in batches(*args, **options):
            sizes.append(len(batch.x))
            yield batch

    with patch.object(quadrants, "batches", counted):
        epoch = time_a_short_epoch(Way(2048, processes=2))
    return sizes, epoch.loss


@pytest.mark.slow
def test_an_epoch_of_the_report_is_the_same_on_two_ranks_and_its_layers_take_most_of_it(ranks):
    """In float64 their losses differ by rounding; another rate gives another loss."""
    alone = time_a_short_epoch(Way(2048, profiled=True))
    kinds = ("Linear", "ReLU", "Sigmoid", "BinaryCrossEntropy")
    assert set(alone.parts) == set(product(kinds, quadrants.PASSES))
    assert 0.5 * alone.seconds < sum(alone.parts.values()) < alone.seconds
    pair = ranks(2, shares_of_an_epoch)
    assert [shares for shares, _ in pair] == [[1024] * 4] * 2
    assert {loss for _, loss in pair} == {pair[0][1]}
    assert pair[0][1] == pytest.approx(alone.loss, rel=1e-12)
    assert time_a_short_epoch(Way(1024)).loss != pytest.approx(alone.loss, rel=1e-3)
