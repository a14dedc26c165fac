# SPDX-License-Identifier: MIT
"""Data parallelism by MPI: join the processes, share out the samples, and end all when one fails.

Process 0 has the samples. In each epoch it scatters to every process its share of each batch. The batches do
not depend on the number of processes. ``examples/train_mpi.py`` holds the training loop.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np

from torchpar.baselines.numpy_mlp import MLP, Array, batches
from torchpar.errors import ConfigError
from torchpar.parallel.launch.rendezvous import find_rank_info

T = TypeVar("T")


@contextmanager
def join() -> Iterator[Any]:
    """Yield the communicator of the processes that mpirun started; without mpirun, `OneProcess`.

    An exception that leaves the block ends all processes when this interpreter exits. Otherwise they would
    wait for this process forever.

    Raises:
        ConfigError: mpi4py or an MPI library is missing.
    """
    if not find_rank_info():
        yield OneProcess()
        return
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as e:  # mpi4py raises RuntimeError if it finds no library
        raise ConfigError(
            f"the processes need mpi4py and an MPI ({e}); pip install 'torchpar[baselines]'"
        ) from e
    try:
        yield MPI.COMM_WORLD
    except BaseException:
        if MPI.COMM_WORLD.size > 1:
            from mpi4py.run import set_abort_status

            set_abort_status(2)
        raise


class OneProcess:
    """A communicator of one process, which needs no MPI."""

    rank, size = 0, 1

    def bcast(self, value: T) -> T:
        return value

    def Bcast(self, array: Array) -> None:
        pass

    def scatter(self, shares: list[T]) -> T:
        return shares[0]

    def Allreduce(self, own: Array, total: Array) -> None:
        total[:] = own


class Samples(NamedTuple):
    """Samples as arrays.

    Attributes:
        x: ``(n, features)``, uint8 for pixels of 0 to 255, or floating.
        labels: ``(n)``.
    """

    x: Array
    labels: Array


def scale_pixels(x: Array) -> Array:
    """Return uint8 pixels as float32 in [0, 1], and floating numbers as they are."""
    return x / np.float32(255) if x.dtype == np.uint8 else x


def scatter(world: Any, samples: Samples | None, order: Sequence[Array]) -> Samples:
    """Return this process's share of the samples.

    Args:
        samples: all of them on process 0, None on the others.
        order: the indices of each process's share.
    """
    shares = samples and [Samples(samples.x[indices], samples.labels[indices]) for indices in order]
    return world.scatter(shares)  # type: ignore[no-any-return]


def scatter_batches(
    world: Any, samples: Samples | None, size: int, batch_size: int, generator: np.random.Generator
) -> list[tuple[Array, Array, int]]:
    """Return this process's share of each batch of an epoch, perhaps an empty one, and the batch's size.

    Args:
        samples: all of them on process 0, None on the others.
        size: number of samples.
        batch_size: samples of a batch, over all processes.
        generator: draws the order of the samples; in the same state on all processes.
    """
    shares = [np.array_split(batch, world.size) for batch in batches(size, batch_size, generator)]
    own = scatter(world, samples, [np.concatenate(of_rank) for of_rank in zip(*shares, strict=True)])
    ends = np.cumsum([len(share[world.rank]) for share in shares])[:-1]
    parts = zip(np.split(own.x, ends), np.split(own.labels, ends), shares, strict=True)
    return [(x, labels, sum(map(len, share))) for x, labels, share in parts]


def evaluate(world: Any, model: MLP, share: Samples, size: int) -> tuple[float, float]:
    """Return the mean loss and the accuracy over ``size`` samples, of which each process has a share."""
    own = np.array(model.evaluate(scale_pixels(share.x), share.labels), np.float64)
    total = np.empty_like(own)
    world.Allreduce(own, total)
    return float(total[0] / size), float(total[1] / size)
