# SPDX-License-Identifier: MIT
"""Answer signals at once that stop a run, also while the main thread computes or waits.

Python calls the handlers of signals in the main thread, between two operations. One operation, such
as a collective that waits for another rank, can take minutes. Python's C code writes the number of
each signal into a socket at once, and a thread reads it there.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

from torchpar.parallel.launch.processes import shutdown_timeout
from torchpar.parallel.launch.world import World
from torchpar.training.outcome import Stopped

logger = logging.getLogger(__name__)
PATIENCE = 0.5  # seconds in which most runs have ended, and need no answer
AGAIN = 1.0  # seconds after a second SIGINT in which the main thread ends by itself
HANDLED = b"\0"  # no signal has this number
# Signals by which a run that has a checkpoint is saved, and ends. Windows has only the first two.
STOPPING = [
    signal.Signals[name]
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    if hasattr(signal, name)
]

Handler = Callable[[int, FrameType | None], object]


@contextmanager
def answering_signals(world: World, saves_at: Collection[int]) -> Iterator[None]:
    """Log on rank 0 how the run ends after a signal, and end this process at a second SIGINT.

    A program that catches the KeyboardInterrupt, such as a debugger, goes on, and no signal is left
    to answer. Nor is there one for a handler that the program sets within the block. Outside of the
    main thread, which alone may ask for signals, nothing is answered.

    Args:
        saves_at: signals after which the run stops after a step and saves it. Where there are none,
            it ends by KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    restore_handlers()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handlers = _handlers(writer, saves_at)
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    answer = _Answer(reader, before, handlers, world.rank == 0, bool(saves_at))
    thread = threading.Thread(target=answer.run, name="answering_signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, old[number])
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        writer.close()  # so that the thread reads the end
        thread.join()


def restore_handlers() -> None:
    """Set the earlier handlers again, if the program has caught the `Stopped` of its run."""
    if isinstance(sys.exception(), Stopped):
        return
    for number in STOPPING:
        handler = signal.getsignal(number)
        if isinstance(handler, partial) and handler.func is unless_stopped:
            signal.signal(number, handler.args[0])


def unless_stopped(before: Handler | int | None, number: int, _frame: FrameType | None) -> None:
    """Ignore a signal during a shutdown; otherwise restore and call the handler ``before``."""
    if isinstance(sys.exception(), Stopped):
        return
    signal.signal(number, before)
    os.kill(os.getpid(), number)


def _handlers(writer: socket.socket, saves_at: Collection[int]) -> dict[int, Handler]:
    """By signal, the present handler, which first writes that it was called.

    Without a checkpoint SIGTERM, and a SIGINT that the program handles, are not ours.
    """

    def noting(handler: Handler) -> Handler:
        def call(number: int, frame: FrameType | None) -> None:
            with suppress(OSError):  # the socket is full
                writer.send(HANDLED)
            handler(number, frame)

        return call

    present = {n: signal.getsignal(n) for n in {signal.SIGINT, *saves_at}}
    return {
        number: noting(handler)
        for number, handler in present.items()
        if callable(handler) and (saves_at or handler is signal.default_int_handler)
    }


class _Answer:
    """The thread that reads signals, in their order with the calls of their handlers.

    Args:
        before: the file to which Python wrote signals before, or -1.
        handlers: of the signals to answer.
    """

    def __init__(
        self,
        reader: socket.socket,
        before: int,
        handlers: dict[int, Handler],
        speaks: bool,
        saves: bool,
    ):
        self.reader, self.before, self.handlers = reader, before, handlers
        self.speaks, self.saves, self.launcher = speaks, saves, os.getppid()
        self.received: list[int] = []
        self.until: float | None = None  # the time at which to speak or to end this process

    def run(self) -> None:
        """Read until the other end is closed."""
        with self.reader:
            while True:
                left = None if self.until is None else max(self.until - time.monotonic(), 1e-3)
                self.reader.settimeout(left)
                try:
                    byte = self.reader.recv(1)
                except TimeoutError:
                    self.until = None
                    self._act()
                    continue
                if not byte:
                    return
                if byte == HANDLED:
                    self._note_handled()
                else:
                    self._receive(byte)

    def _receive(self, byte: bytes) -> None:
        if self.before >= 0:
            os.write(self.before, byte)
        number = byte[0]
        if signal.getsignal(number) is not self.handlers.get(number, self):
            return
        self.received.append(number)
        if self._is_second():
            self.until = time.monotonic() + AGAIN
        elif len(self.received) == 1:
            self.until = time.monotonic() + PATIENCE

    def _note_handled(self) -> None:
        """The main thread has come back to Python, and its program knows of the signal.

        A run that saves has noted the first signal then, and goes on to the end of its step.
        """
        if not self.saves:
            self.received.clear()
        if not self.saves or self._is_second():
            self.until = None

    def _is_second(self) -> bool:
        return self.received.count(signal.SIGINT) > 1

    def _act(self) -> None:
        if self._is_second():
            os._exit(128 + signal.SIGINT)
        elif self.speaks:
            logger.warning(_line(self.received[0], self.saves, has_torchrun(self.launcher)))


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
