# SPDX-License-Identifier: MIT
"""Variables of each launcher, and connecting: again after a restart, and at a port that is
taken."""

import errno
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Thread, Timer
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from commands import MPIRUN, ROOT, import_path, needs_mpirun, run
from torch.distributed import DistError

from torchpar.errors import ConfigError, RankLostError
from torchpar.parallel import join_world
from torchpar.parallel.launch import (
    interface,
    local,
    processes,
    rendezvous,
    settings,
    world,
)
from torchpar.parallel.launch.local import Ranks
from torchpar.parallel.launch.rank_info import RankInfo, find_rank_info
from torchpar.parallel.launch.rendezvous import connect, missing_ranks
from torchpar.parallel.launch.settings import Settings, find_fault

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "a", "MASTER_PORT": "29400", "TORCHELASTIC_USE_AGENT_STORE": "True"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
OPENMPI |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-host-7@1"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_ID": "0"}
MASTER = {"MASTER_ADDR": "m", "MASTER_PORT": "1234"}
BOTH = (1, 1, 2, 2, "127.0.0.1", None, "openmpi")
ELSEWHERE = "203.0.113.7"  # an address of documentation, which no machine has


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, None),
        (TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"}, (3, 1, 4, 2, "a", 29400, "env")),
        (TORCHRUN | OPENMPI | SLURM, (3, 1, 4, 2, "a", 29400, "torchrun")),
        ({"RANK": "0", "WORLD_SIZE": "1"} | MASTER, (0, 0, 1, 1, "m", 1234, "env")),
        # SLURM's rank is the daemon's.
        (OPENMPI | SLURM, (1, 1, 2, 2, "127.0.0.1", None, "openmpi")),
        (MPICH | SLURM, (1, 1, 2, 2, "127.0.0.1", None, "mpich")),
        (MPICH | MASTER | {"PMI_SIZE": "4"}, (1, 1, 4, 2, "m", 1234, "mpich")),
        ({"SLURM_PROCID": "0"}, None),  # a shell in an allocation
        (SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # salloc
        # srun -n 1, and shells of salloc, in a job of several tasks
        (SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "job.sbatch"}, None),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        ({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "1"}, None),
        # One process by itself under launchers whose ranks are not read.
        ({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "1"}, None),
        ({"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "1"}, None),
        ({"PALS_RANKID": "0", "PALS_LOCAL_SIZE": "1"}, None),
        # These set PMI_RANK as MPICH does, and no MPI_LOCALRANKID.
        ({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "1", "PMI_RANK": "0", "PMI_SIZE": "1"}, None),
        ({"PALS_RANKID": "0", "PALS_LOCAL_SIZE": "1", "PMI_RANK": "0", "PMI_SIZE": "1"}, None),
        (
            MPICH | {"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "2", "PALS_RANKID": "0"},
            (1, 1, 2, 2, "127.0.0.1", None, "mpich"),
        ),
        ({"PMIX_RANK": "0"}, None),
        ({"SLURM_NPROCS": "1"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_NPROCS": "1"}, None),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": "0", "NNODES": "1"}, None),
        # Empty values count as not set.
        (dict.fromkeys(("RANK", "WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_PROCID"), ""), None),
        (MPICH | {"RANK": "", "MASTER_PORT": ""}, (1, 1, 2, 2, "127.0.0.1", None, "mpich")),
        # Ranks of mpirun and torchrun that inherit variables of another launcher.
        (OPENMPI | {"PMIX_RANK": "1", "JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2"}, BOTH),
        (TORCHRUN | {"FLUX_TASK_RANK": "1", "NNODES": "2"}, (3, 1, 4, 2, "a", 29400, "torchrun")),
        # Ranks that mpirun starts in a job of SLURM, or where WORLD_SIZE is exported.
        (
            OPENMPI | {"SLURM_NTASKS": "2", "WORLD_SIZE": "2"},
            (1, 1, 2, 2, "127.0.0.1", None, "openmpi"),
        ),
    ],
)
def test_rank_info_of_each_launcher(env, expected):
    info = find_rank_info(env)
    if expected is None:
        assert info is None
    else:
        *numbers, address, port, launcher = expected
        assert info == RankInfo(*numbers, address, info.port if port is None else port, launcher)
        assert port is not None or 20000 <= info.port < 32000


@pytest.mark.parametrize(
    "env, message",
    [
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1'"),
        (TORCHRUN | {"RANK": "4"}, "rank 4 of 4 and local rank 1 of 2, expected"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "rank 3 of 4 and local rank 2 of 2, expected"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "5"}, "rank 3 of 4 and local rank 1 of 5, expected"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT is 65536"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT is 0, expected 1 to 65535"),
        (TORCHRUN | {"MASTER_PORT": "80a"}, "MASTER_PORT is '80a', expected an integer"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        (OPENMPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "-x MASTER_ADDR"),
        (MPICH | {"PMI_SIZE": "4", "MASTER_ADDR": "m"}, "-genv MASTER_ADDR"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MPI_LOCALRANKID is not set"),
        (
            {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2", "PMI_RANK": "1", "PMI_SIZE": "2"},
            "Flux started several processes (FLUX_JOB_SIZE is 2), expected torchrun",
        ),
        (SLURM, "srun started several tasks"),
        (SLURM | {"PMI_RANK": "4", "PMI_SIZE": "7"}, "srun started several tasks"),  # --mpi=pmi2
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "srun started several tasks"),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "job.sbatch"},
            "this job of SLURM has 4 tasks (SLURM_NTASKS), and srun did not start this process; ",
        ),
        (
            MASTER | {"WORLD_SIZE": "2", "LOCAL_RANK": "1"},
            "WORLD_SIZE is 2 and RANK is not set, expected both; start the ranks by torchrun or",
        ),
        ({"WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, "RANK is not set"),
        (
            {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"},
            "MVAPICH2 started several processes (MV2_COMM_WORLD_SIZE is 2), expected torchrun, or",
        ),
        (
            {"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "2"},
            "Flux started several processes (FLUX_JOB_",
        ),
        (
            {"FLUX_TASK_RANK": "1"},
            "(FLUX_TASK_RANK is 1), expected torchrun, or mpirun of Open MPI",
        ),
        ({"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "2"}, "(JSM_NAMESPACE_SIZE is 2), exp"),
        ({"PALS_RANKID": "1", "PALS_LOCAL_SIZE": "1"}, "(PALS_RANKID is 1), expected torchrun"),
        ({"PALS_RANKID": "0", "PALS_LOCAL_SIZE": "2"}, "(PALS_LOCAL_SIZE is 2), expected torchrun"),
        (
            {"PMIX_RANK": "1"},
            "a launcher with PMIx started several processes (PMIX_RANK is 1), exp",
        ),
        ({"SLURM_NPROCS": "2"}, "this job of SLURM has 2 tasks (SLURM_NPROCS), and srun did not"),
        (
            {"LOCAL_RANK": "1"},
            "LOCAL_RANK is 1 and RANK is not set, expected both; start the ranks",
        ),
        ({"NODE_RANK": "1", "NNODES": "1"}, "NODE_RANK is 1 and RANK is not set, expected both"),
        ({"NODE_RANK": "0", "NNODES": "2"}, "NNODES is 2 and RANK is not set, expected both"),
    ],
)
def test_bad_variables_are_named(env, message):
    with pytest.raises(ConfigError) as error:
        find_rank_info(env)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_ctrl_c_ends_a_call_and_the_next_one_has_new_processes(fork_server):
    with Ranks() as pool:
        first = pool(1, os.getpid)
        Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            pool(1, time.sleep, 100)
        assert pool(1, os.getpid) != first


def test_ranks_of_which_one_has_failed_are_not_called_again(ranks):
    """Messages to them may still be under way."""
    alone, two = ranks(1, os.getpid), ranks(2, os.getpid)
    with pytest.raises(ZeroDivisionError):
        ranks(1, divmod, 1, 0)
    assert ranks(2, os.getpid) == two
    assert alone == two[:1]
    with pytest.raises(ZeroDivisionError):
        ranks(2, divmod, 1, 0)
    assert not {*ranks(2, os.getpid)} & {*two}


def test_ports_of_two_jobs_differ():
    first, same, other = (find_rank_info(OPENMPI | {"PMIX_NAMESPACE": job}).port for job in "778")
    assert first == same != other


@pytest.fixture
def agent() -> dist.TCPStore:
    """A store that outlives the ranks, as that of torchrun's agent."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True)


def meet(
    agent: dist.TCPStore, *ranks: int, world_size: int = 3, timeout: float = 20.0
) -> list[dist.Store]:
    def at(rank: int) -> dist.Store:
        info = RankInfo(rank, rank, world_size, world_size, "127.0.0.1", agent.port, "torchrun")
        return connect(info, timedelta(seconds=timeout))

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(at, ranks))


def test_each_start_meets_at_an_empty_store(agent):
    first = meet(agent, 0, 1, 2)
    first[0].set("address", "stale")
    assert [store.get("address") for store in first] == [b"stale"] * 3
    second = meet(agent, 0, 1, 2)
    assert not any(store.check(["address"]) for store in second)
    # The server still has it: the second start must not look there.
    assert first[1].check(["address"])
    second[0].set("address", "new")
    assert [store.get("address") for store in second] == [b"new"] * 3


@pytest.mark.parametrize(
    "joined, missing",
    [
        ((0,), "1, 2"),
        pytest.param((0, 2), "1", marks=pytest.mark.slow),
        pytest.param((0, 1), "2", marks=pytest.mark.slow),
        pytest.param((1,), "0", marks=pytest.mark.slow),
        ((1, 2), "0"),
    ],
)
def test_a_start_that_not_all_reached_names_the_others_and_does_not_disturb_the_next(
    agent, monkeypatch, joined, missing
):
    # Rank 0 hosts no store here, and need not stay until the others have read from it.
    short = SimpleNamespace(monotonic=time.monotonic, sleep=lambda s: time.sleep(min(s, 0.02)))
    monkeypatch.setattr(rendezvous, "time", short)

    def connected(host: str, port: int, size: None, hosts: bool, _: object, **flags: bool):
        return dist.TCPStore(host, port, size, hosts, timedelta(seconds=60), **flags)

    # A busy machine needs more than the short timeout to connect.
    monkeypatch.setattr(rendezvous, "TCPStore", connected)
    with ThreadPoolExecutor(len(joined)) as pool:
        errors = [pool.submit(meet, agent, rank, timeout=0.3).exception for rank in joined]
    for error in errors:
        assert isinstance(error(), RankLostError)
        remedy = f"look at the output of rank {missing}, or take a longer timeout"
        assert str(error()) == f"rank {missing} did not join the others within 0.3 s; {remedy}"
    stores = meet(agent, 0, 1, 2)
    stores[1].set("address", "new")
    assert [store.get("address") for store in stores] == [b"new"] * 3


def outcomes_of(port: int, started: list[dict[str, Any]], launcher: str) -> list[Any]:
    """What each of the processes gets from `connect`: a store, or an error.

    Args:
        started: for each, ``rank``, ``size`` and ``local_size``, and the ``backend``; the processes
            that are ``late`` come after the others.
    """

    def at(rank: int, size: int, local_size: int = 0, backend: str = "gloo", **_: bool) -> Any:
        places = rank, rank % (local_size or size), size, local_size or size
        info = RankInfo(*places, "127.0.0.1", port, launcher)
        try:
            return connect(info, timedelta(seconds=20), backend)
        except (ConfigError, RankLostError) as e:
            return e

    with ThreadPoolExecutor(len(started)) as pool:
        early, late = (
            [
                (number, one)
                for number, one in enumerate(started)
                if bool(one.get("late")) == is_late
            ]
            for is_late in (False, True)
        )
        found: dict[int, Any] = {}
        for some in (early, late):
            waits = {number: pool.submit(at, **one) for number, one in some}
            found |= {number: wait.result() for number, wait in waits.items()}
    return [found[number] for number in range(len(started))]


def of(*sizes: int, **more: Any) -> list[dict[str, Any]]:
    return [{"rank": rank, "size": size, **more} for rank, size in enumerate(sizes)]


TWICE = r"^RANK is {} on process \d+ on .* and on process \d+ on .*, expected another on each; give"
DIFFERING = [
    (of(2, 3), r"^WORLD_SIZE is 2 on rank 0 and 3 on rank 1, expected the same on all; set it to"),
    pytest.param(
        *(of(3, 2), r"^WORLD_SIZE is 3 on rank 0 and 2 on rank 1, expected the same"),
        marks=pytest.mark.slow,
    ),
    (of(3, 4, 3), r"^WORLD_SIZE is 3 on ranks? 0(, 2)? and 4 on rank 1, expected the same"),
    (
        [*of(2, backend="nccl"), *of(2, 2)[1:]],
        "^the backend is nccl on rank 0 and gloo on rank 1, expected the same on all; give all",
    ),
    (
        [*of(2, local_size=1), *of(2, 2)[1:]],
        "^LOCAL_WORLD_SIZE is 1 on rank 0 and 2 on rank 1, expected the number of ranks on its",
    ),
    ([*of(3, 3), *of(3, 3)[1:]], TWICE.format(1)),
    ([*of(2), *of(2)], TWICE.format(0)),
]


@pytest.mark.parametrize("launcher", ["torchrun", "env"])
@pytest.mark.parametrize("started, message", DIFFERING)
def test_ranks_with_other_settings_are_refused_by_each(
    agent, monkeypatch, launcher, started, message
):
    """Before the timeout, and with the values."""
    monkeypatch.setattr(rendezvous, "STAY", 0.3)
    monkeypatch.setattr(rendezvous, "LATER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    port = agent.port if launcher == "torchrun" else port
    for outcome in outcomes_of(port, started, launcher):
        assert isinstance(outcome, ConfigError), outcome
        assert re.match(message, str(outcome)), outcome
        assert "\n" not in str(outcome)


@pytest.mark.parametrize(
    "first, late, message",
    [
        (
            of(2, 2),
            {"rank": 2, "size": 3},
            "^WORLD_SIZE is 2 on ranks 0, 1 and 3 on rank 2, expect",
        ),
        (of(1), {"rank": 1, "size": 2}, "^WORLD_SIZE is 1 on rank 0 and 2 on rank 1, expected the"),
        (of(2, 2), {"rank": 1, "size": 2}, TWICE.format(1)),
    ],
)
def test_a_process_that_comes_to_a_whole_world_says_so(first, late, message):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    *members, last = outcomes_of(port, [*first, {**late, "late": True}], "env")
    assert all(isinstance(one, dist.PrefixStore) for one in members), members
    assert isinstance(last, ConfigError)
    assert re.match(message, str(last)), last


def test_ranks_with_the_same_settings_are_taken(agent):
    """On machines of two and of one rank, with and without torchrun."""
    sizes = [{"local_size": 2}, {"local_size": 2}, {"local_size": 1}]
    started = [one | size for one, size in zip(of(3, 3, 3), sizes, strict=True)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for where, launcher in ((agent.port, "torchrun"), (port, "env")):
        found = outcomes_of(where, started, launcher)
        assert all(isinstance(one, dist.PrefixStore) for one in found), found


@pytest.mark.parametrize(
    "addresses, machines, ranks",
    [
        (["127.0.1.1", "10.7.0.2"], ["a", "b"], "rank 0"),
        (["127.0.0.1", "::1"], ["a", "b"], "ranks 0, 1"),
        (["127.0.0.1", "127.0.0.1"], ["a", "a"], ""),  # two torchruns on one machine
        (["10.7.0.1", ""], ["a", "b"], ""),  # the second has GLOO_SOCKET_IFNAME
        (["127.0.0.1", "127.0.0.1"], ["", ""], ""),  # it is not known
    ],
)
def test_ranks_that_other_machines_do_not_reach_are_refused_by_each(
    agent, monkeypatch, addresses, machines, ranks
):
    """gloo would wait for its timeout, and name a lost rank."""
    monkeypatch.setattr(rendezvous, "LATER", 0.5)

    def told(mine: Settings, **values: Any) -> Settings:
        if "gloo" in values:
            values = {"gloo": addresses[mine.rank], "machine": machines[mine.rank]}
        return replace(mine, **values)

    monkeypatch.setattr(rendezvous, "replace", told)
    found = outcomes_of(agent.port, of(2, 2, local_size=1), "torchrun")
    if not ranks:
        assert all(isinstance(one, dist.PrefixStore) for one in found), found
        return
    name = re.escape(addresses[0])
    for error in found:
        assert isinstance(error, ConfigError), error
        line = rf"^gloo listens at {name} on {ranks}, since the host's name has no other address "
        assert re.match(
            line + r"there \(process \d+ on .*\), .* export GLOO_SOCKET_IFNAME on", str(error)
        )


@pytest.mark.parametrize(
    "found, given, address",
    [
        (["127.0.1.1"], "", "127.0.1.1"),
        ([ELSEWHERE, "127.0.0.1"], "", "127.0.0.1"),
        ([ELSEWHERE], "", "127.0.0.1"),
        ([], "", "127.0.0.1"),
        (["127.0.1.1"], "eth0", ""),
    ],
)
def test_the_address_of_gloo_is_that_of_the_host_name(monkeypatch, found, given, address):
    def look_up(name: str, port: None, **_: Any) -> list[Any]:
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [resolve(one, port, type=socket.SOCK_STREAM)[0] for one in found]

    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
    assert interface.gloo_address() == address
    assert interface.is_loopback(address) == bool(address)
    assert not interface.is_loopback(ELSEWHERE)


def test_versions_are_compared_without_their_builds(monkeypatch):
    infos = [RankInfo(rank, rank, 2, 2, "127.0.0.1", 1, "env") for rank in range(2)]
    mine = Settings.of(infos[0])
    for version, fault in (
        ("2.14.1+cu126", ""),
        ("9.9.9", "the version of PyTorch is .* on rank 0 and 9.9.9 on rank 1, expected the same"),
    ):
        monkeypatch.setattr(torch, "__version__", version if fault else f"{torch.__version__}+x")
        found = find_fault([mine, Settings.of(infos[1])])
        assert re.match(fault, found) if fault else found == ""
    monkeypatch.undo()
    monkeypatch.setattr(settings, "_installed_version", lambda: "0.4.0")
    found = find_fault([mine, Settings.of(infos[1])])
    assert found.startswith("the version of torchpar is ")
    assert found.endswith(
        " and 0.4.0 on rank 1, expected the same on all; install one version for all ranks"
    )


def meet_two_others(port: int) -> None:
    """Meet the other rank of this call and rank 2, which does not come."""
    rank = dist.get_rank()
    info = RankInfo(rank, rank, 3, 3, "127.0.0.1", port, "env")
    error = r"^rank 2 did not join the others within 2 s; look at the output of rank 2, or [^\n]*$"
    with patch.object(rendezvous, "LATER", 0.3), pytest.raises(RankLostError, match=error):
        connect(info, timedelta(seconds=2))


def test_all_ranks_name_one_that_does_not_join(ranks):
    """Rank 0 hosts the store, and may end first."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks(2, meet_two_others, port)


@pytest.mark.parametrize("asking", [(0, 1, 2), (0, 2), pytest.param((1,), marks=pytest.mark.slow)])
def test_ranks_that_do_not_ask_are_missing(agent, asking):
    stores = meet(agent, 0, 1, 2)
    with ThreadPoolExecutor(3) as pool:
        patience = 20.0 if len(asking) == 3 else 0.5  # seconds; it ends at once when all ask
        found = list(pool.map(lambda rank: missing_ranks(stores[rank], rank, 3, patience), asking))
    assert found == [sorted({0, 1, 2} - set(asking))] * len(asking)


@pytest.mark.parametrize(
    "of_agent, missing",
    [("False", [[1], [0]]), pytest.param("True", [[], []], marks=pytest.mark.slow)],
)
def test_a_store_that_does_not_answer_is_that_of_rank_0(monkeypatch, of_agent, missing):
    """Unless torchrun's agent hosts it. Requests to the store of a host that was stopped block."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", of_agent)
    stopped = SimpleNamespace(clone=lambda: time.sleep(3))
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda rank: missing_ranks(stopped, rank, 2, 0.1), range(2))
        assert list(found) == missing


def test_every_rank_notices_that_another_program_has_the_port(monkeypatch):
    """A launcher may let the other ranks live when rank 0 has failed."""
    store_of_another_job = dist.TCPStore("127.0.0.1", 0, is_master=True)
    with socket.create_server(("", 0)) as mute:
        for port, later, error, reason in (
            (mute.getsockname()[1], 0.1, ConfigError, "does not answer as rank 0's store"),
            (store_of_another_job.port, 1.0, RankLostError, "rank 0 did not join"),
        ):
            monkeypatch.setattr(rendezvous, "LATER", later)
            monkeypatch.setattr(rendezvous, "RIVAL", 0.3)
            infos = [RankInfo(rank, rank, 2, 2, "127.0.0.1", port, "mpich") for rank in range(2)]
            with pytest.raises(
                ConfigError, match=r"rank 0 did not meet the others at .*EADDRINUSE"
            ):
                connect(infos[0], timedelta(seconds=60))
            with pytest.raises(error, match=reason):
                connect(infos[1], timedelta(seconds=0.5))


def test_a_rank_notices_that_no_program_has_the_port(monkeypatch):
    """Without PyTorch's store, which prints frames, and whose thread may abort the process."""
    monkeypatch.setattr(rendezvous, "TCPStore", store := Mock())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    info = RankInfo(1, 1, 2, 2, "127.0.0.1", port, "env")
    with pytest.raises(ConfigError, match=r"rank 1 did not meet the others at .*refused.*; MASTER"):
        connect(info, timedelta(seconds=0.3))
    store.assert_not_called()


def ask(address: str, rank: int = 0) -> None:
    connect(RankInfo(rank, rank, 2, 2, address, 29400, "env"), timedelta(seconds=60))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_that_cannot_be_found_is_named_at_once_on_each_rank(monkeypatch, rank):
    """PyTorch's store would ask for its timeout, which is half an hour here."""
    monkeypatch.setattr(rendezvous, "TCPStore", store := Mock())
    monkeypatch.setattr(rendezvous, "LOOKUP", 0.1)  # the machine of the tests may have no network
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "no.invalid"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", "29400")
    message = (
        rf"^rank {rank} cannot resolve the MASTER_ADDR 'no\.invalid' \(.+\), expected the name or "
        r"the address of rank 0's machine; set MASTER_ADDR on each rank, to 127\.0\.0\.1 for .*"
    )
    with pytest.raises(ConfigError, match=message), join_world("cpu", timeout=1800):
        pass
    with pytest.raises(ConfigError, match=r"resolve the MASTER_ADDR 'x+' \(.*label too long"):
        ask("x" * 64, rank)
    of_torchrun = RankInfo(rank, rank, 2, 2, "no.invalid", 29400, "torchrun")
    with pytest.raises(ConfigError, match=r"start torchrun with --local_addr and that add"):
        connect(of_torchrun, timedelta(seconds=60))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2))
    with pytest.raises(ConfigError, match=r"resolve the MASTER_ADDR 'a' \(no answer within 0\.1 s"):
        ask("a", rank)
    store.assert_not_called()


def test_a_name_server_that_answers_later_is_asked_again(monkeypatch):
    answers = [socket.gaierror(socket.EAI_AGAIN, "later"), socket.getaddrinfo("127.0.0.1", 29400)]
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=answers))
    monkeypatch.setattr(rendezvous, "TCPStore", Mock(side_effect=OSError("has been found")))
    with pytest.raises(ConfigError, match="has been found"):
        ask("a")


def test_rank_0_on_a_machine_without_the_address_says_so(monkeypatch):
    monkeypatch.setattr(rendezvous, "TCPStore", Mock(side_effect=OSError("is reached")))
    monkeypatch.setattr(rendezvous, "REACH", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    make = socket.create_connection
    with socket.create_server(("127.0.0.1", 0)) as other:
        for target, message in (
            (None, r"the machine of rank 0 does not have the MASTER_ADDR '203\.0\.113\.7', and is"),
            (other.getsockname(), "the machine of rank 0 does not have the MASTER_ADDR"),
            (("127.0.0.1", port), "is reached"),  # such as by a router
        ):
            lead = Mock(side_effect=OSError) if target is None else lambda _, t: make(target, t)  # noqa: B023
            monkeypatch.setattr(socket, "create_connection", lead)
            with pytest.raises(ConfigError, match=message):
                connect(RankInfo(0, 0, 2, 2, ELSEWHERE, port, "env"), timedelta(seconds=60))


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(errno.EACCES, "Permission denied"), r"that port is privileged, as .* \(EACCES\)"),
        (DistError("failed to bind. port: 80, name: EACCES"), "that port is privileged, as most"),
        (OSError(errno.EADDRINUSE, "in use"), r"another program has that port \(EADDRINUSE\)"),
        (DistError("Ping failed, invalid value returned"), "does not answer as rank 0's store"),
    ],
)
def test_a_port_that_cannot_be_taken_is_one_line(monkeypatch, error, reason):
    monkeypatch.setattr(rendezvous, "TCPStore", Mock(side_effect=error))
    with pytest.raises(ConfigError, match=rf"^rank 0 did not meet .*:29400: .*{reason}.*; MASTER"):
        ask("127.0.0.1")


def test_an_interface_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none")
    with pytest.raises(ConfigError) as error, join_world("cpu"):
        pass
    assert str(error.value) == (
        "gloo finds no network interface (Unable to find address for: none), and "
        "GLOO_SOCKET_IFNAME is none; export GLOO_SOCKET_IFNAME=lo for ranks on one machine, or the "
        "name of another"
    )


ADD_UP = """
import torch
from torchpar.parallel.launch.rank_info import find_rank_info
from torchpar.parallel.launch.world import join_world
with join_world("cpu") as world:
    total = world.sum(torch.tensor(world.rank + 1.0))
    print(f"{find_rank_info().launcher} {total.item()}\\n", end="", flush=True)
"""


@pytest.mark.slow
@needs_mpirun
def test_two_processes_started_by_mpirun(monkeypatch):
    for name in ("OMPI", "PRTE"):
        monkeypatch.setenv(f"{name}_ALLOW_RUN_AS_ROOT", "1")
        monkeypatch.setenv(f"{name}_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    # A shell between mpirun and the ranks: their parents differ.
    _, out, err = run(MPIRUN, "-n", "2", "sh", "-c", f'{sys.executable} -c "$0"; true', ADD_UP)
    assert out in ("openmpi 3.0\n" * 2, "mpich 3.0\n" * 2), err


def test_a_rank_that_dies_between_two_calls_is_replaced():
    with Ranks(preload=()) as ranks:
        (pid,) = ranks(1, os.getpid)
        sleeping = ranks.workers[0].submit(time.sleep, 60)
        os.kill(pid, signal.SIGKILL)
        assert sleeping.exception() is not None
        assert ranks(1, os.getpid) != [pid]


def test_ctrl_c_ends_ranks_that_begin():
    """A rank that goes on would print a traceback: it misses a semaphore of the ended program."""
    with (
        patch.object(Future, "result", side_effect=KeyboardInterrupt),
        patch.object(local.os, "kill") as kill,
        pytest.raises(KeyboardInterrupt),
        Ranks(preload=()) as ranks,
    ):
        ranks.start(2)
    assert [call.args[1] for call in kill.mock_calls] == [signal.SIGKILL] * 2


def interrupt(handles: bool) -> int:
    """How often this rank has handled SIGINT."""
    received: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if handles:
        signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    return len(received)


def test_ctrl_c_reaches_a_rank_that_handles_it_alone():
    with Ranks(preload=()) as ranks:
        assert (ranks(1, interrupt, True), ranks(1, interrupt, False)) == ([1], [0])
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


ORPHANS = """
import os, sys, time
from torchpar.parallel.launch.local import Ranks

if __name__ == "__main__":
    with Ranks(preload=()) as pool:
        pool.start(2)
        print(pool._stores, flush=True)
        pool(2, time.sleep, 100)
"""


@contextmanager
def started(folder: Path) -> Iterator[tuple[Popen[str], str]]:
    """A program with two ranks, and a mark in the environment of all its processes."""
    script, mark = folder / "script.py", f"ORPHANS_OF={os.getpid()}-{folder.name}"
    script.write_text(ORPHANS)
    environment = os.environ | {"PYTHONPATH": import_path(ROOT), "TMPDIR": str(folder)}
    environment |= dict([mark.split("=")])
    with Popen([sys.executable, str(script)], stdout=PIPE, text=True, env=environment) as program:
        yield program, mark
        program.kill()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Popen[str], str]]:
    with started(tmp_path_factory.mktemp("program")) as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def early_program(request: pytest.FixtureRequest) -> None:
    """Start the program with the first test of this file: it imports PyTorch twice meanwhile."""
    if any("program" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("program")


def leaves_no_ranks_behind(program: Popen[str], mark: str, number: int) -> None:
    stores = Path(program.stdout.readline().strip())
    assert stores.is_dir()
    assert len(living(mark)) >= 4  # the program, the server and two ranks
    os.kill(program.pid, number)
    program.wait()
    deadline = time.monotonic() + 30
    while living(mark):
        assert time.monotonic() < deadline, living(mark)
        time.sleep(0.02)
    assert not stores.exists()


def test_a_killed_program_leaves_no_ranks_behind(program):
    """Neither the server that ranks are forked from, nor files."""
    leaves_no_ranks_behind(*program, signal.SIGKILL)


# The file alone imports no PyTorch.
ORPHAN = """
import runpy, signal, sys, time
if sys.argv[4:]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[2] == "torchrun":
    runpy.run_path(sys.argv[1])["end_with_launcher"](speaks=True)
print("started", flush=True)
time.sleep(float(sys.argv[3]))
print("orphan", flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


ENDED = "torchrun has ended, and its ranks end within 0.2 s; start the same command again\n"


@pytest.mark.parametrize(
    "launcher, seconds, said, line",
    [
        ("torchrun", "60", "", ENDED),
        ("torchrun", "60 ignores SIGTERM", "", ENDED),
        ("env", "0.5", "orphan\n", ""),
    ],
)
def test_a_rank_ends_with_a_killed_torchrun(monkeypatch, launcher, seconds, said, line):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0.2")
    flags = [processes.__file__, launcher, *seconds.split()]
    command = [sys.executable, "-c", LAUNCHER, ORPHAN, *flags]
    with Popen(command, stdout=PIPE, stderr=PIPE, text=True) as parent:
        assert parent.stdout.readline() == "started\n"
        parent.kill()
        assert parent.stdout.read() == said  # which ends with the last process that can print
        assert parent.stderr.read() == line


def test_a_rank_ends_also_if_nobody_reads_its_line(monkeypatch):
    """Its stderr is a full pipe. Only SIGKILL ends this rank."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0.2")
    flags = [processes.__file__, "torchrun", "60", "ignores SIGTERM"]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    command = [sys.executable, "-c", LAUNCHER, ORPHAN, *flags]
    with Popen(command, stdout=PIPE, stderr=writing, text=True) as parent:
        assert parent.stdout.readline() == "started\n"
        parent.kill()
        ended = Thread(target=parent.stdout.read, daemon=True)
        ended.start()
        ended.join(30)
        is_alive = ended.is_alive()
        os.close(writing)
        os.close(reading)  # so that a rank that waits for a reader ends, too
    assert not is_alive


