# SPDX-License-Identifier: MIT
"""Ranks on this machine: processes that form a world on the CPU and wait for functions to run.

    with start_ranks(2) as ranks:
        results = ranks.run(function, argument)  # one of each rank

A function finds its world by `current_world`.
"""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from torchpar.parallel.launch.world import World, join_world

_joined = ExitStack()
_world: World | None = None


class Ranks(NamedTuple):
    """Processes that wait for functions to run, one for each rank."""

    workers: list[ProcessPoolExecutor]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a module-level ``function`` on all ranks at once and return their results.

        Raises:
            Exception: the error of the lowest rank that had one.
        """
        futures = [worker.submit(function, *args) for worker in self.workers]
        return [future.result() for future in futures]


def current_world() -> World:
    """Return the world of the rank that this process is."""
    if _world is None:
        raise RuntimeError("this process was not started by start_ranks")
    return _world


@contextmanager
def start_ranks(ranks: int, threads: int = 1, timeout: float = 300.0, device: str = "cpu") -> Iterator[Ranks]:
    """Start ``ranks`` processes of ``threads`` threads each; at the end they leave.

    Args:
        timeout: seconds after which a rank that waits for another one gives up.
        device: as for `join_world`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("forkserver")  # imports once for all, in a process without threads
    context.set_forkserver_preload([__name__])
    with ExitStack() as stack:
        started = Ranks([stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(ranks)])
        joining = [
            worker.submit(_join, rank, ranks, threads, port, timeout, device)
            for rank, worker in enumerate(started.workers)
        ]
        processes = [future.result() for future in joining]
        try:
            yield started
        except KeyboardInterrupt:
            for process in processes:
                os.kill(process, signal.SIGKILL)
            raise
        finally:
            with suppress(BrokenProcessPool):  # a rank was killed
                started.run(_leave)


def _join(rank: int, ranks: int, threads: int, port: int, timeout: float, device: str) -> int:
    """Become a rank; returns this process's id."""
    global _world
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C `start_ranks` ends the ranks
    torch.set_num_threads(threads)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    _world = _joined.enter_context(join_world(device, timeout))
    return os.getpid()


def _leave() -> None:
    global _world
    _world = None
    _joined.close()
