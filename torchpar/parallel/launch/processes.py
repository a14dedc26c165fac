# SPDX-License-Identifier: MIT
"""Processes that end with the process that started them."""

import ctypes
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection, parent_process
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h


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


def end_with_launcher(launcher: str) -> None:
    """Let Linux send SIGTERM to this rank of torchrun when torchrun ends, even by SIGKILL.

    The ranks of a killed torchrun would train on. The signal comes when the thread ends that
    started this process. In torchrun that is the main thread, but others may have short ones.
    """
    if launcher == "torchrun" and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def putting_off_sigterm() -> Iterator[None]:
    """Call this process's handler of SIGTERM only after the block, which starts processes.

    A handler that raises within the start leaves a process behind that misses what it was to
    receive, and prints a traceback.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGTERM, lambda *given: received.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        if received:
            handler(*received[0])
