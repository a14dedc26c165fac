# SPDX-License-Identifier: MIT
"""Collectives of a training step on this rank: how many, how many bytes, how many seconds."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchpar.parallel.split.shared_memory import TRACED_AS, SharedSum
from torchpar.training.profile.phases import phase
from torchpar.training.profile.record import Call

if TYPE_CHECKING:
    from torchpar.parallel.launch.world import World


_OPERATIONS = {"allreduce": "all_reduce", "allgather": "all_gather", "alltoall_base": "all_to_all"}


def groups_of(world: "World | None") -> Iterator[tuple[str, dist.ProcessGroup]]:
    """Yield each dimension of a mesh and its group; without a mesh all ranks are on "dp"."""
    if world is not None:
        for name in world.mesh.mesh_dim_names or ():
            yield name, world.mesh.get_group(name)
    if dist.group.WORLD is not None and (world is None or world.dp_size == world.world_size):
        yield "dp", dist.group.WORLD  # which DistributedDataParallel takes


class Collectives(TorchDispatchMode):
    """Record the collectives within the block, those of DistributedDataParallel included.

    It waits for each all-reduce, all-gather and all-to-all at once, and not for a send or receive.
    Their seconds count as phase "collectives".

    Args:
        world: its mesh names the dimensions; without it all ranks are on "dp".

    Attributes:
        calls: in the order of the calls.
    """

    def __init__(self, world: "World | None" = None):
        super().__init__()
        self.calls: list[Call] = []
        self._dimensions = {group.group_name: name for name, group in groups_of(world)}

    def __enter__(self) -> "Collectives":
        self._watch_before, SharedSum.watch = SharedSum.watch, self._record_shared
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        SharedSum.watch = self._watch_before
        super().__exit__(*error)

    @contextmanager
    def _record_shared(self, nbytes: int) -> Iterator[None]:
        """Record the block as an all-reduce through shared memory, also in a trace."""
        with record_function(TRACED_AS), self.record("dp", "all_reduce", nbytes):
            yield

    @contextmanager
    def record(self, dimension: str, operation: str, nbytes: int) -> Iterator[None]:
        """Record the block as a `Call` of a collective."""
        with phase("collectives"):
            start = time.perf_counter()
            yield
            seconds = time.perf_counter() - start
        self.calls.append(Call(dimension, operation, nbytes, start, seconds))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        operation = func._opname.strip("_")
        tensors = args[1] if operation == "allgather" else args[0]
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        if group.size() == 1:  # DistributedDataParallel calls it on one rank, too
            return func(*args, **(kwargs or {}))
        dimension = self._dimensions.get(group.group_name, "")
        nbytes = sum(t.nbytes for t in tree_leaves(tensors))
        with self.record(dimension, _OPERATIONS.get(operation, operation), nbytes):
            result = func(*args, **(kwargs or {}))
            work = result[-1] if isinstance(result, tuple) else result
            # A rank must send its own message before it waits for its neighbor's.
            if operation in _OPERATIONS:
                dist.Work.unbox(work).wait()
                if torch.cuda.is_available():  # NCCL's wait only blocks the stream
                    torch.cuda.synchronize()
        return result
