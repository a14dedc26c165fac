# SPDX-License-Identifier: MIT
"""Sums through shared memory: every bit, on ranks that come late, end or hang, and without such
memory."""

import os
import time
from copy import deepcopy
from functools import reduce
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from torchpar.errors import ConfigError
from torchpar.parallel import join_world
from torchpar.parallel.launch.world import World
from torchpar.parallel.split import shared_memory

SHAPES = [(), (33, 15), (0, 2), (504,)]
STEPS = 100
pytestmark = pytest.mark.skipif(
    not shared_memory.SUPPORTED, reason="ranks share memory on x86 under Linux"
)


def shared(world: World, dtype: torch.dtype = torch.float32) -> Any:
    return shared_memory.make_shared_sum(world.mesh.get_group("dp"), SHAPES, dtype, world.timeout)


def terms(rank: int, step: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    if not dtype.is_floating_point:  # of which float64 would round half
        limits = torch.iinfo(dtype)
        args = (limits.min // 8, limits.max // 8)
        return [torch.randint(*args, shape, generator=generator, dtype=dtype) for shape in SHAPES]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def sums(dtype: torch.dtype, wait: bool = True) -> bool:
    """Whether many sums, to which ranks come late, have the bits of adding in the order of the
    ranks."""
    equal = True
    with join_world("cpu") as world, pytest.MonkeyPatch.context() as patch:
        if not wait:
            patch.setattr(shared_memory.SharedSum, "_wait", lambda self, rank: None)
        add = shared(world, dtype)
        for step in range(STEPS):
            if step % 10 == world.rank:
                time.sleep(0.002)
            mine = terms(world.rank, step, dtype)
            add(mine)
            of_ranks = (terms(rank, step, dtype) for rank in range(world.world_size))
            expected = (reduce(torch.add, each) for each in zip(*of_ranks, strict=True))
            equal &= all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
    return equal


@pytest.mark.parametrize(
    "world_size, dtype",
    [(2, torch.float32), (3, torch.float64), (4, torch.bfloat16), (3, torch.int64)],
)
def test_sums_have_the_bits_of_the_ranks_order(ranks, world_size, dtype):
    assert ranks(world_size, sums, dtype) == [True] * world_size


def test_the_comparison_rejects_sums_that_do_not_wait(ranks):
    assert not all(ranks(2, sums, torch.float32, False))


def unable(how: str) -> bool:
    """Whether ranks are refused memory."""
    with join_world("cpu") as world, pytest.MonkeyPatch.context() as patch:
        last = world.rank == world.world_size - 1
        if how == "of another processor":
            patch.setattr(shared_memory, "SUPPORTED", not last)
        if how == "without memory":
            patch.setattr(os, "posix_fallocate", lambda *_: os.open("/missing", 0))
        if how == "on another machine" and last:  # where the path is another file's
            patch.setattr(os, "readlink", lambda _: "/tmp/other")
        if how == "with much to send":  # 3 lines, and twice 1000 numbers of 3 ranks
            patch.setattr(shared_memory, "MAX_BYTES", 3 * (64 + 2 * 1000 * 4) - 1)
        if how == "too many":
            patch.setattr(shared_memory, "MAX_RANKS", 2)
        return shared(world) is None


@pytest.mark.parametrize(
    "how, world_size, refused",
    [
        ("of another processor", 2, True),
        ("without memory", 2, True),
        ("on another machine", 2, True),
        *(("too many", 3, True), ("too many", 2, False)),
        *(("with much to send", 3, True), ("with much to send", 2, False)),
    ],
)
def test_ranks_that_cannot_share_memory(ranks, how, world_size, refused):
    assert ranks(world_size, unable, how) == [refused] * world_size


def averages_are_gloos() -> bool:
    """Whether DistributedDataParallel, whose second step forms other buckets, has gloo's bits."""
    made: list[Any] = []
    make = shared_memory.make_shared_sum
    with join_world("cpu") as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            shared_memory, "make_shared_sum", lambda *args: made.append(make(*args)) or made[-1]
        )
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(600, 500), torch.nn.Linear(500, 600))
        ours, gloos = (DistributedDataParallel(deepcopy(model)) for _ in range(2))
        shared_memory.register_shared_memory_hook(ours, world)
        equal = True
        for step in range(3):
            x = torch.randn(4, 600) + world.rank
            for replica in (ours, gloos):
                replica.zero_grad()
                if step == 1:
                    with replica.no_sync():
                        replica(2 * x).sum().backward()
                replica(x).square().sum().backward()
            pairs = zip(ours.parameters(), gloos.parameters(), strict=True)
            equal &= all(torch.equal(p.grad, q.grad) for p, q in pairs)
        # Of one bucket at first, then of two; none under no_sync.
        return equal and [add._number for add in made] == [1, 2, 2]


