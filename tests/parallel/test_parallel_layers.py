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
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from saved import same
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from torchpar import reference
from torchpar.nn import HIDDEN_LAYERS, MLP, Linear, LinearMaxout, LinearSigmoid
from torchpar.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    full_state_dict,
    load_full_state_dict,
    parallel_mlp,
)
from torchpar.parallel.split import layers

COLUMN, ROW = ColumnParallelLinear, RowParallelLinear
AXES = {COLUMN: {"weight": 0, "bias": 0}, ROW: {"weight": 1}}
# Two orders of summing at most 40 float64 terms below 10 each: 2·40·eps·400 < 1e-11.
TIGHT = {"rtol": 0.0, "atol": 1e-11}


def tp_mesh(device: str = "cpu") -> DeviceMesh:
    return init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))


def mine(t: Tensor, axis: int | None) -> Tensor:
    """This rank's part of ``t`` along ``axis``."""
    if axis is None:
        return t
    parts = [*t.chunk(dist.get_world_size(), axis), t.narrow(axis, 0, 0), t.narrow(axis, 0, 0)]
    return parts[dist.get_rank()]


def results(model: Any, x: Tensor, g: Tensor | None, *of: str) -> dict[str, Tensor]:
    """The output, and the gradients ``of`` some tensors, by default all; without ``g`` those of the
    sum."""
    leaves = {"x": x.detach().requires_grad_(), **dict(model.named_parameters())}
    leaves = {name: t for name, t in leaves.items() if not of or name in of}
    y = model(leaves.get("x", x.detach()))
    grads = torch.autograd.grad(y.sum() if g is None else y, [*leaves.values()], g)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def parts_of(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the results of the whole model those that this rank should have found."""
    parts = {}
    for name, t in expected.items():
        axis = next((a for a in range(t.dim()) if found[name].shape[a] != t.shape[a]), None)
        parts[name] = mine(t, axis)
    return parts


def compare(twin: Any, whole: Any, x: Tensor, g: Any, *of: str) -> None:
    found, expected = (results(model, x, g, *of) for model in (twin, whole))
    assert_close(found, parts_of(expected, found), **TIGHT)


def sequential() -> torch.nn.Sequential:
    """PyTorch's own layers with one ReLU in two places, and units whose sum is exactly 0."""
    relu, narrow = torch.nn.ReLU(inplace=True), torch.nn.Linear(7, 1, bias=False)
    layers = {"in": torch.nn.Linear(9, 7), "act": relu, "mid": narrow, "again": relu}
    model = torch.nn.Sequential(OrderedDict(layers))
    model.extend([LinearSigmoid(1, 6), torch.nn.Linear(6, 4), torch.nn.Sigmoid()])
    with torch.no_grad():
        model[0].weight[::2], model[0].bias[::2] = -0.0, 0
    return model.eval().double()


MODELS: list[Callable[[], Any]] = [
    partial(MLP, (9, 5, 3), "sigmoid", "sigmoid", dtype=torch.float64),
    partial(MLP, (9, 1, 6, 32, 2, 3), "relu", dtype=torch.float64),  # the last layer stays whole
    partial(MLP, (9, 5, 4, 3), "tanh", dtype=torch.float64),
    sequential,
]


def split_models_equal_the_whole_ones(device: str) -> None:
    mesh = tp_mesh(device)
    for make in MODELS:
        torch.manual_seed(0)
        whole = make().to(device)
        for p in whole.parameters():
            if p.dim() == 1:
                torch.nn.init.normal_(p)
        before = copy.deepcopy(whole.state_dict())
        twin = parallel_mlp(whole, mesh)
        assert (type(twin), twin.training) == (type(whole), whole.training)
        narrow = torch.randn(6, 18, dtype=torch.float64, device=device)
        xs = [narrow[:0, :9], narrow[0, :9], narrow[:, ::2], narrow.view(2, 3, -1)[..., ::2]]
        xs += [narrow.view(9, 12).mT, torch.zeros_like(narrow[:, :9])]  # a ReLU's derivative at 0
        for x in xs:
            for g in (None, torch.randn_like(whole(x))):
                compare(twin, whole, x, g)
        for name in ("x", *dict(whole.named_parameters())):  # nothing else needs a gradient
            compare(twin, whole, x, g, name)
        assert same(full_state_dict(twin), before)
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(1)
        assert same(whole.state_dict(), before)
        assert same(full_state_dict(twin), {name: t + 1 for name, t in before.items()})
        load_full_state_dict(twin, before)
        assert same(full_state_dict(twin), before)


@pytest.mark.parametrize("world_size", [1, 3])
def test_parallel_mlp_equals_the_whole_mlp_and_does_not_change_it(ranks, device, world_size):
    """On a GPU the ranks share it, and gloo sends some messages through the CPU."""
    ranks(world_size, split_models_equal_the_whole_ones, device)


def compare_without_reduction() -> None:
    with patch.object(layers, "start_all_reduce", lambda *_: lambda: None):
        split_models_equal_the_whole_ones("cpu")


def test_the_comparison_rejects_a_missing_collective(ranks):
    with pytest.raises(AssertionError, match=r"item \['x'\]"):
        ranks(2, compare_without_reduction)


def layers_keep_their_slices_of_the_weight_that_all_draw() -> None:
    for kind in (COLUMN, ROW):
        torch.manual_seed(0)
        layer = kind(7, 5, mesh=tp_mesh())
        torch.manual_seed(0)
        for name, p in Linear(7, 5).named_parameters():
            assert torch.equal(getattr(layer, name), mine(p, AXES[kind].get(name)))


def errors_under_autocast_are_those_of_the_whole_model() -> None:
    torch.manual_seed(0)
    whole = MLP((129, 127, 65))
    x, g, twin = torch.randn(65, 129), torch.randn(65, 65), parallel_mlp(whole, tp_mesh())
    truth = results(copy.deepcopy(whole).double(), x.double(), g.double())
    for module in (twin, whole):  # autocast for the forward pass only
        module.forward = torch.autocast("cpu", torch.bfloat16)(module.forward)
    found, expected = (results(module, x, g.bfloat16()) for module in (twin, whole))
    truth, expected = parts_of(truth, found), parts_of(expected, found)
    for name, t in truth.items():
        error, of_whole = ((one[name] - t).abs().max() for one in (found, expected))
        assert 0 < error <= 2 * of_whole, name


def the_plain_references_are_right() -> None:
    """column → sigmoid → row, and the average that DistributedDataParallel computes."""
    torch.manual_seed(0)
    whole = torch.nn.Sequential(
        torch.nn.Linear(6, 7), torch.nn.Sigmoid(), torch.nn.Linear(7, 3)
    ).double()
    column, row = reference.ColumnParallelLinear(whole[0]), reference.RowParallelLinear(whole[2])
    x, g = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    compare(torch.nn.Sequential(column, whole[1], row), whole, x, g)
    plain = MLP([5, 7, 3], dtype=torch.float64)
    replica = DistributedDataParallel(copy.deepcopy(plain))
    torch.manual_seed(dist.get_rank())
    x = torch.randn(4, 5, dtype=torch.float64)
    for model in (replica, plain):
        model(x).square().sum().backward()
    reference.average_gradients(plain)
    for p, q in zip(replica.parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, **TIGHT)


def styles_and_shards_have_the_values_of_the_whole_model() -> None:
    """`parallelize_module` by our styles, and `fully_shard`, of each kind of hidden layer."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from torchpar.parallel.split import styles

    mesh = tp_mesh()
    orders = [styles.ColwiseParallel, styles.RowwiseParallel] * 2
    for hidden in HIDDEN_LAYERS:
        torch.manual_seed(0)
        whole = MLP([6, 10, 8, 4], hidden, dtype=torch.float64)
        x = torch.randn(5, 6, dtype=torch.float64)
        expected = results(whole, x, None)
        refused(
            "ColwiseParallel currently only support",
            ColwiseParallel()._apply,
            whole.layers[0],
            mesh,
        )
        sharded = copy.deepcopy(whole)
        fully_shard(sharded.layers[0], mesh=mesh)
        same_as_whole(fully_shard(sharded, mesh=mesh), x, expected)
        for first in range(2):
            plan = {f"layers.{i}": orders[first + i]() for i in range(3)}
            given = mine(x, 1) if first else x
            split = parallelize_module(copy.deepcopy(whole), mesh, plan)
            same_as_whole(split, given, expected)
            with torch.no_grad():
                split.layers[0].weight.mul_(1.1)
            with pytest.raises(AssertionError):
                same_as_whole(split, given, expected)


def same_as_whole(model: Any, x: Tensor, expected: dict[str, Tensor]) -> None:
    """Compare a model of DTensors, whose last layer may return a shard, with the whole model."""
    y = model(x)
    is_shard = y.shape != expected["y"].shape
    assert_close(y, mine(expected["y"], 1) if is_shard else expected["y"], **TIGHT)
    y.sum().backward()
    for name, p in model.named_parameters():
        assert_close(p.grad.full_tensor(), expected[name], **TIGHT)
        p.grad = None


# Refusals


def refused(message: str, build: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises((ValueError, RuntimeError), match=f"^{re.escape(message)}"):
        build(*args, **options)


def bad_arguments_are_named() -> None:
    mesh = tp_mesh()
    torch.manual_seed(0)
    column = partial(COLUMN, 3, 4, mesh=mesh)
    refused(
        "activation is 'gelu', expected None, 'sigmoid', 'relu' or 'tanh'",
        column,
        activation="gelu",
    )

    class OwnLinear(Linear):
        """A layer that may compute something else."""

    convert, linear = COLUMN.from_linear, torch.nn.Linear(3, 3)
    known = (
        "expected torch.nn.Linear or torchpar.nn.Linear, LinearSigmoid, LinearReLU or LinearTanh"
    )
    refused(f"cannot split a OwnLinear, {known}", convert, OwnLinear(3, 4), mesh=mesh)
    twice = "activation is 'relu', but LinearSigmoid has 'sigmoid' already"
    refused(twice, convert, LinearSigmoid(3, 4), mesh=mesh, activation="relu")

    def split(*layers: torch.nn.Module) -> None:
        parallel_mlp(torch.nn.Sequential(linear, *layers), mesh)

    refused("cannot split a Linear, expected torchpar.nn.MLP or", parallel_mlp, linear, mesh)
    kinds = "expected Linear, Linear, LinearSigmoid, LinearReLU, LinearTanh, Sigmoid, ReLU, Tanh"
    refused(f"cannot split layer 1, a Dropout; {kinds}", split, torch.nn.Dropout())
    message = f"cannot split layer 0, a LinearMaxout; {kinds}, or take data or pipeline parallelism"
    refused(message, parallel_mlp, MLP([5, 4, 2], "maxout"), mesh)
    refused(f"cannot split a LinearMaxout, {known}", convert, LinearMaxout(3, 4), mesh=mesh)
    refused("cannot split layers that share parameters", split, torch.nn.Sigmoid(), linear)

    load = partial(load_full_state_dict, parallel_mlp(MLP([5, 33, 2]), mesh))
    shape = "layers.0.weight has shape (30, 5), expected (33, 5)"
    refused(shape, load, MLP([5, 30, 2]).state_dict())


def second_derivatives_are_refused() -> None:
    for layer in (COLUMN(4, 6, mesh=tp_mesh()), ROW(4, 6, mesh=tp_mesh())):
        x = torch.randn(3, layer.weight.shape[1], requires_grad=True)
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        refused("trying to differentiate twice a function", dx.sum().backward)


def different_layers_are_refused() -> None:
    mesh, rank = tp_mesh(), dist.get_rank()
    layer = {"in_features": 4, "out_features": 4, "mesh": mesh}
    for kind, name, *values in (
        (COLUMN, "in_features", 5, 6),
        (ROW, "bias", True, False),
        (COLUMN, "activation", "tanh", None),
        (COLUMN, "dtype", torch.float64, torch.float32),
    ):
        message = (
            f"a layer's ranks: {name} is {values[0]} on rank 0 and {values[1]} on rank 1, expected"
        )
        refused(message, kind, **layer | {name: values[rank]})
    refused(
        "a layer's ranks: layer is ColumnParallelLinear on rank 0", (COLUMN, ROW)[rank], **layer
    )
    COLUMN(**layer)
    refused("the ranks' models: layers is ", parallel_mlp, MLP([5, 7 + rank, 5]), mesh)
    odd = torch.nn.Sequential(torch.nn.Linear(4, 4), [torch.nn.ReLU(), torch.nn.Dropout()][rank])
    refused("the ranks' models: layers is ", parallel_mlp, odd, mesh)
    refused("the ranks' models: type is ", parallel_mlp, [odd, odd[0]][rank], mesh)


def different_weights_are_refused() -> None:
    """Drawn, copied, and those of the last layer, which stays whole."""
    mesh, rank = tp_mesh(), dist.get_rank()
    for kind in (COLUMN, ROW):
        torch.manual_seed(rank)
        refused(
            f"the weight of a {kind.__name__} of 4 to 6 features differs", kind, 4, 6, mesh=mesh
        )
        torch.manual_seed(0)
        linear = torch.nn.Linear(4, 6)
        linear.bias.data[3] += 1e-3 * rank
        refused(
            f"the bias of a {kind.__name__} of 4 to 6 features differs",
            kind.from_linear,
            linear,
            mesh=mesh,
        )
    mlp = MLP([5, 7, 5, 3])
    mlp.layers[-1].weight.data[2, 3] += 1e-6 * rank
    refused("2.weight differs between ranks", parallel_mlp, mlp, mesh)
    mlp.layers[-1].weight.data[2, 3] = 0.5
    parallel_mlp(mlp, mesh)


def different_shapes_are_refused_before_they_are_sent() -> None:
    mesh, rank = tp_mesh(), dist.get_rank()
    pair = torch.nn.Sequential(COLUMN(4, 6, mesh=mesh), ROW(6, 3, mesh=mesh))
    for rows in ((1, 2), (7, 8), (1, 2)):  # what was refused is refused again
        message = (
            f"({rows[rank]}, 3) torch.float32 on rank {rank}, ({rows[1 - rank]}, 3) torch.float32 "
            f"on"
        )
        refused(
            f"ranks of a group send different shapes: {message}", pair, torch.ones(rows[rank], 4)
        )
        assert len(pair(torch.ones(5, 4))) == 5


@pytest.mark.parametrize(
    "function, world_size",
    [
        (layers_keep_their_slices_of_the_weight_that_all_draw, 3),
        (errors_under_autocast_are_those_of_the_whole_model, 2),
        (the_plain_references_are_right, 2),
        (styles_and_shards_have_the_values_of_the_whole_model, 2),
        (bad_arguments_are_named, 2),
        (second_derivatives_are_refused, 2),
        (different_layers_are_refused, 2),
        (different_weights_are_refused, 2),
        (different_shapes_are_refused_before_they_are_sent, 2),
    ],
)
def test_on_every_rank(ranks, function, world_size):
    ranks(world_size, function)


def order_of_calls() -> list[str]:
    """Calls of a column layer's backward pass: both ends of the all-reduce, and the factors of
    dW."""
    y = COLUMN(5, 8, mesh=tp_mesh(), activation="sigmoid")(torch.randn(3, 5, requires_grad=True))
    calls = Mock()
    with (
        patch.object(layers, "start_all_reduce") as start,
        patch.object(layers, "rows", wraps=layers.rows) as rows,
    ):
        calls.attach_mock(start, "start")
        calls.attach_mock(rows, "rows")
        y.sum().backward()
    return [name for name, *_ in calls.mock_calls]


def test_the_all_reduce_overlaps_with_the_weights_gradient(ranks):
    assert ranks(1, order_of_calls) == [["start", "rows", "rows", "start()"]]
