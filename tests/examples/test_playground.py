# SPDX-License-Identifier: MIT
"""The lesson of the playground's points and features."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
from commands import lesson, rows_of

pytest.importorskip("tyro", reason="tyro reads the flags")

from support import plots

import playground


def drawn(*how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    samples = playground.draw(*how)
    return samples.features, samples.labels


def test_labels_are_those_of_the_points_without_noise():
    x, labels = drawn("quadrants", 400, 0)
    assert torch.equal(labels == 1, x.prod(1) < 0)
    assert x.abs().min() >= 0.3 / playground.SIDE - 1e-6  # the gap, but for rounding
    x, labels = drawn("circle", 400, 0)
    radius = x.norm(dim=1) * playground.SIDE
    assert torch.equal(labels == 1, radius < 2.5)
    assert not ((radius > 2.51) & (radius < 3.49)).any()
    x, labels = drawn("gauss", 400, 0)
    for label, middle in ((0, -2.0), (1, 2.0)):
        mean = (x[labels == label] * playground.SIDE).mean(0)
        # 200 points of variance 0.5: 5 standard deviations of their mean
        assert (mean - middle).abs().max() < 5 * (0.5 / 200) ** 0.5
    x, labels = drawn("spiral", 400, 0)
    torch.testing.assert_close(x[labels == 0], -x[labels == 1])  # half a turn apart


@pytest.mark.parametrize("kind", ["quadrants", "circle"])
def test_noise_gives_other_labels_and_the_same_points(kind):
    (x, labels), (noisy_x, noisy) = (drawn(kind, 400, 0, noise) for noise in (0.0, 0.5))
    assert torch.equal(x, noisy_x)
    assert 40 < (labels != noisy).sum() < 200


def test_the_features_are_functions_of_the_coordinates():
    found = playground.with_features(torch.tensor([[0.5, -0.25]]), tuple(playground.FEATURES))
    expected = [0.5, -0.25, 0.25, 0.0625, -0.125, math.sin(3), math.sin(-1.5)]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_a_feature_that_a_reader_adds_can_be_chosen_by_the_flag():
    text, first = Path(playground.__file__).read_text(), '    "x1": lambda x1, x2: x1,\n'
    assert first in text
    space: dict[str, Any] = {"__name__": "playground"}
    exec(text.replace(first, f'    "one": lambda x1, x2: 1,\n{first}'), space)
    assert get_args(space["Feature"]) == ("one", *playground.FEATURES)


def test_the_picture_of_a_boundary_says_what_its_shade_means(tmp_path):
    pytest.importorskip("matplotlib", reason="it draws the pictures")
    from matplotlib.figure import Figure

    points = SimpleNamespace(
        features=torch.tensor([[-0.5, 0.5], [0.5, 0.5]]),
        labels=torch.tensor([0, 1]),
        classes=("0", "1"),
    )
    with patch.object(Figure, "savefig", autospec=True) as save:
        plots.save_boundaries(
            tmp_path / "picture.png", {"one": (points, lambda x: (1 + x[:, 0]) / 2)}
        )
    (legend,) = save.call_args.args[0].legends
    assert legend.get_title().get_text() == "shade: probability of label 1; line: ½"


@pytest.mark.parametrize("activation, least", [("relu", 0.0), ("tanh", -1.0)])
def test_the_neurons_of_each_layer_are_drawn_as_they_compute(tmp_path, activation, least):
    pytest.importorskip("matplotlib", reason="it draws the pictures")
    from matplotlib.figure import Figure

    flags = playground.Flags(activation=activation, epochs=1, samples=20, lr=0.03)
    features = ("x1", "x1x2", "x2")
    with torch.random.fork_rng():
        row, _, probability, neurons = playground.learn(
            "circle", features, (4, 2), flags, torch.device("cpu")
        )
    x = 2 * torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) - 1
    values = [function(x) for function in neurons.values()]
    assert [v.shape[1] for v in values] == [3, 4, 2, 1]
    assert torch.equal(values[0], playground.with_features(x, features))
    assert least <= min(v.min() for v in values[1:3])
    assert (values[1].min() < 0) == (activation == "tanh")
    assert torch.equal(values[3][:, 0], 2 * probability(x) - 1)
    with patch.object(Figure, "savefig", autospec=True) as save:
        plots.save_neurons(tmp_path / "picture.png", neurons)
    axes = save.call_args.args[0].axes
    assert [bool(one.images) for one in axes] == [
        *(True, True, True, True),
        *(True, True, True, False),
        *(True, True, False, False),
        *(False, True, False, False),
    ]
    across = torch.linspace(-1, 1, 61)
    product_of_both = torch.from_numpy(axes[4].images[0].get_array().data)
    torch.testing.assert_close(product_of_both, torch.outer(across, across))
    assert row["test_squared"] > 0


@pytest.mark.slow
def test_a_network_4_2_with_tanh_reaches_the_loss_of_the_playground(tmp_path):
    """The course's slide has a test loss of 0.003, by the rate 0.03. The playground's loss is that
    of the squares, which is far below it."""
    flags = ["--points=circle", "--activation=tanh", "--hidden", "4", "2", "--lr=0.03"]
    flags += ["--epochs=300", "--features", "x1", "x2", "--device=cpu"]
    code, _, err = lesson("playground", *flags, f"--metrics={tmp_path / 'metrics'}")
    assert code == 0, err
    line, *_, last = rows_of(tmp_path / "metrics")
    assert last["hidden"] == "4 2"
    assert last["test_squared"] < 0.003 < line["test_squared"]
    assert last["test_loss"] < 0.02  # the cross-entropy, which other processors round otherwise
    assert last["test_accuracy"] > 0.99


def test_a_line_through_squares_learns_circles(tmp_path):
    flags = ["--points=circle", "--features", "x1^2", "x2^2", "--epochs=15", "--samples=100"]
    flags += ["--lr=0.5", "--device=cpu", f"--metrics={tmp_path / 'metrics'}"]
    with patch.object(plots, "save_boundaries") as save:
        code, _, err = lesson("playground", *flags, f"--plots={tmp_path}")
    assert (code, err) == (0, "")
    both = ["x1 x2", "x1^2 x2^2"]  # as many features, told apart
    assert list(save.call_args.args[1]) == [
        f"features: {one}\nhidden: {layers}" for layers in ("none", "8 8") for one in both
    ]
    line, squares, _, _ = rows_of(tmp_path / "metrics")
    assert (line["hidden"], squares["hidden"]) == ("-", "-")
    assert [line["features"], squares["features"]] == both
    assert line["test_accuracy"] < 0.75 < 0.9 < squares["test_accuracy"]
    code, _, err = lesson("playground", "--noise=0.6")
    assert code == 2
    assert "--noise is 0.6, expected less than 0.5" in err
