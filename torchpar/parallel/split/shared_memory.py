# SPDX-License-Identifier: MIT
"""All-reduces over ranks of one machine through memory that they share.

Each rank writes its terms where all ranks see them, and then a sequence number. When a rank sees
this number from every rank, it adds all terms in the order of the ranks, so that all ranks get the
same bits. gloo sends tensors through a socket, which takes several times as long (docs/gloo.md).
"""

import fcntl
import mmap
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from math import prod
from types import MethodType
from typing import Any, BinaryIO, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import JoinHook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from torchpar.errors import ConfigError
from torchpar.parallel.launch.world import World, check_world

# On x86 other cores see writes in the order in which they were made.
SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"
MAX_RANKS = 8  # each rank reads the terms of all ranks
MAX_BYTES = 2**30  # of all ranks together
TRACED_AS = "shared_memory:all_reduce"  # the name of a sum in a trace
_NOTHING = nullcontext()
_CACHE_LINE = 64  # bytes; the sequence number of each rank has its own cache line
# A waiting rank looks this many times before it lets other processes run, and before it sleeps.
_SPINS, _YIELDS = 200, 5000
_PAUSE = 1e-4  # seconds


class SharedSum:
    """Sums of tensors of given ``shapes`` over the "dp" ranks. Made by `make_shared_sum`.

    Attributes:
        watch: set by a profiler, which would see operators only: from the bytes of a sum, a context
            for it.
    """

    watch: ClassVar[Callable[[int], AbstractContextManager[None]] | None] = None

    def __init__(
        self,
        group: dist.ProcessGroup,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        file: BinaryIO,
        timeout: float,
    ):
        self.group, self.rank, self.ranks, self.timeout = group, group.rank(), group.size(), timeout
        sizes = [prod(shape) for shape in shapes]
        self._nbytes = sum(sizes) * dtype.itemsize
        self._file = file
        memory = torch.frombuffer(mmap.mmap(self._file.fileno(), 0), dtype=torch.uint8)
        head = self.ranks * _CACHE_LINE
        numbers = memory[:head].view(torch.int64).numpy()
        self._numbers = numbers[
            :: _CACHE_LINE // 8
        ]  # the sequence number of each rank's latest sum
        # A rank may be one sum ahead of the other ranks, but never two: hence two sets of slots.
        self._slots = memory[head:].view(dtype).view(2, self.ranks, sum(sizes))
        self._terms = [
            [
                [
                    term.view(tuple(shape))
                    for term, shape in zip(slot.split(sizes), shapes, strict=True)
                ]
                for slot in slots
            ]
            for slots in self._slots
        ]
        self._number = 0
        # A rank holds the lock of its byte as long as it lives.
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, self.rank)

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Replace ``tensors``, of the given shapes, by their sums over the ranks.

        Every rank must call this.

        Raises:
            RuntimeError: a rank has ended, or did not come within the timeout.
        """
        self._number += 1
        current = self._number % 2
        with self._recorded():
            torch.cat([t.flatten() for t in tensors], out=self._slots[current, self.rank])
            self._numbers[self.rank] = self._number  # after the terms
            for rank in range(self.ranks):
                if self._numbers[rank] < self._number:
                    self._wait(rank)
            for total, *terms in zip(tensors, *self._terms[current], strict=True):
                torch.add(terms[0], terms[1], out=total)
                for term in terms[2:]:
                    total.add_(term)

    def _recorded(self) -> AbstractContextManager[None]:
        """Show a sum to the profilers that are active; `record_function` would take 6 µs."""
        if SharedSum.watch is not None:
            return SharedSum.watch(self._nbytes)
        if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            return record_function(TRACED_AS)
        return _NOTHING

    def _wait(self, rank: int) -> None:
        start, looked = time.monotonic(), 0
        while self._numbers[rank] < self._number:
            looked += 1
            if looked > _SPINS:
                os.sched_yield()
            if looked > _YIELDS:
                time.sleep(_PAUSE)
                if self._has_ended(rank) and self._numbers[rank] < self._number:
                    raise dist.DistNetworkError(
                        f"Connection closed by rank {dist.get_global_rank(self.group, rank)}"
                    )
                if time.monotonic() - start > self.timeout:
                    lost = dist.get_global_rank(self.group, rank)
                    waited = f"Timed out waiting {self.timeout:g} s for rank {lost}"
                    raise dist.DistNetworkError(waited)

    def _has_ended(self, rank: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True


def make_shared_sum(
    group: dist.ProcessGroup, shapes: Sequence[Sequence[int]], dtype: torch.dtype, timeout: float
) -> SharedSum | None:
    """Return sums of tensors over the ranks of ``group``, or None if they cannot share memory.

    Ranks can share memory on one Linux machine with an x86 processor, up to `MAX_RANKS` ranks, if
    twice the size of their tensors is free and at most `MAX_BYTES`. Every rank must call this.

    Args:
        shapes: the shapes of the tensors of each sum.
        timeout: seconds after which a rank that waits for another rank gives up.
    """
    nbytes = group.size() * (_CACHE_LINE + 2 * sum(map(prod, shapes)) * dtype.itemsize)
    able = can_share_memory(group.size()) and nbytes <= MAX_BYTES
    shared = file = None
    offered = [""]
    with suppress(OSError):  # too little memory is free
        if able and group.rank() == 0:
            # The memory has no name in a file system: it is freed with the last rank, even if this
            # is killed.
            name = f"torchpar-{uuid.uuid4()}"
            file = os.fdopen(os.memfd_create(name), "r+b")
            os.posix_fallocate(file.fileno(), 0, nbytes)
            offered = [f"/proc/{os.getpid()}/fd/{file.fileno()} {name}"]
    dist.broadcast_object_list(offered, group=group, group_src=0)
    with suppress(OSError):
        if able and offered[0]:
            path, name = offered[0].split()
            if name in os.readlink(path):  # on another machine the path may be another file's
                file = file or os.fdopen(os.open(path, os.O_RDWR), "r+b")
                shared = SharedSum(group, shapes, dtype, file, timeout)
    made = [False] * group.size()
    dist.all_gather_object(made, shared is not None, group)
    return shared if all(made) else None


def can_share_memory(ranks: int) -> bool:
    """Return whether so many ranks of one machine can add through memory, if enough is free."""
    return SUPPORTED and 1 < ranks <= MAX_RANKS


def register_shared_memory_hook(replica: DistributedDataParallel, world: World) -> None:
    """Let ``replica`` average its gradients through shared memory, or if it cannot, by gloo.

    The backward pass waits for the average of each bucket. Every rank must call this. Within
    ``replica.join(divide_by_initial_world_size=False)`` the sum is divided by the number of ranks
    that still have batches, as without the hook. They count themselves by one more all-reduce in
    each step. Sparse gradients, such as those of `torch.nn.Embedding` with ``sparse=True``, are
    averaged by gloo: ranks have different numbers of elements.

    Raises:
        ConfigError: ``replica`` is no DistributedDataParallel, or ``world`` no `World`.
    """
    check_world("register_shared_memory_hook", world)
    if not isinstance(replica, DistributedDataParallel):
        given = f"register_shared_memory_hook: replica is of type {type(replica).__name__}"
        raise ConfigError(f"{given}, expected DistributedDataParallel(model)")
    group: dist.ProcessGroup = replica.process_group
    sums: dict[int, tuple[tuple[int, torch.dtype], SharedSum | None]] = {}
    divisor = _Divisor(group)

    def sum_of(index: int, gradients: Tensor) -> SharedSum | None:
        kind = gradients.numel(), gradients.dtype
        # In its second step the replica forms other buckets.
        if index not in sums or sums[index][0] != kind:
            shapes = [gradients.shape]
            sums[index] = kind, make_shared_sum(group, shapes, gradients.dtype, world.timeout)
        return sums[index][1]

    def average(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        index, gradients = bucket.index(), bucket.buffer()
        add = None if gradients.is_sparse else sum_of(index, gradients)
        if index == 0:  # the first bucket of a backward pass
            divisor.update()
        gradients.div_(divisor.ranks)  # first: a sum of fp16 may overflow
        if add is None:
            work = dist.all_reduce(gradients, group=group, async_op=True)
            return work.get_future().then(lambda future: future.value()[0])
        add([gradients])
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(gradients)
        return done

    # Of an emulated GPU, too, messages go between the devices: a CUDA graph holds them.
    is_on_gpu = any(p.is_cuda for p in replica.parameters())
    if world.device.type == "cpu" and not is_on_gpu and group.size() > 1:
        replica.register_comm_hook(None, average)
        # PyTorch does not tell a hook what `join` was asked for, nor that this rank has joined.
        replica.join_hook = MethodType(partial(_join_hook, divisor), replica)  # type: ignore[method-assign]


class _Divisor:
    """The number of ranks whose gradients are averaged."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.ranks = group.size()
        self.counts_joined = True  # divide_by_initial_world_size
        self.has_joined = False  # this rank has no more batches, and adds zeros

    def update(self) -> None:
        if self.counts_joined:
            self.ranks = self.group.size()
            return
        present = torch.tensor(int(not self.has_joined), device="cpu")
        dist.all_reduce(present, group=self.group)
        self.ranks = int(present.item())


class _JoinHook(JoinHook):
    """PyTorch's hook, which tells a `_Divisor` that this rank has joined."""

    def __init__(self, hook: JoinHook, divisor: _Divisor):
        self.hook, self.divisor = hook, divisor

    def main_hook(self) -> None:
        self.divisor.has_joined = True
        try:
            self.hook.main_hook()
        finally:
            self.divisor.has_joined = False

    def post_hook(self, is_last_joiner: bool) -> None:
        self.hook.post_hook(is_last_joiner)


def _join_hook(divisor: _Divisor, replica: DistributedDataParallel, **options: Any) -> JoinHook:
    """Make the hook of `join` in place of the method ``replica.join_hook``."""
    divisor.counts_joined = bool(options.get("divide_by_initial_world_size", True))
    return _JoinHook(type(replica).join_hook(replica, **options), divisor)
