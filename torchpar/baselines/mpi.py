# SPDX-License-Identifier: MIT
"""Data parallelism by MPI: join the processes, end all when one fails, and add up the figures of shares.

``examples/train_mpi.py`` holds the training loop.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from torchpar.baselines.numpy_mlp import MLP, Array
from torchpar.errors import ConfigError
from torchpar.parallel.launch.rendezvous import find_rank_info


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
        from mpi4py.run import set_abort_status

        set_abort_status(2)
        raise


class OneProcess:
    """A communicator of one process, which needs no MPI."""

    rank, size = 0, 1

    def Allreduce(self, own: Array, total: Array) -> None:
        total[:] = own


def evaluate(world: Any, model: MLP, share: Sequence[Array], size: int) -> tuple[float, float]:
    """Return the mean loss and the accuracy over ``size`` samples; ``share`` is this process's x, labels."""
    own = np.array(model.evaluate(*share), np.float64)
    total = np.empty_like(own)
    world.Allreduce(own, total)
    return float(total[0] / size), float(total[1] / size)
