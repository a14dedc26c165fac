# SPDX-License-Identifier: MIT
"""Split layers compared with whole ones: values, gradients, collectives and their order.

Each rank builds the whole layer from the same seed and compares its own part.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from torchpar import reference
from torchpar.nn import MLP, Linear, LinearReLU, LinearSigmoid
from torchpar.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    full_state_dict,
    load_full_state_dict,
    parallel_mlp,
)
from torchpar.parallel.split import layers

COLUMN, ROW = ColumnParallelLinear, RowParallelLinear
WHOLE = {None: Linear, "sigmoid": LinearSigmoid, "relu": LinearReLU}
AXES = {COLUMN: {"weight": 0, "bias": 0}, ROW: {"weight": 1}}
# Two orders of summing at most 40 float64 terms below 10 each: 2·40·eps·400 < 1e-11.
TIGHT = {"rtol": 0.0, "atol": 1e-11}
EQUAL = {"rtol": 0.0, "atol": 0.0}


def tp_mesh(device: str = "cpu") -> DeviceMesh:
    return init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))


def mine(t: Tensor, axis: int | None) -> Tensor:
    """This rank's part of ``t`` along ``axis``."""
    return t if axis is None else t.tensor_split(dist.get_world_size(), axis)[dist.get_rank()]


def pair_of_layers(
    kind: Any, sizes: tuple[int, int], bias: bool, activation: Any, dtype: torch.dtype
) -> tuple[Any, Linear]:
    """A split layer and the whole one from the same seed, with biases other than 0."""
    torch.manual_seed(0)
    layer = kind(*sizes, bias, mesh=tp_mesh(), activation=activation, dtype=dtype)
    torch.manual_seed(0)
    whole = WHOLE[activation](*sizes, bias, dtype=dtype)
    for name, p in whole.named_parameters():
        assert torch.equal(getattr(layer, name), mine(p, AXES[kind].get(name))), name
    if whole.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(mine(whole.bias.normal_(), AXES[kind].get("bias")))
    return layer, whole


def results(layer: Any, x: Tensor, g: Tensor | None, *of: str) -> dict[str, Tensor]:
    """The output, and the gradients ``of`` some tensors, by default all; without ``g`` those of the sum."""
    leaves = {"x": x.detach().requires_grad_(), **dict(layer.named_parameters())}
    leaves = {name: t for name, t in leaves.items() if not of or name in of}
    y = layer(leaves.get("x", x.detach()))
    grads = torch.autograd.grad(y.sum() if g is None else y, [*leaves.values()], g)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def expected_results(kind: Any, whole: Linear, x: Tensor, g: Tensor | None) -> Any:
    """The right `results` on this rank, and this rank's parts of x and g."""
    axes = AXES[kind] | ({"y": -1} if kind is COLUMN else {"x": -1})
    expected = {name: mine(t, axes.get(name)) for name, t in results(whole, x, g).items()}
    return expected, mine(x, axes.get("x")), None if g is None else mine(g, axes.get("y"))


def compare(kind: Any, sizes: tuple[int, int], bias: bool, activation: Any) -> None:
    layer, whole = pair_of_layers(kind, sizes, bias, activation, torch.float64)
    narrow = torch.randn(6, 2 * sizes[0], dtype=torch.float64)
    xs = [narrow[:0, : sizes[0]], narrow[0, : sizes[0]], narrow[:, ::2], narrow.view(2, 3, -1)[..., ::2]]
    xs.append(torch.randn(sizes[0], 5, dtype=torch.float64).mT)
    xs.append(torch.zeros(2, sizes[0], dtype=torch.float64))  # a ReLU's derivative at 0
    for x in xs:
        for g in (None, torch.randn(*x.shape[:-1], sizes[1], dtype=torch.float64)):
            expected, own_x, own_g = expected_results(kind, whole, x, g)
            assert_close(results(layer, own_x, own_g), expected, **TIGHT)
    for name in {*expected} - {"y"}:  # nothing else needs a gradient
        assert_close(results(layer, own_x, own_g, name), {k: expected[k] for k in ("y", name)}, **TIGHT)


