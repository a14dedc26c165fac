# SPDX-License-Identifier: MIT
"""Layers, clipping and gradients in exact arithmetic: the whole's bits on every part, NaNs, and refusals."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.exact import clip_grad_norm_, parallel_mlp
from torchpar.exact.gradients import ExactGradients
from torchpar.exact.layers import ExactColumnParallelLinear, ExactLinear, ExactRowParallelLinear
from torchpar.nn import MLP, Linear, LinearReLU, LinearSigmoid
from torchpar.parallel import join_world

WHOLE = {None: Linear, "sigmoid": LinearSigmoid, "relu": LinearReLU}
COLUMN, ROW = ExactColumnParallelLinear, ExactRowParallelLinear
LAYERS: list[tuple[Any, tuple[int, int], bool, Any, dict[str, Any]]] = [
    (COLUMN, (12, 33), True, "sigmoid", {}),
    (COLUMN, (5, 7), False, "relu", {"gather_output": True}),
    (COLUMN, (3, 1), True, None, {"gather_output": True}),  # some ranks have no features
    (ROW, (33, 12), True, None, {}),
    (ROW, (7, 5), True, "sigmoid", {"input_is_parallel": False}),
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

        def mine(t: Tensor, axis: int | None) -> Tensor:
            return t if axis is None else t.tensor_split(mesh.size(), axis)[mesh.get_local_rank()]

        rejected = 0
        for kind, sizes, bias, activation, options in LAYERS:
            torch.manual_seed(0)
            whole = WHOLE[activation](*sizes, bias)
            if bias:
                torch.nn.init.normal_(whole.bias)
            layer = kind.from_linear(whole, mesh=mesh, **options)
            one = ExactLinear.from_linear(whole)
            axes: dict[str, int | None] = dict(kind.split_axes)
            axes["y"] = -1 if kind is COLUMN and not options.get("gather_output") else None
            axes["x"] = -1 if kind is ROW and options.get("input_is_parallel", True) else None
            for shape in ((65,), (2, 3), (0,)):
                x, g = torch.randn(*shape, sizes[0]), torch.randn(*shape, sizes[1])
                if shape != (65,):
                    x[..., :1] *= 1000  # exponents of other ranks' columns are smaller
                found = results(layer, mine(x, axes["x"]), mine(g, axes["y"]), ExactGradients(layer, world))
                expected = results(one, x, g, ExactGradients(one, world))
                truth = results(whole.double(), x.double(), g.double(), None)
                single = results(whole.float(), x, g, None)
                for name, t in expected.items():
                    assert torch.equal(found[name], mine(t, axes.get(name))), (kind, sizes, name)
                    rejected += not torch.equal(single[name], t)
                    errors = [(r[name] - truth[name]).norm() for r in (expected, single)]
                    if shape == (65,) and t.numel() > 10:  # of few numbers the errors are chance
                        assert errors[0] <= 2 * errors[1], (kind, sizes, name)
            x = torch.randn(3, sizes[0])
            x[1, 0] = torch.inf
            found, expected = layer(mine(x, axes["x"])), mine(one(x), axes["y"])
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found[::2], expected[::2])
        assert rejected > len(LAYERS)  # results of products of float32


# Gradients


ALL = [f"layers.{i}.{name}" for i in range(2) for name in ("weight", "bias")]


def frozen() -> None:
    whole: dict[str, Tensor] = {}
    with join_world("cpu") as world:
        world = world.with_mesh(dp=world.world_size)
        for names in ([], ALL[1:3], ALL[:2], ALL[3:], ALL):
            torch.manual_seed(0)
            model = parallel_mlp(MLP([5, 7, 3]), world.mesh["tp"])
            for name, p in model.named_parameters():
                p.requires_grad_(name not in names)
            gradients = ExactGradients(model, world)
            for factor in (1.0, 2.0):
                x = torch.full((2, 5), factor, requires_grad=names == ALL)
                (model(x) * factor).sum().backward()
            gradients()
            assert not any(layer.passes for layer in model.layers)
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            whole = whole or found
            assert found.keys() == set(ALL) - set(names)
            assert all(gradient.any() and gradient.equal(whole[name]) for name, gradient in found.items())


def refusals() -> None:
    with join_world("cpu") as world:
        world = world.with_mesh(dp=world.world_size)
        model = parallel_mlp(MLP([5, 7, 3, 2]), world.mesh["tp"])
        gradients = ExactGradients(model, world)
        x = torch.ones(2, 5, requires_grad=True)
        norm = torch.nn.Sequential(ExactLinear(5, 7), torch.nn.LayerNorm(7))
        loss = model(x).sum()
        saw = "a layer saw {} backward passes since the last call, expected {}; call"
        cases: list[tuple[Callable[[], object], str]] = [
            (lambda: (torch.autograd.grad(loss, x, retain_graph=True), gradients()), saw.format(0, 1)),
            (lambda: (model(x).sum().backward(), gradients(2)), saw.format(1, 2)),
            (lambda: gradients(0), "passes is 0, expected at least 1"),
            (
                lambda: (model.layers[1].requires_grad_(False), gradients()),
                "layers.1 was frozen after ExactGradients was made; make another one",
            ),
            (lambda: ExactGradients(norm, world), "1.weight belongs to no layer in exact arithmetic, exp"),
            (lambda: torch.autograd.grad(loss, x, create_graph=True), "no second derivative; leave out"),
            (lambda: ExactLinear.from_linear(norm[1]), "cannot copy a LayerNorm, expected one of torch.nn."),
        ]
        for call, message in cases:
            with pytest.raises(ConfigError, match=message):
                call()


def peculiar_gradients() -> None:
    with join_world("cpu") as world:
        layer = ExactLinear(2, 3, activation="relu")
        layer.load_state_dict({"weight": torch.zeros(3, 2), "bias": torch.tensor([0.0, -1.0, 1.0])})
        layer(torch.ones(1, 2)).sum().backward()
        copy.deepcopy(layer)  # what a backward pass has left belongs to no graph
        ExactGradients(layer, world)()
        assert layer.bias.grad.tolist() == [0.0, 0.0, 1.0]  # as LinearReLU
        for value in (torch.inf, torch.nan):
            for first in (0, 1):  # 1: the sample that is not finite has no part in the loss
                layer = ExactLinear(3, 2)
                layer(torch.tensor([[value, 1, 2], [1, 2, 3.0]]))[first:].sum().backward()
                ExactGradients(layer, world)()
                assert layer.weight.grad.isnan().all()
                assert layer.bias.grad.isfinite().all()


# Clipping


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "subnormal": lambda g: g * 1e-42,
    "of many magnitudes": lambda g: g * 10.0 ** torch.randint(-30, 30, g.shape),
    "0": torch.zeros_like,
    "inf": lambda g: torch.where(g == g.max(), torch.inf, g),
}


def clipped() -> None:
    """`test_exact_training.py` compares the bits of clipped gradients on other meshes."""
    with join_world("cpu") as world:
        for name, change in GRADIENTS.items():
            torch.manual_seed(0)
            model = parallel_mlp(MLP((25, 33, 7, 5)), world.mesh["tp"])
            for p in model.parameters():
                p.grad = change(torch.randn(p.shape))
            true = torch.cat([p.grad.flatten().double() for p in model.parameters()]).norm().item()
            before = [p.grad.clone() for p in model.parameters()]
            norm = clip_grad_norm_(model, 0.5, world).item()
            for p, gradient in zip(model.parameters(), before, strict=True):
                if name == "inf":
                    assert norm != norm
                    assert p.grad.isnan().all()
                else:
                    # Squares in units of 2⁻⁶⁰ times the largest: 1e3 are less than 1e-14 of their sum.
                    assert norm == pytest.approx(true, rel=1e-12, abs=0), name
                    scale = torch.tensor(min(0.5 / (norm + 1e-6), 1)).float()
                    assert torch.equal(p.grad, gradient * scale)


@pytest.mark.parametrize(
    "world_size, check",
    [
        *((n, layers_have_the_same_bits) for n in (1, 2, 3)),
        (2, frozen),
        (2, refusals),
        (1, peculiar_gradients),
        (1, clipped),
    ],
)
def test_on_ranks(ranks, world_size, check):
    ranks(world_size, check)
