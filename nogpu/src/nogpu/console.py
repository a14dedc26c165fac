# SPDX-License-Identifier: MIT
"""Lines of the command: tables, how far a silent script is, and its end where nobody reads."""

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

SILENCE = 10.0  # seconds after which a line says how far a silent block is


def plural(number: int, noun: str, ending: str = "s") -> str:
    """Return a number of things, as "1 thread" or "1,024 threads"."""
    return f"{number:,} {noun}{ending * (number != 1)}"


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    """The cells of a table in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


@contextmanager
def breaking_silence(how_far: Callable[[], str]) -> Iterator[None]:
    """Say on stderr how far the block is, after each `SILENCE` seconds in which it prints nothing.

    It serves a block of somebody else's code, which has no loop to ask. A thread speaks, to the
    stderr that is there at the start, so that what the block captures stays its own. What is
    printed by other ways than the two streams of the start is not noticed.

    Args:
        how_far: as "12 launches executed"; " after 10 s" follows. The thread calls it.
    """
    stderr, ended = sys.stderr, threading.Event()
    silence = min(SILENCE, threading.TIMEOUT_MAX)
    begun = last = time.monotonic()
    if stderr is None:  # it was closed, and `print` would take stdout
        yield
        return

    def noted(write: Callable[[str], int], text: str) -> int:
        nonlocal last
        last = time.monotonic()
        return write(text)

    def speak() -> None:
        nonlocal last
        while not ended.wait(max(last + silence - time.monotonic(), 0.0)):
            if (now := time.monotonic()) - last >= silence:  # the block has not printed meanwhile
                last = now
                with suppress(OSError, ValueError):  # the block has closed it
                    print(f"{how_far()} after {now - begun:.0f} s", file=stderr, flush=True)

    streams = {id(one): one for one in (sys.stdout, stderr) if isinstance(one, io.TextIOWrapper)}
    before = {number: vars(one).get("write") for number, one in streams.items()}
    for stream in streams.values():  # an attribute in the method's place: the stream stays the same
        stream.write = partial(noted, stream.write)  # type: ignore[method-assign]
    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for number, stream in streams.items():
            del vars(stream)["write"]
            if before[number] is not None:  # of a block around this one
                vars(stream)["write"] = before[number]


@contextmanager
def printing(command: str) -> Iterator[None]:
    """Let the block print; end the process in one line where the output cannot be written.

    Where nobody reads on, such as head, that has read enough, the process ends without a line.

    Args:
        command: whose block it is, for the message.
    """
    if sys.stdout is None:  # it was closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until this process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where there is only ASCII, print ? for others
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        stop_printing()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as e:
        if e.filename is not None or can_print():  # then it is another file's
            raise
        stop_printing()
        print(f"{command}: error: the output cannot be written: {e}", file=sys.stderr)
        sys.exit(1)


def stop_printing() -> None:
    """Let what is printed from now on go nowhere, as after a reader has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def can_print() -> bool:
    """Whether a line, which is empty, can be written to the output."""
    try:
        print(flush=True)  # a flush alone would find an empty buffer
    except OSError:
        return False
    return True
