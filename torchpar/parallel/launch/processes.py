# SPDX-License-Identifier: MIT
"""The end of processes: with the process that started them, and by signals."""

import ctypes
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, parent_process
from pathlib import Path
from types import FrameType

logger = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
TICK = 0.3  # seconds between two looks whether torchrun lives
_watched = 0  # the process whose launcher a thread watches; a fork has no such thread
_launcher = 0  # this launcher
# Windows has no SIGHUP.
ENDING = [signal.Signals[name] for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def end_with_parent(folder: Path | None = None) -> None:
    """Let this process of `multiprocessing` end at once when its parent ends, even by SIGKILL.

    Give the function to a pool as ``initializer``. A worker of a pool would otherwise wait for its
    next task for ever, because it holds both ends of the queue itself.

    Args:
        folder: a folder to remove then, since the parent could not remove it.
    """
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def end_with_launcher(speaks: bool) -> None:
    """End this rank of torchrun when torchrun has ended, even by SIGKILL.

    The ranks of a killed torchrun would train on. As torchrun would, send SIGTERM, by which a `Run`
    saves, and after `shutdown_timeout` seconds SIGKILL. A thread looks whose child this process is:
    the signal that Linux sends at the end of a parent would end this process before it can speak.

    Args:
        speaks: log why the ranks end: one rank on each machine.
    """
    global _watched, _launcher
    if _watched == os.getpid():
        return
    _watched, _launcher = os.getpid(), (launcher := os.getppid())

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(TICK)
        seconds = shutdown_timeout()
        if speaks:  # in a thread of its own: stderr may be a pipe that is full
            threading.Thread(target=speak, args=[seconds], daemon=True).start()
            spoken.wait(min(seconds, TICK))  # before SIGTERM, which may end the process at once
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    spoken = threading.Event()

    def speak(seconds: float) -> None:
        logger.warning(
            "torchrun has ended, and its ranks end within %g s; start the same command again",
            seconds,
        )
        spoken.set()

    threading.Thread(target=watch, name="end_with_launcher", daemon=True).start()


def has_lost_torchrun() -> bool:
    """Whether the torchrun of `end_with_launcher` has ended, so that this rank's signal is ours."""
    return _watched == os.getpid() and os.getppid() != _launcher


def shutdown_timeout() -> float:
    """The seconds that torchrun gives its ranks to end after a signal."""
    try:
        return max(float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")), 0.0)
    except ValueError:
        return 30.0


def restarts_left() -> bool:
    """Whether torchrun would start the ranks again if one ended with another status than 0."""
    starts, restarts = (
        int(os.environ.get(f"TORCHELASTIC_{name}", "0"))
        for name in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    return starts < restarts


def stop_torchrun(number: int) -> None:
    """End torchrun by the signal ``number`` if it would start the ranks again that were stopped.

    torchrun takes ranks that end with status 0 for a success, and starts ranks again that end with
    another status. When it has received a signal it does neither: it ends with status 1, whatever
    its ranks return. One rank on each machine calls this, as soon as no rank needs another. A
    torchrun that was signalled itself receives a second signal, because a handler in Python does
    not see who sent the first one: it prints two tracebacks, and ends with status 1, too.

    Nothing is sent where torchrun did not start this process itself, such as by a shell script.
    """
    launcher = os.getppid()
    if restarts_left() and _runs_python(launcher):
        os.kill(launcher, number)


def _runs_python(pid: int) -> bool:
    """Whether a process runs the same Python: no shell, and not who adopts the orphans."""
    if sys.platform != "linux":
        return pid != 1
    with suppress(OSError):
        return os.path.samefile(f"/proc/{pid}/exe", "/proc/self/exe")
    return False


def has_default_handler(number: int) -> bool:
    """Whether a signal has its default effect, and neither Python nor C handles it."""
    if signal.getsignal(number) != signal.SIG_DFL:
        return False
    with suppress(OSError):  # faulthandler.register sets handlers that Python does not know
        status = Path("/proc/self/status").read_text()
        handled = int(status.partition("SigCgt:")[2].split()[0], 16)
        return not handled >> (number - 1) & 1
    return True


def die_with_parent(number: signal.Signals) -> None:
    """Let Linux send this process a signal when the thread has ended that started it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


class Terminated(BaseException):
    """The signal ``number`` was received; a shell reports it as the exit status ``status``.

    It is not a SystemExit, because a reader's function may raise one.
    """

    def __init__(self, number: int):
        self.number = number
        self.status = 128 + number
        super().__init__(f"ended by {signal.Signals(number).name}")


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as an exception does, so that its processes end too.

    By default they end this process alone, and its semaphores and files stay behind. A signal that
    is ignored, as by nohup, stays ignored.

    Raises:
        Terminated: a signal was received. From then on both are ignored, also after the block.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        sys.unraisablehook = again_if_lost
        raise Terminated(number)

    def again_if_lost(raised: "sys.UnraisableHookArgs") -> None:
        """Send the signal again if a destructor was running, whose exceptions Python drops.

        Nothing is printed: the exception leaves other objects half made, such as Numba's.
        """
        if isinstance(raised.exc_value, Terminated):
            again = threading.main_thread().ident, raised.exc_value.number
            later = threading.Timer(0.1, signal.pthread_kill, again)
            later.start()  # returns before the signal comes, which would be lost here, too
            for one in before:
                signal.signal(one, end)

    before = {}
    if threading.current_thread() is threading.main_thread():  # which alone sets handlers
        before = {one: signal.getsignal(one) for one in ENDING}
        # None is a handler that another language has set.
        before = {one: old for one, old in before.items() if old not in (signal.SIG_IGN, None)}
    for one in before:
        signal.signal(one, end)
    try:
        yield
    finally:
        if not isinstance(sys.exception(), Terminated):
            for one, handler in before.items():
                signal.signal(one, handler)


@contextmanager
def putting_off_signals() -> Iterator[None]:
    """Call the handlers of SIGINT and `ENDING` only after the block, which starts processes.

    A handler that raises within the start leaves a process behind that misses what it was to
    receive, and prints a traceback.
    """
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    received: list[tuple[int, FrameType | None]] = []
    try:
        if threading.current_thread() is threading.main_thread():
            for one in (signal.SIGINT, *ENDING):
                if callable(handler := signal.getsignal(one)):
                    handlers[one] = handler
                    signal.signal(one, lambda *given: received.append(given))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            handlers[received[0][0]](*received[0])
