# SPDX-License-Identifier: MIT
"""A pool of processes, the ranks of every test, forked from one server that has imported PyTorch."""

import itertools
import os
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from importlib.util import find_spec
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from commands import ROOT, import_path

# Modules that the server imports once, for longer than most tests take. DistributedDataParallel imports the
# compiler. Missing packages are passed over; without its own, ``support`` would end the server.
PRELOAD = [
    *("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
    *("torch.distributed.pipelining", "torch.distributed.tensor.debug", "torch.testing"),
    *("torchpar.parallel.split.pipeline", "torchpar.training", "torchvision.datasets"),
]
if find_spec("rich") and find_spec("tyro"):
    PRELOAD += ["rich.progress", "tyro", "support.log", "support.session"]
TIMEOUT = 120.0  # seconds for a call
GRACE = 10.0  # seconds for the other ranks, once one has failed
LATER = (BrokenProcessPool, RuntimeError)  # the errors of ranks that others left alone


def fork_context() -> ForkServerContext:
    """Return the context whose processes are forked from the server; the first call starts it."""
    forkserver.set_forkserver_preload(PRELOAD)
    # Until Python 3.14 the server ignores the parent's sys.path.
    paths = import_path(*(ROOT / folder for folder in (".", "examples", "tests")))
    with patch.dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return get_context("forkserver")


class Ranks(ExitStack):
    """``ranks(world_size, function, *args)``: the results of a module-level function on each gloo rank.

    The processes live as long as the pool; each call makes a new process group among them.

    Args:
        stores: a folder for the files by which the ranks of a call meet.
    """

    def __init__(self, stores: Path):
        super().__init__()
        self._stores = stores
        self._calls = itertools.count()
        self._workers: list[ProcessPoolExecutor] = []

    def __call__(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        context = fork_context()
        while len(self._workers) < world_size:
            self._workers.append(self.enter_context(ProcessPoolExecutor(1, context)))
        pids = [worker.submit(os.getpid) for worker in self._workers]
        store = f"file://{self._stores / str(next(self._calls))}"
        futures = [
            worker.submit(_on_rank, rank, world_size, store, function, args)
            for rank, worker in enumerate(self._workers[:world_size])
        ]
        waiting = wait(futures, TIMEOUT, FIRST_EXCEPTION).not_done
        if waiting and wait(waiting, GRACE).not_done:
            # A rank has failed, or all hang. The others would wait for it as long as their groups' timeout.
            for pid in pids:
                os.kill(pid.result(), signal.SIGKILL)
            self._workers.clear()
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        # The error of a test comes first, then that of a lost connection, then that of a killed rank.
        for error in sorted(errors, key=lambda error: [isinstance(error, kind) for kind in LATER]):
            raise error
        return [future.result() for future in futures]


def _on_rank(rank: int, world_size: int, store: str, function: Callable[..., Any], args: Any) -> Any:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()
