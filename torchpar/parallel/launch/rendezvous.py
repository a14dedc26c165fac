# SPDX-License-Identifier: MIT
"""Rank and address from the launcher's environment, and the store through which the ranks connect."""

import os
import re
import socket
import stat
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from torch.distributed import DistError, DistStoreError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from torchpar.errors import ConfigError, RankLostError

T = TypeVar("T")
POLL = 0.02  # seconds between two requests to the store
ANSWER = 10.0  # seconds in which rank 0's store must answer once something listens at its port
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
        launcher: "torchrun", whose agent hosts the store. Rank 0 hosts it under "openmpi", "mpich", "slurm"
            and "env" (RANK and the other variables were set by something else).
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    address: str
    port: int
    launcher: str


def find_rank_info(env: Mapping[str, str] = os.environ) -> RankInfo | None:
    """Read the variables of torchrun, of mpirun (Open MPI and MPICH) or of srun.

    MASTER_ADDR and MASTER_PORT are read under each launcher. Without them the address is 127.0.0.1 on one
    machine and the first node under srun, and the port is derived from the job's name.

    Returns:
        None without a launcher, and for the only process of an mpirun or srun.

    Raises:
        ConfigError: a variable is missing or out of range, or mpirun spans machines without MASTER_ADDR.
    """
    # mpirun comes before SLURM: inside an allocation it starts its daemons by srun, and the ranks inherit
    # the daemons' SLURM_PROCID. srun --mpi=pmi2 sets PMI_RANK too, but not hydra's MPI_LOCALRANKID.
    if "RANK" in env:
        launcher = "torchrun" if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "env"
        rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE", least=1)
        local_rank = _number(env, "LOCAL_RANK", default=rank)
        local_world_size = _number(env, "LOCAL_WORLD_SIZE", default=world_size, least=1)
        job = str(os.getppid())
    elif "OMPI_COMM_WORLD_RANK" in env:
        launcher = "openmpi"
        rank, world_size = (_number(env, f"OMPI_COMM_WORLD_{name}") for name in ("RANK", "SIZE"))
        local_rank, local_world_size = (
            _number(env, f"OMPI_COMM_WORLD_LOCAL_{name}") for name in ("RANK", "SIZE")
        )
        job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or str(os.getppid())
    elif "PMI_RANK" in env and ("MPI_LOCALRANKID" in env or "SLURM_STEP_ID" not in env):
        launcher = "mpich"
        rank, world_size = _number(env, "PMI_RANK"), _number(env, "PMI_SIZE", least=1)
        local_rank, local_world_size = _number(env, "MPI_LOCALRANKID"), _number(env, "MPI_LOCALNRANKS")
        job = _hydra(env)
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # the shell of an allocation has no step
        launcher = "slurm"
        # salloc's shell is a step of one task, but its SLURM_NTASKS is the job's.
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        rank, world_size = _number(env, "SLURM_PROCID"), _number(env, size, least=1)
        local_rank, local_world_size = _number(env, "SLURM_LOCALID"), _tasks_here(env, world_size)
        job = f"{env.get('SLURM_JOB_ID')}.{env['SLURM_STEP_ID']}"
    else:
        return None
    if rank >= world_size:
        raise ConfigError(f"{launcher} sets rank {rank}, expected less than world size {world_size}")
    if local_rank >= local_world_size:
        raise ConfigError(f"{launcher} sets local rank {local_rank}, expected less than {local_world_size}")
    if local_world_size > world_size:
        raise ConfigError(
            f"{launcher} sets local world size {local_world_size}, expected at most {world_size}, "
            "the world size"
        )
    if world_size == 1 and "RANK" not in env:
        return None

    address = env.get("MASTER_ADDR")
    if local_world_size < world_size and launcher in ("openmpi", "mpich"):
        if not address or not env.get("MASTER_PORT"):
            raise ConfigError(
                "mpirun over several machines needs MASTER_ADDR, the host of rank 0, and MASTER_PORT: mpirun "
                + ("-x MASTER_ADDR=… -x MASTER_PORT=…" if launcher == "openmpi" else "-genv MASTER_ADDR …")
            )
    elif not address:
        address = "127.0.0.1" if local_world_size == world_size else _first_host(env)
    # Ports from 32768 on are those that Linux gives to outgoing connections.
    port = _number(env, "MASTER_PORT", default=20000 + zlib.crc32(job.encode()) % 12000)
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT is {port}, expected 1 to 65535")
    return RankInfo(rank, local_rank, world_size, local_world_size, address, port, launcher)


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

    def join() -> tuple[Store, int]:
        tcp = TCPStore(info.address, info.port, None, hosts, timeout, wait_for_workers=False)
        store = PrefixStore("torchpar", tcp)
        if info.rank == 0:
            return store, _welcome(store, info.world_size, timeout)
        return store, _join(store, info.rank, timeout)

    try:
        if hosts or info.launcher == "torchrun":
            store, start = join()
        else:
            # Where another program has the port, rank 0 fails at once, and its launcher may let the other
            # ranks live. The program may be another job's store, or never answer: then TCPStore blocks for
            # ever.
            _wait_for_listener(info, timeout)
            store, start = run_in_daemon(join).result(ANSWER)
        if info.rank:
            _wait_for_all(store, start, timeout)
        return PrefixStore(f"start{start}", store)
    except (DistError, OSError) as e:  # TimeoutError is an OSError
        reason = str(e).partition("\n")[0] or "the program at that port does not answer as rank 0's store"
        raise ConfigError(
            f"rank {info.rank} did not meet the others at {info.address}:{info.port}: {reason}; "
            "MASTER_ADDR and MASTER_PORT must be the host of rank 0 and a port that is free there"
        ) from e


