# SPDX-License-Identifier: MIT
"""The operators on DTensors: every placement gives the results and gradients of the full tensors."""

import itertools
from functools import partial

import pytest
import torch
from operators import OPERATORS, Shapes
from ranks import Ranks
from samples import arguments, normal

import torchpar

# Of PyTorch's own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def operands(name: str, shapes: Shapes) -> list[torch.Tensor]:
    return [t.detach().requires_grad_() for t in OPERATORS[name].operands(*arguments(shapes))]


def compare(name: str, shapes: Shapes) -> list[str]:
    """Run ``name`` with each combination of placements; return those that took no communication."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    operator = partial(OPERATORS[name].overload, **OPERATORS[name].factors(len(shapes)))
    whole = operands(name, shapes)
    expected = operator(*whole)
    incoming = normal(*expected.shape, seed=9)  # the same on every rank
    gradients = torch.autograd.grad(expected, whole, incoming)
    local = []
    for placements in itertools.product(*([Replicate(), *map(Shard, range(t.dim()))] for t in whole)):
        args = [
            distribute_tensor(t.detach(), mesh, [placement]).requires_grad_()
            for t, placement in zip(whole, placements, strict=True)
        ]
        with CommDebugMode() as communication:
            result = operator(*args)
        if communication.get_total_counts() == 0:
            local.append(" ".join(map(str, placements)) + " -> " + str(result.placements[0]))
        torch.testing.assert_close(result.full_tensor(), expected.detach())
        result = result.redistribute(placements=[Replicate()])
        found = torch.autograd.grad(result, args, distribute_tensor(incoming, mesh, [Replicate()]))
        torch.testing.assert_close([g.full_tensor() for g in found], list(gradients))
    return local


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPERATORS)
def test_every_placement(ranks, name, world_size):
    shapes, expected = OPERATORS[name].sharded
    local = ranks(world_size, compare, name, shapes)
    assert local[0] == local[-1]
    # A replicated operand is split without communication, too.
    assert expected <= set(local[0]), local[0]


def compare_backward(shapes: Shapes) -> list[str]:
    """Run `maximum_backward`, which only a GPU's backward calls; return what took no communication."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = arguments(shapes)
    backward = torch.ops.torchpar.maximum_backward
    local = []
    for placements in itertools.product(*([Replicate(), *map(Shard, range(t.dim()))] for t in whole)):
        args = [distribute_tensor(t, mesh, [p]) for t, p in zip(whole, placements, strict=True)]
        with CommDebugMode() as communication:
            results = backward(*args)
        if communication.get_total_counts() == 0:
            local.append(" ".join(map(str, placements)) + " -> " + str(results[0].placements[0]))
        torch.testing.assert_close([t.full_tensor() for t in results], list(backward(*whole)))
    return local


def test_the_backward_operator_of_maximum(ranks):
    local = ranks(2, compare_backward, ((6, 5), (6, 5), (5,)))[0]
    assert {"R R R -> R", "S(0) S(0) R -> S(0)", "S(1) S(1) S(0) -> S(1)"} <= set(local), local


