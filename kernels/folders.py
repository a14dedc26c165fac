# SPDX-License-Identifier: MIT
"""Folders of measured tables; write a table atomically. It needs no Triton."""

import os
from pathlib import Path

SHIPPED = Path(__file__).parent.resolve() / "tuned"


def user_folder() -> Path:
    """The folder of the user's own tables: $TORCHPAR_CACHE, or torchpar's folder in the user's cache."""
    if folder := os.environ.get("TORCHPAR_CACHE"):
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # there may be no home
    return Path(cache) / "torchpar" / "tuned"


def write(name: str, text: str) -> Path:
    """Write the table ``name``, atomically; return its path.

    Its folder is beside the kernels in a checkout, and otherwise `user_folder`. It is also `user_folder` if
    that has the table already, which has priority.
    """
    checkout = (SHIPPED.parent.parent / "pyproject.toml").exists() and os.access(SHIPPED.parent, os.W_OK)
    own = os.environ.get("TORCHPAR_CACHE") or (user_folder() / name).exists()
    path = (SHIPPED if checkout and not own else user_folder()) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
