# SPDX-License-Identifier: MIT
"""The processes that train together, and the mesh they form."""

import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store

from torchpar.errors import ConfigError
from torchpar.parallel import rendezvous
from torchpar.parallel.agreement import check_alike
from torchpar.parallel.partition import Partition
from torchpar.parallel.reduction import Reduction, check_reduction

T = TypeVar("T")
TIMEOUT = 1800.0
PATIENCE = 1.5  # seconds that a rank whose collective failed leaves the others to report that theirs did


class RankLostError(ConfigError):
    """A rank died or hangs.

    The lowest rank that is left tells.
    """


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    The ranks form a mesh of three dimensions: "pp" (pipeline stages), "dp" (shares of each batch) and
    "tp" (shares of each layer), the last varying fastest.

    Attributes:
        rank: 0 … world_size − 1 over all machines.
        local_rank: its number on its own machine.
        device: where it keeps its tensors.
        mesh: None stands for pure data parallelism.
        reduction: how sums over ranks are made (`torchpar.parallel.reduction`).
        timeout: seconds after which a rank that waits for another gives up.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    reduction: Reduction = "fast"
    timeout: float = TIMEOUT

    def split(self, *, dp: int = 1, tp: int = 1, pp: int = 1, reduction: Reduction = "fast") -> "World":
        """This world as a mesh of ``pp × dp × tp`` ranks.

        Raises:
            ConfigError: a product that is not the number of ranks, or a reduction that these numbers
                of ranks do not allow.
        """
        self.check_alike("mesh", {"dp": dp, "tp": tp, "pp": pp, "reduction": reduction})
        if min(dp, tp, pp) < 1 or dp * tp * pp != self.world_size:
            raise ConfigError(
                f"dp {dp} × tp {tp} × pp {pp} is {dp * tp * pp} ranks, but {self.world_size} were started; "
                "start as many, or choose other factors"
            )
        for ranks in (dp, tp):
            check_reduction(reduction, ranks)
        if reduction == "invariant" and pp > 1:
            raise ConfigError(f"reduction 'invariant' takes meshes of dp and tp alone, not pp {pp}")
        mesh = init_device_mesh(self.device.type, (pp, dp, tp), mesh_dim_names=("pp", "dp", "tp"))
        for dim in ("pp", "dp", "tp"):
            _set_timeout(mesh[dim].get_group(), timedelta(seconds=self.timeout))
        _calm_gloo()
        return replace(self, mesh=mesh, reduction=reduction)

    @property
    def data_ranks(self) -> int:
        """Among how many ranks a batch is shared."""
        return self.world_size if self.mesh is None else self.mesh["dp"].size()

    @property
    def data_rank(self) -> int:
        """Which of them this is."""
        return self.rank if self.mesh is None else self.mesh["dp"].get_local_rank()

    @property
    def tensor_rank(self) -> int:
        """Which of the ranks that share each layer this is."""
        return 0 if self.mesh is None else self.mesh["tp"].get_local_rank()

    def share(self, size: int) -> Partition:
        """How an axis of ``size`` samples is shared by the data-parallel ranks."""
        if self.mesh is not None:
            return Partition.of(size, self.mesh["dp"], self.reduction)
        return Partition(size, self.world_size, self.world_size, self.rank)

    @property
    def counts(self) -> bool:
        """Whether this rank's outputs count: the last stage has them, and one of its tensor-split ranks
        stands for all."""
        if self.mesh is None:
            return True
        last = self.mesh["pp"].get_local_rank() == self.mesh["pp"].size() - 1
        return last and self.tensor_rank == 0

    def sum(self, t: Tensor) -> Tensor:
        """``t`` summed over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(t)
        return t

    def once_per_machine(self, prepare: Callable[[], None]) -> None:
        """Run ``prepare`` on each machine's first rank while the others wait.

        Raises:
            Exception: what ``prepare`` raised, on every rank.
        """
        self.agree(prepare if self.local_rank == 0 else None)

    def on_rank_0(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """The result of ``function`` on rank 0, on every rank.

        Raises:
            Exception: what ``function`` raised, on every rank.
        """
        result: T = self.agree(function if self.rank == 0 else None, group)[0]
        return result

    def agree(self, function: Callable[[], Any] | None, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Each rank's result of ``function``, None where it has none to run; the first error, on all."""
        outcome: tuple[Any, Exception | None] = (None, None)
        if function is not None:
            try:
                outcome = (function(), None)
            except Exception as e:
                outcome = (None, e)
        outcomes = [outcome]
        if self.world_size > 1:
            outcomes *= self.world_size
            dist.all_gather_object(outcomes, outcome, group)
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for result, _ in outcomes]

    def check_alike(self, what: str, values: dict[str, Any]) -> None:
        """`torchpar.parallel.agreement.check_alike` over all ranks."""
        if self.world_size > 1:
            check_alike(None, what, values)


