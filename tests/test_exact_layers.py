# SPDX-License-Identifier: MIT
"""Layers, clipping and gradients in exact arithmetic: the whole's bits on every part, NaNs, and refusals."""

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from test_exact_training import Mesh, split
from test_parallel_layers import AXES, COLUMN, ROW, mine
from torch import Tensor
from torch.nn.functional import linear

from torchpar import training
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.nn import MLP, Linear, LinearReLU, LinearSigmoid
from torchpar.parallel import clip_grad_norm_, full_state_dict, join_world, parallel_mlp
from torchpar.parallel.split.exact import (
    ExactColumnParallelLinear,
    ExactLinear,
    ExactRowParallelLinear,
)
from torchpar.parallel.split.exact_gradients import ExactGradients
from torchpar.parallel.split.layers import split_parameters
from torchpar.parallel.split.pipeline import stage_mlp
from torchpar.training.verify import digest

WHOLE = {None: Linear, "sigmoid": LinearSigmoid, "relu": LinearReLU}
EXACT = {COLUMN: ExactColumnParallelLinear, ROW: ExactRowParallelLinear}
LAYERS: list[tuple[Any, tuple[int, int], bool, Any, dict[str, Any]]] = [
    (COLUMN, (12, 33), True, "sigmoid", {}),
    (COLUMN, (5, 7), False, "relu", {"gather_output": True}),
    (COLUMN, (3, 1), True, "sigmoid", {"gather_output": True}),  # some ranks have no features
    (COLUMN, (300, 4), True, None, {}),
    (ROW, (33, 12), True, None, {}),
    (ROW, (7, 5), True, "sigmoid", {"input_is_parallel": False}),
    (ROW, (300, 4), False, "relu", {}),
    (ROW, (1, 3), True, "relu", {"input_is_parallel": False}),
]