def compare_compiled(name: str) -> None:
    """The compiled operator beside the eager one, with replicated and with split operands."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes, _ = OPERATORS[name].sharded
    whole = operands(name, shapes)
    operator = partial(OPERATORS[name].function, **OPERATORS[name].factors(len(shapes)))
    for placement in (lambda t: Replicate(), lambda t: Shard(0), lambda t: Shard(t.dim() - 1)):
        args = [distribute_tensor(t.detach(), mesh, [placement(t)]).requires_grad_() for t in whole]
        torch._dynamo.reset()
        actual = torch.compile(operator, fullgraph=True, backend="aot_eager")(*args).full_tensor()
        expected = operator(*whole)
        torch.testing.assert_close(actual, expected)
        found = torch.autograd.grad(actual.cos().sum(), args)
        gradients = torch.autograd.grad(expected.cos().sum(), whole)
        torch.testing.assert_close([g.full_tensor() for g in found], list(gradients))


def compare_all_compiled() -> None:
    for name in OPERATORS:
        compare_compiled(name)


def test_compiled(tmp_path):
    # In processes of its own: PyTorch's compiler (2.15) fails after other tests have used DTensors eagerly.
    with Ranks(tmp_path) as ranks:
        ranks(2, compare_all_compiled)


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("maximum", ((4, 3, 5), (3, 1))),
        ("matmul_t", ((4, 3, 2),)),
        ("symmetric_matmul", ((4, 3, 3), (4, 3, 3))),
    ],
)
def test_batches_and_broadcasts(ranks, name, shapes):
    local = ranks(2, compare, name, shapes)[0]
    assert any(combination.endswith("-> S(0)") for combination in local), local


def scaled_and_checked() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole = operands("symmetric_matmul", ((6, 6), (6, 6), (6, 6)))
    for placement in (Replicate(), Shard(0), Shard(1)):
        a, b, c = (distribute_tensor(t.detach(), mesh, [placement]) for t in whole)
        for check in (False, True):
            for args, wholes in (((a, b), whole[:2]), ((a, b, c), whole)):
                factors = OPERATORS["symmetric_matmul"].factors(len(args))
                result = torchpar.symmetric_matmul(*args, **factors, check=check)
                expected = torchpar.symmetric_matmul(*wholes, **factors)
                torch.testing.assert_close(result.full_tensor(), expected.detach())
        shifted = distribute_tensor(whole[1].detach().roll(1, 0), mesh, [placement])
        with pytest.raises(RuntimeError, match="is not symmetric"):
            torchpar.symmetric_matmul(a, shifted, check=True)


def test_factors_and_the_check_of_shards(ranks):
    # The product of two shards of k is not symmetric; their sum is.
    ranks(2, scaled_and_checked)


def rows_of_a_product(shape: tuple[int, ...]) -> tuple[str, dict[str, int]]:
    """matmul_t of a matrix split by rows: the placement of the result, and the collectives it took."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = Shard(len(shape) - 2)
    torch.manual_seed(0)
    whole = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = torchpar.matmul_t(whole)
    incoming = torch.randn_like(expected)
    x = distribute_tensor(whole.detach(), mesh, [rows]).requires_grad_()
    with CommDebugMode() as communication:
        result = torchpar.matmul_t(x)
    torch.testing.assert_close(result.full_tensor(), expected.detach())
    (found,) = torch.autograd.grad(result, x, distribute_tensor(incoming, mesh, [rows]))
    (gradient,) = torch.autograd.grad(expected, whole, incoming)
    torch.testing.assert_close(found.full_tensor(), gradient)
    counts = communication.get_comm_counts().items()
    return str(result.placements[0]), {str(collective): count for collective, count in counts}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(7, 5), (300, 5), (2, 8, 5)], ids=str)
def test_rows_of_a_product_take_one_gather(ranks, shape, world_size):
    for placement, counts in ranks(world_size, rows_of_a_product, shape):
        assert placement == f"S({len(shape) - 2})"
        assert counts == {"c10d_functional.all_gather_into_tensor": 1}


def test_rules_wait_for_dtensor() -> None:
    import torch.distributed.tensor

    from torchpar.ops import _library

    torchpar.maximum(torch.zeros(1), torch.zeros(1))
    assert not _library._sharding_rules


def check_of_a_split_product() -> tuple[bool, str]:
    """Whether a symmetric product passes, and the error of another; both operands are split by columns."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    s = torch.randn(8, 8, dtype=torch.float64)
    s = s + s.mT
    a, b, other = (distribute_tensor(t, mesh, [Shard(1)]) for t in (s @ s, s, torch.randn_like(s)))
    torchpar.symmetric_matmul(a, b)  # DTensor caches the rule that it finds without the check
    checked = torchpar.symmetric_matmul(a, b, check=True)
    try:
        torchpar.symmetric_matmul(a, other, check=True)
    except RuntimeError as e:
        return torch.allclose(checked.full_tensor(), s @ s @ s), str(e)
    return False, ""


def test_the_check_is_of_the_whole_and_not_of_its_parts(ranks):
    for passes, said in ranks(2, check_of_a_split_product):
        assert passes
        assert "a @ b.mT is not symmetric" in said