CASES = [
    (COLUMN, (12, 32), True, "sigmoid"),
    (COLUMN, (5, 7), False, "relu"),
    (COLUMN, (3, 1), True, None),  # some ranks have no features
    (ROW, (32, 12), True, "relu"),
    (ROW, (7, 5), True, "sigmoid"),
    (ROW, (1, 3), False, None),
]


def split_layers_equal_the_whole_ones() -> None:
    for case in CASES:
        compare(*case)


def compare_without_reduction() -> None:
    with patch.object(layers, "start_all_reduce", lambda *_: lambda: None):
        compare(*CASES[0])


def test_the_comparison_rejects_a_missing_collective(ranks):
    with pytest.raises(AssertionError, match=r"item \['x'\]"):
        ranks(2, compare_without_reduction)


def errors_under_autocast_are_those_of_the_whole_layer() -> None:
    for kind, activation in ((COLUMN, "sigmoid"), (ROW, None)):
        layer, whole = pair_of_layers(kind, (129, 127), True, activation, torch.float32)
        x, g = torch.randn(65, 129), torch.randn(65, 127)
        truth, own_x, own_g = expected_results(kind, copy.deepcopy(whole).double(), x.double(), g.double())
        for module in (layer, whole):  # autocast for the forward pass only
            module.forward = torch.autocast("cpu", torch.bfloat16)(module.forward)
        g = g.bfloat16()
        expected, *_ = expected_results(kind, whole, x, g)
        found = results(layer, own_x.float(), own_g.to(g.dtype))
        for name, t in truth.items():
            error, of_whole = ((one[name] - t).abs().max() for one in (found, expected))
            assert 0 < error <= 2 * of_whole, name


def the_plain_references_are_right() -> None:
    """column → sigmoid → row, and the average that DistributedDataParallel computes."""
    torch.manual_seed(0)
    x, g = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    first, second = torch.nn.Linear(6, 7).double(), torch.nn.Linear(7, 3).double()
    sigmoid = torch.nn.Sigmoid()
    twin = [reference.ColumnParallelLinear(first), sigmoid, reference.RowParallelLinear(second)]
    axes = {"0.weight": 0, "0.bias": 0, "2.weight": 1}
    whole = results(torch.nn.Sequential(first, sigmoid, second), x, g)
    expected = {name: mine(t, axes.get(name)) for name, t in whole.items()}
    assert_close(results(torch.nn.Sequential(*twin), x, g), expected, **TIGHT)

    plain = MLP([5, 7, 3], dtype=torch.float64)
    replica = DistributedDataParallel(copy.deepcopy(plain))
    torch.manual_seed(dist.get_rank())
    x = torch.randn(4, 5, dtype=torch.float64)
    for model in (replica, plain):
        model(x).square().sum().backward()
    reference.average_gradients(plain)
    for p, q in zip(replica.parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, **TIGHT)


def sequential() -> torch.nn.Sequential:
    """PyTorch's own layers with one ReLU in two places, and units whose sum is exactly 0."""
    relu, narrow = torch.nn.ReLU(inplace=True), torch.nn.Linear(7, 1, bias=False)
    layers = {"in": torch.nn.Linear(9, 7), "act": relu, "mid": narrow, "again": relu}
    model = torch.nn.Sequential(OrderedDict(layers))
    model.extend([LinearSigmoid(1, 6), torch.nn.Linear(6, 4), torch.nn.Sigmoid()])
    with torch.no_grad():
        model[0].weight[::2], model[0].bias[::2] = 0, 0
    return model.double()


