# SPDX-License-Identifier: MIT
"""Where a process stands in each launcher, and meeting again after the processes of a start have died.

The processes that the tests start run this file, with the name of one of its functions.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torchpar.errors import ConfigError
from torchpar.parallel.rendezvous import Place, absent, connect, find_place

ROOT = Path(__file__).parent.parent
# The wheels of MPICH and Open MPI put theirs beside Python.
MPIRUN = shutil.which("mpirun", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "a", "MASTER_PORT": "29400", "TORCHELASTIC_USE_AGENT_STORE": "True"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
OPENMPI |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-host-7@1"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
SLURM |= {"SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "SLURM_STEP_NODELIST": "node[01-02,7],x"}
SLURM |= {"SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
MASTER = {"MASTER_ADDR": "m", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, None),
        (TORCHRUN, (3, 1, 4, 2, "a", 29400, "torchrun")),
        (TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"}, (3, 1, 4, 2, "a", 29400, "env")),
        (TORCHRUN | OPENMPI | SLURM, (3, 1, 4, 2, "a", 29400, "torchrun")),
        ({"RANK": "0", "WORLD_SIZE": "2"} | MASTER, (0, 0, 2, 2, "m", 1234, "env")),
        ({"RANK": "0", "WORLD_SIZE": "1"} | MASTER, (0, 0, 1, 1, "m", 1234, "env")),
        (OPENMPI, (1, 1, 2, 2, "127.0.0.1", None, "openmpi")),
        (OPENMPI | MASTER, (1, 1, 2, 2, "m", 1234, "openmpi")),
        (OPENMPI | SLURM, (1, 1, 2, 2, "127.0.0.1", None, "openmpi")),  # SLURM's rank is the daemon's
        (MPICH, (1, 1, 2, 2, "127.0.0.1", None, "mpich")),
        (MPICH | SLURM, (1, 1, 2, 2, "127.0.0.1", None, "mpich")),
        (MPICH | MASTER | {"PMI_SIZE": "4"}, (1, 1, 4, 2, "m", 1234, "mpich")),
        (SLURM, (4, 1, 7, 3, "node01", None, "slurm")),
        (SLURM | MASTER, (4, 1, 7, 3, "m", 1234, "slurm")),
        (SLURM | {"PMI_RANK": "4", "PMI_SIZE": "7"}, (4, 1, 7, 3, "node01", None, "slurm")),  # --mpi=pmi2
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "7"}, (4, 1, 7, 7, "127.0.0.1", None, "slurm")),
        (SLURM | {"SLURM_STEP_NODELIST": "r[0-1]n[3-4]-ib,y"}, (4, 1, 7, 3, "r0n3-ib", None, "slurm")),
        (SLURM | {"SLURM_STEP_NODELIST": "x,node[01-02]"}, (4, 1, 7, 3, "x", None, "slurm")),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}, None),  # a shell in an allocation
        (SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # salloc
        (MPICH | {"PMI_RANK": "0", "MPI_LOCALRANKID": "0", "PMI_SIZE": "1", "MPI_LOCALNRANKS": "1"}, None),
    ],
)
def test_place_in_each_launcher(env, expected):
    place = find_place(env)
    if expected is None:
        assert place is None
    else:
        *numbers, address, port, launcher = expected
        assert place == Place(*numbers, address, place.port if port is None else port, launcher)
        assert port is not None or 20000 <= place.port < 32000


@pytest.mark.parametrize(
    "env, message",
    [
        (TORCHRUN | {"RANK": "x"}, "RANK is 'x'"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1'"),
        (TORCHRUN | {"RANK": "4"}, "rank 4 of 4"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "local rank 2 of 2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "5"}, "5 of 4 processes"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT is 65536"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        (OPENMPI | {"OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE is ''"),
        (OPENMPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "-x MASTER_ADDR"),
        (MPICH | {"PMI_SIZE": "4", "MASTER_ADDR": "m"}, "-genv MASTER_ADDR"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALRANKID is not set"),
        (SLURM | {"SLURM_PROCID": "7"}, "rank 7 of 7"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3(y2)"}, "SLURM_STEP_TASKS_PER_NODE is '3(y2)'"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is not set"),
    ],
)
def test_bad_variables_are_named(env, message):
    with pytest.raises(ConfigError) as error:
        find_place(env)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_ports_of_two_jobs_differ():
    other = find_place(OPENMPI | {"PMIX_NAMESPACE": "prterun-host-8@1"})
    assert find_place(OPENMPI) == find_place(OPENMPI)
    assert find_place(OPENMPI).port != other.port


@pytest.fixture
def agent() -> dist.TCPStore:
    """A store that outlives those who meet at it, as torchrun's."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True)


def meet(agent: dist.TCPStore, *ranks: int, world_size: int = 3, timeout: float = 20.0) -> list[dist.Store]:
    def at(rank: int) -> dist.Store:
        place = Place(rank, rank, world_size, world_size, "127.0.0.1", agent.port, "torchrun")
        return connect(place, timedelta(seconds=timeout))

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(at, ranks))