def missing_ranks(store: Store, rank: int, world_size: int, patience: float) -> list[int]:
    """Return the ranks that do not call this within ``patience`` seconds: they hang, or have ended.

    Every rank whose collective failed calls it once. The ranks wait for the hanging one in different
    collectives, and their waits end as far apart as they began. So ``patience`` must be longer than the
    longest time between two collectives of a rank; otherwise healthy ranks are named too. If rank 0 hosts
    the store, it must be the last to end.

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


def _wait_for_listener(info: RankInfo, timeout: timedelta) -> None:
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((info.address, info.port), timeout.total_seconds()).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL)


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
    process = store.add(f"processes/{rank}", 1)
    try:
        start = int(store.get(f"welcome/{rank}/{process}"))
    except DistStoreError as e:
        raise _did_not_join("0", timeout) from e
    store.set(f"joined/{rank}/{start}", "")
    return start


def _wait_for_all(store: Store, start: int, timeout: timedelta) -> None:
    """Wait until rank 0 says that all ranks have joined.

    Raises:
        RankLostError: it says that some have not, or says nothing.
    """
    key, patience = f"missing/{start}", timeout + timedelta(seconds=LATER)

    def ask() -> str:
        store.wait([key], patience)
        return store.get(key).decode()

    try:  # requests to a host that was stopped block whatever the timeout is
        missing = run_in_daemon(ask).result(patience.total_seconds() + LATER)
    except (DistError, TimeoutError) as e:
        raise _did_not_join("0", timeout) from e
    if missing:
        raise _did_not_join(missing, timeout)


def _did_not_join(ranks: str, timeout: timedelta) -> RankLostError:
    return RankLostError(f"rank {ranks} did not join the others within {timeout.total_seconds():g} s")


def _number(env: Mapping[str, str], name: str, *, default: int | None = None, least: int = 0) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            raise ConfigError(f"{name} is not set, expected an integer from the launcher")
        return default
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name} is {text!r}, expected an integer of at least {least}")
    return int(text)


def _hydra(env: Mapping[str, str]) -> str:
    """Return what the ranks of one mpirun on one machine share: a socket to its proxy, or their parent."""
    with suppress(KeyError, ValueError, OSError):
        control = os.fstat(int(env["HYDI_CONTROL_FD"]))
        if stat.S_ISSOCK(control.st_mode):
            return str(control.st_ino)
    return str(os.getppid())


def _tasks_here(env: Mapping[str, str], world_size: int) -> int:
    """Return the step's tasks on this node, from SLURM's compact list: 2(x3),1 is 2, 2, 2, 1."""
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    name = next((name for name in names if name in env), None)
    if name is None:
        raise ConfigError(f"{names[0]} is not set, expected the number of tasks per node from srun")
    counts: list[int] = []
    for part in env[name].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"{name} is {env[name]!r}, expected numbers of tasks as in 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return min(counts[min(_number(env, "SLURM_NODEID", default=0), len(counts) - 1)], world_size)


def _first_host(env: Mapping[str, str]) -> str:
    """Return the first of SLURM's compact list of nodes: node[01-03,7],x begins with node01."""
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not hosts:
        raise ConfigError("SLURM_STEP_NODELIST is not set; export MASTER_ADDR, the host of rank 0")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", hosts).split(",")[0]
