# SPDX-License-Identifier: MIT
"""The operators on DTensors: every placement gives what the whole tensors give, gradients included."""

import itertools

import pytest
import torch

import torchpar

SHAPES = {
    "maximum": ((6, 5), (6, 5)),
    "matmul_t": ((7, 5),),
    "linear_sigmoid": ((6, 5), (7, 5), (7,)),
}


def compare(name: str, shapes: tuple[tuple[int, ...], ...]) -> list[str]:
    """Run ``name`` with each combination of placements; return those that were computed without a gather."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    operator = getattr(torch.ops.torchpar, name)
    torch.manual_seed(0)
    whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = operator(*whole)
    incoming = torch.randn_like(expected)
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


LOCAL = {
    "maximum": ["R R -> R", "S(0) S(0) -> S(0)", "S(1) S(1) -> S(1)"],
    "matmul_t": ["R -> R", "S(1) -> P(sum)"],
    "linear_sigmoid": ["R R R -> R", "R S(0) S(0) -> S(1)", "S(0) R R -> S(0)"],
}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_every_placement(ranks, name, world_size):
    local = ranks(world_size, compare, name, SHAPES[name])
    assert local[0] == local[-1]
    # A replicated operand is split without communication, too.
    assert set(LOCAL[name]) <= set(local[0]), local[0]


@pytest.mark.parametrize("name, shapes", [("maximum", ((4, 3, 5), (3, 1))), ("matmul_t", ((4, 3, 2),))])
def test_batches_and_broadcasts(ranks, name, shapes):
    local = ranks(2, compare, name, shapes)[0]
    assert any(combination.endswith("-> S(0)") for combination in local), local


def test_rules_wait_for_dtensor() -> None:
    import torch.distributed.tensor

    from torchpar.ops import _library

    torchpar.maximum(torch.zeros(1), torch.zeros(1))
    assert not _library._sharding_rules
