# SPDX-License-Identifier: MIT
"""Tests of the layers and the MLP against PyTorch's own modules."""

import pytest
import torch

from torchpar.baselines import numpy_mlp
from torchpar.nn import MLP, Linear, LinearSigmoid


@pytest.mark.parametrize("hidden, activation", [("sigmoid", torch.nn.Sigmoid()), ("relu", torch.nn.ReLU())])
@pytest.mark.parametrize("output", ["logits", "sigmoid"])
def test_mlp_equals_the_network_of_torchs_modules(hidden, activation, output, device):
    torch.manual_seed(0)
    for sizes in [(3, 2), (5, 7, 1), (127, 129, 64, 10)]:
        mlp = MLP(sizes, hidden, output, device=device, dtype=torch.float64)
        other = torch.nn.Sequential()
        for layer in mlp.layers:
            own = torch.nn.Linear(layer.in_features, layer.out_features, device=device, dtype=torch.float64)
            own.load_state_dict(layer.state_dict())
            other.extend([own, activation])
        other[-1] = torch.nn.Sigmoid() if output == "sigmoid" else torch.nn.Identity()
        for shape in ((0,), (1,), (6,), (2, 3), ()):
            x = torch.randn(*shape, sizes[0], device=device, dtype=torch.float64)
            y, expected = mlp(x), other(x)
            torch.testing.assert_close(y, expected)
            grads = torch.autograd.grad(y.square().sum(), list(mlp.parameters()))
            others = torch.autograd.grad(expected.square().sum(), list(other.parameters()))
            torch.testing.assert_close(grads, others)


def test_xavier_variance():
    torch.manual_seed(0)
    uniform, normal = LinearSigmoid(300, 500).weight.detach(), numpy_mlp.MLP((300, 500), seed=1).weights[0]
    variance = 2 / (300 + 500)
    for weight in (uniform.numpy(), normal):
        # The mean of n draws deviates by σ/√n, and of normal ones the variance by σ²·√(2/n); five of each.
        assert abs(weight.mean()) < 5 * (variance / weight.size) ** 0.5
        assert abs(weight.var() / variance - 1) < 5 * (2 / weight.size) ** 0.5
    assert uniform.abs().max() <= (3 * variance) ** 0.5


def test_biases_begin_at_0_or_are_left_out():
    assert not Linear(3, 4).bias.any()
    assert list(Linear(3, 4, bias=False).state_dict()) == ["weight"]
    assert LinearSigmoid(3, 4, bias=False)(torch.zeros(2, 3)).eq(0.5).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([3],), r"sizes is \[3\], expected at least"),
        (([3, 2], "tanh"), "hidden is 'tanh', expected one of"),
        (([3, 2], "relu", "softmax"), "output is 'softmax', expected one of"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLP(*arguments)
