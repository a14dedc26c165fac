# SPDX-License-Identifier: MIT
"""What travels between ranks in a step: how often, how many bytes, how long."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchpar.parallel.step import LossSum, Step
from torchpar.parallel.world import World
from torchpar.phases import NoPhases, Phases


@dataclass(frozen=True)
class Call:
    """One collective operation, or one message to or from a neighbour.

    Attributes:
        dimension: of the mesh, "" for the whole world.
        operation: "all_reduce", "all_gather", "send", "recv" or another of `torch.distributed`'s.
        ranks: how many take part.
        bytes: of this rank's tensors.
        seconds: from its start to its end; the rank waits for it.
    """

    dimension: str
    operation: str
    ranks: int
    bytes: int
    seconds: float


_OPERATIONS = {"allreduce": "all_reduce", "allgather": "all_gather"}


class Collectives(TorchDispatchMode):
    """Records the calls that run within it, DistributedDataParallel's too, each waited for at once.

    Args:
        world: its mesh gives the groups their names.
        measure: counts the seconds as "collectives".
    """

    def __init__(self, world: World, measure: Phases | NoPhases | None = None):
        super().__init__()
        self.calls: list[Call] = []
        self._measure = measure or NoPhases()
        self._names: dict[str, str] = {}
        if world.mesh is None:
            assert dist.group.WORLD is not None
            self._names[dist.group.WORLD.group_name] = "dp"
        else:
            for name in world.mesh.mesh_dim_names or ():
                self._names[world.mesh[name].get_group().group_name] = name

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
        with self._measure("collectives"):
            start = time.perf_counter()
            result = func(*args, **(kwargs or {}))
            work = result[-1] if isinstance(result, tuple) else result
            # A received message must not be waited for before this rank has sent its own.
            if operation in ("allreduce", "allgather"):
                dist.Work.unbox(work).wait()
                if torch.cuda.is_available():  # NCCL's wait is the stream's
                    torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        self.calls.append(
            Call(
                self._names.get(group.group_name, ""),
                _OPERATIONS.get(operation, operation),
                group.size(),
                sum(t.nbytes for t in _tensors(tensors)),
                seconds,
            )
        )
        return result


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for part in found for t in _tensors(part)]


class WatchedStep:
    """A step whose calls are recorded: ``steps`` of them, after the first ``skip``.

    Attributes:
        calls: of each recorded step.
    """

    def __init__(self, step: Step, world: World, skip: int = 2, steps: int = 20):
        self.step = step
        self.world = world
        self.skip = skip  # in two steps DistributedDataParallel sets itself up
        self.steps = steps
        self.calls: list[list[Call]] = []

    def gradients(
        self, x: Tensor, labels: Tensor, global_size: int, loss_sum: LossSum, measure: Phases | NoPhases
    ) -> Tensor:
        if isinstance(measure, NoPhases) and len(self.calls) == self.steps:
            return self.step.gradients(x, labels, global_size, loss_sum, measure)
        with Collectives(self.world, measure) as watch:
            loss = self.step.gradients(x, labels, global_size, loss_sum, measure)
        if self.skip:
            self.skip -= 1
        elif len(self.calls) < self.steps:
            self.calls.append(watch.calls)
        return loss

    def outputs(self, x: Tensor) -> Tensor | None:
        return self.step.outputs(x)
