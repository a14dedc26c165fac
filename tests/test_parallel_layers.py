# SPDX-License-Identifier: MIT
"""Split layers compared with whole ones: values, gradients, collectives and their order.

Each rank builds the whole layer from the same seed and compares its own part.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.func import functional_call
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from torchpar import reference
from torchpar.nn import MLP, Linear, LinearReLU, LinearSigmoid
from torchpar.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    clip_grad_norm_,
    copy_to_tensor_model_parallel_region,
    full_state_dict,
    gather_from_tensor_model_parallel_region,
    join_world,
    load_full_state_dict,
    parallel_mlp,
    reduce_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from torchpar.parallel.split.exact import ExactColumnParallelLinear, ExactRowParallelLinear
from torchpar.profile.collectives import Collectives

WHOLE = {None: Linear, "sigmoid": LinearSigmoid, "relu": LinearReLU}
AXES = {ColumnParallelLinear: {"weight": 0, "bias": 0}, RowParallelLinear: {"weight": 1}}
# Two orders of summing at most 40 float64 terms below 10 each: 2·40·eps·400 < 1e-11.
TIGHT = {"rtol": 0.0, "atol": 1e-11}


def tp_mesh(device: str = "cpu") -> DeviceMesh:
    return init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))


def mine(t: Tensor, axis: int | None) -> Tensor:
    """This rank's part of ``t`` along ``axis``."""
    return t if axis is None else t.tensor_split(dist.get_world_size(), axis)[dist.get_rank()]


def pair_of_layers(
    kind: Any, sizes: tuple[int, int], bias: bool, activation: Any, dtype: torch.dtype, **options: Any
) -> tuple[Any, Linear]:
    """A split layer and the whole one from the same seed, with biases other than 0."""
    torch.manual_seed(0)
    layer = kind(*sizes, bias, mesh=tp_mesh(), activation=activation, dtype=dtype, **options)
    torch.manual_seed(0)
    whole = WHOLE[activation](*sizes, bias, dtype=dtype)
    for name, p in whole.named_parameters():
        assert torch.equal(getattr(layer, name), mine(p, AXES[kind].get(name))), name
    if whole.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(mine(whole.bias.normal_(), AXES[kind].get("bias")))
    return layer, whole


def results(layer: Any, x: Tensor, g: Tensor | None) -> dict[str, Tensor]:
    """Output and gradients for the incoming gradient ``g``; None takes ``.sum()``'s, which is expanded."""
    x = x.detach().requires_grad_()
    y = layer(x)
    g = None if g is None else g.to(y.dtype)
    grads = torch.autograd.grad(y.sum() if g is None else y, [x, *layer.parameters()], g)
    return dict(zip(["y", "x", *dict(layer.named_parameters())], [y.detach(), *grads], strict=True))


def expected_results(kind: Any, whole: Linear, x: Tensor, g: Tensor | None, **options: Any) -> Any:
    """The right `results` on this rank, and this rank's parts of x and g."""
    axes: dict[str, int | None] = dict(AXES[kind])
    axes["y"] = -1 if kind is ColumnParallelLinear and not options.get("gather_output") else None
    axes["x"] = -1 if kind is RowParallelLinear and options.get("input_is_parallel", True) else None
    expected = {name: mine(t, axes.get(name)) for name, t in results(whole, x, g).items()}
    return expected, mine(x, axes["x"]), None if g is None else mine(g, axes["y"])


def compare(kind: Any, sizes: tuple[int, int], bias: bool, activation: Any, options: dict[str, Any]) -> None:
    layer, whole = pair_of_layers(kind, sizes, bias, activation, torch.float64, **options)
    narrow = torch.randn(6, 2 * sizes[0], dtype=torch.float64)
    xs = [narrow[:0, : sizes[0]], narrow[0, : sizes[0]], narrow[:, ::2], narrow.view(2, 3, -1)[..., ::2]]
    xs.append(torch.randn(sizes[0], 5, dtype=torch.float64).mT)
    for x in xs:
        for g in (None, torch.randn(*x.shape[:-1], sizes[1], dtype=torch.float64)):
            expected, own_x, own_g = expected_results(kind, whole, x, g, **options)
            torch.testing.assert_close(results(layer, own_x, own_g), expected, **TIGHT)


