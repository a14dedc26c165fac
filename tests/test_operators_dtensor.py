# SPDX-License-Identifier: MIT
"""The operators on DTensors: every placement gives the results and gradients of the full tensors."""

import itertools
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from operators import BACKWARDS, OPERATORS, Shapes
from ranks import fork_context
from samples import arguments, normal

import torchpar
from torchpar.testing.ranks import Ranks

# Of PyTorch's own compiler.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


NAMES = [*OPERATORS, *BACKWARDS]


def operands(name: str, shapes: Shapes) -> list[torch.Tensor]:
    if name not in OPERATORS:
        made = arguments(shapes)
    else:  # exact products of operands whose sums are not exact in float32
        made = OPERATORS[name].operands(*arguments(shapes, OPERATORS[name].widest))
    return [t.detach().requires_grad_() for t in made]


def place(whole: torch.Tensor, mesh: Any, placements: Sequence[Any]) -> Any:
    """A DTensor of ``whole``. Where it is partial, the ranks' parts differ in every element."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    value = whole.detach()
    for dim, placement in enumerate(placements):
        if placement.is_partial():
            size = mesh.size(dim)
            weights = normal(size, *whole.shape, dtype=whole.dtype, seed=dim)
            weights += (1 - weights.sum(0)) / size
            value = value * weights[mesh.get_local_rank(dim)]
    held = [Replicate() if p.is_partial() else p for p in placements]
    local = distribute_tensor(value, mesh, held, src_data_rank=None).to_local()
    placed = DTensor.from_local(local, mesh, placements, shape=whole.shape, stride=whole.stride())
    return placed.requires_grad_()


def compare_placed(
    operator: Callable[..., Any], whole: list[torch.Tensor], mesh: Any, placements: Sequence[Sequence[Any]]
) -> tuple[int, str]:
    """Compare results and gradients with those of ``whole``: the collectives, and the result's placements.

    Those of exact products are equal bit for bit, unless operands are parts of a sum: sums of rounded parts
    would have other bits.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    def results(args: Sequence[Any]) -> tuple[Any, ...]:
        found = operator(*args)
        return found if isinstance(found, tuple) else (found,)

    is_exact = whole[0].dtype == torch.float32 and not any(p.is_partial() for own in placements for p in own)
    how = {"rtol": 0, "atol": 0} if is_exact else {}
    expected = results(whole)
    incoming = [normal(*t.shape, dtype=t.dtype, seed=9) for t in expected]  # the same on every rank
    gradients = torch.autograd.grad(expected, whole, incoming, materialize_grads=True)
    args = [place(t, mesh, placement) for t, placement in zip(whole, placements, strict=True)]
    with CommDebugMode() as communication:
        actual = results(args)
    torch.testing.assert_close([t.full_tensor() for t in actual], [t.detach() for t in expected], **how)
    replicated = [Replicate()] * mesh.ndim
    found = torch.autograd.grad(
        [t.redistribute(placements=replicated) for t in actual],
        args,
        [distribute_tensor(g, mesh, replicated) for g in incoming],
        materialize_grads=True,
    )
    torch.testing.assert_close([g.full_tensor() for g in found], list(gradients), **how)
    return communication.get_total_counts(), " ".join(map(str, actual[0].placements))