def second_derivatives(model: Any, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The gradients of the squared norm of the loss's gradient of x."""
    x = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad((model(x).square() * g).sum(), x, create_graph=True)
    leaves = {"x": x, **dict(model.named_parameters())}
    grads = torch.autograd.grad(dx.square().sum(), [*leaves.values()])
    return {f"second {name}": t for name, t in zip(leaves, grads, strict=True)}


def mlp_equals(device: str) -> None:
    x = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    mesh = tp_mesh(device)
    torch.manual_seed(0)
    mlps = (((9, 3), "sigmoid", "sigmoid"), ((9, 1, 6, 32, 2), "relu", "logits"))
    for whole in (*(MLP(*case, dtype=torch.float64) for case in mlps), sequential().eval()):
        before = copy.deepcopy(whole.to(device).state_dict())
        twin = parallel_mlp(whole, mesh)
        assert (type(twin), twin.training) == (type(whole), whole.training)
        g = torch.randn_like(whole(x))
        found, expected = (results(m, x, g) | second_derivatives(m, x, g) for m in (twin, whole))
        assert list(found) == list(expected)
        for name, t in expected.items():
            axis = next((a for a in range(t.dim()) if found[name].shape[a] != t.shape[a]), None)
            assert_close(found[name], mine(t, axis), **TIGHT)
        assert_close(full_state_dict(twin), before, **EQUAL)
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(1)
        assert_close(whole.state_dict(), before, **EQUAL)
        assert_close(full_state_dict(twin), {name: t + 1 for name, t in before.items()}, **EQUAL)
        load_full_state_dict(twin, before)
        assert_close(full_state_dict(twin), before, **EQUAL)


@pytest.mark.parametrize("world_size", [1, 3])
def test_parallel_mlp_equals_the_whole_mlp_and_does_not_change_it(ranks, device, world_size):
    """On a GPU the ranks share it, and gloo sends some messages through the CPU."""
    ranks(world_size, mlp_equals, device)


# Refusals


def refused(message: str, build: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises((ValueError, RuntimeError), match=f"^{re.escape(message)}"):
        build(*args, **options)


def bad_arguments_are_named() -> None:
    mesh = tp_mesh()
    square = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    column = partial(COLUMN, 3, 4, mesh=mesh)
    refused("activation is 'tanh', expected None, 'sigmoid' or 'relu'", column, activation="tanh")
    refused("mesh has dimensions ('dp', 'tp'), expected one, such as mesh['tp']", ROW, 3, 4, mesh=square)

    class OwnLinear(Linear):
        """A layer that may compute something else."""

    convert, linear = COLUMN.from_linear, torch.nn.Linear(3, 3)
    known = "expected torch.nn.Linear or torchpar.nn.Linear, LinearSigmoid or LinearReLU"
    refused(f"cannot split a OwnLinear, {known}", convert, OwnLinear(3, 4), mesh=mesh)
    twice = "activation is 'relu', but LinearSigmoid has 'sigmoid' already"
    refused(twice, convert, LinearSigmoid(3, 4), mesh=mesh, activation="relu")

    def split(*layers: torch.nn.Module) -> None:
        parallel_mlp(torch.nn.Sequential(linear, *layers), mesh)

    refused("cannot split a Linear, expected torchpar.nn.MLP or", parallel_mlp, linear, mesh)
    refused(
        "cannot split layer 1, a Dropout; expected Linear, Linear, LinearSigmoid, LinearReLU, Sigmoid",
        split,
        torch.nn.Dropout(),
    )
    refused("cannot split layers that share parameters", split, torch.nn.Sigmoid(), linear)

    load = partial(load_full_state_dict, parallel_mlp(MLP([5, 33, 2]), mesh))
    shape = "layers.0.weight has shape (30, 5), expected 33 on axis 0"
    refused(shape, load, MLP([5, 30, 2]).state_dict())


def different_layers_are_refused() -> None:
    mesh, rank = tp_mesh(), dist.get_rank()
    layer = {"in_features": 4, "out_features": 4, "mesh": mesh}
    for kind, name, *values in (
        (COLUMN, "in_features", 5, 6),
        (ROW, "bias", True, False),
        (COLUMN, "activation", "tanh", None),
        (COLUMN, "dtype", torch.float64, torch.float32),
    ):
        message = f"a layer's ranks: {name} is {values[0]} on rank 0 and {values[1]} on rank 1, expected"
        refused(message, kind, **layer | {name: values[rank]})
    refused("a layer's ranks: layer is ColumnParallelLinear on rank 0", (COLUMN, ROW)[rank], **layer)
    COLUMN(**layer)
    refused("the ranks' models: layers is ", parallel_mlp, MLP([5, 7 + rank, 5]), mesh)


def different_shapes_are_refused_before_they_are_sent() -> None:
    mesh, rank = tp_mesh(), dist.get_rank()
    pair = torch.nn.Sequential(COLUMN(4, 6, mesh=mesh), ROW(6, 3, mesh=mesh))
    for rows in ((1, 2), (7, 8), (1, 2)):  # what was refused is refused again
        message = f"({rows[rank]}, 3) torch.float32 on rank {rank}, ({rows[1 - rank]}, 3) torch.float32 on"
        refused(f"ranks of a group send different shapes: {message}", pair, torch.ones(rows[rank], 4))
        assert len(pair(torch.ones(5, 4))) == 5


# Collectives


def collectives_of_layers_and_pairs() -> None:
    mesh, reduced, cases = tp_mesh(), "c10d.allreduce_", []
    for frozen, needs_gradient, backward in (
        (0, False, {reduced: 1}),
        (1, False, {}),
        (2, True, {reduced: 2}),
    ):
        model = parallel_mlp(MLP([5, 7, 5, 7, 5]), mesh)
        model.layers[: 2 * frozen].requires_grad_(False)
        cases.append((model, needs_gradient, {reduced: 2}, backward))
    for model, needs_gradient, forward, backward in cases:
        x, head = torch.randn(3, 5, requires_grad=needs_gradient), torch.ones((), requires_grad=True)
        with CommDebugMode() as mode:
            loss = model(x).sum() * head
        assert {str(op): n for op, n in mode.get_comm_counts().items()} == forward
        with CommDebugMode() as mode:
            loss.backward()
        assert {str(op): n for op, n in mode.get_comm_counts().items()} == backward


@pytest.mark.parametrize(
    "function, world_size",
    [
        (split_layers_equal_the_whole_ones, 1),
        (split_layers_equal_the_whole_ones, 3),
        (errors_under_autocast_are_those_of_the_whole_layer, 2),
        (the_plain_references_are_right, 3),
        (bad_arguments_are_named, 2),
        (different_layers_are_refused, 2),
        (different_shapes_are_refused_before_they_are_sent, 2),
        (collectives_of_layers_and_pairs, 2),
    ],
)
def test_on_every_rank(ranks, function, world_size):
    ranks(world_size, function)


def order_of_events() -> list[Any]:
    """The products of a column layer's backward pass by their shape, and the two ends of its all-reduce."""
    events: list[Any] = []
    start = layers.start_all_reduce

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                events.append(tuple(result.shape))
            return result

    def start_all_reduce(*args: Any) -> Callable[[], None]:
        wait = start(*args)
        events.append("start")
        return lambda: (wait(), events.append("end"))

    y = COLUMN(5, 8, mesh=tp_mesh(), activation="sigmoid")(torch.randn(3, 5, requires_grad=True))
    with (
        patch.object(layers, "start_all_reduce", start_all_reduce),
        patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce,
        Products(),
    ):
        y.sum().backward()
    assert all_reduce.call_args.kwargs["async_op"]
    return events


def test_the_all_reduce_overlaps_with_the_weights_gradient(ranks):
    dx, dw = (3, 5), (4, 5)
    assert ranks(2, order_of_events) == [[dx, "start", dw, "end"]] * 2
