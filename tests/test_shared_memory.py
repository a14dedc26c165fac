# SPDX-License-Identifier: MIT
"""Sums through shared memory: every bit, on ranks that come late, end or hang, and without such memory."""

import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from torchpar.parallel import join_world
from torchpar.parallel.launch.local import current_world, start_ranks
from torchpar.parallel.launch.world import World
from torchpar.parallel.split import shared_memory

SHAPES = [(), (33, 15), (0, 2), (504,)]
STEPS = 100
pytestmark = pytest.mark.skipif(not shared_memory.SUPPORTED, reason="ranks share memory on x86 under Linux")


def shared(world: World, dtype: torch.dtype = torch.float32, combine: Any = torch.add) -> Any:
    return shared_memory.make_shared_sum(world.mesh.get_group("dp"), SHAPES, dtype, world.timeout, combine)


def terms(rank: int, step: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    if not dtype.is_floating_point:  # of which float64 would round half
        limits = torch.iinfo(dtype)
        args = (limits.min // 8, limits.max // 8)
        return [torch.randint(*args, shape, generator=generator, dtype=dtype) for shape in SHAPES]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def sums(dtype: torch.dtype, combine: Any = torch.add, wait: bool = True) -> bool:
    """Whether many sums, to which ranks come late, have the bits of adding in the order of the ranks."""
    equal = True
    with join_world("cpu") as world, pytest.MonkeyPatch.context() as patch:
        if not wait:
            patch.setattr(shared_memory.SharedSum, "_wait", lambda self, rank: None)
        add = shared(world, dtype, combine)
        for step in range(STEPS):
            if step % 10 == world.rank:
                time.sleep(0.002)
            mine = terms(world.rank, step, dtype)
            add(mine)
            of_ranks = (terms(rank, step, dtype) for rank in range(world.world_size))
            expected = (reduce(combine, each) for each in zip(*of_ranks, strict=True))
            equal &= all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
    return equal


@pytest.mark.parametrize(
    "world_size, dtype, combine",
    [
        (2, torch.float32, torch.add),
        (3, torch.float64, torch.add),
        (4, torch.bfloat16, torch.add),
        (3, torch.int64, torch.add),
        (3, torch.int32, torch.maximum),
    ],
)
def test_sums_have_the_bits_of_the_ranks_order(ranks, world_size, dtype, combine):
    assert ranks(world_size, sums, dtype, combine) == [True] * world_size


def test_the_comparison_rejects_sums_that_do_not_wait(ranks):
    assert not all(ranks(2, sums, torch.float32, torch.add, False))


def unable(how: str, folder: Path) -> bool:
    """Whether ranks are refused memory."""
    with join_world("cpu") as world, pytest.MonkeyPatch.context() as patch:
        last = world.rank == world.world_size - 1
        patch.setattr(shared_memory, "FOLDER", folder / "missing" if how == "without a folder" else folder)
        if how == "of another processor":
            patch.setattr(shared_memory, "SUPPORTED", not last)
        if how == "without memory":
            patch.setattr(os, "posix_fallocate", lambda *_: os.open("/missing", 0))
        if how == "on another machine" and last:  # it has a folder of its own
            opened = Path.open
            patch.setattr(Path, "open", lambda path, mode: opened(folder / "other" / path.name, mode))
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
        ("without a folder", 2, True),
        ("on another machine", 2, True),
        *(("too many", 3, True), ("too many", 2, False)),
        *(("with much to send", 3, True), ("with much to send", 2, False)),
    ],
)
def test_ranks_that_cannot_share_memory(ranks, tmp_path, how, world_size, refused):
    assert ranks(world_size, unable, how, tmp_path) == [refused] * world_size
    assert not list(tmp_path.iterdir())


def be_killed(moment: str, folder: Path) -> None:
    """Make a sum of 8 MB, during which rank 0 is killed."""

    def kill(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    world = current_world()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "FOLDER", folder)
        if world.rank == 0 and moment == "before the others know its name":
            patch.setattr(dist, "broadcast_object_list", kill)
        if world.rank == 0 and moment == "with all of its memory":
            reserve = os.posix_fallocate
            patch.setattr(os, "posix_fallocate", lambda *args: (reserve(*args), kill()))
        shared_memory.make_shared_sum(world.mesh.get_group("dp"), [(500_000,)], torch.float32, 5.0)


@pytest.mark.parametrize("moment", ["before the others know its name", "with all of its memory"])
def test_a_killed_rank_leaves_no_memory(moment, tmp_path):
    with pytest.raises((RuntimeError, BrokenProcessPool)), start_ranks(2, timeout=5.0) as ranks:
        ranks.run(be_killed, moment, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 0


def averages_are_gloos() -> bool:
    """Whether DistributedDataParallel, whose second step forms other buckets, has gloo's bits."""
    made: list[Any] = []
    make = shared_memory.make_shared_sum
    with join_world("cpu") as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "make_shared_sum", lambda *args: made.append(make(*args)) or made[-1])
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


def begin_and_end(how: str) -> None:
    """Sum once; then rank 1 ends or hangs, and rank 0 waits for it."""
    world = current_world()
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
def test_a_rank_that_is_lost(how, message):
    with pytest.raises(RuntimeError, match=message), start_ranks(2, timeout=3.0) as ranks:
        ranks.run(begin_and_end, how)
