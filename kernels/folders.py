# SPDX-License-Identifier: MIT
"""Folders of measured tables, which are read from there and written atomically. It needs no Triton."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent.resolve() / "tuned"


def user_folder() -> Path:
    """The folder of the user's own tables: $TORCHPAR_CACHE, or torchpar's folder in the user's cache."""
    if folder := os.environ.get("TORCHPAR_CACHE"):
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # there may be no home
    return Path(cache) / "torchpar" / "tuned"


def read(name: str, check: Callable[[Any], object], hint: str) -> tuple[Path, dict[str, Any]] | None:
    """The path of the table ``name`` and its content, or None; a damaged one gives a warning, and None.

    Args:
        check: raises a ValueError that says what is wrong with a table.
        hint: what the warning says beside the reason.
    """
    for folder in (user_folder(), SHIPPED):
        path = folder / name
        try:
            table: dict[str, Any] = json.loads(path.read_text())
            check(table)
            return path, table
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (OSError, ValueError, RecursionError) as error:
            warnings.warn(f"{path}: {error}; {hint}", stacklevel=3)
            break
    return None


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