COLUMN, ROW = ColumnParallelLinear, RowParallelLinear
CASES = [
    (COLUMN, (12, 33), True, "sigmoid", {}),
    (COLUMN, (5, 7), False, "relu", {"gather_output": True}),
    (COLUMN, (3, 1), True, "sigmoid", {"gather_output": True}),  # some ranks have no features
    (COLUMN, (3, 1), False, None, {}),
    (COLUMN, (12, 33), False, "relu", {}),
    (ROW, (33, 12), True, None, {}),
    (ROW, (7, 5), True, "sigmoid", {"input_is_parallel": False}),
    (ROW, (7, 5), False, "relu", {}),
    (ROW, (1, 3), False, "relu", {}),
    (ROW, (1, 3), True, None, {"input_is_parallel": False}),
]


def compare_all() -> None:
    for case in CASES:
        compare(*case)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_split_layers_equal_the_whole_ones(ranks, world_size):
    ranks(world_size, compare_all)


def compare_without(function: str, case: int, substitute: Any) -> None:
    with patch(f"torchpar.parallel.split.{function}", substitute):
        compare(*CASES[case])


def no_reduction(*_: Any) -> Callable[[], None]:
    return lambda: None


def unchanged(t: Tensor, *_: Any) -> Tensor:
    return t


def sliced(t: Tensor, *_: Any) -> Tensor:
    return mine(t, -1)


@pytest.mark.parametrize(
    "function, case, substitute, wrong",
    [
        ("column.start_all_reduce", 0, no_reduction, "x"),
        ("layers.reduce_from_tensor_model_parallel_region", 5, unchanged, "y"),
        ("layers.scatter_to_tensor_model_parallel_region", 6, sliced, "x"),
    ],
)
def test_the_comparison_rejects_a_missing_collective(ranks, function, case, substitute, wrong):
    with pytest.raises(AssertionError, match=rf"item \['{wrong}'\]"):
        ranks(2, compare_without, function, case, substitute)


def errors_of_rounding(kind: Any, activation: Any, autocast: bool) -> list[tuple[str, float, float]]:
    """The errors of output and gradients against float64, of the split layer and of the whole one."""
    layer, whole = pair_of_layers(kind, (129, 127), True, activation, torch.float32)
    x, g = torch.randn(65, 129), torch.randn(65, 127)
    truth, own_x, own_g = expected_results(kind, copy.deepcopy(whole).double(), x.double(), g.double())
    for module in (layer, whole):  # autocast for the forward pass only
        module.forward = torch.autocast("cpu", torch.bfloat16, enabled=autocast)(module.forward)
    expected, *_ = expected_results(kind, whole, x, g)
    found = results(layer, own_x.float(), own_g.float())
    return [
        (name, (found[name] - t).abs().max().item(), (expected[name] - t).abs().max().item())
        for name, t in truth.items()
    ]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind, activation", [(COLUMN, "sigmoid"), (COLUMN, "relu"), (ROW, None)])
def test_rounding_errors_are_those_of_the_whole_layer(ranks, kind, activation, autocast):
    for rank in ranks(2, errors_of_rounding, kind, activation, autocast):
        for name, error, whole in rank:
            assert error <= 2 * whole, name
            assert whole > 0


