# SPDX-License-Identifier: MIT
"""Give up a student's function that never returns.

Python calls the handler of a signal after compiled code has returned. So the ladder runs in a child
process, which tells this one when it calls a function, and when the function has returned. If one
does not return, this process kills the child, and starts another one without that function.
"""

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

from torchpar.parallel.launch.processes import Terminated, die_with_parent

PATIENCE = 50.0  # seconds beyond a call's limit, in which compiled code may return
NOTICE = 5.0  # seconds beyond the limit, after which a line says what is waited for
GRACE = 3.0  # seconds to end after a signal; the ladder outside of a call has four times as many
TICK = 0.5  # seconds after which the child is looked at, although it has told nothing


class Call(NamedTuple):
    """A call of a student's function, which is to return within ``seconds``."""

    file: str
    name: str
    seconds: float

    def __str__(self) -> str:
        return f"{Path(self.file).name}: {self.name}"


class Watched:
    """The child's side: it tells its parent of calls.

    Attributes:
        pipe: to the parent, or None where nobody watches.
        endless: file and name of the functions that were given up, and after how many seconds.
    """

    def __init__(self) -> None:
        self.pipe: int | None = None
        self.endless: dict[tuple[str, str], float] = {}

    def tell(self, call: Call | None) -> None:
        """Tell that a function is called, or that it has returned.

        What was printed before is flushed, for it would be lost if this process is killed.
        """
        if self.pipe is not None:
            with suppress(OSError):  # the next `print` raises it
                sys.stdout.flush()
            os.write(self.pipe, json.dumps(call).encode() + b"\n")

    @contextmanager
    def calling(self, file: str, name: str, limit: float) -> Iterator[Callable[[bool], None]]:
        """Call a student's function in the block.

        Yields:
            a function that takes whether the student's is being compiled, which may take any time.
        """

        def compiling(has_begun: bool) -> None:
            self.tell(Call(file, name, math.inf if has_begun else limit))

        compiling(False)
        try:
            yield compiling
        finally:
            self.tell(None)


WATCHED = Watched()


class Child:
    """The parent's side: a process that runs the ladder.

    Attributes:
        call: that which it has told last, or None if that has returned.
    """

    def __init__(self, pid: int, pipe: int):
        self.pid, self.pipe = pid, pipe
        self.call: Call | None = None

    def wait(self) -> bool:
        """Wait until the child ends; False if its call does not return."""
        waited, last, is_noted, text = 0.0, time.monotonic(), False, b""
        while True:
            if select.select([self.pipe], [], [], TICK)[0]:
                if not (read := os.read(self.pipe, 2**16)):
                    return True
                *lines, text = (text + read).split(b"\n")
                for line in lines:
                    self.call = Call(*told) if (told := json.loads(line)) else None
                    waited, last, is_noted = 0.0, time.monotonic(), False
                continue
            if self.has_ended():  # and a process of its own holds the pipe
                return True
            now = time.monotonic()
            waited += min(now - last, 2 * TICK)  # not while this process was stopped, as by Ctrl-Z
            last = now
            if self.call is None or waited <= self.call.seconds + NOTICE:
                continue
            if waited > self.call.seconds + PATIENCE:
                return False
            if not is_noted:
                is_noted = True
                print(
                    f"{self.call} has been in compiled code, which cannot be stopped, for "
                    f"{self.call.seconds + NOTICE:.0f} s; the ladder gives it up after "
                    f"{self.call.seconds + PATIENCE:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )

    def has_ended(self) -> bool:
        """Whether the process has ended; its status can still be read."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def status(self) -> int:
        """The exit status, as a shell has it. A line names the signal that has ended the child."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if code >= 0:
            return code
        who = f"{self.call} has ended the ladder" if self.call else "the ladder was ended"
        print(f"{who} by {signal.Signals(-code).name}", file=sys.stderr)
        return 128 - code

    def terminate(self, number: int | None) -> int | None:
        """Let the child end by a signal.

        Args:
            number: of the signal; None after Ctrl-C, which sends it to the child, too.

        Returns:
            the status; None if the child was killed, and has said nothing.
        """
        if number is not None:
            os.kill(self.pid, number)
        if self.ends_within(GRACE):
            return self.status()
        if self.call is None:  # it may take long to end its processes, or knows of no signal
            os.kill(self.pid, signal.SIGTERM)
            if self.ends_within(3 * GRACE):
                return self.status()
        self.kill()
        return None

    def ends_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self.has_ended() and time.monotonic() < end:
            time.sleep(0.01)
        return self.has_ended()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def guarded(main: Callable[[], int]) -> int:
    """Run ``main`` in a child process, and once more for each function that never returns.

    Returns:
        the status of the last child.
    """
    with_files = any(argument.startswith("--w") for argument in sys.argv[1:])
    if not with_files or sys.platform != "linux":  # where a fork is safe, also with NumPy's threads
        return main()
    while True:
        sys.stdout.flush()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            die_with_parent(signal.SIGKILL)
            WATCHED.pipe = write
            return main()
        os.close(write)
        child = Child(pid, read)
        try:
            if child.wait():
                return child.status()
        except (Terminated, KeyboardInterrupt) as e:
            status = child.terminate(e.number if isinstance(e, Terminated) else None)
            if status is None:
                raise
            return status
        finally:
            os.close(read)
        child.kill()
        endless = child.call
        assert endless is not None
        WATCHED.endless[endless.file, endless.name] = endless.seconds + PATIENCE
        print(f"{endless} does not return; the ladder begins again without it", flush=True)
