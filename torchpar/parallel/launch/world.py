# SPDX-License-Identifier: MIT
"""The ranks of a job and their mesh: join, form meshes, divide samples, exchange results."""

import gc
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store

from torchpar.decorating import context_manager
from torchpar.errors import (
    ConfigError,
    RankLostError,
    TorchparError,
    check_number,
    check_whole,
    whole_or_text,
)
from torchpar.parallel.launch import rendezvous
from torchpar.parallel.launch.agreement import check_same_on_all_ranks
from torchpar.parallel.launch.processes import end_with_launcher
from torchpar.parallel.launch.rank_info import RankInfo, find_rank_info

T = TypeVar("T")
_holders: WeakSet[Any] = WeakSet()
TIMEOUT = 1800.0
LONGEST = 1e9  # seconds of a timeout that Python and PyTorch take
_GLOOS_FILE = re.compile(r"\[[^]]*[/\\]gloo[/\\][^]]*:\d+\]")  # and line
PATIENCE = 1.5  # seconds in which each rank whose collective failed reports to the store


@dataclass(frozen=True)
class World:
    """This process's rank, device and mesh.

    The ranks form a mesh of three dimensions: "pp" (pipeline stages), "dp" (shares of each batch)
    and "tp" (shards of each layer). Ranks that differ in "tp" alone have consecutive numbers.

    Attributes:
        rank: 0 … world_size − 1 over all machines.
        local_rank: 0 … local_world_size − 1 on this machine.
        world_size: number of ranks on all machines.
        device: the device of this rank's tensors.
        mesh: the mesh, of shape ``(pp, dp, tp)``. `join_world` puts all ranks on "dp"; `with_mesh`
            makes another mesh.
        timeout: seconds after which a rank that waits for another rank gives up.
        gloo_yields: as in `join_world`.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    timeout: float = TIMEOUT
    gloo_yields: bool = False

    def with_mesh(self, *, dp: int = 1, tp: int = 1, pp: int = 1) -> "World":
        """Return this world with a mesh of ``pp × dp × tp`` ranks.

        Raises:
            ConfigError: on every rank: a factor is no whole number from 1 on, or the product is not
                the number of ranks.
        """
        factors = {"dp": dp, "tp": tp, "pp": pp}
        # First: a rank that refused a factor of its own would leave the others waiting.
        given = {name: whole_or_text(factor) for name, factor in factors.items()}
        check_same_on_all_ranks(None, "mesh", given)
        dp, tp, pp = (check_whole(name, factor) for name, factor in factors.items())
        if dp * tp * pp != self.world_size:
            raise ConfigError(
                f"dp {dp} × tp {tp} × pp {pp} is {dp * tp * pp} ranks, but {self.world_size} were "
                "started; start as many, or choose other factors"
            )
        mesh = _make_mesh(self.device, (pp, dp, tp), self.timeout, self.gloo_yields)
        return replace(self, mesh=mesh)

    @cached_property
    def dp_size(self) -> int:
        """Number of ranks that share each batch."""
        return self.mesh.get_group("dp").size()

    @cached_property
    def dp_rank(self) -> int:
        """This rank's number among the ranks that share each batch."""
        return self.mesh.get_local_rank("dp")

    @cached_property
    def tp_size(self) -> int:
        """Number of ranks that hold the shards of each layer."""
        return self.mesh.get_group("tp").size()

    @cached_property
    def tp_rank(self) -> int:
        """This rank's number among the ranks that hold the shards of each layer."""
        return self.mesh.get_local_rank("tp")

    def share(self, samples: Tensor) -> Tensor:
        """Return this rank's share of ``samples (n, *)``, as a view.

        `torch.tensor_split` cuts the samples over "dp".
        """
        return samples.tensor_split(self.dp_size)[self.dp_rank]

    @cached_property
    def owns_outputs(self) -> bool:
        """Whether this rank's outputs count: it is the last stage's first tensor-parallel rank."""
        return self.mesh.get_local_rank("pp") == self.mesh.shape[0] - 1 and self.tp_rank == 0

    def sum(self, t: Tensor) -> Tensor:
        """Sum ``t`` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(t)
        return t

    def gather_results(
        self, function: Callable[[], T], group: dist.ProcessGroup | None = None
    ) -> list[T]:
        """Run ``function`` and return the results of all ranks.

        Raises:
            Exception: on every rank, the error of the lowest rank that failed.
        """
        try:
            outcome: tuple[Any, Exception | None] = (function(), None)
        except Exception as e:
            outcome = (None, e)
        outcomes = [outcome] * self.world_size
        # The other ranks of a fake group do not exist.
        if self.world_size > 1 and dist.get_backend(group) != "fake":
            dist.all_gather_object(outcomes, outcome, group)
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for result, _ in outcomes]


def check_world(function: str, world: object) -> None:
    """Refuse what is no `World`: PyTorch's function of the same name takes something else."""
    if not isinstance(world, World):
        given = f"{function}: world is of type {type(world).__name__}"
        raise ConfigError(f"{given}, expected the World of `with join_world(…) as world`")