def results(layer: Any, x: Tensor, g: Tensor, gradients: Callable[[], None] | None) -> dict[str, Tensor]:
    """Output and gradients of a layer; of parameters by ``gradients``, or else by autograd."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    if gradients is not None:
        gradients()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def layers_have_the_same_bits() -> None:
    """Those of the whole layer in exact arithmetic, whose errors are at most twice those of float32."""
    with join_world("cpu") as world:
        world = world.with_mesh(tp=world.world_size)
        mesh = world.mesh["tp"]
        for kind, sizes, bias, activation, options in LAYERS:
            torch.manual_seed(0)
            whole = WHOLE[activation](*sizes, bias)
            if bias:
                torch.nn.init.normal_(whole.bias)
            layer = EXACT[kind].from_linear(whole, mesh=mesh, **options)
            one = ExactLinear.from_linear(whole)
            axes: dict[str, int | None] = dict(AXES[kind])
            axes["y"] = -1 if kind is COLUMN and not options.get("gather_output") else None
            axes["x"] = -1 if kind is ROW and options.get("input_is_parallel", True) else None
            for shape in ((65,), (2, 3), (0,)):
                x, g = torch.randn(*shape, sizes[0]), torch.randn(*shape, sizes[1])
                if shape != (65,):
                    x[..., :1] *= 1000  # exponents of other ranks' columns are smaller
                found = results(layer, mine(x, axes["x"]), mine(g, axes["y"]), ExactGradients(layer, world))
                expected = results(one, x, g, ExactGradients(one, world.with_mesh(tp=world.world_size)))
                truth = results(whole.double(), x.double(), g.double(), None)
                single = results(whole.float(), x, g, None)
                for name, t in expected.items():
                    assert torch.equal(found[name], mine(t, axes.get(name))), (kind, sizes, name)
                    errors = [(r[name] - truth[name]).norm() for r in (expected, single)]
                    if shape == (65,) and t.numel() > 10:  # of few numbers the errors are chance
                        assert errors[0] <= 2 * errors[1], (kind, sizes, name)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_split_layers_have_the_whole_ones_bits(ranks, world_size):
    ranks(world_size, layers_have_the_same_bits)


def layers_of_float32_products() -> None:
    def act(layer: Any, x: Tensor) -> Tensor:
        z = linear(x, layer.weight)
        if layer.adds_outputs is not None:
            dist.all_reduce(z.data)
        return z if layer.bias is None else z + layer.bias

    with (
        patch("torchpar.parallel.split.exact.ExactLayer.affine", act),
        patch.object(ExactGradients, "__call__"),
    ):
        layers_have_the_same_bits()


def test_the_comparison_rejects_products_of_float32(ranks):
    with pytest.raises(AssertionError):
        ranks(2, layers_of_float32_products)


def test_the_gradient_of_relu_at_exactly_0_is_one_half(ranks):
    for arithmetic, gradient in ranks(2, gradients_at_0):
        assert arithmetic == gradient == [0.5, 0.0, 1.0]


def gradients_at_0() -> tuple[list[float], list[float]]:
    """Of the biases of three units at 0, below and above, in exact arithmetic and by `LinearReLU`."""
    found = []
    with join_world("cpu") as world:
        for kind in (ExactLinear.from_linear, lambda layer: layer):
            layer = LinearReLU(2, 3)
            with torch.no_grad():
                layer.weight.zero_()
                layer.bias.copy_(torch.tensor([0.0, -1.0, 1.0]))
            layer = kind(layer)
            layer(torch.ones(world.world_size, 2)[:1]).sum().backward()
            if isinstance(layer, ExactLinear):
                ExactGradients(layer, world.with_mesh(tp=world.world_size))()
            found.append(layer.bias.grad.tolist())
    return found[0], found[1]


def frozen(names: list[str]) -> dict[str, list[float]]:
    """The gradients after two steps of two passes each, where parameters of given names are frozen."""
    with join_world("cpu") as world:
        world = world.with_mesh(dp=world.world_size)
        torch.manual_seed(0)
        model = parallel_mlp(MLP([5, 7, 3]), world.mesh["tp"], "exact")
        for name, p in model.named_parameters():
            p.requires_grad_(name not in names)
        gradients = ExactGradients(model, world)
        for _ in range(2):
            for factor in (1.0, 2.0):
                x = torch.full((2, 5), factor, requires_grad=names == ALL)
                (model(x) * factor).sum().backward()
            gradients()
            assert not any(layer.passes for layer in model.layers)
        return {name: p.grad.flatten().tolist() for name, p in model.named_parameters() if p.grad is not None}


ALL = [f"layers.{i}.{name}" for i in range(2) for name in ("weight", "bias")]


@pytest.mark.parametrize(
    "names",
    [
        ["layers.0.bias", "layers.1.weight"],
        ["layers.0.weight"],
        ["layers.0.weight", "layers.0.bias"],
        ["layers.1.bias"],
        ALL,
    ],
)
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(ranks, names):
    (whole, _), (one, two) = ranks(2, frozen, []), ranks(2, frozen, names)
    assert any(map(any, whole.values()))
    assert one == two == {name: gradient for name, gradient in whole.items() if name not in names}


def refusals(axes: dict[str, int]) -> list[str]:
    with join_world("cpu") as world:
        world = world.with_mesh(**axes)
        model = parallel_mlp(MLP([5, 7, 3, 2]), world.mesh["tp"], "exact")
        gradients = ExactGradients(model, world)
        x = torch.ones(2, 5, requires_grad=True)
        norm = torch.nn.Sequential(ExactLinear(5, 7), torch.nn.LayerNorm(7))
        calls: list[Callable[[], object]] = [
            gradients,
            lambda: (model(x).sum().backward(), gradients(2)),
            lambda: gradients(0),
            lambda: (model.layers[1].requires_grad_(False), gradients()),
            lambda: ExactGradients(norm, world),
            lambda: ExactGradients(parallel_mlp(MLP([5, 7, 3]), world.mesh["tp"]), world),
        ]
        messages = []
        for call in calls:
            try:
                call()
                messages.append("taken")
            except ValueError as e:
                messages.append(str(e))
        return messages


@pytest.mark.parametrize("axes", [{"dp": 2}, {"tp": 2}])
def test_gradients_that_are_refused_on_every_rank(ranks, axes):
    for messages in ranks(2, refusals, axes):
        assert messages == [
            *(
                f"a layer saw {n} backward passes since the last call, expected {n + 1}; "
                "call backward() of the loss before"
                for n in (0, 1)
            ),
            "passes is 0, expected at least 1",
            "layers.1 was frozen after ExactGradients was made; make another one",
            "1.weight is of no layer in exact arithmetic, expected those of parallel_mlp",
            "layers.0.weight is of no layer in exact arithmetic, expected those of parallel_mlp",
        ]


def passes_for_inputs() -> None:
    with join_world("cpu") as world:
        model = parallel_mlp(MLP([5, 7, 3]), world.mesh["tp"], "exact")
        gradients = ExactGradients(model, world)
        x = torch.randn(4, 5, requires_grad=True)
        loss = model(x).square().sum()
        torch.autograd.grad(loss, x, retain_graph=True)  # asks for no gradient of a parameter
        with pytest.raises(ConfigError, match="saw 0 backward passes"):
            gradients()
        loss.backward()
        copy.deepcopy(model)  # what is kept belongs to no graph
        gradients()
        assert all(p.grad is not None for p in model.parameters())


def test_gradients_of_inputs_alone_count_for_no_parameter(ranks):
    ranks(1, passes_for_inputs)


def not_finite(value: float, masked: bool) -> None:
    with join_world("cpu") as world:
        layer = ExactLinear(3, 2)
        gradients = ExactGradients(layer, world)
        y = layer(torch.tensor([[value, 1, 2], [1, 2, 3.0]]))
        (y[1:] if masked else y).sum().backward()
        gradients()
        assert layer.weight.grad.isnan().all()
        assert layer.bias.grad.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_sample_that_is_not_finite_makes_the_gradient_nan(ranks, value, masked):
    ranks(1, not_finite, value, masked)


SIZES = (25, 33, 7, 5)
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda g: g,
    "tiny": lambda g: g * 1e-30,
    "subnormal": lambda g: g * 1e-42,
    "of many magnitudes": lambda g: g * 10.0 ** torch.randint(-30, 30, g.shape),
    "0": torch.zeros_like,
    "inf": lambda g: torch.where(g == g.max(), torch.inf, g),
    "nan": lambda g: torch.where(g == g.max(), torch.nan, g),
}


def clipped(axes: dict[str, int]) -> dict[str, tuple[float, float, str]]:
    """For each of `GRADIENTS` the norm, the true one, and the hash of the clipped gradients."""
    found = {}
    with join_world("cpu") as world:
        world = world.with_mesh(**axes)
        for name, change in GRADIENTS.items():
            torch.manual_seed(0)
            whole = MLP(SIZES)
            grads = {name: change(torch.randn(p.shape)) for name, p in whole.named_parameters()}
            model = stage_mlp(parallel_mlp(whole, world.mesh["tp"], "exact"), world.mesh["pp"])
            parts = {name: (axis, layer.partition) for name, axis, layer in split_parameters(model)}
            for key, p in model.named_parameters():
                p.grad = parts[key][1].narrow(grads[key], parts[key][0]) if key in parts else grads[key]
                p.grad = p.grad.clone()
            norm = clip_grad_norm_(model, 0.5, world, "exact")
            true = torch.cat([g.flatten().double() for g in grads.values()]).norm()
            for p in model.parameters():
                p.data = torch.where(p.grad.isnan(), torch.nan, p.grad)  # NaNs have many bit patterns
            found[name] = norm.item(), true.item(), digest(model, world)
            if name in ("inf", "nan"):
                assert not any(p.isfinite().any() for p in model.parameters())
            else:
                assert all(t.isfinite().all() for t in full_state_dict(model).values())
    return found


CLIPPED = [{"dp": 3}, {"tp": 2}, {"tp": 5}, {"pp": 3}, {"dp": 2, "tp": 2}, {"tp": 2, "pp": 2}]


def test_a_clipped_gradient_has_the_same_bits_on_every_mesh(ranks):
    (expected,) = ranks(1, clipped, {})
    for name, (norm, true, _) in expected.items():
        if name in ("inf", "nan"):
            assert norm != norm
        else:
            # Squares in units of 2⁻⁶⁰ times the largest's: 1e3 of them are less than 1e-14 of their sum.
            assert norm == pytest.approx(true, rel=1e-12, abs=0), name
    assert len({bits for _, _, bits in expected.values()}) == len(expected) - 1  # inf and NaN end alike
    for axes in CLIPPED:
        world_size = torch.tensor(list(axes.values())).prod().item()
        for found in ranks(world_size, clipped, axes):
            assert repr(found) == repr(expected), axes


def test_the_norm_of_float64_squares_has_other_bits(ranks):
    """Fast clipping adds them in an order that depends on the mesh: its norm is as accurate, not as equal."""
    assert len({ranks(n, fast_norm, axes)[0] for n, axes in ((1, {}), (2, {"tp": 2}), (3, {"tp": 3}))}) > 1


def fast_norm(axes: dict[str, int]) -> float:
    with join_world("cpu") as world:
        world = world.with_mesh(**axes)
        torch.manual_seed(0)
        model = parallel_mlp(MLP((257, 129, 65)), world.mesh["tp"])
        for p in model.parameters():
            p.grad = p.detach().clone()
        return clip_grad_norm_(model, 1e9, world).item()


def run_with_a_nan(mesh: Mesh) -> tuple[str, bool]:
    """The error of a run with a NaN among its inputs, and whether the loss of the batch is NaN."""
    sizes = (9, 4, 130, 4)
    torch.manual_seed(0)
    x = torch.rand(12, sizes[0])
    x[7, 3] = torch.nan
    samples = Samples(x, torch.arange(12) % sizes[-1], tuple("0123"))
    total = torch.zeros((), dtype=torch.float64)
    with join_world("cpu") as world:
        world = world.with_mesh(**mesh.axes)
        model, step, predict = split(MLP(sizes, "relu"), world, mesh)
        optimizer = training.sgd(model, lr=0.5, momentum=0.9, weight_decay=0, arithmetic="exact")
        try:
            with training.Run(
                *(model, optimizer, None, world, samples, samples), epochs=1, batch_size=12, predict=predict
            ) as run:
                for epoch in run.epochs():
                    for batch in run.batches(epoch):
                        loss = step(*batch)
                        total = world.sum(loss.double() * world.owns_outputs)
                        optimizer.step()
                        run.log(loss)
        except ConfigError as e:
            return str(e), total.isnan().item()
    return "", total.isnan().item()


@pytest.mark.parametrize("mesh", [Mesh(dp=3), Mesh(tp=2), Mesh(pp=2)], ids=["dp", "tp", "pp"])
def test_a_nan_ends_the_run(ranks, mesh):
    for message, is_nan in ranks(mesh.ranks, run_with_a_nan, mesh):
        assert is_nan
        assert "not finite" in message or "nan" in message
        assert "\n" not in message
