# SPDX-License-Identifier: MIT
"""Folders of the user's cache."""

import atexit
import os
import shutil
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

ROOM = 2**20  # bytes that must be free in the cache: more than the core and some kernels take


def cache_folder(name: str) -> Path:
    """Return where the user's cache has ``name`` of nogpu, by the XDG specification.

    It ignores XDG_CACHE_HOME if that is empty or relative.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    for folder in (given, os.path.expanduser("~/.cache")):
        if os.path.isabs(folder):
            return Path(folder) / "nogpu" / name
    return Path("/.cache/nogpu") / name  # a user without a home, as of some containers


@lru_cache(None)
def writable(folder: Path) -> Path:
    """Return a folder of the cache, or a temporary one if that cannot be written, and say so."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # os.access is always true for root
            file.write(bytes(ROOM))
            file.flush()  # a full disk has names of files, and no room for a byte
        return folder
    except OSError as e:
        made = tempfile.mkdtemp(prefix="nogpu-")
        atexit.register(_remove, made, os.getpid())
        reason = f"{folder} cannot be written ({e.strerror}), so that nothing is kept in it"
        advice = "set XDG_CACHE_HOME to a folder that can be written"
        print(f"nogpu: {reason}; {advice}", file=sys.stderr, flush=True)
        return Path(made)


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # and not a fork of it
        shutil.rmtree(folder, ignore_errors=True)