@contextmanager
def join_world(device: str = "auto", timeout: float = TIMEOUT) -> Iterator[World]:
    """Join the processes that torchrun, mpirun or srun started; a world of one without them.

    NCCL connects ranks with a GPU each; gloo connects ranks on CPUs, and ranks that share a GPU.

    Args:
        device: "cpu", "cuda", or "auto": CUDA where there is any.
        timeout: seconds after which a rank that waits for another gives up.

    Raises:
        ConfigError: an unknown device, or CUDA on a machine without.
        RankLostError: in the place of PyTorch's error when a rank has died or hangs.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {device!r}, expected 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: no CUDA device is available here; use cpu or auto")
    started = rendezvous.find_place()
    place = started or rendezvous.Place(0, 0, 1, 1, address="", port=0, launcher="none")
    if device == "cpu" or not torch.cuda.is_available():
        own, backend = torch.device("cpu"), "gloo"
    else:
        own = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        backend = "gloo" if place.local_world_size > torch.cuda.device_count() else "nccl"
        torch.cuda.set_device(own)
    if dist.is_initialized():
        yield World(dist.get_rank(), place.local_rank, dist.get_world_size(), own)
        return
    limit = timedelta(seconds=timeout)
    store = rendezvous.connect(place, limit) if started else dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(
        backend,
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=limit,
        device_id=own if backend == "nccl" else None,
    )
    _calm_gloo()
    try:
        yield World(place.rank, place.local_rank, place.world_size, own, timeout=timeout)
    except ConfigError as e:
        e.told = _rank_0_tells(store, place.rank)
        raise
    except RuntimeError as e:
        if not _is_of_communication(e):
            raise
        lost = rendezvous.absent(store, place.rank, place.world_size, PATIENCE)
        reason = re.sub(r"^\[\S*\] ", "", str(e).partition("\n")[0])  # without gloo's own file and line
        who = f"rank {', '.join(map(str, lost))} does not answer" if lost else "the ranks lost each other"
        error = RankLostError(f"{who} ({reason})")
        error.told = any(rank not in lost for rank in range(place.rank))
        raise error from e
    finally:
        # A group's threads end with its last reference, and abort the process if that is after the
        # interpreter has begun to exit. DistributedDataParallel keeps one, in a reference cycle.
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def alone(device: str = "auto") -> Iterator[World]:
    """`join_world` for a program that is one process.

    Raises:
        ConfigError: as `join_world`, or a launcher has started several.
    """
    with join_world(device) as world:
        if world.world_size > 1:
            raise ConfigError(
                f"{world.world_size} processes were started, expected 1; start it without a launcher"
            )
        yield world


def _calm_gloo() -> None:
    """Keep the thread that polls gloo's sockets from taking a core from those that send on them.

    While a sender holds a pair's lock, that thread spins on it (gloo's `Pair::handleEvents` tries the lock
    and returns to a poll that is ready at once; gloo #246). Having slept, it goes before the sender, which
    then waits for the scheduler's next tick: on two busy cores 10 to 30% of the all-reduces of 16 B to
    256 KB took 4 ms in the place of 0.3. A thread under SCHED_BATCH goes before nobody: the mean fell two-
    to fourfold (docs/parallel.md). Best effort: Linux only, and by the name that gloo gives the thread.
    """
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):
            if (task / "comm").read_text().strip() == "gloo_tcp_loop":
                os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))


def _rank_0_tells(store: Store, rank: int) -> bool:
    """Whether rank 0 has met an error as well, or is about to."""
    if rank == 0:
        store.set("failed", "")
        return False
    try:
        store.wait(["failed"], timedelta(seconds=PATIENCE))
    except dist.DistNetworkError:
        return True  # it hosts the store, and has ended
    except dist.DistStoreError:
        return False
    return True


def _is_of_communication(error: RuntimeError) -> bool:
    signs = r"gloo|NCCL|[Cc]onnection|[Ss]ocket|[Tt]imed out|[Tt]imeout|pair closure"
    return isinstance(error, dist.DistError) or re.search(signs, str(error)) is not None


def _set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """The groups of a mesh are made with PyTorch's own timeout, whatever the first group's is."""
    c10d = dist.distributed_c10d
    set_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout  # the latter before torch 2.15
    set_timeout(timeout, group)
