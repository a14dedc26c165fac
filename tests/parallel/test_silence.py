# SPDX-License-Identifier: MIT
"""A rank that is stopped within a step is named, and no other one is."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from torchpar.data import Samples
from torchpar.nn import MLP
from torchpar.parallel import join_world
from torchpar.parallel.launch import silence
from torchpar.training import Classification, Run

PROCESSES = {0: "process 70 on a", 1: "process 71 on b", 2: "process 72 on b"}


def lines_of(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: int,
    steps: Callable[[int], int | None],
    answers: Callable[[int, int], bool],
    seconds: int = 60,
) -> tuple[list[str], int]:
    """What a rank of 3 says, and how many heartbeats it sends, by a clock of whole seconds.

    Args:
        steps: of this rank, from the second.
        answers: whether another rank sends a heartbeat, from its number and the second.
    """
    store, clock = dist.HashStore(), SimpleNamespace(now=0)
    for other, process in PROCESSES.items():
        store.set(f"process/{other}", process)

    def left(_: float) -> bool:
        clock.now += 1
        for other in set(PROCESSES) - {rank}:
            store.add(f"heartbeat/{other}", int(answers(other, clock.now)))
        return clock.now > seconds

    monkeypatch.setattr(silence, "time", SimpleNamespace(monotonic=lambda: float(clock.now)))
    world: Any = SimpleNamespace(rank=rank, world_size=len(PROCESSES), timeout=600.0)
    silence._watch(store, world, lambda: steps(clock.now), left)
    return capsys.readouterr().err.splitlines(), store.add(f"heartbeat/{rank}", 0)


def line(rank: int) -> str:
    return (
        f"rank {rank} has not answered for 10 s; continue or end its {PROCESSES[rank]}, or wait "
        "until the timeout of 600 s"
    )


def test_silent_ranks_are_named_once(monkeypatch, capsys):
    def said(rank: int, *silent: int) -> list[str]:
        given = rank, lambda _: 3, lambda other, _: other not in silent
        return lines_of(monkeypatch, capsys, *given)[0]

    assert said(0, 1) == [line(1)]
    assert said(0, 1, 2) == [line(1), line(2)]
    assert said(1, 0, 2) == [line(0)]  # of which rank 0 speaks
    assert said(2, 0, 1) == said(0) == said(1) == []


def test_nobody_is_named_while_steps_go_on_or_who_sends_heartbeats(monkeypatch, capsys):
    def of(
        steps: Callable[[int], int | None], answers: Callable[[int, int], bool] = lambda *_: False
    ) -> tuple[list[str], int]:
        return lines_of(monkeypatch, capsys, 0, steps, answers)

    assert of(lambda second: second // 5) == ([], 12)
    assert of(lambda _: None) == ([], 12)  # the others may have left, or wait for this rank
    assert of(lambda _: 3, lambda _, second: second % 7 == 0)[0] == []
    assert of(lambda second: second // 30)[0] == 2 * [line(1), line(2)]  # at each stop


def test_a_rank_that_is_not_here_yet_is_not_waited_for(monkeypatch, capsys):
    clock, store = SimpleNamespace(now=0), dist.HashStore()

    def left(_: float) -> bool:
        clock.now += 1
        return clock.now > 60

    monkeypatch.setattr(silence, "time", SimpleNamespace(monotonic=lambda: float(clock.now)))
    world: Any = SimpleNamespace(rank=0, world_size=2, timeout=600.0)
    silence._watch(store, world, lambda: 3, left)
    assert capsys.readouterr().err == ""
    assert clock.now == 61


def test_a_rank_that_was_stopped_itself_names_nobody(monkeypatch, capsys):
    """Its clock went on meanwhile."""
    seconds, left = iter([1, 2, 3, 90, 91, 92]), iter([False] * 5 + [True])
    store = dist.HashStore()
    store.set("process/1", PROCESSES[1])
    monkeypatch.setattr(silence, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    world: Any = SimpleNamespace(rank=0, world_size=2, timeout=600.0)
    silence._watch(store, world, lambda: 3, lambda _: next(left))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("asks", [True, False])
def test_a_store_whose_host_has_ended_leaves_no_frames(monkeypatch, capfd, asks):
    """Those of PyTorch's error, where nobody asks before a request."""
    host = dist.TCPStore("127.0.0.1", 0, is_master=True)
    store = dist.PrefixStore("a", dist.TCPStore("127.0.0.1", host.port, is_master=False))
    steps, clock = iter([False, True]), SimpleNamespace(now=0.0)

    def left(_: float) -> bool:
        nonlocal host
        host, clock.now = None, 100.0  # after this process's name has been sent
        return next(steps)

    monkeypatch.setattr(silence, "time", SimpleNamespace(monotonic=lambda: clock.now))
    if not asks:
        monkeypatch.setattr(silence, "host_has_ended", lambda _: False)
    world: Any = SimpleNamespace(rank=1, world_size=2, timeout=600.0)
    silence._watch(store, world, lambda: 3, left)
    err = capfd.readouterr().err
    assert ("frame #" in err) is not asks, err
    assert not asks or err == ""


def run_in_which_rank_1_is_stopped() -> tuple[list[str], int, list[str]]:
    """Train one epoch; in its second step rank 1 is stopped, until rank 0 has named it.

    Returns:
        What this rank said, its process, and its threads.
    """
    samples = Samples(torch.zeros(12, 28, 28, dtype=torch.uint8), torch.zeros(12).long(), ("0",))
    model, said = MLP([784, 1]), list[str]()
    with join_world("cpu") as world, patch.multiple(silence, TICK=0.01, HEARTBEAT=0.02, SILENT=0.1):
        pids: list[int] = [0, 0]
        dist.all_gather_object(pids, os.getpid())
        last = threading.Timer(20, os.kill, (pids[1], signal.SIGCONT))  # if nobody is named

        def hear(message: str, *values: object) -> None:
            said.append(message % values)
            os.kill(pids[1], signal.SIGCONT)

        optimizer = torch.optim.SGD(model.parameters())
        task, replica = Classification(samples, samples, 4), DistributedDataParallel(model)
        with (
            patch.object(silence.logger, "warning", hear),
            Run(model, optimizer, None, world, task, epochs=1) as run,
        ):
            if world.rank == 0:
                last.start()
            for x, labels, _ in run.batches(1):
                if run.total_steps == 1 and world.rank == 1:
                    os.kill(os.getpid(), signal.SIGSTOP)
                loss = torch.nn.functional.cross_entropy(replica(x), labels, reduction="sum")
                loss.backward()
                optimizer.step()
                run.end_step(loss_sum=loss)
            run.end_epoch()
        last.cancel()
    return said, os.getpid(), [thread.name for thread in threading.enumerate()]


def test_a_run_names_a_rank_that_is_stopped_in_a_step(ranks):
    (said, _, threads), (_, pid, _) = ranks(2, run_in_which_rank_1_is_stopped)
    assert said[0].startswith("rank 1 has not answered for 0 s; ")
    assert f"its process {pid} on {socket.gethostname()}," in said[0]
    assert "naming_silent_ranks" not in threads
