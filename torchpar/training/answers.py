# SPDX-License-Identifier: MIT
"""Answer SIGINT and SIGTERM at once, also while the main thread computes or waits.

Python calls the handlers of signals in the main thread, between two operations. One operation, such
as a collective that waits for another rank, can take minutes. In C Python writes the number of each
signal into a socket at once, and a thread reads it there.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torchpar.parallel.launch.processes import shutdown_timeout
from torchpar.parallel.launch.world import World

logger = logging.getLogger(__name__)
PATIENCE = 0.5  # seconds in which most runs have ended, and need no answer
AGAIN = 1.0  # seconds after a second SIGINT in which the main thread ends by itself


@contextmanager
def answering_signals(world: World, saves: bool) -> Iterator[None]:
    """Log on rank 0 how the run ends after a signal, and end this process at a second SIGINT.

    Outside of the main thread, which alone may ask for signals, nothing is answered.

    Args:
        saves: whether the run stops after a step and saves it, instead of ending by
            KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    left = threading.Event()
    arguments = reader, before, left, world.rank == 0, saves
    thread = threading.Thread(None, _answer, "answering_signals", arguments, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        writer.close()  # so that the thread reads the end
        thread.join()


def _answer(
    reader: socket.socket, before: int, left: threading.Event, speaks: bool, saves: bool
) -> None:
    """Read signals until the other end is closed.

    Args:
        before: the file to which Python wrote signals before, or -1.
    """
    launcher, received = os.getppid(), []
    with reader:
        while byte := reader.recv(1):
            if before >= 0:
                os.write(before, byte)
            number = byte[0]
            # Without a checkpoint SIGTERM, and a SIGINT that the program handles, are not ours.
            is_default = signal.getsignal(number) is signal.default_int_handler
            if not (is_default or (saves and number in (signal.SIGINT, signal.SIGTERM))):
                continue
            received.append(number)
            if len(received) == 1 and speaks and not left.wait(PATIENCE):
                logger.warning(_line(number, saves, has_torchrun(launcher)))
            if received.count(signal.SIGINT) > 1 and not left.wait(AGAIN):
                os._exit(128 + signal.SIGINT)


def has_torchrun(launcher: int) -> bool:
    """Whether torchrun, the process ``launcher``, has started this process and lives."""
    is_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return is_torchrun and os.getppid() == launcher


def _line(number: int, saves: bool, has_torchrun: bool) -> str:
    end = (
        "stops after the next step, and saves it"
        if saves
        else "ends when the present operation has ended"
    )
    if has_torchrun:
        sooner = f"torchrun kills it after {shutdown_timeout():g} s"
    elif number == signal.SIGINT:
        sooner = "press Ctrl-C again to end it at once" + ", without saving" * saves
    else:
        sooner = "SIGKILL ends it at once"
    return f"received {signal.Signals(number).name}: the run {end}; {sooner}"
