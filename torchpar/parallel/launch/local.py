# SPDX-License-Identifier: MIT
"""Ranks on this machine: processes forked from one server that has imported PyTorch."""

import gc
import itertools
import os
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist

from torchpar.parallel.launch.processes import end_with_parent, putting_off_signals

# Imports that take longer than most calls. DistributedDataParallel imports the compiler.
PRELOAD = [f"torch.{name}" for name in ("_dynamo", "testing")]
PRELOAD += [f"torch.distributed.{name}" for name in ("checkpoint", "fsdp", "tensor.debug")]
TIMEOUT = 120.0  # seconds for a call
GRACE = 10.0  # seconds for the other ranks, once a rank has failed
T = TypeVar("T")
# The errors of ranks whose partners have failed.
LATER = (TimeoutError, BrokenProcessPool, RuntimeError)


def fork_context(preload: Iterable[str] = PRELOAD) -> ForkServerContext:
    """Return the context whose processes are forked from the server; the first call starts it.

    The server blocks SIGINT, and so do its processes, until they unblock it: at Ctrl-C, which
    reaches all, they would print tracebacks while they begin.

    Args:
        preload: modules that the server imports once for all processes; missing packages are
            skipped.
    """
    forkserver.set_forkserver_preload([__name__, *preload])
    # For functions that set more threads: waiting threads leave their core to other processes.
    waiting = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    resource_tracker.ensure_running()  # its start, within the server's, would unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        with patch.dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY=waiting):
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return get_context("forkserver")


class Ranks(ExitStack):
    """A pool of gloo ranks that call a module-level function, and return the results.

        with Ranks() as ranks:
            results = ranks(2, function, *args)

    Each call makes a new process group. The processes live as long as the pool; if a process dies
    or hangs, or if one rank of several fails, new processes replace all. Ctrl-C ends the processes
    at once, and so does the end of this process, even by SIGKILL.
    """

    def __init__(self, preload: Iterable[str] = PRELOAD) -> None:
        super().__init__()
        self._context = fork_context(preload)
        # Holds a file for each call, through which the ranks of the call meet.
        self._stores = Path(self.enter_context(TemporaryDirectory()))
        self._calls = itertools.count()
        self.workers: list[ProcessPoolExecutor] = []
        self._pids: list[int] = []

    def __call__(self, world_size: int, function: Callable[..., T], *args: object) -> list[T]:
        outcomes: list[T] = self.outcomes(world_size, function, *args)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        # The error of the function comes first, then a lost connection, then a killed rank.
        for error in sorted(errors, key=lambda error: [isinstance(error, kind) for kind in LATER]):
            raise error
        return outcomes

    def outcomes(
        self,
        world_size: int,
        function: Callable[..., object],
        *args: object,
        timeout: float = TIMEOUT,
        grace: float = GRACE,
    ) -> list[Any]:
        """Return the result or the error of each rank: a TimeoutError if the rank hangs.

        Args:
            timeout: seconds for all ranks.
            grace: seconds for the other ranks, once a rank has failed.
        """
        self.start(world_size)
        store = f"file://{self._stores / str(next(self._calls))}"
        futures = [
            worker.submit(_on_rank, rank, world_size, store, function, args)
            for rank, worker in enumerate(self.workers[:world_size])
        ]
        # If a rank has failed, the other ranks may wait until their groups' timeout.
        try:
            hanging = wait(wait(futures, timeout, FIRST_EXCEPTION).not_done, grace).not_done
        except KeyboardInterrupt:
            self.kill()
            raise
        outcomes: list[Any] = []
        for future in futures:
            error = TimeoutError("the rank hangs") if future in hanging else future.exception()
            outcomes.append(error or future.result())
        # Messages of a rank that has failed may be under way, and gloo would write what they bring
        # into memory that another call uses by then.
        lost = BaseException if world_size > 1 else TimeoutError | BrokenProcessPool
        if any(isinstance(outcome, lost) for outcome in outcomes):
            self.kill()
        return outcomes

    def start(self, count: int) -> None:
        """Start processes until there are ``count``; all anew if one died since the last call."""
        try:
            for worker in self.workers:
                worker.submit(int)
        except BrokenProcessPool:
            self.kill()
        missing = range(count - len(self.workers))
        added = [self.enter_context(self._start_one()) for _ in missing]
        with putting_off_signals():
            begun = [worker.submit(int) for worker in added]
            # Known at once, so that Ctrl-C kills them while they begin: without this process they
            # would find no semaphores.
            self._pids += [pid for worker in added for pid in worker._processes]
        for one in begun:
            one.result()
        self.workers += added  # which Ctrl-C has not interrupted

    def _start_one(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, self._context, _begin_rank, (self._stores,))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        if kind is not None and not issubclass(kind, Exception):  # Ctrl-C, or an exit
            self.kill()
        return super().__exit__(kind, error, trace)

    def kill(self) -> None:
        """End all processes at once."""
        for pid in self._pids:
            with suppress(ProcessLookupError):  # the process is dead already
                os.kill(pid, signal.SIGKILL)
        self.workers, self._pids = [], []


def _begin_rank(folder: Path) -> None:
    """Begin a rank's process."""
    # What the server has imported stays. `join_world` ends with a collection of garbage, which
    # would visit all of it in each call. `gc.get_objects` leaves it out from now on.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the pool ends the ranks
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # for functions that handle it
    end_with_parent(folder)


def set_variables(rank: int, world_size: int, **others: str) -> None:
    """Set the variables of a rank on this machine, in place of those of another launcher.

    Args:
        others: further variables, such as MASTER_PORT.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        os.environ.pop(name, None)
    size = str(world_size)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(others)


def _on_rank(
    rank: int, world_size: int, store: str, function: Callable[..., T], args: tuple[object, ...]
) -> T:
    torch.set_num_threads(1)
    set_variables(rank, world_size)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        # A rank that ends at once would close connections that other ranks still open.
        dist.barrier()
        return function(*args)
    finally:
        dist.destroy_process_group()