def check_module(function: str, model: object) -> None:
    """Refuse what is no module, such as the parameters of one."""
    if not isinstance(model, torch.nn.Module):
        given = f"{function}: model is of type {type(model).__name__}"
        raise ConfigError(f"{given}, expected the model, and not its parameters")


def check_mesh(function: str, mesh: object, dimension: str = "tp") -> None:
    """Refuse what is no mesh of one dimension, such as a number of ranks or a whole mesh."""
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        of = f"has {mesh.ndim} dimensions" if isinstance(mesh, DeviceMesh) else f"is {mesh!r}"
        expected = f'expected a mesh of one dimension, such as world.mesh["{dimension}"]'
        raise ConfigError(f"{function}: mesh {of}, {expected}")


@context_manager("torchpar.parallel.join_world")
def join_world(
    device: str = "auto",
    timeout: float = TIMEOUT,
    alone: bool = False,
    gloo_yields: bool = False,
) -> Iterator[World]:
    """Join the processes that torchrun or mpirun started, and yield their `World` to the block.

    Without a launcher the world has one rank. NCCL connects ranks with a GPU each. gloo connects
    ranks on CPUs, and ranks that share a GPU. If `torch.distributed` is initialized already, its
    ranks are the world, and it stays initialized. A rank receives SIGTERM when torchrun has ended,
    even by SIGKILL.

    Args:
        device: "cpu", "cuda", or "auto": CUDA if there is a GPU.
        timeout: seconds after which a rank that waits for another rank gives up.
        alone: raise if more than one rank was launched, for a program that is one process.
        gloo_yields: let the threads that poll gloo's sockets yield to threads that send, on Linux.
            On two cores an all-reduce of 64 bytes to 1 MB between two ranks then takes a fourth to
            half of the time, in the mean (docs/gloo.md). It changes how the system schedules
            threads of this process.

    Raises:
        ConfigError: an unknown device, CUDA on a machine without GPU, a ``timeout`` that is no
            number above 0 and at most `LONGEST`, several ranks with ``alone``, no network interface
            for gloo, or ranks that were started with other settings (`rendezvous.connect`).
        RankLostError: a rank has ended or hangs. This error replaces PyTorch's error.
    """
    timeout = check_number("timeout", timeout, above=True, most=LONGEST)
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {device!r}, expected 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but PyTorch finds no GPU; take cpu")
    launched = find_rank_info()
    info = launched or RankInfo(0, 0, 1, 1, address="", port=0, launcher="none")
    if info.launcher == "torchrun":
        end_with_launcher(speaks=info.local_rank == 0)
    if alone and info.world_size > 1:
        raise ConfigError(
            f"{info.world_size} processes were started, expected 1; start without a launcher"
        )
    rank_device, backend = _choose_device(device, info)
    limit, store = timedelta(seconds=timeout), None
    if not dist.is_initialized():
        store = rendezvous.connect(info, limit, backend) if launched else dist.HashStore()  # type: ignore[attr-defined]
    try:
        if store is not None:
            dist.init_process_group(
                backend,
                store=store,
                rank=info.rank,
                world_size=info.world_size,
                timeout=limit,
                device_id=rank_device if backend == "nccl" else None,
            )
        rank, world_size = dist.get_rank(), dist.get_world_size()
        mesh = _make_mesh(rank_device, (1, world_size, 1), timeout, gloo_yields)
        yield World(rank, info.local_rank, world_size, rank_device, mesh, timeout, gloo_yields)
    except RuntimeError as e:
        if store is None or not is_communication_error(e):
            raise
        raise _explain(e, store, info) from e
    finally:
        # The threads of a process group end with its last reference. If this reference ends after
        # the interpreter has begun to exit, the threads abort the process. DistributedDataParallel
        # keeps a reference in a reference cycle.
        _release_communicators()
        if store is not None and dist.is_initialized():
            dist.destroy_process_group()