def compare(name: str, shapes: Shapes, mesh_shape: tuple[int, ...], drawn: int | None = None) -> list[str]:
    """Run ``name`` with each combination of placements, or ``drawn`` ones; return those that are local."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh = init_device_mesh("cpu", mesh_shape)
    factors = OPERATORS[name].factors(len(shapes)) if name in OPERATORS else {}
    operator = partial(getattr(torch.ops.torchpar, name).default, **factors)
    whole = operands(name, shapes)

    def choices(t: torch.Tensor) -> list[tuple[Any, ...]]:
        on_a_dimension = [Replicate(), *map(Shard, range(t.dim())), Partial("sum")]
        return list(itertools.product(on_a_dimension, repeat=mesh.ndim))

    combinations = list(itertools.product(*map(choices, whole)))
    if drawn is not None:
        combinations = random.Random(0).sample(combinations, min(drawn, len(combinations)))
    local = []
    for placements in combinations:
        collectives, result = compare_placed(operator, whole, mesh, placements)
        if collectives == 0:
            local.append(" ".join(str(p) for placement in placements for p in placement) + " -> " + result)
    return local


@pytest.mark.parametrize("name", [*OPERATORS, *(pytest.param(b, marks=pytest.mark.slow) for b in BACKWARDS)])
def test_every_placement(ranks, name):
    """Partial sums too: a sigmoid of parts of a sum, say, would not be the sigmoid of the sum."""
    shapes, expected = OPERATORS[name].sharded if name in OPERATORS else (BACKWARDS[name].cases[0], set())
    local = ranks(2, compare, name, shapes, (2,))
    assert local[0] == local[-1]
    # A replicated operand is split without communication, too.
    assert expected <= set(local[0]), local[0]


def test_a_layer_of_a_vector(ranks):
    ranks(2, compare, "linear_sigmoid", ((4,), (6, 4), (6,)), (2,))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_placements_on_a_mesh(ranks, name):
    shapes = OPERATORS[name].sharded[0] if name in OPERATORS else BACKWARDS[name].cases[0]
    ranks(4, compare, name, shapes, (2, 2), 40)


def compare_compiled() -> None:
    """The compiled operators beside the eager ones, with split operands, in one graph."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cases = list(itertools.product(OPERATORS, (True, False)))

    def compute(operands_of: list[list[Any]]) -> list[Any]:
        return [
            OPERATORS[name].function(*args, **OPERATORS[name].factors(len(args)))
            for (name, _), args in zip(cases, operands_of, strict=True)
        ]

    whole = [operands(name, OPERATORS[name].sharded[0]) for name, _ in cases]
    placed = [
        [
            distribute_tensor(t.detach(), mesh, [Shard(0 if along_rows else t.dim() - 1)]).requires_grad_()
            for t in args
        ]
        for (_, along_rows), args in zip(cases, whole, strict=True)
    ]
    # The other partitioner would import Inductor, which takes longer than to compile.
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager_default_partitioner")
    actual = [t.full_tensor() for t in compiled(placed)]
    expected = compute(whole)
    torch.testing.assert_close(actual, [t.detach() for t in expected])
    found = torch.autograd.grad(sum(t.cos().sum() for t in actual), list(itertools.chain(*placed)))
    gradients = torch.autograd.grad(sum(t.cos().sum() for t in expected), list(itertools.chain(*whole)))
    torch.testing.assert_close([g.full_tensor() for g in found], list(gradients))


@pytest.mark.slow
def test_compiled():
    # In processes of its own: PyTorch's compiler (2.15) fails after other tests have used DTensors eagerly.
    fork_context()
    with Ranks() as ranks:
        ranks(2, compare_compiled)


def scaled_and_checked() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole = operands("symmetric_matmul", ((6, 6), (6, 6), (6, 6)))
    for placement in (Replicate(), Shard(0), Shard(1)):
        a, b, c = (distribute_tensor(t.detach(), mesh, [placement]) for t in whole)
        # DTensor caches the rule that it finds without the check.
        for check, (args, wholes) in itertools.product(
            (False, True), (((a, b), whole[:2]), ((a, b, c), whole))
        ):
            factors = OPERATORS["symmetric_matmul"].factors(len(args))
            result = torchpar.symmetric_matmul(*args, **factors, check=check)
            expected = torchpar.symmetric_matmul(*wholes, **factors)
            torch.testing.assert_close(result.full_tensor(), expected.detach())
        shifted = distribute_tensor(whole[1].detach().roll(1, 0), mesh, [placement])
        with pytest.raises(RuntimeError, match=r"a @ b\.mT is not symmetric"):
            torchpar.symmetric_matmul(a, shifted, check=True)


def test_the_check_is_of_the_whole_and_not_of_its_parts(ranks):
    # The product of two shards of k is not symmetric; their sum is.
    ranks(2, scaled_and_checked)


def rows_of_a_product(shape: tuple[int, ...]) -> tuple[int, str]:
    """matmul_t of a matrix split by rows: the number of collectives, and the placement of the result."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (2,))
    return compare_placed(torchpar.matmul_t, operands("matmul_t", (shape,)), mesh, [[Shard(len(shape) - 2)]])


@pytest.mark.parametrize("shape", [(7, 5), (300, 5), (2, 8, 5)], ids=str)
def test_rows_of_a_product_take_one_gather(ranks, shape):
    assert ranks(2, rows_of_a_product, shape) == [(1, f"S({len(shape) - 2})")] * 2
