# SPDX-License-Identifier: MIT
"""Rank, number of ranks and address from the environment of torchrun, Open MPI or MPICH.

A value that differs between ranks is found here, too, for MPI and for `torch.distributed`.
"""

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchpar.errors import ConfigError


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
        launcher: "torchrun", whose agent hosts the store. Rank 0 hosts it under "openmpi", "mpich"
            and "env" (something else set RANK and the other variables).
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
    "openmpi": tuple(
        f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
# Rank and number of processes under launchers whose ranks are not read, and their names. The last
# three are set by hand, or by programs that start processes for `torch.distributed`.
_UNREAD = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "srun"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MVAPICH2"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "Flux"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "jsrun"),
    ("PALS_RANKID", "PALS_LOCAL_SIZE", "PALS"),
    ("PMIX_RANK", None, "a launcher with PMIx"),
    (None, "WORLD_SIZE", None),
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE", None),
    ("NODE_RANK", "NNODES", None),
)
# Shows srun, whose --mpi=pmi2 sets PMI_RANK, too, Flux or PALS.
_SETS_PMI = {"SLURM_STEP_ID", "FLUX_TASK_RANK", "PALS_RANKID"}


def find_rank_info(env: Mapping[str, str] = os.environ) -> RankInfo | None:
    """Read the variables of torchrun, or of mpirun (Open MPI and MPICH).

    MASTER_ADDR and MASTER_PORT are read under each launcher. Without them the address is 127.0.0.1
    on one machine, and the port is derived from the job's name. MPICH does not tell the job's name:
    its second job on a machine needs a MASTER_PORT.

    Returns:
        None without a launcher, and for the only process of an mpirun.

    Raises:
        ConfigError: a variable is missing or out of range, the ranks span machines without
            MASTER_ADDR and MASTER_PORT, or this is one of several processes that nothing here
            tells its rank: of a launcher such as srun without torchrun, or with a WORLD_SIZE alone.
    """
    env = {name: value for name, value in env.items() if value}  # an empty one counts as not set
    # mpirun comes before SLURM: in an allocation its ranks inherit the SLURM variables of its
    # daemons.
    job = None
    if "RANK" in env:
        launcher = "env"
        env = {"LOCAL_RANK": env["RANK"], "LOCAL_WORLD_SIZE": env.get("WORLD_SIZE", ""), **env}
    elif "OMPI_COMM_WORLD_RANK" in env:
        launcher, job = "openmpi", env.get("PMIX_NAMESPACE")
    elif "PMI_RANK" in env and ("MPI_LOCALRANKID" in env or not _SETS_PMI & env.keys()):
        launcher = "mpich"  # it names no job
    else:
        _check_alone(env)
        return None
    rank, world_size, local_rank, local_world_size = (
        _number_in_environment(env, name) for name in _VARIABLES[launcher]
    )
    if world_size == 1 and launcher != "env":
        return None
    if not (rank < world_size and local_rank < local_world_size <= world_size):
        raise ConfigError(
            f"{launcher} sets rank {rank} of {world_size} and local rank {local_rank} of "
            f"{local_world_size}, expected ranks below their number, and no more local ranks than "
            "ranks"
        )

    address, on_one_machine = env.get("MASTER_ADDR"), local_world_size == world_size
    if not on_one_machine and not (address and env.get("MASTER_PORT")):
        raise ConfigError(
            "ranks on several machines need MASTER_ADDR, the host of rank 0, and MASTER_PORT: "
            "mpirun -x MASTER_ADDR=… -x MASTER_PORT=… of Open MPI, or -genv MASTER_ADDR … of MPICH"
        )
    # Linux gives ports from 32768 on to outgoing connections.
    default = 20000 + zlib.crc32((job or launcher).encode()) % 12000
    port = _number_in_environment({"MASTER_PORT": str(default), **env}, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT is {port}, expected 1 to 65535")
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and launcher == "env":
        launcher = "torchrun"
    return RankInfo(
        rank, local_rank, world_size, local_world_size, address or "127.0.0.1", port, launcher
    )


def _check_alone(env: Mapping[str, str]) -> None:
    """Refuse one of several processes that nothing tells its rank.

    Each of them would train alone, on all samples, and write the same files.
    """
    for rank, size, launcher in _UNREAD:
        for name, of_one in ((size, "1"), (rank, "0")):
            if name and env.get(name, of_one) != of_one:
                raise ConfigError(_of_several(name, env[name], launcher))
    # srun -n 1 is a step of one task. In a shell of salloc a person starts processes one by one.
    is_step = "SLURM_STEP_NUM_TASKS" in env or "SLURM_STEP_ID" in env
    if not is_step and env.get("SLURM_JOB_NAME") not in ("interactive", "bash"):
        name = "SLURM_NTASKS" if "SLURM_NTASKS" in env else "SLURM_NPROCS"  # its older name
        tasks = env.get(name, "1")
        if tasks != "1":
            raise ConfigError(
                f"this job of SLURM has {tasks} tasks ({name}), and srun did not start this "
                "process; start one torchrun per node as examples/cluster does, or one process by "
                "srun -n 1"
            )


def _of_several(name: str, value: str, launcher: str | None) -> str:
    """Say that a variable shows a process to be one of several, and what to start them by."""
    if launcher == "srun":
        return "srun started several tasks, expected one torchrun per node: examples/cluster"
    if launcher is None:
        return (
            f"{name} is {value} and RANK is not set, expected both; start the ranks by torchrun or "
            f"mpirun, or set RANK on each, or unset {name} for one process"
        )
    return (
        f"{launcher} started several processes ({name} is {value}), expected torchrun, or mpirun "
        f"of Open MPI or MPICH; start the ranks by one of them, or unset {name} for one process"
    )


def _number_in_environment(env: Mapping[str, str], name: str) -> int:
    if name not in env:
        raise ConfigError(f"{name} is not set, expected an integer from the launcher")
    if not env[name].isdecimal():
        raise ConfigError(f"{name} is {env[name]!r}, expected an integer of at least 0")
    return int(env[name])


def first_difference(
    by_rank: Sequence[Mapping[str, object]], numbers: Sequence[int] | None = None
) -> tuple[str, str] | None:
    """Return the first name whose value differs between ranks, and a clause that says how.

    Args:
        by_rank: each rank's values, by name; one that is missing counts as None.
        numbers: of the ranks; by default 0, 1 and so on.

    Returns:
        A name and a clause such as "epochs is 2 on ranks 0, 2 and 3 on rank 1"; None if all agree.
    """
    for name in dict.fromkeys(name for values in by_rank for name in values):
        ranks_of: list[tuple[object, list[int]]] = []  # values need not be hashable
        for rank, values in zip(numbers or range(len(by_rank)), by_rank, strict=True):
            value = values.get(name)
            same = [ranks for other, ranks in ranks_of if other == value]
            same[0].append(rank) if same else ranks_of.append((value, [rank]))
        if len(ranks_of) > 1:
            clauses = [
                f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                for value, ranks in ranks_of
            ]
            return name, f"{name} is {' and '.join(clauses)}"
    return None
