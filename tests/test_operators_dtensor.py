# SPDX-License-Identifier: MIT
"""The operators on DTensors: every placement gives what the whole tensors give, gradients included."""

import itertools

import pytest
import torch

import torchpar

SHAPES = {
    "maximum": ((6, 5), (6, 5)),
    "matmul_t": ((7, 5),),
    "symmetric_matmul": ((6, 6), (6, 6)),
    "linear_sigmoid": ((6, 5), (7, 5), (7,)),
}


def operands(name: str, shapes: tuple[tuple[int, ...], ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if name == "symmetric_matmul":  # a = S² - S, b = 2S, c = S
        s = tensors[0] + tensors[0].mT
        tensors = [s @ s - s, 2 * s, s][: len(shapes)]
    return [t.requires_grad_() for t in tensors]


def compare(name: str, shapes: tuple[tuple[int, ...], ...]) -> list[str]:
    """Run ``name`` with each combination of placements; return those that were computed without a gather."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    operator = getattr(torch.ops.torchpar, name)
    whole = operands(name, shapes)
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
    "symmetric_matmul": ["R R -> R", "S(1) S(1) -> P(sum)"],
    "linear_sigmoid": ["R R R -> R", "R S(0) S(0) -> S(1)", "S(0) R R -> S(0)"],
}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_every_placement(ranks, name, world_size):
    local = ranks(world_size, compare, name, SHAPES[name])
    assert local[0] == local[-1]
    # A replicated operand is split without communication, too.
    assert set(LOCAL[name]) <= set(local[0]), local[0]


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


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_sum_over_shards_and_c(ranks, world_size):
    local = ranks(world_size, compare, "symmetric_matmul", ((6, 6), (6, 6), (6, 6)))[0]
    # Of a replicated c, each rank takes a share without communication.
    assert {"R R R -> R", "S(1) S(1) R -> P(sum)"} <= set(local), local


def scaled_and_checked() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole = operands("symmetric_matmul", ((6, 6), (6, 6), (6, 6)))
    for placement in (Replicate(), Shard(0), Shard(1)):
        a, b, c = (distribute_tensor(t.detach(), mesh, [placement]) for t in whole)
        for check in (False, True):
            for args, wholes in (((a, b), whole[:2]), ((a, b, c), whole)):
                result = torchpar.symmetric_matmul(*args, alpha=-2.5, beta=0.5, check=check)
                expected = torchpar.symmetric_matmul(*wholes, alpha=-2.5, beta=0.5)
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


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("shape", [(8, 5), (7, 5), (300, 5), (2, 8, 5)], ids=str)
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
    """Whether a kept promise passes, and what is said of a broken one; both operands are split by columns."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    s = torch.randn(8, 8, dtype=torch.float64)
    s = s + s.mT
    a, b, other = (distribute_tensor(t, mesh, [Shard(1)]) for t in (s @ s, s, torch.randn_like(s)))
    torchpar.symmetric_matmul(a, b)  # a rule found without the check is kept
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
