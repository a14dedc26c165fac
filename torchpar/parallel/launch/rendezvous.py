# SPDX-License-Identifier: MIT
"""Rank and address from the launcher's environment, and the store through which the ranks connect."""

import os
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from torchpar.errors import ConfigError, RankLostError

T = TypeVar("T")
POLL = 0.02  # seconds between two requests to the store
LATER = 1.0  # seconds that the others wait longer than rank 0, which tells them who is missing


@dataclass(frozen=True)
class RankInfo:
    """Rank of this process, numbers of ranks, and address of the store.

    Attributes:
        rank: 0 … world_size − 1 over all machines.
        local_rank: 0 … local_world_size − 1 on this machine.
        world_size: number of ranks on all machines.
        local_world_size: number of ranks on this machine.
        address: host of the store.
        port: port of the store.
        launcher: "torchrun", whose agent hosts the store. Rank 0 hosts it under "openmpi", "mpich" and "env"
            (RANK and the other variables were set by something else).
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    address: str
    port: int
    launcher: str


# Rank, world size, local rank, and local world size under each launcher.
_VARIABLES = {
    "env": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


def find_rank_info(env: Mapping[str, str] = os.environ) -> RankInfo | None:
    """Read the variables of torchrun, or of mpirun (Open MPI and MPICH).

    MASTER_ADDR and MASTER_PORT are read under each launcher. Without them the address is 127.0.0.1 on one
    machine, and the port is derived from the job's name, which MPICH does not tell: its second job on a
    machine needs a MASTER_PORT.

    Returns:
        None without a launcher, and for the only process of an mpirun.

    Raises:
        ConfigError: a variable is missing or out of range, the ranks span machines without MASTER_ADDR and
            MASTER_PORT, or srun started several tasks without torchrun.
    """
    # mpirun comes before SLURM: in an allocation its ranks inherit the SLURM variables of its daemons.
    job = None
    if "RANK" in env:
        launcher = "env"
        env = {"LOCAL_RANK": env["RANK"], "LOCAL_WORLD_SIZE": env.get("WORLD_SIZE", ""), **env}
    elif "OMPI_COMM_WORLD_RANK" in env:
        launcher, job = "openmpi", env.get("PMIX_NAMESPACE")
    elif "PMI_RANK" in env and ("MPI_LOCALRANKID" in env or "SLURM_STEP_ID" not in env):
        launcher = "mpich"  # which names no job; srun --mpi=pmi2 sets PMI_RANK, too
    elif env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        raise ConfigError("srun started several tasks, expected one torchrun per node: examples/cluster")
    else:
        return None
    rank, world_size, local_rank, local_world_size = (_number(env, name) for name in _VARIABLES[launcher])
    if world_size == 1 and launcher != "env":
        return None
    if not (rank < world_size and local_rank < local_world_size <= world_size):
        raise ConfigError(
            f"{launcher} sets rank {rank} of {world_size} and local rank {local_rank} of {local_world_size}, "
            "expected ranks below their number, and no more local ranks than ranks"
        )

    address, on_one_machine = env.get("MASTER_ADDR"), local_world_size == world_size
    if not on_one_machine and not (address and env.get("MASTER_PORT")):
        raise ConfigError(
            "ranks on several machines need MASTER_ADDR, the host of rank 0, and MASTER_PORT: "
            "mpirun -x MASTER_ADDR=… -x MASTER_PORT=… of Open MPI, or -genv MASTER_ADDR … of MPICH"
        )
    # Ports from 32768 on are those that Linux gives to outgoing connections.
    default = 20000 + zlib.crc32((job or launcher).encode()) % 12000
    port = _number({"MASTER_PORT": str(default), **env}, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT is {port}, expected 1 to 65535")
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and launcher == "env":
        launcher = "torchrun"
    return RankInfo(rank, local_rank, world_size, local_world_size, address or "127.0.0.1", port, launcher)


def connect(info: RankInfo, timeout: timedelta) -> Store:
    """Connect to the other ranks and return the store for `init_process_group`.

    The store is empty at each start of the processes, also when torchrun starts them again.

    Args:
        timeout: how long to wait for the others; also the store's timeout.

    Raises:
        ConfigError: no store at the address, or another program at the port.
        RankLostError: a rank did not join.
    """
    # torchrun's agent keeps its server over restarts (torch.distributed.elastic's DynamicRendezvousHandler
    # and StaticTCPRendezvous make it once), so a new rank can read the address that a dead one left under
    # the same key. Nothing in the environment numbers the starts: TORCHELASTIC_RESTART_COUNT counts each
    # node's own failures. A count of all that joined is wrong once one died before it joined. So rank 0
    # draws the number of the start. It tells each rank under a key of that rank's present process. Only a
    # rank 0 that lives beside that process can have written it: agents end all workers before new ones start.
    hosts = info.rank == 0 and info.launcher != "torchrun"
    limit = timeout.total_seconds() + LATER
    try:
        # Where another program has the port and never answers, TCPStore would block for ever.
        tcp = run_in_daemon(
            lambda: TCPStore(info.address, info.port, None, hosts, timeout, wait_for_workers=False)
        ).result(limit)
        store = PrefixStore("torchpar", tcp)
        if info.rank == 0:
            start = _welcome(store, info.world_size, timeout)
        else:  # requests to a host that was stopped block whatever the timeout is
            start = run_in_daemon(lambda: _join(store, info.rank, timeout)).result(2 * limit)
    except (DistError, OSError) as e:  # TimeoutError is an OSError
        reason = str(e).partition("\n")[0] or "the program at that port does not answer as rank 0's store"
        raise ConfigError(
            f"rank {info.rank} did not meet the others at {info.address}:{info.port}: {reason}; "
            "MASTER_ADDR and MASTER_PORT must be the host of rank 0 and a port that is free there"
        ) from e
    return PrefixStore(f"start{start}", store)


def missing_ranks(store: Store, rank: int, world_size: int, patience: float) -> list[int]:
    """Return the ranks that do not call this within ``patience`` seconds: they hang, or have ended.

    Every rank whose collective failed calls it once. Their waits end as far apart as they began. So
    ``patience`` must be longer than the longest time between two collectives of a rank; otherwise healthy
    ranks are named too. If rank 0 hosts the store, it must be the last to end.

    Args:
        store: returned by `connect`.
        patience: seconds to wait for the others; the call takes at most half a second more.

    Returns:
        The missing ranks, sorted. If the store does not answer: [0] if rank 0 hosts it, else [].
    """
    present = {rank}
    deadline = time.monotonic() + patience

    def ask() -> None:
        own = store.clone()  # a collective may hold the connection
        own.set(f"present/{rank}", "")
        while len(present) < world_size and time.monotonic() <= deadline:
            present.update(r for r in set(range(world_size)) - present if own.check([f"present/{r}"]))
            time.sleep(POLL)

    # Requests to a host that was stopped block whatever the store's timeout is.
    try:
        run_in_daemon(ask).result(patience + 0.5)
    except (RuntimeError, TimeoutError):  # the store's host has ended, or was stopped
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return []
        if 0 not in present:
            return [0]
    return sorted(set(range(world_size)) - present)


def run_in_daemon(function: Callable[[], T]) -> "Future[T]":
    """Run ``function`` in a daemon thread: the interpreter exits without waiting for it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as e:  # CheckpointException is no Exception
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    return future


