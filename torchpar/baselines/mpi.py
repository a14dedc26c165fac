# SPDX-License-Identifier: MIT
"""Training by MPI: processes, settings, arrays, a split hidden layer, and sums.

``examples/train_mpi.py`` and ``examples/fashion_pooled.py`` hold the training loops. This module
imports NumPy, and under mpirun mpi4py.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from torchpar.baselines.numpy_mlp import Array, NumpyMLP
from torchpar.decorating import context_manager
from torchpar.errors import AllRanksError, ConfigError
from torchpar.parallel.launch.rank_info import find_rank_info, first_difference

T = TypeVar("T")
Communicator = Any  # mpi4py's `MPI.Intracomm`, which need not be installed, or `OneProcess`
POLL = 0.01  # seconds between two looks at a barrier
GRACE = 10.0  # seconds for process 0 to say the same error first, and to end all
ONE_COMMAND = "start all by one command: mpirun -n N python …, with the same packages"


def find_mpirun() -> str | None:
    """Return the path of mpirun, which the wheels of MPICH and Open MPI put beside Python; None if
    there is none."""
    beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return shutil.which("mpirun", path=beside)


@context_manager("join")
def join() -> Iterator[Communicator]:
    """Yield the communicator of the processes that mpirun started; without mpirun, `OneProcess`.

    An exception that leaves the block ends all processes when this interpreter exits. Otherwise the
    other processes would wait for this process forever. Other processes than 0 wait `GRACE` seconds
    before that: if all have the error, process 0 alone prints it.

    Raises:
        ConfigError: mpi4py or an MPI library is missing, or MPI connects other processes than were
            started, as under torchrun. An AllRanksError where all are on one machine.
    """
    info = find_rank_info()
    if not info:
        yield OneProcess()
        return
    if info.launcher == "torchrun":
        raise ConfigError(
            f"torchrun started {info.world_size} of these processes, which exchange arrays by MPI; "
            f"start them by mpirun -n {info.world_size} python …, or one process by python …"
        )
    # The processes of one machine have the same packages, so that one line suffices.
    is_alike = info.local_world_size == info.world_size
    refusal = AllRanksError if is_alike else ConfigError
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as e:  # mpi4py raises RuntimeError if it finds no library
        reason = str(e).partition("\n")[0]  # the other lines list the places where it looked
        raise refusal(
            f"the processes need mpi4py and an MPI ({reason}); pip install mpi4py mpich"
        ) from e
    world = MPI.COMM_WORLD
    if world.size != info.world_size:  # under torchrun, or the mpirun of another MPI
        raise refusal(
            f"MPI connects {world.size} process{'es' if world.size > 1 else ''}, the launcher "
            f"started {info.world_size}; start by the mpirun of mpi4py's MPI: mpirun -n "
            f"{info.world_size} python …"
        )
    with _ending_all(world):
        yield world


@contextmanager
def _ending_all(world: Communicator) -> Iterator[None]:
    """End all processes after an exception that not all of them may have."""
    try:
        yield
    except AllRanksError:
        raise
    except BaseException as e:
        from mpi4py.run import set_abort_status

        set_abort_status(2)
        if world.rank > 0 and isinstance(e, Exception):
            time.sleep(GRACE)
        raise


@contextmanager
def agreeing() -> Iterator[Callable[[Mapping[str, object]], None]]:
    """Yield a function that compares the settings of all processes that mpirun started.

    Begin this before the flags are read, and call the function before anything else is sent.
    Otherwise processes whose flags differ would wait for each other forever, or print MPI's stack.
    The program and NumPy's version are settings, too. After --help or a wrong flag a process leaves
    the block without that call, and is compared, too. Nothing is compared without mpirun, or if MPI
    does not connect the processes: `join` refuses what is missing.

    Raises:
        AllRanksError: on every process, a setting differs, or all settings are refused.
        SystemExit: if all processes exit; for wrong flags on process 0 only.
    """
    info, world = find_rank_info(), None
    if info and info.launcher != "torchrun":
        with suppress(ImportError, RuntimeError):
            from mpi4py import MPI

            world = MPI.COMM_WORLD
    if world is None or info is None or world.size != info.world_size:
        yield lambda settings: None
        return
    program = {"the program": Path(sys.argv[0]).name, "the version of NumPy": np.__version__}

    def check(settings: Mapping[str, object], command: str = "complete") -> None:
        check_same(world, {"the command line": command, **program, **settings}, ONE_COMMAND)

    end: SystemExit | ConfigError | None = None
    with _ending_all(world):
        try:
            yield check
        except AllRanksError:
            raise
        except (SystemExit, ConfigError) as e:
            end = e
    if isinstance(end, ConfigError):
        check({}, f"wrong ({end})")
        raise AllRanksError(str(end)) from end
    if end:
        check({}, "wrong" if end.code else "a question for help")
        if end.code and world.rank > 0:
            raise AllRanksError("wrong flags") from end
        raise end


def check_same(world: Communicator, values: Mapping[str, object], remedy: str) -> None:
    """Compare ``values``, by name, between the processes.

    Args:
        world: the processes.
        values: this process's.
        remedy: what to do about a difference, with which the error message ends.

    Raises:
        AllRanksError: a value differs; on every process.
    """
    if difference := first_difference(world.allgather(values)):
        raise AllRanksError(f"{difference[1]}, expected the same on all; {remedy}")


class OneProcess:
    """A communicator of one process, which needs no MPI. Its methods are those of mpi4py."""

    rank, size = 0, 1

    def Allreduce(self, own: Array, total: Array) -> None:
        total[:] = own

    def Bcast(self, buffer: Array) -> None:
        pass

    def Gather(self, own: Array, rows: Array) -> None:
        rows[0] = own

    def bcast(self, value: T) -> T:
        return value

    def allgather(self, value: T) -> list[T]:
        return [value]


def shares(count: int, size: int) -> list[slice]:
    """Divide ``count`` rows into ``size`` shares in order, as `numpy.array_split` does."""
    ends = np.cumsum([count // size + (r < count % size) for r in range(size)]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def scatter(world: Communicator, rows: Array | None) -> Array:
    """Return this process's share of the ``rows`` of process 0. Other processes pass None.

    MPI counts elements, of which a row ``rows[i]`` has many. Shares of different sizes need
    Scatterv.
    """
    if world.size == 1:
        assert rows is not None
        return rows
    shape, dtype = world.bcast(rows if rows is None else (rows.shape, rows.dtype))
    of_ranks = shares(shape[0], world.size)
    mine = of_ranks[world.rank]
    share = np.empty((mine.stop - mine.start, *shape[1:]), dtype)
    per_row = int(np.prod(shape[1:]))
    counts = [per_row * (of_rank.stop - of_rank.start) for of_rank in of_ranks]
    world.Scatterv(rows if rows is None else [np.ascontiguousarray(rows), counts], share)
    return share


def wait(world: Communicator) -> None:
    """Wait until all processes call this. Unlike Barrier, leave the core to other processes."""
    if world.size > 1:
        request = world.Ibarrier()
        while not request.Test():
            time.sleep(POLL)


def evaluate(
    world: Communicator, model: NumpyMLP, share: Sequence[Array], size: int
) -> tuple[float, float]:
    """Return the mean loss and the accuracy over all ``size`` samples.

    ``share`` is this process's share: x and labels.
    """
    figures = np.array(model.evaluate(*share), np.float64)
    total = np.empty_like(figures)
    world.Allreduce(figures, total)
    return float(total[0] / size), float(total[1] / size)


class HiddenSplitMLP(NumpyMLP):
    """Model parallelism: this process's units of a perceptron's only hidden layer.

    Process r has the columns r of W⁰, their biases, and the rows r of W¹. Every process takes all
    samples.

        aᵣ = f(x·W⁰[:, r] + b⁰[r])    z = Σᵣ aᵣ·W¹[r, :] + b¹

    One Allreduce of ``(b, classes)`` adds up the products. Then every process knows z, and can
    compute ∂L/∂z and the gradients of its weights. So the backward pass sends no message. b¹ is
    replicated, and takes the same steps on all processes.

    Args:
        whole: the unsharded perceptron, the same on all processes; its weights are copied.
        world: the communicator.

    Raises:
        ConfigError: the number of hidden layers is not one.
    """

    def __init__(self, whole: NumpyMLP, world: Communicator):
        if len(whole.sizes) != 3:
            raise ConfigError(
                f"the sizes are {list(whole.sizes)}, expected one hidden layer, whose units are "
                "split; take one width, or split the data"
            )
        inputs, width, classes = whole.sizes
        units = shares(width, world.size)[world.rank]
        super().__init__(
            (inputs, units.stop - units.start, classes),
            hidden=whole.hidden,
            loss=whole.loss,
            init="zero",
            dtype=whole.parameters.dtype.type,
        )
        self.world = world
        for shard, values in (
            (self.weights[0], whole.weights[0][:, units]),
            (self.biases[0], whole.biases[0][units]),
            (self.weights[1], whole.weights[1][units]),
            (self.biases[1], whole.biases[1]),
        ):
            shard[:] = values

    def output_layer(self, a: Array) -> Array:
        partial_sum = a @ self.weights[1]
        z = np.empty_like(partial_sum)
        self.world.Allreduce(partial_sum, z)
        z += self.biases[1]
        return z

    def whole(self) -> NumpyMLP:
        """Return the perceptron with the units of all processes. Every process calls this."""
        shards = self.world.allgather((self.weights, self.biases))
        weights, biases = zip(*shards, strict=True)
        hidden = [
            np.concatenate([w[0] for w in weights], 1),
            np.concatenate([b[0] for b in biases]),
        ]
        model = NumpyMLP(
            (len(hidden[0]), len(hidden[1]), self.sizes[-1]),
            hidden=self.hidden,
            loss=self.loss,
            init="zero",
            dtype=self.parameters.dtype.type,
        )
        model.weights[0][:], model.biases[0][:] = hidden
        model.weights[1][:] = np.concatenate([w[1] for w in weights])
        model.biases[1][:] = self.biases[1]
        return model
