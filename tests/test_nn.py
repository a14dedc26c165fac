# SPDX-License-Identifier: MIT
"""Tests of the layers and the MLP against PyTorch's own modules."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from layer_tools import LAYERS, OF_PYTORCH, STAND_INS, ByInheritance, outcome

from torchpar.baselines import numpy_mlp
from torchpar.nn import MLP, Linear, LinearMaxout, LinearSigmoid

ACTIVATIONS = [
    ("sigmoid", torch.nn.Sigmoid()),
    ("relu", torch.nn.ReLU()),
    ("tanh", torch.nn.Tanh()),
]


@pytest.mark.parametrize("hidden, activation", ACTIVATIONS)
@pytest.mark.parametrize("output", ["logits", "sigmoid"])
def test_mlp_equals_the_network_of_torchs_modules(hidden, activation, output, device):
    torch.manual_seed(0)
    for sizes in [(3, 2), (5, 7, 1), (127, 129, 64, 10)]:
        mlp = MLP(sizes, hidden, output, device=device, dtype=torch.float64)
        other = torch.nn.Sequential()
        for layer in mlp.layers:
            own = torch.nn.Linear(
                layer.in_features, layer.out_features, device=device, dtype=torch.float64
            )
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


def maxout_of_torchs_modules(mlp: MLP, x: torch.Tensor) -> torch.Tensor:
    """The output of a maxout MLP by two products a layer; the weight's first rows are the first
    piece's."""
    *hidden, last = mlp.layers
    for layer in hidden:
        (w1, w2), (b1, b2) = layer.weight.chunk(2), layer.bias.chunk(2)
        x = torch.maximum(
            torch.nn.functional.linear(x, w1, b1), torch.nn.functional.linear(x, w2, b2)
        )
    return torch.nn.functional.linear(x, last.weight, last.bias)


def test_maxout_equals_the_maximum_of_two_layers(device):
    torch.manual_seed(0)
    for sizes in [(3, 2), (5, 1, 1), (5, 7, 1), (127, 129, 64, 10)]:
        mlp = MLP(sizes, "maxout", device=device, dtype=torch.float64)
        state = {}
        for i, (before, after) in enumerate(pairwise(sizes)):
            rows = after if i == len(sizes) - 2 else 2 * after
            state |= {f"layers.{i}.weight": (rows, before), f"layers.{i}.bias": (rows,)}
        assert {name: tuple(t.shape) for name, t in mlp.state_dict().items()} == state
        xs = [
            torch.randn(*shape, sizes[0], device=device).double()
            for shape in ((0,), (6,), (2, 3), ())
        ]
        # Both pieces of 0 are equal, and share the gradient.
        for x in [*xs, torch.zeros_like(xs[1])]:
            y, expected = mlp(x), maxout_of_torchs_modules(mlp, x)
            torch.testing.assert_close(y, expected)
            grads = (
                torch.autograd.grad(t.square().sum() + t.sum(), list(mlp.parameters()))
                for t in (y, expected)
            )
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("hidden", ["tanh", "maxout"])
def test_derivatives_of_first_and_second_order(hidden, device):
    torch.manual_seed(0)
    mlp = MLP((4, 5, 3, 2), hidden, device=device, dtype=torch.float64)
    names = [name for name, _ in mlp.named_parameters()]

    def outputs(x, *parameters):
        return torch.func.functional_call(mlp, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(torch.randn_like(p).requires_grad_() for p in mlp.parameters()))
    assert torch.autograd.gradcheck(outputs, inputs)
    assert torch.autograd.gradgradcheck(outputs, inputs)


def test_maxout_is_compiled_as_one_graph(device):
    torch.manual_seed(0)
    mlp = MLP((5, 7, 3), "maxout", device=device)
    for layer in mlp.layers:
        torch.nn.init.normal_(layer.bias)
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    x = torch.randn(6, 5, device=device)
    compiled = torch.compile(mlp, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), mlp(x))
    (targets,) = graphs
    assert any("maximum" in target for target in targets)


