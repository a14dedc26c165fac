# SPDX-License-Identifier: MIT
"""One process beside several of MPI: the same training there, with all threads, too; and the same
losses."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

import numpy as np

from torchpar.baselines import mpi
from torchpar.errors import ConfigError, DivergedError
from torchpar.parallel.launch.processes import end_with_parent

T = TypeVar("T")
# Of the largest loss. Roundings of 6e-8 leave some 1e-7 of a mean over an epoch, 1e-5 at most in
# the tests. Without a bias, or with a gradient that lacks a process's share, the losses are off by
# 1e-3 or more.
LOSS_ERROR = 1e-4
# Prefixes of the launchers' variables.
LAUNCHERS = ("PMI_", "PMIX_", "OMPI_", "MPI_", "HYDRA_", "PRTE_", "OMP_NUM_THREADS")


def train_on_one(world: mpi.Communicator, train: Callable[[mpi.Communicator], T]) -> dict[str, T]:
    """Train on one process, and again on one that has all threads.

    NumPy reads the number of its threads when it is imported. So the second one is a process of its
    own, without MPI. It has the cores of all processes, as a launcher may bind each to one core.
    All processes of ``world`` call this, and wait.

    Args:
        train: of a communicator; a function or a `functools.partial` that another process can
            import.

    Returns:
        On process 0 the result of each, by a name such as "1 process, 2 threads"; on the others
            nothing.
    """
    cores = set[int]().union(*world.allgather(own_cores()))
    threads = own_threads()
    runs: dict[str, T] = {}
    if world.rank == 0:
        print(name := f"1 process, {threads} thread{'s' if threads > 1 else ''}", flush=True)
        runs[name] = train(mpi.OneProcess())
        if world.size > 1 and threads < len(cores):
            print(name := f"1 process, {len(cores)} threads", flush=True)
            with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as executor:
                with outside_mpi(cores):  # a new process inherits its cores and its environment
                    future = executor.submit(train, mpi.OneProcess())
                runs[name] = future.result()
    mpi.wait(world)
    return runs


def own_cores() -> set[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def own_threads() -> int:
    """Return the number of threads that this process's NumPy takes: OMP_NUM_THREADS, or one for
    each core."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(given) if given.isdecimal() else len(own_cores())


@contextmanager
def outside_mpi(cores: set[int]) -> Iterator[None]:
    """Give this process all ``cores``, and hide the variables of mpirun and OMP_NUM_THREADS."""
    before, hidden = own_cores(), {k: v for k, v in os.environ.items() if k.startswith(LAUNCHERS)}
    for name in hidden:
        del os.environ[name]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, before)
        os.environ.update(hidden)


def compare_losses(expected: Sequence[float], ways: Mapping[str, Sequence[float]]) -> str:
    """Return a line that says how well the losses of ``ways`` agree with the ``expected`` ones of 1
    process.

    Raises:
        ConfigError: a way's losses are off by more than `LOSS_ERROR` of the largest.
        DivergedError: those of 1 process are not finite.
    """
    one = np.array(expected)
    if not np.isfinite(one).all():
        raise DivergedError("a loss on 1 process is not finite; take a smaller --lr")
    apart = 0.0
    for way, losses in ways.items():
        off = float(np.abs(np.array(losses) - one).max() / one.max())
        if not off <= LOSS_ERROR:
            raise ConfigError(
                f"{way}: losses are off by {off:.0e}, expected those of 1 process; mend its "
                "gradients"
            )
        apart = max(apart, off)
    if not apart:
        return "the losses are exactly those of 1 process"
    return f"the losses agree with those of 1 process to {apart:.0e}"
