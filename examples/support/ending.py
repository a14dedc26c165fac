# SPDX-License-Identifier: MIT
"""The end of an example after an error: on all ranks, with one line that is said once.

It imports no torch, so that the examples in NumPy run where PyTorch is not installed.
"""

import errno
import io
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NoReturn

from torchpar.console import cache_remedy, can_print, stop_printing
from torchpar.errors import AllRanksError, ConfigError, RankLostError, TorchparError, first_line
from torchpar.parallel.launch.processes import restarts_left
from torchpar.parallel.launch.rank_info import RankInfo, find_rank_info
from torchpar.training.outcome import Stopped

# Seconds in which torchrun ends the other ranks after rank 0 has failed, on a busy machine, too.
GRACE = 20.0
# All ranks have the same wrong flags. Rank 0 may be the last to have imported its modules, so that
# the others wait so many times as long.
OF_FLAGS = 3


@contextmanager
def ending() -> Iterator[None]:
    """End every rank with status 2 where the block raises an error that a person can mend.

    These are a `TorchparError`, a file that cannot be read or written, too little memory, a model
    that cannot be compiled, and wrong flags. One line says what is wrong, once: rank 0 prints it,
    or torchrun as the last line of its report. Another rank waits `GRACE` seconds before it speaks,
    and longer with wrong flags: if rank 0 has failed too, the launcher has ended this rank by then.
    mpirun may not; then wrong flags are of this rank alone where rank 0 waits for it. It
    does not wait with an error of its own, of which rank 0 would only say that this rank is lost.
    A run that a signal has stopped ends with 128 and the number of the signal, as a shell reports
    it: SIGINT with 130, SIGTERM with 143, and a pipe whose reader has left, such as head, with 141.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Terminals that have only ASCII print ? for λ. The reader of a pipe sees each line at
            # once.
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        yield
    except WrongFlags as e:
        _end(e.said, is_of_flags=True)
    except AllRanksError as e:  # rank 0 has the same error
        sys.exit(2) if _rank() > 0 else _end(line_of(e))
    except (TorchparError, OSError, MemoryError, RuntimeError) as e:
        if isinstance(e, BrokenPipeError) and not can_print():  # such as head, that has read enough
            stop_printing()
            sys.exit(128 + signal.SIGPIPE)
        _end(line_of(_reason(e)), is_own=_is_own(e))
    except Stopped as e:
        if _rank() == 0:
            said = f"{e}; the state is saved, the same command resumes from it"
            _is_told_by_torchrun(f"{Path(sys.argv[0]).name}: {said}\n", time.time())
            with suppress(OSError):  # the terminal was closed, which SIGHUP tells
                print(said, flush=True)
        sys.exit(128 + e.signal)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports SIGINT


class WrongFlags(SystemExit):
    """The flags of a rank are wrong; ``said`` is what to print of them."""

    def __init__(self, said: str):
        super().__init__(2)
        self.said = said


@contextmanager
def parsing() -> Iterator[None]:
    """Keep what a parser prints from being printed by every rank.

    Raises:
        SystemExit: after the help, which rank 0 prints; without a launcher also for wrong flags.
        WrongFlags: for wrong flags, on each rank.
    """
    if _launched() is None:
        yield
        return
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            yield
    except SystemExit as e:
        if e.code:
            raise WrongFlags(said.getvalue()) from e
        if _rank() == 0:
            print(said.getvalue(), end="")
        raise


def _reason(error: Exception) -> str:
    """What to print of an error; it is raised again if it is a fault of the program."""
    of_output = errno.ENOSPC, errno.EPIPE  # a full disk, or nobody who reads on
    if isinstance(error, OSError) and error.errno in of_output and not can_print():
        return f"the output cannot be written: {error}"
    if isinstance(error, OSError) and (remedy := cache_remedy(error)):
        return f"{error}; {remedy}"
    if isinstance(error, TorchparError | OSError):
        return str(error)
    if _is_of_memory(error):
        remedy = "take a smaller model, smaller batches or fewer samples"
        return f"the memory does not suffice; {remedy} ({first_line(error)})"
    compiler = sys.modules.get("torch._dynamo.exc")
    if compiler and isinstance(error, compiler.TorchDynamoException):
        reason = " ".join(str(error).partition("\n\n")[0].split())
        return f"the model cannot be compiled: {reason}; drop --compile"
    raise error


def _is_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(error, (MemoryError, *([torch.OutOfMemoryError] if torch else [])))


def _is_own(error: Exception) -> bool:
    """Whether rank 0 may not say the same."""
    if isinstance(error, RankLostError):
        return 0 in error.missing
    return isinstance(error, OSError) or _is_of_memory(error)


def _launched() -> RankInfo | None:
    """Return this process's rank, if a launcher started it and its variables are right."""
    with suppress(ConfigError):  # which join_world raises
        return find_rank_info()
    return None


def _rank() -> int:
    info = _launched()
    return info.rank if info else 0


def line_of(error: object) -> str:
    """Return the line that a script prints of an error."""
    return f"{Path(sys.argv[0]).name}: error: {error}\n"


def _end(said: str, is_own: bool = False, is_of_flags: bool = False) -> NoReturn:
    """End this rank with status 2, and let one rank say why."""
    failed, info = time.time(), _launched()
    if info and info.rank > 0 and not is_own:
        # torchrun ends this rank meanwhile; under mpirun a person waits for it.
        longer = OF_FLAGS if is_of_flags else 1
        time.sleep(longer * GRACE if info.launcher == "torchrun" else GRACE / 10)
        if is_of_flags and info.launcher in ("openmpi", "mpich") and not _is_awaited(info):
            sys.exit(2)
    if not _is_told_by_torchrun(said, failed):
        print(said, end="", file=sys.stderr, flush=True)
    sys.exit(2)


def _is_awaited(info: RankInfo) -> bool:
    """Whether rank 0 waits at the address of the store, which it hosts under mpirun."""
    with suppress(OSError):
        socket.create_connection((info.address, info.port), timeout=1).close()
        return True
    return False


def _is_told_by_torchrun(said: str, failed: float) -> bool:
    """Hand over to torchrun what it prints at the end, if it does not start the ranks again.

    After the ranks torchrun prints a traceback of its own, and a table of those that failed. The
    last lines of the table are the error file of the rank that was the first to fail. Ranks that
    torchrun ends count as failed, too, by whole seconds; so this one has failed a second before.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file or restarts_left():
        return False
    more = {"py_callstack": f"\n{said.rstrip()}", "timestamp": str(int(failed) - 1)}
    try:
        Path(file).write_text(json.dumps({"message": {"message": said, "extraInfo": more}}))
    except OSError:  # the disk is full
        with suppress(OSError):
            os.unlink(file)  # torchrun would fail to read a part of it
        return False
    return True
