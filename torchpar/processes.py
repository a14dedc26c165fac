# SPDX-License-Identifier: MIT
"""Processes that end with the one that started them."""

import os
import shutil
import threading
from multiprocessing import connection, parent_process
from pathlib import Path


def end_with_parent(folder: Path | None = None) -> None:
    """Let this process, one of `multiprocessing`, end at once when its parent has ended, even by
    SIGKILL.

    Give it to a pool as ``initializer``. A worker of a pool would otherwise wait for its next task
    for ever, because it holds both ends of the queue itself.

    Args:
        folder: to remove then, for the parent could not.
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