def pairs_equal_the_references() -> None:
    """column → sigmoid → row, from PyTorch's own layers: the plain split, and the library's three ways."""
    torch.manual_seed(0)
    x, g = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    first, second = torch.nn.Linear(6, 7).double(), torch.nn.Linear(7, 3).double()
    sigmoid, identity, mesh = torch.nn.Sigmoid(), torch.nn.Identity(), tp_mesh()
    whole = torch.nn.Sequential(first, sigmoid, second)
    twins = [
        [reference.ColumnParallelLinear(first), sigmoid, reference.RowParallelLinear(second)],
        parallel_mlp(whole, mesh),
        [COLUMN.from_linear(first, mesh=mesh), sigmoid, ROW.from_linear(second, mesh=mesh)],
        [
            COLUMN.from_linear(first, mesh=mesh, activation="sigmoid", gather_output=True),
            identity,
            ROW.from_linear(second, mesh=mesh, input_is_parallel=False),
        ],
    ]
    axes = {"0.weight": 0, "0.bias": 0, "2.weight": 1}
    expected = {name: mine(t, axes.get(name)) for name, t in results(whole, x, g).items()}
    for twin in twins:
        torch.testing.assert_close(results(torch.nn.Sequential(*twin), x, g), expected, **TIGHT)


@pytest.mark.parametrize("world_size", [2, 3])
def test_pairs_equal_the_plain_references(ranks, world_size):
    ranks(world_size, pairs_equal_the_references)


def averaged() -> tuple[list[list[float]], list[list[float]]]:
    """A model's gradients, averaged by DistributedDataParallel and by the reference."""
    torch.manual_seed(0)
    plain = MLP([5, 7, 3], dtype=torch.float64)
    replica = DistributedDataParallel(copy.deepcopy(plain))
    torch.manual_seed(dist.get_rank())
    x = torch.randn(4, 5, dtype=torch.float64)
    for model in (replica, plain):
        model(x).square().sum().backward()
    reference.average_gradients(plain)
    return tuple([p.grad.flatten().tolist() for p in model.parameters()] for model in (replica, plain))


def test_replicas_average_as_the_plain_reference(ranks):
    for replica, plain in ranks(3, averaged):
        for found, expected in zip(replica, plain, strict=True):
            assert found == pytest.approx(expected, rel=0, abs=TIGHT["atol"])


def check_layer_gradients(kind: Any, activation: Any) -> None:
    """Check the layer as a function of whole tensors, which gradcheck perturbs alike on all ranks."""
    options: dict[str, Any] = {"gather_output": True} if kind is COLUMN else {"input_is_parallel": False}
    layer, whole = pair_of_layers(kind, (3, 3), True, activation, torch.float64, **options)
    mesh, axes = layer.mesh, AXES[kind]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        own = {}
        for name, p in zip(("weight", "bias"), parameters, strict=True):
            if name in axes:
                p = p.movedim(axes[name], -1)
                p = scatter_to_tensor_model_parallel_region(p, mesh).movedim(-1, axes[name])
            own[name] = p
        return functional_call(layer, own, (x,))

    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)  # for the incoming gradients that gradgradcheck draws
    assert gradcheck(function, (x, *whole.parameters()))
    assert gradgradcheck(function, (x, *whole.parameters()), fast_mode=True)


@pytest.mark.parametrize(
    "kind, activation",
    [(COLUMN, "sigmoid"), (COLUMN, "relu"), (COLUMN, None), (ROW, "sigmoid"), (ROW, None)],
)
def test_first_and_second_derivatives(ranks, kind, activation):
    ranks(2, check_layer_gradients, kind, activation)


