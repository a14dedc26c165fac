# SPDX-License-Identifier: MIT
"""A pool of gloo ranks: processes forked from one server that has imported PyTorch."""

import itertools
import os
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

# Modules that the server imports once, for longer than most calls take. DistributedDataParallel imports the
# compiler.
PRELOAD = [
    *("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.testing"),
    *("torch.distributed.pipelining", "torch.distributed.tensor.debug", "torchpar.testing.situations"),
]
TIMEOUT = 120.0  # seconds for a call
GRACE = 10.0  # seconds for the other ranks, once one has failed
LATER = (TimeoutError, BrokenProcessPool, RuntimeError)  # the errors of ranks that others left alone


def fork_context(preload: Iterable[str] = ()) -> ForkServerContext:
    """Return the context whose processes are forked from the server; the first call starts it.

    Args:
        preload: modules that the server imports besides `PRELOAD`; missing packages are passed over.
    """
    forkserver.set_forkserver_preload([*PRELOAD, *preload])
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return get_context("forkserver")


class Ranks(ExitStack):
    """``ranks(world_size, function, *args)``: the results of a module-level function on each gloo rank.

    Each call makes a new process group. The processes live as long as the pool; if one of them dies or hangs,
    new ones replace all.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stores = Path(self.enter_context(TemporaryDirectory()))  # files by which a call's ranks meet
        self._calls = itertools.count()
        self._workers: list[ProcessPoolExecutor] = []

    def __call__(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        outcomes = self.outcomes(world_size, function, *args)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        # The error of a test comes first, then that of a lost connection, then that of a killed rank.
        for error in sorted(errors, key=lambda error: [isinstance(error, kind) for kind in LATER]):
            raise error
        return outcomes

    def outcomes(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = TIMEOUT,
        grace: float = GRACE,
    ) -> list[Any]:
        """Return of each rank its result or its error: a TimeoutError if it hangs.

        Args:
            timeout: seconds for all ranks.
            grace: seconds for the others, once one has failed.
        """
        context = fork_context()
        while len(self._workers) < world_size:
            self._workers.append(self.enter_context(ProcessPoolExecutor(1, context)))
        pids = [worker.submit(os.getpid) for worker in self._workers]
        store = f"file://{self._stores / str(next(self._calls))}"
        futures = [
            worker.submit(_on_rank, rank, world_size, store, function, args)
            for rank, worker in enumerate(self._workers[:world_size])
        ]
        # A rank that has failed leaves the others waiting for as long as their groups' timeout.
        hanging = wait(wait(futures, timeout, FIRST_EXCEPTION).not_done, grace).not_done
        outcomes = [TimeoutError("the rank hangs") if f in hanging else _outcome(f) for f in futures]
        if any(isinstance(outcome, TimeoutError | BrokenProcessPool) for outcome in outcomes):
            for pid in pids:
                with suppress(ProcessLookupError, BrokenProcessPool):  # it is dead already
                    os.kill(pid.result(), signal.SIGKILL)
            self._workers.clear()
        return outcomes


def _outcome(future: Future[Any]) -> Any:
    error = future.exception()
    return future.result() if error is None else error


def _on_rank(rank: int, world_size: int, store: str, function: Callable[..., Any], args: Any) -> Any:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        dist.barrier()  # a rank that ends at once would close its connections while others still open theirs
        return function(*args)
    finally:
        dist.destroy_process_group()
