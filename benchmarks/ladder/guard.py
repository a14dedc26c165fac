# SPDX-License-Identifier: MIT
"""Go on without a student's function that never returns, where no signal ends its compiled code.

Python runs the handler of a signal when compiled code has returned. So the ladder runs in a child
process, which tells this one when a function is called and when it has returned. If one does not
return, the child is killed, and another one begins without that function.
"""

import ctypes
import json
import math
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from torchpar.parallel.launch.processes import Terminated

PATIENCE = 50.0  # seconds beyond a call's limit, in which compiled code may return by itself
SAID = 5.0  # seconds beyond the limit, after which a line says what is waited for
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
GRACE = 3.0  # seconds in which the ladder ends by itself after a signal
TICK = 0.5  # seconds after which the child is looked at, although it has told nothing


class Call(NamedTuple):
    """A call of a student's function, which is to return within ``seconds``."""

    file: str
    name: str
    seconds: float

    def __str__(self) -> str:
        return f"{Path(self.file).name}: {self.name}"


class Ladder:
    """What the ladder's process knows of the one that watches it.

    Attributes:
        pipe: to that process, or None if there is none.
        endless: file and name of the functions that have not returned, with the seconds after which
            they were given up.
    """

    def __init__(self) -> None:
        self.pipe: int | None = None
        self.endless: dict[tuple[str, str], float] = {}

    def tell(self, call: Call | None) -> None:
        """Tell that a function is called, or that it has returned.

        What was printed before is written, for it would be lost if this process is killed.
        """
        if self.pipe is not None:
            with suppress(OSError):  # who prints next says so
                sys.stdout.flush()
            os.write(self.pipe, json.dumps(call).encode() + b"\n")

    @contextmanager
    def watched(self, file: str, name: str, limit: float) -> Iterator[Callable[[bool], None]]:
        """Call a student's function in the block.

        Yields:
            Takes whether the function is being compiled, which may take any time.
        """

        def compiling(has_begun: bool) -> None:
            self.tell(Call(file, name, math.inf if has_begun else limit))

        compiling(False)
        try:
            yield compiling
        finally:
            self.tell(None)


LADDER = Ladder()


def guarded(main: Callable[[], int]) -> int:
    """The status of ``main``, which runs in a child process, again for each endless function."""
    with_files = any(argument.startswith("--w") for argument in sys.argv[1:])
    if not with_files or sys.platform != "linux":  # where a fork is safe, also with NumPy's threads
        return main()
    while True:
        sys.stdout.flush()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            end_with_parent()
            LADDER.pipe = write
            return main()
        os.close(write)
        try:
            endless = wait(child, read)
        except (Terminated, KeyboardInterrupt) as e:
            status = ended(child, signal.SIGTERM if isinstance(e, Terminated) else None)
            if status is None:  # it has said nothing
                raise
            return status
        finally:
            os.close(read)
        if endless is None:
            return exit_status(os.waitpid(child, 0)[1])
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        LADDER.endless[endless.file, endless.name] = endless.seconds + PATIENCE
        print(f"{endless} does not return; the ladder begins again without it", flush=True)


def end_with_parent() -> None:
    """Let Linux kill this process when its parent has ended, as by SIGKILL."""
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def wait(child: int, pipe: int) -> Call | None:
    """Wait until the child ends, or return the call that does not."""
    call, since, said, text = None, 0.0, False, b""
    while True:
        if select.select([pipe], [], [], TICK)[0]:
            if not (read := os.read(pipe, 2**16)):
                return None
            *lines, text = (text + read).split(b"\n")
            for line in lines:
                call = Call(*told) if (told := json.loads(line)) else None
                since, said = time.monotonic(), False
        elif call and (beyond := time.monotonic() - since - call.seconds) > SAID:
            if beyond > PATIENCE:
                return call
            if not said:
                said = True
                print(
                    f"{call} is in compiled code for {SAID + call.seconds:.0f} s, which cannot be "
                    f"stopped; after {PATIENCE + call.seconds:.0f} s the ladder goes on without it",
                    file=sys.stderr,
                    flush=True,
                )
        elif has_ended(child):  # and a process of its own holds the pipe
            return None


def has_ended(child: int) -> bool:
    """Whether a child has ended; its status can still be read."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def ended(child: int, number: int | None) -> int | None:
    """Send a child a signal, which Ctrl-C has sent already, and wait; its status, or None if it had
    to be killed."""
    if number is not None:
        os.kill(child, number)
    end = time.monotonic() + GRACE
    while time.monotonic() < end:
        if has_ended(child):
            return exit_status(os.waitpid(child, 0)[1])
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def exit_status(status: int) -> int:
    """A shell's exit status of a process, also of one that a signal has ended."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