def region_values() -> None:
    """The table in regions.py, with different numbers on each rank."""
    mesh, p, rank = tp_mesh(), dist.get_world_size(), dist.get_rank()
    for width in (7, 1):
        torch.manual_seed(0)
        wholes, grads = torch.randn(2, p, 2, width).unbind()
        widths = [t.shape[-1] for t in wholes[0].tensor_split(p, -1)]

        def there_and_back(
            region: Any, x: Tensor, g: Tensor, y: Tensor, dx: Tensor, mesh: Any, *args: Any
        ) -> None:
            x = x.clone().requires_grad_()
            out = region(x, mesh, *args)
            out.backward(g)
            torch.testing.assert_close(out, y)
            torch.testing.assert_close(x.grad, dx)

        whole, grad, own = wholes[0], grads[rank], mine(wholes[0], -1)
        shared = grads[0]
        there_and_back(copy_to_tensor_model_parallel_region, whole, grad, whole, grads.sum(0), mesh)
        there_and_back(
            reduce_from_tensor_model_parallel_region, wholes[rank], shared, wholes.sum(0), shared, mesh
        )
        scatter, gather = scatter_to_tensor_model_parallel_region, gather_from_tensor_model_parallel_region
        there_and_back(scatter, whole, mine(shared, -1), own, shared, mesh)
        there_and_back(gather, own, shared, whole, mine(shared, -1), mesh, widths)
    halves = gather_from_tensor_model_parallel_region(torch.full((2, 3), float(rank)), mesh)
    torch.testing.assert_close(halves, torch.arange(float(p)).repeat_interleave(3).expand(2, -1))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_regions_forward_and_backward(ranks, world_size):
    ranks(world_size, region_values)


def check_region_gradients() -> list[bool]:
    """Whether derivatives are right: of both pairs of regions, and of a pair without its backward pass."""
    mesh, rank = tp_mesh(), dist.get_rank()
    x = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3).requires_grad_()

    def copied_and_reduced(t: Tensor) -> Tensor:
        t = copy_to_tensor_model_parallel_region(t, mesh)
        return reduce_from_tensor_model_parallel_region((t * (rank + 1)) ** 3, mesh)

    def scattered_and_gathered(t: Tensor) -> Tensor:
        t = scatter_to_tensor_model_parallel_region(t, mesh, [2, 1]) ** 3
        return gather_from_tensor_model_parallel_region(t, mesh, [2, 1])

    def not_copied(t: Tensor) -> Tensor:
        return reduce_from_tensor_model_parallel_region((t * (rank + 1)) ** 3, mesh)

    torch.testing.assert_close(copied_and_reduced(x), x**3 * (1 + 8))
    torch.testing.assert_close(scattered_and_gathered(x), x**3)
    passed = []
    for function in (copied_and_reduced, scattered_and_gathered, not_copied):
        torch.manual_seed(1)
        passed.append(
            gradcheck(function, (x,), raise_exception=False)
            and gradgradcheck(function, (x,), raise_exception=False)
        )
    return passed


def test_regions_second_derivatives(ranks):
    assert ranks(2, check_region_gradients) == [[True, True, False]] * 2


def error_of(build: Callable[..., Any], *args: Any, **options: Any) -> str:
    try:
        build(*args, **options)
    except ValueError as e:
        return str(e)
    return "no error"


def bad_arguments() -> list[str]:
    mesh = tp_mesh()
    square = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    linear = torch.nn.Linear(3, 3)
    return [
        error_of(COLUMN, 3, 4, mesh=mesh, activation="tanh"),
        error_of(parallel_mlp, MLP([3, 4, 2]), mesh, "slow"),
        error_of(parallel_mlp, MLP([3, 4, 2], dtype=torch.float64), mesh, "exact"),
        error_of(ExactRowParallelLinear, 3, 4, mesh=mesh, dtype=torch.bfloat16),
        error_of(ExactColumnParallelLinear(3, 4, mesh=mesh), torch.ones(5, 3, dtype=torch.float64)),
        error_of(ExactColumnParallelLinear(3, 4, mesh=mesh).double(), torch.ones(5, 3)),
        error_of(parallel_mlp, torch.nn.Sequential(linear, torch.nn.Sigmoid()), mesh, "exact"),
        error_of(COLUMN, 3, 4, mesh=mesh, init="zeros"),
        error_of(ROW, 3, 4, mesh=square),
        error_of(parallel_mlp, MLP([3, 4, 2]), square),
        error_of(COLUMN.from_linear, torch.nn.Conv1d(3, 4, 1), mesh=mesh),
        error_of(ROW.from_linear, AlwaysReducing(3, 4, mesh=mesh), mesh=mesh),
        error_of(COLUMN.from_linear, LinearSigmoid(3, 4), mesh=mesh, activation="relu"),
        error_of(parallel_mlp, linear, mesh),
        error_of(parallel_mlp, torch.nn.Sequential(linear, torch.nn.Dropout(), torch.nn.Linear(3, 1)), mesh),
        error_of(parallel_mlp, torch.nn.Sequential(linear, torch.nn.ReLU(), linear), mesh),
    ]