def _choose_device(device: str, info: RankInfo) -> tuple[torch.device, str]:
    """Return this rank's device and the backend that connects it, and make the device current."""
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu"), "gloo"
    rank_device = torch.device("cuda", info.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(rank_device)
    # The device of an emulated GPU is the CPU.
    has_own = rank_device.type == "cuda" and info.local_world_size <= torch.cuda.device_count()
    return rank_device, "nccl" if has_own else "gloo"


def hold_communicators(holder: Any) -> None:
    """Call ``holder.release()`` before `join_world` ends the process group.

    NCCL waits at its end for the CUDA graphs that hold its communicators (pytorch#115388).
    """
    _holders.add(holder)


def _release_communicators() -> None:
    for holder in list(_holders):
        holder.release()
    gc.collect()


def _explain(error: RuntimeError, store: Store, info: RankInfo) -> TorchparError:
    """Return the error that says why this rank does not reach the others."""
    # Without gloo's own file and line.
    reason = re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0])
    if "Unable to find address for" in reason:  # GLOO_SOCKET_IFNAME, or this host's name
        given = os.environ.get("GLOO_SOCKET_IFNAME", "not set")
        reason = reason[reason.index("Unable") :]
        return ConfigError(
            f"gloo finds no network interface ({reason}), and GLOO_SOCKET_IFNAME is {given}; "
            "export GLOO_SOCKET_IFNAME=lo for ranks on one machine, or the name of another"
        )
    missing = rendezvous.missing_ranks(store, info.rank, info.world_size, PATIENCE)
    ranks = f"rank {', '.join(map(str, missing))}" if missing else "the others"
    fault = f"{ranks} does not answer" if missing else "ranks lost each other"
    remedy = f"look at the output of {ranks}"
    if "connectFullMesh" in reason and info.local_world_size < info.world_size:
        fault = f"gloo did not connect rank {info.rank} to {ranks}"
        reason = reason.partition("] ")[2] or reason  # behind gloo's own file
        address = rendezvous.gloo_address_within(timedelta(seconds=PATIENCE))
        remedy += (
            "; where it runs, let GLOO_SOCKET_IFNAME on each machine name the interface that leads "
            f"to the others, such as eth0: gloo listens at {address or 'that interface'} here"
        )
    if "Timed out" in reason:  # it may only be slow
        remedy += ", or take a longer timeout"
    return RankLostError(f"{fault} ({reason}); {remedy}", missing)


def _make_mesh(
    device: torch.device, shape: tuple[int, int, int], timeout: float, gloo_yields: bool
) -> DeviceMesh:
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "dp", "tp"))
    c10d = dist.distributed_c10d
    # Before torch 2.15 the name is private.
    set_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout
    # Mesh["dp"] would import the compiler: a second, and 157 MB.
    for group in mesh.get_all_groups():
        set_timeout(timedelta(seconds=timeout), group)  # PyTorch makes groups with its default
    if gloo_yields:
        _schedule_gloo_as_batch()
    return mesh


def _schedule_gloo_as_batch() -> None:
    """Schedule the thread that polls gloo's sockets as SCHED_BATCH, so that it yields to senders.

    The thread spins on a sender's lock, and with the usual policy preempts the sender until the
    scheduler's next tick (gloo #246): on few cores the mean time of a small all-reduce is two to
    four times as long (docs/gloo.md). The thread is found by the name that gloo gives it, on Linux
    only. A thread names itself when it first runs, which may be after its group was made.
    """
    for _ in range(4):
        for task in Path("/proc/self/task").glob("*"):
            with suppress(OSError):
                if (task / "comm").read_text().strip() == "gloo_tcp_loop":
                    os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))
        time.sleep(0.005)


def is_communication_error(error: RuntimeError) -> bool:
    """Whether ranks lost each other: PyTorch's ``DistError``, or an error of gloo.

    The errors of NCCL, of the TCP store and of its sockets are of classes below `dist.DistError`.
    All errors that gloo raises are plain RuntimeErrors: a rank that ended, a rank that does not
    answer in time, an interface that is not there. Only gloo's own file, which their messages
    name first, tells them from other errors.
    """
    return isinstance(error, dist.DistError) or bool(_GLOOS_FILE.search(str(error)))