def test_each_start_meets_at_an_empty_store(agent):
    first = meet(agent, 0, 1, 2)
    first[0].set("address", "stale")
    assert [store.get("address") for store in first] == [b"stale"] * 3
    second = meet(agent, 0, 1, 2)
    assert not any(store.check(["address"]) for store in second)
    assert first[1].check(["address"])  # the server still has it: the second start must not look there
    second[0].set("address", "new")
    assert [store.get("address") for store in second] == [b"new"] * 3


@pytest.mark.parametrize("joined", [(0,), (0, 2), (1,), (1, 2)])
def test_a_start_that_not_all_reached_does_not_disturb_the_next(agent, joined):
    with pytest.raises(ConfigError, match="rank 1 did not join" if 0 in joined else "did not meet"):
        meet(agent, *joined, timeout=0.3)
    stores = meet(agent, 0, 1, 2)
    stores[1].set("address", "new")
    assert [store.get("address") for store in stores] == [b"new"] * 3


def test_absent_names_nobody_where_all_are_present(agent):
    stores = meet(agent, 0, 1, 2)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda rank: absent(stores[rank], rank, 3, 20.0), range(3))) == [[]] * 3


def start(*command: str, **env: str) -> subprocess.Popen[str]:
    inherited = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=inherited | env, cwd="/")


def outputs(*processes: subprocess.Popen[str]) -> list[str]:
    """What each process wrote; those that are stopped are killed when the others have ended."""
    try:
        running = [p for p in processes if p.args[-1] != "stop"]
        said = [process.communicate(timeout=90) for process in running]
        assert [process.returncode for process in running] == [0] * len(running), said
        return [out for out, _ in said]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def by_hand(rank: int, world_size: int, *arguments: str) -> subprocess.Popen[str]:
    env = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": world_size}
    env |= {"OMPI_COMM_WORLD_LOCAL_RANK": rank, "OMPI_COMM_WORLD_LOCAL_SIZE": world_size}
    env |= {"PMIX_NAMESPACE": f"{os.getpid()} {os.environ['PYTEST_CURRENT_TEST']}"}
    return start(sys.executable, __file__, *arguments, **{name: str(value) for name, value in env.items()})


def join(timeout: float = 60.0) -> tuple[Place, dist.Store]:
    place = find_place()
    store = connect(place, timedelta(seconds=60))
    wait = timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size, timeout=wait)
    return place, store


def say(line: str) -> None:
    sys.stdout.write(line + "\n")  # at once: lines of several ranks share a pipe
    sys.stdout.flush()


def add_up() -> None:
    place, _ = join()
    total = torch.tensor([place.rank + 1.0])
    dist.all_reduce(total)
    say(f"{place.launcher} {int(total)}")
    dist.destroy_process_group()


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun; pip install mpich")
def test_two_processes_started_by_mpirun():
    root = {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
    # A shell between mpirun and the ranks: their parents differ.
    (out,) = outputs(
        start(MPIRUN, "-n", "2", "sh", "-c", f"{sys.executable} {__file__} add_up; true", **root)
    )
    assert out in ("openmpi 3\n" * 2, "mpich 3\n" * 2)


def die_twice() -> None:
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if os.environ["RANK"] == "1" and attempt == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    join()
    total = torch.ones(1)
    for step in range(100):
        if os.environ["RANK"] == "1" and attempt == 1 and step == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(total)
        total /= 2
    say(f"attempt {attempt}: {int(total)}")
    dist.destroy_process_group()


def test_torchrun_starts_again_after_a_rank_was_killed():
    """Before it joined, and in the middle of its collectives."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--max_restarts=3", "--monitor_interval=0.1"]
    (out,) = outputs(start(*torchrun, *flags, __file__, "die_twice"))
    assert out.splitlines() == ["attempt 2: 1"] * 2


def hang() -> None:
    place, store = join(2.0)
    total = torch.tensor([place.rank + 1.0])
    dist.all_reduce(total)
    assert total == place.world_size * (place.world_size + 1) / 2
    if sys.argv[-1] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    with pytest.raises(RuntimeError):
        dist.all_reduce(total)
    failed = time.monotonic()
    say(str(absent(store, place.rank, place.world_size, 2.0)))
    assert time.monotonic() - failed < 2 + 1 + 1
    if place.rank == 0:  # its end is that of the store
        time.sleep(1)
    os._exit(0)  # the group waits for the rank that hangs


@pytest.mark.parametrize("stopped", [0, 2], ids=["host of the store", "another"])
def test_absent_names_a_rank_that_hangs(stopped):
    world_size = 3 if stopped else 2
    ranks = [by_hand(r, world_size, "hang", *["stop"] * (r == stopped)) for r in range(world_size)]
    assert outputs(*ranks) == [f"[{stopped}]\n"] * (world_size - 1)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
