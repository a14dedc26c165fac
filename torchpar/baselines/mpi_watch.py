# SPDX-License-Identifier: MIT
"""Execute a program on a process of MPI, and record the time of its messages.

``mpirun -n 2 python torchpar/baselines/mpi_watch.py FOLDER SECONDS my.py`` writes to the folder, by
rank, what the program prints (``0.out``), what it takes (``0.json``), an error (``0.error``), and
after so many seconds where it is (``0.where``). The program takes ``MPI.COMM_WORLD`` as usual. This
file imports nothing of torchpar, which takes seconds on each process.
"""

import ctypes
import faulthandler
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

ONE_TO_ALL = ("bcast", "scatter", "gather", "reduce", "allreduce", "allgather", "alltoall")
METHODS = [
    *ONE_TO_ALL,
    *(name.capitalize() for name in ONE_TO_ALL),
    *("Scatterv", "Gatherv", "Allgatherv", "Alltoallv", "Reduce_scatter", "Barrier", "barrier"),
    *("send", "recv", "sendrecv", "Send", "Recv", "Sendrecv"),
]


def size_of(value: object) -> int:
    """The bytes of arrays, also in lists and tuples; 0 of other objects."""
    if isinstance(value, list | tuple):
        return sum(map(size_of, value))
    found = getattr(value, "nbytes", 0)
    return found if isinstance(found, int) else 0


def timed(name: str, method: Callable[..., Any], messages: dict[str, list[float]]) -> Any:
    """A method of a communicator that adds its calls, seconds and bytes to ``messages``."""

    @wraps(method)
    def called(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = method(*arguments, **named)
        taken = messages.setdefault(name, [0, 0.0, 0])
        taken[0] += 1
        taken[1] += time.perf_counter() - start
        taken[2] += max(map(size_of, (*arguments, *named.values(), result)))
        return result

    return called


def told_by(error: BaseException) -> str:
    """The class and the first line of an error, whose class may raise another one."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException as e:
        text = f"{type(error).__name__}: (str of it raises {type(e).__name__})"
    return "".join(text[:1000].splitlines()[:1])


def flush() -> None:
    """Write what the program has printed, if it has left an output."""
    with suppress(Exception):
        sys.stdout.flush()


def main(folder: Path, seconds: float, file: str) -> int:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with mpirun
    sys.argv, sys.path[0] = [file], str(Path(file).parent)
    from mpi4py import MPI

    messages: dict[str, list[float]] = {}
    methods = {name: timed(name, getattr(MPI.Intracomm, name), messages) for name in METHODS}
    world: Any = type("Intracomm", (MPI.Intracomm,), methods)(MPI.COMM_WORLD)
    vars(MPI)["COMM_WORLD"] = world
    rank = folder / str(world.rank)
    os.dup2(os.open(f"{rank}.out", os.O_WRONLY | os.O_CREAT), sys.stdout.fileno())
    where = open(f"{rank}.where", "w")  # noqa: SIM115  # as long as the process
    faulthandler.dump_traceback_later(seconds, file=where)
    start = time.perf_counter()
    try:
        runpy.run_path(file, run_name="__main__")
    except BaseException as e:
        if isinstance(e, SystemExit) and not e.code:
            return 0
        places = [one for one in traceback.extract_tb(e.__traceback__) if one.filename == file]
        at = f"{Path(file).name}, line {places[-1].lineno}: " if places else ""
        text = told_by(e)
        if isinstance(e, MPI.Exception):
            text = f"MPI: {MPI.Get_error_string(e.Get_error_class())}"
            if e.Get_error_class() == MPI.ERR_TRUNCATE:
                text += (
                    "; give the receiver a buffer of as many bytes as it is sent: of the same "
                    "dtype, and of shares of equal size"
                )
        Path(f"{rank}.error").write_text(at + text, "utf-8")
        flush()
        world.Abort(1)
    finally:
        flush()
        taken = {"seconds": time.perf_counter() - start, "messages": messages}
        Path(f"{rank}.json").write_text(json.dumps(taken), "utf-8")
        faulthandler.cancel_dump_traceback_later()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]))