def _welcome(store: Store, world_size: int, timeout: timedelta) -> int:
    start: int = store.add("starts", 1)
    deadline = time.monotonic() + timeout.total_seconds()
    missing = list(range(1, world_size))
    while missing:
        for rank in missing:
            # This may be the number of the rank's dead predecessor; so again until the rank confirms.
            store.set(f"welcome/{rank}/{store.add(f'processes/{rank}', 0)}", str(start))
        time.sleep(POLL)
        missing = [rank for rank in missing if not store.check([f"joined/{rank}/{start}"])]
        if missing and time.monotonic() > deadline:
            ranks = ", ".join(map(str, missing))
            store.set(f"missing/{start}", ranks)
            time.sleep(LATER)  # the others read it before this process, which may host the store, ends
            raise _did_not_join(ranks, timeout)
    store.set(f"missing/{start}", "")
    return start


def _join(store: Store, rank: int, timeout: timedelta) -> int:
    """Return the number of the start, once rank 0 says that all ranks have joined."""
    process = store.add(f"processes/{rank}", 1)
    try:
        start = int(store.get(f"welcome/{rank}/{process}"))
        store.set(f"joined/{rank}/{start}", "")
        store.wait([f"missing/{start}"], timeout + timedelta(seconds=LATER))
        missing = store.get(f"missing/{start}").decode()
    except DistError as e:
        raise _did_not_join("0", timeout) from e
    if missing:
        raise _did_not_join(missing, timeout)
    return start


def _did_not_join(ranks: str, timeout: timedelta) -> RankLostError:
    return RankLostError(f"rank {ranks} did not join the others within {timeout.total_seconds():g} s")


def _number(env: Mapping[str, str], name: str) -> int:
    if name not in env:
        raise ConfigError(f"{name} is not set, expected an integer from the launcher")
    if not env[name].isdecimal():
        raise ConfigError(f"{name} is {env[name]!r}, expected an integer of at least 0")
    return int(env[name])
