# SPDX-License-Identifier: MIT
"""Processes beside a benchmark's own: ranks that stay in one world, and workers.

`start_ranks` starts ranks, whose functions ask for `current_world`. `start_worker` starts a process
whose libraries find other variables in the environment.
"""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from typing import TypeVar
from unittest.mock import patch

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from torchpar.parallel.launch.local import Ranks
from torchpar.parallel.launch.processes import Terminated, end_with_parent, putting_off_signals
from torchpar.parallel.launch.world import World, join_world

T = TypeVar("T")
# Rounds for which an idle thread of OpenMP spins in a plain program. The pool's threads would sleep
# at once, and a training on one rank with two threads took twice as long.
SPINS = {"GOMP_SPINCOUNT": "300000"}
_joined = ExitStack()
_world: World | None = None


class Group(Ranks):
    """The processes of `start_ranks`."""

    def run(self, function: Callable[..., T], *args: object) -> list[T]:
        """Run a module-level ``function`` on all ranks at once and return their results.

        Raises:
            Exception: the error of the lowest rank that had one.
        """
        futures = [worker.submit(function, *args) for worker in self.workers]
        return [future.result() for future in futures]


@contextmanager
def start_ranks(ranks: int, threads: int = 1, device: str = "cpu") -> Iterator[Group]:
    """Start the ranks of a benchmark, which stay in one world from call to call until the end.

    Args:
        ranks: processes.
        threads: of each process.
        device: as for `join_world`.
    """
    port = get_free_port()
    with ExitStack() as stack:
        with patch.dict(os.environ, {**SPINS, **os.environ}):  # processes have it from their start
            started = stack.enter_context(Group(preload=()))
            started.start(ranks)
        joining = [
            worker.submit(_join, rank, ranks, threads, port, device)
            for rank, worker in enumerate(started.workers)
        ]
        for future in joining:
            future.result()
        try:
            yield started
        except (KeyboardInterrupt, Terminated):
            started.kill()
            raise
        finally:
            with suppress(BrokenProcessPool):  # a rank was killed
                started.run(_leave)


@contextmanager
def start_worker(**environment: str) -> Iterator[ProcessPoolExecutor]:
    """Start a process whose libraries find ``environment`` when they are imported."""
    with ProcessPoolExecutor(1, get_context("spawn"), _begin_worker) as worker:
        with patch.dict(os.environ, environment):
            with putting_off_signals():
                begun = worker.submit(int)
            begun.result()
        yield worker


def current_world() -> World:
    """Return the world of the rank that this process is."""
    if _world is None:
        raise RuntimeError("this process was not started by start_ranks")
    return _world


def _join(rank: int, ranks: int, threads: int, port: int, device: str) -> None:
    global _world
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C `start_ranks` ends the ranks
    torch.set_num_threads(threads)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    _world = _joined.enter_context(join_world(device, timeout=300.0, gloo_yields=True))


def _leave() -> None:
    _joined.close()


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
