# SPDX-License-Identifier: MIT
"""Data parallelism by hand: the NumPy network on several processes, which exchange arrays by MPI.

Process 0 has the samples. It broadcasts the parameters once; scatters, each epoch, to every process its
share of each batch; and in every step all add up their gradients (and losses, in the same message), so that
all take the same step. Whatever the number of processes, the batches are those of one.
"""

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from benchmarks.baselines.numpy_mlp import MLP, SGD, Array, batches
from torchpar.errors import ConfigError
from torchpar.parallel.rendezvous import find_place

T = TypeVar("T")
Measure = Callable[[str], AbstractContextManager[None]]
PHASES = ("scatter", "compute", "reduce", "update")


@contextmanager
def join() -> Iterator[Any]:
    """The communicator of all processes that mpirun started; of one without it.

    An error that only one process meets ends all of them, which would wait for it forever.

    Raises:
        ConfigError: mpi4py or an MPI library is missing, or mpirun belongs to another MPI.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as e:  # the latter if it finds no library
        error = ConfigError(f"MPI cannot be used ({e}); pip install 'torchpar[baselines]'")
        place = find_place()
        error.told = place is not None and place.rank != 0  # all find it
        raise error from e
    world = MPI.COMM_WORLD
    # Where MPI sees several, they need no address to meet at, which `find_place` asks for over machines.
    place = find_place() if world.size == 1 else None
    if place is not None and place.world_size > 1:
        error = ConfigError(
            f"{place.launcher} started {place.world_size} processes, of which mpi4py sees {world.size}; "
            f"start them by the mpirun of the MPI that mpi4py loads, {MPI.get_vendor()[0]}"
        )
        error.told = place.rank != 0  # all find it
        raise error
    try:
        yield world
    except ConfigError as e:  # on all processes
        e.told = world.rank != 0  # process 0 tells it
        raise
    except BaseException as e:
        if world.size > 1:
            if isinstance(e, OSError | MemoryError):  # a disk that is full, say: no fault of the program
                print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr, flush=True)
            elif not isinstance(e, KeyboardInterrupt):
                traceback.print_exc()
            time.sleep(1)  # until mpirun has passed that on: it ends at once with the process
            world.Abort(1)
        raise


def on_rank_0(world: Any, function: Callable[[], T]) -> T | None:
    """The result of ``function`` on process 0, None on the others.

    Raises:
        ConfigError: what ``function`` raised, on all.
    """
    result, error = None, None
    if world.rank == 0:
        try:
            result = function()
        except ConfigError as e:
            error = e
    error = world.bcast(error)
    if error is not None:
        error.told = world.rank != 0  # process 0 tells it
        raise error
    return result


class Samples(NamedTuple):
    """``x (n, features)``, bytes that stand for 0 to 1 or such numbers, and ``labels (n)``."""

    x: Array
    labels: Array


def inputs(x: Array) -> Array:
    """The samples as a network takes them: bytes travel faster, but are not what it computes with."""
    return x / np.float32(255) if x.dtype == np.uint8 else x


class Alone:
    """What is used here of a communicator, for a single process: for it MPI need not be installed."""

    rank, size = 0, 1

    def bcast(self, value: T) -> T:
        return value

    def Bcast(self, array: Array) -> None:
        pass

    def Scatterv(self, send: list[Any], received: Array) -> None:
        received[:] = send[0]

    def Allreduce(self, own: Array, total: Array) -> None:
        total[:] = own


def scatter(world: Any, samples: Samples | None, order: Sequence[Array]) -> Samples:
    """This process's share of the samples.

    Args:
        samples: on process 0, which has them all.
        order: the indices of each process's share.
    """
    x, labels = samples or (None, None)
    return Samples(_scatter(world, x, order), _scatter(world, labels, order))


def _scatter(world: Any, array: Array | None, order: Sequence[Array]) -> Array:
    shape, dtype = world.bcast(None if array is None else (array.shape[1:], array.dtype))
    received = np.empty((len(order[world.rank]), *shape), dtype)
    numbers = [len(indices) * math.prod(shape) for indices in order]
    world.Scatterv(None if array is None else [array[np.concatenate(order)], numbers], received)
    return received


class Trainer:
    """Trains a network on the processes of ``world``.

    Args:
        model: of any weights; those of process 0 are broadcast.
        measure: times the phases ("scatter", "compute", "reduce", "update").
    """

    def __init__(self, world: Any, model: MLP, optimizer: SGD, measure: Measure):
        self.world = world
        self.model = model
        self.optimizer = optimizer
        self.measure = measure
        self.own = np.empty(model.parameters.size + 1, model.parameters.dtype)  # gradient and loss
        self.sum = np.empty_like(self.own)
        world.Bcast(model.parameters)

    def step(self, x: Array, labels: Array, global_size: int) -> float:
        """Descend by the mean gradient of a batch; its loss, summed over samples.

        Args:
            x, labels: this process's share of the batch, which may be empty.
            global_size: samples of the batch.
        """
        with self.measure("compute"):
            self.own[-1], self.own[:-1] = self.model.gradients(inputs(x), labels)
        with self.measure("reduce"):
            self.world.Allreduce(self.own, self.sum)
        with self.measure("update"):
            self.optimizer.step(self.sum[:-1] / global_size)
        return float(self.sum[-1])

    def epoch(
        self,
        train: Samples | None,
        size: int,
        batch_size: int,
        generator: np.random.Generator,
        on_step: Callable[[int], None] = lambda trained: None,
    ) -> float:
        """Train on each sample once; the mean loss.

        Args:
            train: on process 0.
            size: how many samples these are.
            generator: of their order, in the same state on all processes.
            on_step: called after each step with the samples that all have trained on.
        """
        with self.measure("scatter"):
            drawn = batches(size, batch_size, generator)
            shares = [np.array_split(batch, self.world.size) for batch in drawn]
            order = [np.concatenate(of_rank) for of_rank in zip(*shares, strict=True)]
            mine = scatter(self.world, train, order)
        loss, at, trained = 0.0, 0, 0
        for batch in shares:
            share = slice(at, at + len(batch[self.world.rank]))
            global_size = sum(map(len, batch))
            loss += self.step(mine.x[share], mine.labels[share], global_size)
            at, trained = share.stop, trained + global_size
            on_step(trained)
        return loss / size

    def evaluate(self, test: Samples, size: int) -> tuple[float, float]:
        """Mean loss and accuracy over all processes' shares of ``size`` samples."""
        mine = np.array(self.model.evaluate(inputs(test.x), test.labels), np.float64)
        total = np.empty_like(mine)
        self.world.Allreduce(mine, total)
        return float(total[0] / size), float(total[1] / size)
