# SPDX-License-Identifier: MIT
"""The operators on DTensors of several processes; `test_our_operators.py` tries every placement in
one."""

import itertools
from typing import Any

import pytest
import torch
from samples import widest_arguments
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import torchpar
from benchmarks.records import OPERATORS
from benchmarks.records.record import Shapes
from torchpar.parallel.launch.local import Ranks

# Of PyTorch's own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def operands(name: str, shapes: Shapes) -> list[torch.Tensor]:
    made = OPERATORS[name].operands(*widest_arguments(name, shapes))
    return [t.detach().requires_grad_() for t in made]


def compare_compiled() -> None:
    """The compiled operators beside the eager ones, with split operands, in one graph."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    # Split along rows, and along columns.
    cases = list(itertools.product(OPERATORS.values(), (0, -1)))

    def compute(operands_of: list[list[Any]]) -> list[Any]:
        pairs = zip(cases, operands_of, strict=True)
        return [op.function(*args, **op.factors(len(args))) for (op, _), args in pairs]

    whole = [operands(op.name, op.small[0]) for op, _ in cases]
    placed = [
        [distribute_tensor(t.detach(), mesh, [Shard(dim % t.dim())]).requires_grad_() for t in args]
        for (_, dim), args in zip(cases, whole, strict=True)
    ]
    # The other partitioner would import Inductor, which takes longer than to compile.
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager_default_partitioner")
    actual, expected = [t.full_tensor() for t in compiled(placed)], compute(whole)
    torch.testing.assert_close(actual, [t.detach() for t in expected])
    found = torch.autograd.grad(sum(t.cos().sum() for t in actual), list(itertools.chain(*placed)))
    gradients = torch.autograd.grad(
        sum(t.cos().sum() for t in expected), list(itertools.chain(*whole))
    )
    torch.testing.assert_close([g.full_tensor() for g in found], list(gradients))


@pytest.mark.slow
def test_compiled(fork_server):
    # In processes of its own: PyTorch's compiler (2.15) fails after other tests have used DTensors
    # eagerly.
    with Ranks() as ranks:
        ranks(2, compare_compiled)


def checked() -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = operands("symmetric_matmul", ((6, 6), (6, 6), (6, 6)))
    for placement in (Replicate(), Shard(0), Shard(1)):
        a, b, c = (distribute_tensor(t.detach(), mesh, [placement]) for t in whole)
        for args, wholes in (((a, b), whole[:2]), ((a, b, c), whole)):
            factors = OPERATORS["symmetric_matmul"].factors(len(args))
            result = torchpar.symmetric_matmul(*args, **factors, check=True)
            expected = torchpar.symmetric_matmul(*wholes, **factors)
            torch.testing.assert_close(result.full_tensor(), expected.detach())
        shifted = distribute_tensor(whole[1].detach().roll(1, 0), mesh, [placement])
        with pytest.raises(RuntimeError, match=r"a @ b\.mT is not symmetric"):
            torchpar.symmetric_matmul(a, shifted, check=True)


def test_the_check_is_of_the_whole_and_not_of_its_parts(ranks):
    # The product of two shards of k is not symmetric; their sum is.
    ranks(2, checked)


def rows_of_a_product(shape: tuple[int, ...]) -> tuple[int, str]:
    """matmul_t of a matrix split by rows: the number of collectives, and the placement of the
    result."""
    (whole,) = operands("matmul_t", (shape,))
    mesh = init_device_mesh("cpu", (2,))
    x = distribute_tensor(whole.detach(), mesh, [Shard(len(shape) - 2)]).requires_grad_()
    with CommDebugMode() as communication:
        y = torchpar.matmul_t(x)
    expected = torchpar.matmul_t(whole)
    torch.testing.assert_close(y.full_tensor(), expected.detach())
    gradients = [
        torch.autograd.grad(one.cos().sum(), t)[0] for one, t in ((y, x), (expected, whole))
    ]
    torch.testing.assert_close(gradients[0].full_tensor(), gradients[1])
    return communication.get_total_counts(), str(*y.placements)


@pytest.mark.parametrize("shape", [(7, 5), (300, 5), (2, 8, 5)], ids=str)
def test_rows_of_a_product_take_one_gather(ranks, shape):
    assert ranks(2, rows_of_a_product, shape) == [(1, f"S({len(shape) - 2})")] * 2


def rows_that_are_split_twice() -> None:
    """matmul_t of a layer that is split by rows, and again by `fully_shard`."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    (whole,) = operands("matmul_t", ((8, 5),))
    layer = nn.Linear(5, 8, bias=False)
    layer.weight = nn.Parameter(whole.detach().clone())
    parallelize_module(layer, mesh["tp"], ColwiseParallel())
    fully_shard(layer, mesh=mesh["dp"])
    y, expected = torchpar.matmul_t(layer.weight), torchpar.matmul_t(whole)
    torch.testing.assert_close(y.full_tensor(), expected.detach())
    (found,) = torch.autograd.grad(y.cos().sum(), layer.weight)
    torch.testing.assert_close(
        found.full_tensor(), *torch.autograd.grad(expected.cos().sum(), whole)
    )


def test_rows_that_are_split_twice(ranks):
    ranks(4, rows_that_are_split_twice)