def test_xavier_variance():
    torch.manual_seed(0)
    uniform, normal = (
        LinearSigmoid(300, 500).weight.detach(),
        numpy_mlp.NumpyMLP((300, 500), seed=1).weights[0],
    )
    # Of a maxout layer, each is drawn as a layer is.
    pieces = LinearMaxout(300, 500).weight.detach().numpy()
    variance = 2 / (300 + 500)
    for weight in (uniform.numpy(), normal, *np.split(pieces, 2)):
        # The mean of n draws deviates by σ/√n, and of normal ones the variance by σ²·√(2/n); five
        # of each.
        assert abs(weight.mean()) < 5 * (variance / weight.size) ** 0.5
        assert abs(weight.var() / variance - 1) < 5 * (2 / weight.size) ** 0.5
    assert uniform.abs().max() <= (3 * variance) ** 0.5


def test_biases_begin_at_0_or_are_left_out():
    assert not Linear(3, 4).bias.any()
    assert list(Linear(3, 4, bias=False).state_dict()) == ["weight"]
    assert LinearSigmoid(3, 4, bias=False)(torch.zeros(2, 3)).eq(0.5).all()
    assert not LinearMaxout(3, 4).bias.any()
    maxout = LinearMaxout(3, 4, bias=False)
    assert list(maxout.state_dict()) == ["weight"]
    assert maxout(torch.randn(2, 3)).shape == (2, 4)


# What tools make of the layers. tests/test_clients.py has the tools for which others stand in.


@pytest.mark.parametrize("layer", LAYERS)
def test_tools_that_know_linear_layers_are_right_or_raise(layer):
    of_stand_ins = {name: outcome(tool, LAYERS[layer]) for name, tool in STAND_INS.items()}
    assert of_stand_ins == {
        "adapter": "raises",
        "replacement": "left as it is",
        "initialization": "right",
    }
    of_pytorch = [outcome(tool, LAYERS[layer]) for tool in OF_PYTORCH.values()]
    assert of_pytorch == ["right", "left as it is", "right"]


def test_tools_are_wrong_with_a_layer_that_inherits_from_linear_or_is_not_asked():
    wrong = [outcome(STAND_INS[name], ByInheritance) for name in ("adapter", "replacement")]
    assert wrong == ["wrong"] * 2
    assert [outcome(tool, Linear) for tool in STAND_INS.values()] == ["right"] * 3
    not_asked = type("NotAsked", (LinearSigmoid,), {"_is_hf_initialized": False})
    assert outcome(STAND_INS["initialization"], not_asked) == "wrong"


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_looks_like_a_linear_layer(layer):
    own, of_torch = LAYERS[layer](5, 3), torch.nn.Linear(5, 3)
    assert not isinstance(own, torch.nn.Linear)
    assert str(own) == str(of_torch).replace("Linear", layer)
    assert [*own.state_dict()] == [*of_torch.state_dict()]
    assert (own.in_features, own.out_features) == (5, 3)
    assert str(LAYERS[layer](5, 3, bias=False)).endswith("bias=False)")


@pytest.mark.parametrize("hidden", ["sigmoid", "relu", "tanh", "maxout"])
def test_a_traced_mlp_has_the_values_of_the_mlp(hidden):
    model, x = MLP([5, 7, 3], hidden), torch.randn(4, 5)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    assert not torch.equal(traced(-x), model(x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([4, 0, 2],), r"sizes is \[4, 0, 2\], expected widths of at least 1"),
        (([4, 2.5, 2],), r"sizes is \[4, 2.5, 2\], expected widths of at least 1"),
        (("abc",), "sizes is 'abc', expected widths of at least 1"),
        ((784,), "sizes is 784, expected widths of at least 1"),
        (([3],), r"sizes is \[3\], expected at least"),
        (
            ([3, 2], "gelu"),
            "hidden is 'gelu', expected one of .'maxout', 'relu', 'sigmoid', 'tanh'.$",
        ),
        (([3, 2], "relu", "softmax"), "output is 'softmax', expected one of"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLP(*arguments)


@pytest.mark.parametrize("hidden", ["sigmoid", "relu", "tanh", "maxout"])
def test_to_read_the_attributes_of_a_layer_changes_nothing(hidden):
    """`torch.jit.trace` reads them all, and so do debuggers."""
    model, x = MLP([4, 6, 3], hidden=hidden), torch.randn(5, 4)
    weights = [p.detach().clone() for p in model.parameters()]
    generator = torch.get_rng_state()
    for layer in model.layers:
        for name in dir(layer):
            getattr(layer, name, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        traced = torch.jit.trace(model, x)
    assert all(map(torch.equal, model.parameters(), weights))
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(traced(x), model(x))