def test_bad_arguments_are_named_on_every_rank(ranks):
    first, second = ranks(2, bad_arguments)
    assert first == second
    assert first == [
        "activation is 'tanh', expected None, 'sigmoid' or 'relu'",
        "arithmetic is 'slow', expected 'fast' or 'exact'",
        "exact arithmetic takes float32, the layer has torch.float64",
        "exact arithmetic takes float32, the layer has torch.bfloat16",
        "exact arithmetic takes float32, the input is torch.float64; convert it",
        "exact arithmetic takes float32, the layer's weight is torch.float64; convert it",
        "cannot split layer 1, a Sigmoid; "
        "exact arithmetic expects linear layers, such as torchpar.nn.LinearSigmoid",
        "init is 'zeros', expected 'xavier_uniform' or 'xavier_normal'",
        *["mesh has dimensions ('dp', 'tp'), expected one, such as mesh['tp']"] * 2,
        "cannot split a Conv1d, expected torch.nn.Linear or torchpar.nn.Linear, LinearSigmoid or LinearReLU",
        "cannot split a AlwaysReducing, expected torch.nn.Linear or "
        "torchpar.nn.Linear, LinearSigmoid or LinearReLU",
        "activation is 'relu', but LinearSigmoid has 'sigmoid' already",
        "cannot split a Linear, expected torchpar.nn.MLP or torch.nn.Sequential",
        "cannot split layer 1, a Dropout; expected linear layers, torch.nn.Sigmoid and torch.nn.ReLU",
        "cannot split layers that share parameters, expected each layer to have its own",
    ]


def split_by_rank(sizes: list[list[int]], arithmetic: list[Any]) -> str:
    rank = dist.get_rank()
    return error_of(parallel_mlp, MLP(sizes[rank]), tp_mesh(), arithmetic[rank])


@pytest.mark.parametrize(
    "other, arithmetic",
    [([5, 8, 5], "fast"), ([5, 7, 5, 7, 5], "exact"), ([5, 5], "fast"), ([5, 7, 5], "exact")],
)
def test_splitting_different_mlps_fails_on_every_rank(ranks, other, arithmetic):
    for message in ranks(2, split_by_rank, [[5, 7, 5], other], ["fast", arithmetic]):
        assert message != "no error"
        assert "\n" not in message


def build_by_rank(arguments: list[tuple[Any, dict[str, Any]]]) -> str:
    kind, options = arguments[dist.get_rank()]
    options = {"in_features": 4, "out_features": 4} | options
    return error_of(kind, mesh=tp_mesh(), **options)


@pytest.mark.parametrize(
    "first, second",
    [
        ((COLUMN, {"out_features": 5}), (COLUMN, {"out_features": 6})),
        ((COLUMN, {"in_features": 5}), (COLUMN, {})),
        ((ROW, {"bias": False}), (ROW, {})),
        ((ROW, {"activation": "relu"}), (ROW, {})),
        ((COLUMN, {"activation": "tanh"}), (COLUMN, {})),
        ((COLUMN, {"gather_output": True}), (COLUMN, {})),
        ((ROW, {"input_is_parallel": False}), (ROW, {})),
        ((COLUMN, {"dtype": torch.float64}), (COLUMN, {})),
        ((COLUMN, {"init": "xavier_normal"}), (COLUMN, {})),
        ((COLUMN, {}), (ROW, {})),
    ],
    ids=[
        *["out_features", "in_features", "bias", "activation", "unknown activation", "gather_output"],
        *["input_is_parallel", "dtype", "init", "kind"],
    ],
)
def test_building_different_layers_fails_on_every_rank(ranks, first, second):
    for message in ranks(2, build_by_rank, [first, second]):
        assert message != "no error"
        assert "\n" not in message