def test_averages_of_data_parallel_replicas_are_gloos(ranks):
    """On two ranks to the bit: both halve the gradients and add two terms."""
    assert ranks(2, averages_are_gloos) == [True, True]


def averages_of_sparse(way: str) -> tuple[list[Tensor], list[bool]]:
    """The gradients of two steps, in which each rank has other rows, of an embedding and a layer;
    which of them are sparse."""
    with join_world("cpu") as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "SUPPORTED", way != "by gloo")
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Embedding(10, 4, sparse=True),
            torch.nn.Linear(4, 600),
            torch.nn.Linear(600, 900),
        )
        replica = DistributedDataParallel(model)
        if way != "without a hook":
            shared_memory.register_shared_memory_hook(replica, world)
        found, kinds = [], []
        for step in range(3):
            # A row twice, rows of all ranks, and a rank without a row.
            rows = [[2, 2, 3], [3, 4], []][(world.rank + step) % 3]
            replica(torch.tensor(rows).long()).square().sum().backward()
            gradients = [p.grad for p in model.parameters()]
            kinds += [g.is_sparse for g in gradients]
            found += [g.to_dense().clone() for g in gradients]
            model.zero_grad()
        return found, kinds


@pytest.mark.parametrize("count", [2, 3])
def test_sparse_gradients_are_averaged_as_without_the_hook(ranks, count):
    expected, sparse = ranks(count, averages_of_sparse, "without a hook")[0]
    assert sparse == [True, False, False, False, False] * 3
    assert expected[0].any()
    for way in ("by shared memory", "by gloo"):
        for found, kinds in ranks(count, averages_of_sparse, way):
            assert kinds == sparse
            for mine, gloos in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, gloos)


def test_what_is_no_replica_is_refused():
    with join_world("cpu") as world:
        model: Any = torch.nn.Linear(2, 2)
        with pytest.raises(
            ConfigError, match="hook: replica is of type Linear, expected Distribut"
        ):
            shared_memory.register_shared_memory_hook(model, world)
        with pytest.raises(ConfigError, match="hook: world is of type Linear, expected the World"):
            shared_memory.register_shared_memory_hook(model, model)


def weights_after_uneven_inputs(divides_by_all: bool, way: str) -> Tensor:
    """The weights after 3 steps of rank 0, 5 of rank 1, and 7 of rank 2; then one of all ranks."""
    with join_world("cpu") as world, pytest.MonkeyPatch.context() as patch:
        if way == "by gloo":
            patch.setattr(shared_memory, "SUPPORTED", False)
        if way == "not told":
            patch.setattr(shared_memory._Divisor, "update", lambda self: None)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 300), torch.nn.Linear(300, 600)).double()
        replica = DistributedDataParallel(model, find_unused_parameters=True)
        if way != "without a hook":
            shared_memory.register_shared_memory_hook(replica, world)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        generator = torch.Generator().manual_seed(world.rank)

        def step() -> None:
            x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
            replica(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        with replica.join(divide_by_initial_world_size=divides_by_all):
            for _ in range(3 + 2 * world.rank):
                step()
        step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "world_size, divides_by_all",
    [(3, False), *(pytest.param(2, by_all, marks=pytest.mark.slow) for by_all in (False, True))],
)
def test_uneven_inputs_are_divided_as_without_the_hook(ranks, world_size, divides_by_all):
    """Of more than one bucket. A rank that has joined adds zeros, and no longer counts."""

    def weights(way: str) -> Tensor:
        first, *others = ranks(world_size, weights_after_uneven_inputs, divides_by_all, way)
        assert all(torch.equal(first, other) for other in others)
        return first

    expected = weights("without a hook")
    for way in ("by shared memory", "by gloo"):
        torch.testing.assert_close(weights(way), expected)
    if not divides_by_all:
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(weights("not told"), expected)


def begin_and_end(how: str) -> None:
    """Sum once; then rank 1 ends or hangs, and rank 0 waits for it."""
    with join_world("cpu", timeout=3.0) as world:
        add = shared(world)
        ones = [torch.ones(shape) for shape in SHAPES]
        add(ones)
        if world.rank == 0:
            add(ones)
        elif how == "ends":
            os._exit(1)
        else:
            time.sleep(5)


@pytest.mark.parametrize(
    "how, message",
    [
        ("ends", "Connection closed by rank 1"),
        pytest.param("hangs", "Timed out waiting 3 s for rank 1", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_lost(ranks, how, message):
    with pytest.raises(dist.DistNetworkError, match=message):
        ranks(2, begin_and_end, how)
