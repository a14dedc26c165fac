# SPDX-License-Identifier: MIT
"""Processes that end with the process that started them."""

import os
import shutil
import threading
from multiprocessing import connection, parent_process
from pathlib import Path


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