def test_building_the_same_layer_does_not_fail(ranks):
    assert ranks(2, build_by_rank, [(COLUMN, {"out_features": 5})] * 2) == ["no error"] * 2


def sequential() -> torch.nn.Sequential:
    """PyTorch's own layers with one ReLU in two places, and units whose sum is exactly 0.

    There the gradient of `torch.nn.ReLU` is 0, and that of `torchpar.nn.LinearReLU` is one half.
    """
    relu = torch.nn.ReLU(inplace=True)
    layers = {
        "in": torch.nn.Linear(9, 7),
        "act": relu,
        "mid": torch.nn.Linear(7, 1, bias=False),
        "again": relu,
    }
    model = torch.nn.Sequential(
        OrderedDict(layers),
    )
    model.extend([LinearSigmoid(1, 6), torch.nn.Linear(6, 4), torch.nn.Sigmoid()])
    with torch.no_grad():
        model[0].weight[::2], model[0].bias[::2] = 0, 0
    return model.double()


def mlp_equals(device: str) -> None:
    x = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    mesh = tp_mesh(device)
    cases = [((9, 3), "sigmoid", "sigmoid"), ((9, 33, 5), "relu", "logits")]
    cases += [((9, 7, 1, 4), "sigmoid", "logits"), ((9, 1, 6, 33, 2), "relu", "sigmoid")]
    torch.manual_seed(0)
    for whole in (*(MLP(*case, dtype=torch.float64) for case in cases), sequential()):
        before = copy.deepcopy(whole.to(device).state_dict())
        twin = parallel_mlp(whole, mesh)
        assert type(twin) is type(whole)
        g = torch.randn_like(whole(x))
        found, expected = results(twin, x, g), results(whole, x, g)
        assert list(found) == list(expected)
        for name, t in expected.items():
            axis = next((a for a in range(t.dim()) if found[name].shape[a] != t.shape[a]), None)
            torch.testing.assert_close(found[name], mine(t, axis), **TIGHT)
        state = full_state_dict(twin)
        assert list(state) == list(before)
        assert all(torch.equal(state[name], t) for name, t in before.items())
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(1)
        assert all(torch.equal(t, before[name]) for name, t in whole.state_dict().items())
        assert all(torch.equal(t, before[name] + 1) for name, t in full_state_dict(twin).items())


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_parallel_mlp_equals_the_whole_mlp_and_does_not_change_it(ranks, device, world_size):
    """On a GPU the ranks share it, and gloo sends some messages through the CPU."""
    ranks(world_size, mlp_equals, device)


WIDTHS = (5, 33, 7, 2)


def converted(state: Any) -> dict[str, Any]:
    """A whole model's state after it has been loaded into a split model and gathered."""
    torch.manual_seed(dist.get_rank())
    twin = parallel_mlp(MLP(WIDTHS), tp_mesh())
    load_full_state_dict(twin, {name: torch.from_numpy(t) for name, t in state.items()})
    return {name: t.numpy() for name, t in full_state_dict(twin).items()}


def test_a_state_survives_every_mesh(ranks):
    torch.manual_seed(7)
    original = {name: torch.randn_like(t).numpy() for name, t in MLP(WIDTHS).state_dict().items()}
    state = original
    for world_size in (4, 1, 2, 4):
        for found in ranks(world_size, converted, state):
            assert list(found) == list(original)
            assert all(found[name].tobytes() == t.tobytes() for name, t in original.items())
            state = found


def loads(sizes: list[list[int]]) -> list[bool]:
    """Whether a split model loads the state of a whole one, for each of its sizes."""
    found = []
    for state in (MLP(s).state_dict() for s in sizes):
        try:
            load_full_state_dict(parallel_mlp(MLP([5, 33, 2]), tp_mesh()), state)
            found.append(True)
        except (RuntimeError, ValueError):
            found.append(False)
    return found


