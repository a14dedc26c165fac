# SPDX-License-Identifier: MIT
"""Where a process stands among those that a launcher started together, and the store they meet at."""

import os
import re
import stat
import threading
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from torchpar.errors import ConfigError

POLL = 0.02  # seconds between two looks at the store


@dataclass(frozen=True)
class Place:
    """A process's place among those that train together, and where they meet.

    Attributes:
        rank: 0 … world_size − 1 over all machines.
        local_rank: 0 … local_world_size − 1 on its own machine.
        world_size: the processes on all machines.
        local_world_size: the processes on its own machine.
        address: host of the store.
        port: port of the store.
        launcher: "torchrun" (its agent hosts the store); "env" (RANK and the like set by other means),
            "openmpi", "mpich" or "slurm" (rank 0 hosts it).
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    address: str
    port: int
    launcher: str


def find_place(env: Mapping[str, str] = os.environ) -> Place | None:
    """The place that torchrun, Open MPI's or MPICH's mpirun, or srun gave this process.

    MASTER_ADDR and MASTER_PORT count under each launcher. Without them the ranks of one machine meet at
    127.0.0.1, those of srun at their first machine, at a port derived from the job's identity.

    Returns:
        None for a process alone: no launcher, or one process of mpirun or srun.

    Raises:
        ConfigError: a variable is missing or out of range, or mpirun spans machines without MASTER_ADDR.
    """
    # mpirun inside a SLURM allocation starts its daemons by srun, whose ranks their children inherit, so
    # mpirun comes before SLURM; but srun --mpi=pmi2 sets PMI_RANK too, without hydra's MPI_LOCALRANKID.
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
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # else a shell in an allocation: one process
        launcher = "slurm"
        # The shell that salloc opens is a step of one task, with the SLURM_NTASKS of its job.
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        rank, world_size = _number(env, "SLURM_PROCID"), _number(env, size, least=1)
        local_rank, local_world_size = _number(env, "SLURM_LOCALID"), _tasks_here(env, world_size)
        job = f"{env.get('SLURM_JOB_ID')}.{env['SLURM_STEP_ID']}"
    else:
        return None
    for name, index, end in (("rank", rank, world_size), ("local rank", local_rank, local_world_size)):
        if index >= end:
            raise ConfigError(f"{launcher} says {name} {index} of {end}, expected less than {end}")
    if local_world_size > world_size:
        raise ConfigError(f"{launcher} says {local_world_size} of {world_size} processes are on this machine")
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
    # Below 32768, where Linux takes the ports of outgoing connections from.
    port = _number(env, "MASTER_PORT", default=20000 + zlib.crc32(job.encode()) % 12000)
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT is {port}, expected 1 to 65535")
    return Place(rank, local_rank, world_size, local_world_size, address, port, launcher)


def connect(place: Place, timeout: timedelta) -> Store:
    """Meet the other ranks; the store for `init_process_group`, empty at each start of the processes.

    Args:
        timeout: how long to wait for the others; also the store's timeout.

    Raises:
        ConfigError: no store at the address, or a rank that did not come.
    """
    # torchrun's agent keeps its server over restarts (torch.distributed.elastic's DynamicRendezvousHandler
    # and StaticTCPRendezvous make it once), so a new rank can read the address that a dead one left under
    # the same key. Nothing in the environment numbers the starts: TORCHELASTIC_RESTART_COUNT counts each
    # node's own failures. Counting all who joined is wrong once one died before it joined. So rank 0 draws
    # the start's number and tells each rank under a key of that rank's own present process; only a rank 0
    # that lives beside that process can have written it, since agents end all workers before new ones start.
    hosts = place.rank == 0 and place.launcher != "torchrun"
    try:
        tcp = TCPStore(place.address, place.port, None, hosts, timeout, wait_for_workers=False)
        store = PrefixStore("torchpar", tcp)
        start = _welcome(store, place.world_size, timeout) if place.rank == 0 else _join(store, place.rank)
    except DistError as e:
        raise ConfigError(
            f"rank {place.rank} did not meet the others at {place.address}:{place.port} "
            f"(MASTER_ADDR:MASTER_PORT): {str(e).splitlines()[0]}"
        ) from e
    return PrefixStore(f"start{start}", store)


def absent(store: Store, rank: int, world_size: int, patience: float) -> list[int]:
    """The ranks that do not call this within ``patience`` seconds: those that hang, or have ended.

    To be called, once, by every rank whose collective failed. Ranks wait in different collectives for
    the one that hangs, and fail as far apart as they began to wait: ``patience`` must cover the longest
    time between two collectives of a rank, or ranks that are well are named too. Rank 0, where it hosts
    the store, must be the last to end.

    Args:
        store: what `connect` returned.
        patience: seconds to wait for the others; this takes at most one second more.

    Returns:
        The absent ranks, sorted. Where the store does not answer: [0] if rank 0 hosts it, else [].
    """
    here = {rank}
    asked = threading.Event()
    deadline = time.monotonic() + patience

    def ask() -> None:
        with suppress(RuntimeError):  # the store's host is gone
            own = store.clone()  # a collective may hold the connection
            own.set(f"present/{rank}", "")
            while len(here) < world_size:
                here.update(r for r in range(world_size) if r not in here and own.check([f"present/{r}"]))
                if time.monotonic() > deadline:
                    break
                time.sleep(POLL)
            asked.set()

    # Requests to a host that was stopped block whatever the store's timeout is.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience + 1)
    if not asked.is_set():
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return []
        if 0 not in here:
            return [0]
    return sorted(set(range(world_size)) - here)


def _welcome(store: Store, world_size: int, timeout: timedelta) -> int:
    start: int = store.add("starts", 1)
    deadline = time.monotonic() + timeout.total_seconds()
    for rank in range(1, world_size):
        while not store.check([f"joined/{rank}/{start}"]):
            # May still be the number of the rank's dead predecessor, so again until the rank confirms.
            store.set(f"welcome/{rank}/{store.add(f'processes/{rank}', 0)}", str(start))
            if time.monotonic() > deadline:
                raise ConfigError(f"rank {rank} did not join rank 0 within {timeout}")
            time.sleep(POLL)
    return start


def _join(store: Store, rank: int) -> int:
    process = store.add(f"processes/{rank}", 1)
    start = int(store.get(f"welcome/{rank}/{process}"))
    store.set(f"joined/{rank}/{start}", "")
    return start


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
    """What the ranks of one mpirun on one machine share: a socket to its proxy, else their parent."""
    with suppress(KeyError, ValueError, OSError):
        control = os.fstat(int(env["HYDI_CONTROL_FD"]))
        if stat.S_ISSOCK(control.st_mode):
            return str(control.st_ino)
    return str(os.getppid())


def _tasks_here(env: Mapping[str, str], world_size: int) -> int:
    """The step's tasks on this node, from SLURM's compact list: 2(x3),1 is 2, 2, 2, 1."""
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
    """The first of SLURM's compact list of nodes: node[01-03,7],x begins with node01."""
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not hosts:
        raise ConfigError("SLURM_STEP_NODELIST is not set; export MASTER_ADDR, the host of rank 0")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", hosts).split(",")[0]
