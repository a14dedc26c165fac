# SPDX-License-Identifier: MIT
"""A process with limits: of time, memory, files, output and processes, in a folder and session."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

KEPT = 4000  # characters of the output's end
SUBREAPER = 36  # prctl's PR_SET_CHILD_SUBREAPER: what a child leaves behind becomes a child here


class Limits(NamedTuple):
    """The limits of a process and of those that it starts, together.

    Attributes:
        seconds: until it ends.
        memory: bytes in RAM.
        files: bytes in its folder.
        output: bytes that it prints.
        processes: their number, threads not counted.
    """

    seconds: float = 120.0
    memory: int = 8 * 2**30
    files: int = 2**30
    output: int = 2**20
    processes: int = 8


class Ended(NamedTuple):
    """The end of a process.

    Attributes:
        why: the limit that was reached, or how it has ended by itself otherwise than with status 0;
            "" if it ended with that.
        output: the end of what it printed.
    """

    why: str
    output: str


def confined(
    command: Sequence[str], folder: Path, limits: Limits, environment: dict[str, str], given: bytes
) -> Ended:
    """Run a command in a session of its own, and end all its processes at the end.

    All children that this process gets meanwhile are ended, too.

    Args:
        given: its standard input.
    """
    _adopt()
    before = set(_children())
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdin is not None  # noqa: PT018
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(given)
        process.stdin.close()
    printed = _Printed(process.stdout)
    end, why = time.monotonic() + limits.seconds, ""
    try:
        while process.poll() is None:
            if why := _reached(process.pid, before, folder, limits, printed, end):
                break
            time.sleep(0.05)
    finally:
        _end_all(process.pid, before)
        process.wait()
    printed.thread.join(5)
    process.stdout.close()
    status = process.returncode
    if not why and status:
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        last = printed.text().strip().rpartition("\n")[2]
        why = f"its process ended with {how}{f': {last}' if last and status > 0 else ''}"
    if not why and printed.count > limits.output:
        why = f"it prints more than {limits.output:,} bytes"
    return Ended(why, printed.text())


class _Printed:
    """The output of a process: all is read, and the end kept."""

    def __init__(self, stream: IO[bytes]):
        self.count, self._end = 0, b""
        self.thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self.thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):
            while piece := os.read(stream.fileno(), 2**16):
                self.count += len(piece)
                self._end = (self._end + piece)[-KEPT:]

    def text(self) -> str:
        return self._end.decode(errors="replace")


def _reached(
    leader: int, before: set[int], folder: Path, limits: Limits, printed: _Printed, end: float
) -> str:
    """Return the limit that is reached, and "" if none is."""
    if time.monotonic() > end:
        return f"it takes more than {limits.seconds:g} s"
    if printed.count > limits.output:
        return f"it prints more than {limits.output:,} bytes"
    members = [leader, *_below(leader), *(set(_children()) - before - {leader})]
    if len(set(members)) > limits.processes:
        return f"it starts more than {limits.processes} processes"
    if sum(map(_resident, set(members))) > limits.memory:
        return f"it takes more than {limits.memory / 2**30:g} GiB of memory"
    if _size(folder) > limits.files:
        return f"it writes more than {limits.files / 2**20:g} MiB into its folder"
    return ""


def _end_all(leader: int, before: set[int]) -> None:
    """Kill a session, and what has left it: until none is there, since new ones may be started."""
    for _ in range(100):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
        left = set(_children()) - before - {leader}
        left |= {one for root in left for one in _below(root)}
        for one in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(one, signal.SIGKILL)
        for one in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(one, os.WNOHANG)
        if not left:
            return
        time.sleep(0.01)


def _adopt() -> None:
    """Let orphans of a child become children of this process, where the system can do so."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


def _children(pid: int | None = None) -> Iterator[int]:
    """Yield the processes that a process has started, also those that have ended."""
    pid = os.getpid() if pid is None else pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            yield from map(int, task.read_text().split())


def _below(pid: int) -> Iterator[int]:
    for one in _children(pid):
        yield one
        yield from _below(one)


def _resident(pid: int) -> int:
    """Return the bytes of memory that a process has in RAM."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def _size(folder: Path) -> int:
    """Return the bytes that the files of a folder take."""
    found = 0
    with contextlib.suppress(OSError):
        for root, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError):
                    found += (Path(root) / name).lstat().st_blocks * 512
    return found