def test_a_state_of_other_sizes_is_refused_on_every_rank(ranks):
    sizes = [[5, 33, 2], [5, 30, 2], [5, 40, 2], [6, 33, 2], [5, 33, 33, 2]]
    assert ranks(2, loads, sizes) == [[True, False, False, False, False]] * 2


class AlwaysReducing(ColumnParallelLinear):
    """A layer that all-reduces the gradient of every input, needed or not, as Megatron-LM's does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach().requires_grad_())


def collectives_in(function: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    with CommDebugMode() as mode:
        result = function()
    return result, {str(op): n for op, n in mode.get_comm_counts().items()}


def pass_counts(model: torch.nn.Module, needs_gradient: bool) -> list[dict[str, int]]:
    """The collectives of a forward and of a backward pass."""
    x = torch.randn(3, 5, requires_grad=needs_gradient)
    head = torch.ones((), requires_grad=True)  # a parameter, if all layers are frozen
    y, forward = collectives_in(lambda: model(x))
    _, backward = collectives_in((y.sum() * head).backward)
    return [forward, backward]


def counts() -> dict[str, list[dict[str, int]]]:
    mesh = tp_mesh()
    found = {}
    for pairs in (1, 2, 3):
        model = parallel_mlp(MLP([5, *[7, 5] * pairs]), mesh)
        for needs_gradient in (False, True):
            found[f"{pairs} pairs, {needs_gradient}"] = pass_counts(model, needs_gradient)
    model = parallel_mlp(MLP([5, 7, 5, 7, 5]), mesh)
    for p in model.layers[:2].parameters():
        p.requires_grad_(False)
    found["first pair frozen"] = pass_counts(model, False)
    model.requires_grad_(False)
    found["frozen"] = pass_counts(model, False)
    found["frozen, True"] = pass_counts(model, True)
    wasteful = torch.nn.Sequential(AlwaysReducing(5, 7, mesh=mesh), ROW(7, 5, mesh=mesh))
    found["wasteful"] = pass_counts(wasteful, False)
    return found


def test_collectives_per_pair(ranks):
    def all_reduces(forward: int, backward: int) -> list[dict[str, int]]:
        return [{"c10d.allreduce_": n} if n else {} for n in (forward, backward)]

    for found in ranks(2, counts):
        assert found == {
            "1 pairs, False": all_reduces(1, 0),
            "1 pairs, True": all_reduces(1, 1),
            "2 pairs, False": all_reduces(2, 1),
            "2 pairs, True": all_reduces(2, 2),
            "3 pairs, False": all_reduces(3, 2),
            "3 pairs, True": all_reduces(3, 3),
            "first pair frozen": all_reduces(2, 0),
            "frozen": all_reduces(2, 0),
            "frozen, True": all_reduces(2, 2),
            "wasteful": all_reduces(1, 1),
        }


def replica_counts(sizes: list[int]) -> list[dict[str, int]]:
    """The collectives of a backward pass under no_sync, and of two without."""
    replica = DistributedDataParallel(MLP(sizes))
    found = []
    for silent in (replica.no_sync, nullcontext, nullcontext):
        with silent():
            found.append(collectives_in(replica(torch.randn(4, sizes[0])).sum().backward)[1])
    return found


# The weight of 512 × 600 numbers fills the first bucket of 1 MiB. The first backward pass has one bucket,
# since the order of the gradients is not known yet.
@pytest.mark.parametrize("sizes, buckets", [([5, 33, 7], 1), ([33, 512, 600, 7], 2)])
def test_collectives_of_replicas_are_their_buckets(ranks, sizes, buckets):
    for found in ranks(2, replica_counts, sizes):
        assert found == [{}, {"c10d.allreduce_": 1}, {"c10d.allreduce_": buckets}]


def clip_counts(axes: dict[str, int]) -> tuple[dict[str, int], list[tuple[str, int]]]:
    with join_world("cpu") as world:
        world = world.with_mesh(**axes)
        model = parallel_mlp(MLP([5, 7, 3]), world.mesh["tp"])
        model(torch.randn(4, 5)).sum().backward()
        _, counted = collectives_in(lambda: clip_grad_norm_(model, 1e-3, world))
        with Collectives(world) as watch:
            clip_grad_norm_(model, 1e-3, world)
        return counted, [(call.operation, call.bytes) for call in watch.calls]


def test_clipping_sends_one_number(ranks):
    double = 8
    assert ranks(2, clip_counts, {"tp": 2}) == [({"c10d.allreduce_": 1}, [("all_reduce", double)])] * 2
    assert ranks(4, clip_counts, {"dp": 2, "tp": 2})[3] == (
        {"c10d.allreduce_": 1},
        [("all_reduce", double)],
    )
    assert ranks(2, clip_counts, {"dp": 2}) == [({}, [])] * 2


class Order(TorchDispatchMode):
    """The order of events: products by their shape, and the start and end of all-reduces."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.events.append(tuple(result.shape))
        return result

    def waiting(self) -> AbstractContextManager[Any]:
        start = dist.all_reduce

        def all_reduce(*args: Any, **kwargs: Any) -> Any:
            self.events.append("start")
            work = start(*args, **kwargs)
            if work is None:
                self.events.append("end")
            return _Work(work, self.events)

        return patch.object(dist, "all_reduce", all_reduce)