def test_a_fork_watches_its_own_launcher(monkeypatch):
    """A thread does not live on in a fork."""
    monkeypatch.setattr(processes, "_watched", 0)
    started: list[int] = []
    monkeypatch.setattr(
        processes.threading, "Thread", lambda **_: Mock(start=lambda: started.append(os.getpid()))
    )
    for pid in (11, 11, 12):
        monkeypatch.setattr(processes.os, "getpid", lambda pid=pid: pid)
        processes.end_with_launcher(speaks=True)
    assert started == [11, 12]


def test_a_joining_rank_asks_for_its_end(monkeypatch):
    info = RankInfo(0, 0, 1, 1, "127.0.0.1", 1, "torchrun")
    monkeypatch.setattr(world, "find_rank_info", lambda: info)
    monkeypatch.setattr(rendezvous, "connect", lambda *_: dist.HashStore())
    with patch.object(world, "end_with_launcher") as asked, join_world("cpu"):
        asked.assert_called_once_with(speaks=True)


@pytest.mark.slow
def test_a_terminated_program_leaves_no_ranks_behind(tmp_path):
    with started(tmp_path) as (program, mark):
        leaves_no_ranks_behind(program, mark, signal.SIGTERM)


def living(mark: str) -> list[int]:
    """The processes that have inherited ``mark`` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if mark in (path / "environ").read_bytes().decode(errors="replace").split("\0"):
                found.append(int(path.name))
    return found


def policies_of_polling_threads(gloo_yields: bool) -> set[int]:
    with join_world("cpu", gloo_yields=gloo_yields):
        tasks = [task for task in Path("/proc/self/task").glob("*") if (task / "comm").exists()]
        polling = [t for t in tasks if (t / "comm").read_text().strip() == "gloo_tcp_loop"]
        return {os.sched_getscheduler(int(task.name)) for task in polling}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone shows a process's threads")
def test_threads_that_poll_yield_only_where_it_is_asked_for():
    """In processes of its own: gloo keeps a thread for all groups."""
    with Ranks(preload=()) as ranks:
        assert ranks(2, policies_of_polling_threads, False) == [{os.SCHED_OTHER}] * 2
        assert ranks(2, policies_of_polling_threads, True) == [{os.SCHED_BATCH}] * 2
