# SPDX-License-Identifier: MIT
"""A rank that waits for others says for whom, and is silent where all come in time."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from torchpar.errors import ConfigError, RankLostError
from torchpar.parallel.launch import rendezvous
from torchpar.parallel.launch.rank_info import RankInfo
from torchpar.parallel.launch.rendezvous import connect

WORLD_SIZE, PER_MACHINE = 6, 3


def wait(*ranks: int) -> None:
    """Let these ranks of a job on two machines wait for the others."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True)

    def at(rank: int) -> None:
        places = (rank, rank % PER_MACHINE, WORLD_SIZE, PER_MACHINE)
        info = RankInfo(*places, "127.0.0.1", agent.port, "torchrun")
        connect(info, timedelta(seconds=2))

    with ThreadPoolExecutor(len(ranks)) as pool:
        waits = []
        for rank in ranks:
            waits.append(pool.submit(at, rank))
            if rank == 0:  # it has come before the others look for it
                agent.wait(["torchpar/awaited/1"])
        if len(ranks) == WORLD_SIZE:
            assert [one.result() for one in waits] == [None] * WORLD_SIZE
            return
        assert all(isinstance(one.exception(), RankLostError) for one in waits)


@pytest.mark.parametrize(
    "ranks, lines",
    [
        # Of each machine one rank; the first of the second machine has heard it from rank 0.
        ((0, 1, 3, 4), ["rank 0 waits for rank 2, 5", "rank 3 waits for rank 2, 5"]),
        pytest.param(
            (1, 2, 3),
            [f"rank {rank} waits for rank 0" for rank in (1, 2, 3)],
            marks=pytest.mark.slow,
        ),
        (range(WORLD_SIZE), []),
    ],
)
def test_a_rank_says_for_whom_it_waits(monkeypatch, capsys, ranks, lines):
    monkeypatch.setattr(rendezvous, "SILENCE", 60.0 if len(ranks) == WORLD_SIZE else 0.5)
    monkeypatch.setattr(rendezvous, "LATER", 0.3)
    wait(*ranks)
    assert sorted(capsys.readouterr().err.splitlines()) == lines


def test_a_rank_says_where_it_waits_for_the_store(monkeypatch, capsys):
    """Without torchrun rank 0 hosts it."""
    monkeypatch.setattr(rendezvous, "SILENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    info = RankInfo(1, 1, 2, 2, "127.0.0.1", port, "env")
    with pytest.raises(ConfigError):
        connect(info, timedelta(seconds=0.5))
    line = f"rank 1 waits for rank 0, expected at 127.0.0.1:{port}\n"
    assert capsys.readouterr().err == line