class _Work:
    def __init__(self, work: Any, events: list[Any]):
        self.work, self.events = work, events

    def wait(self) -> None:
        self.work.wait()
        self.events.append("end")


class SplitByAutograd(ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(copy_to_tensor_model_parallel_region(x, self.mesh), self.weight, self.bias)


def order_of_events(kind: Any, activation: Any) -> list[Any]:
    layer = kind(5, 8, mesh=tp_mesh(), activation=activation)
    y = layer(torch.randn(3, 5, requires_grad=True))
    g = torch.randn_like(y)
    order = Order()
    with order.waiting(), order:
        y.backward(g)
    return order.events


@pytest.mark.parametrize("activation", [None, "sigmoid", "relu"])
def test_the_all_reduce_overlaps_with_the_weights_gradient(ranks, activation):
    dx, dw = (3, 5), (4, 5)
    for events in ranks(2, order_of_events, COLUMN, activation):
        assert events == [dx, "start", dw, "end"]


def test_autograds_own_backward_pass_does_not_overlap(ranks):
    for events in ranks(2, order_of_events, SplitByAutograd, None):
        assert events[2:] == ["start", "end"]


def send_different_shapes(gather_output: bool) -> list[str]:
    """The errors of four steps, in the first and last of which the ranks' batches differ in size."""
    mesh = tp_mesh()
    column = ColumnParallelLinear(4, 6, mesh=mesh, gather_output=gather_output)
    row = RowParallelLinear(6, 3, mesh=mesh)
    forward = column if gather_output else (lambda x: row(column(x)))
    messages = []
    for rows in (dist.get_rank() + 1, 5, 5, 7 + dist.get_rank()):
        try:
            forward(torch.ones(rows, 4))
            messages.append("")
        except ValueError as e:
            messages.append(str(e))
    return messages


@pytest.mark.parametrize("gather_output", [False, True])
def test_different_shapes_are_refused_before_they_are_sent(ranks, gather_output):
    """Or else gloo would abort both processes."""
    for messages in ranks(2, send_different_shapes, gather_output):
        assert [bool(message) for message in messages] == [True, False, False, True]
        for message, rows in ((messages[0], (1, 2)), (messages[3], (7, 8))):
            shapes = sorted((3, n) if gather_output else (n, 3) for n in rows)
            assert sorted(re.findall(r"\((\d), (\d)\) torch.float32 on rank", message)) == [
                (str(a), str(b)) for a, b in shapes
            ]
