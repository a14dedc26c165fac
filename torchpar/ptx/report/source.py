# SPDX-License-Identifier: MIT
"""Lines of the source: their text, and the names by which files are shown."""

import linecache
import os
from contextlib import suppress
from pathlib import Path

from torchpar.ptx.machine.counters import Source

STARTED_IN = os.environ.get("PWD", "/")
with suppress(OSError):  # the folder may be gone
    STARTED_IN = os.getcwd()


def shown_path(path: str) -> str:
    """Return the name of a file, without the folder that Python was started in."""
    with suppress(ValueError):
        return str(Path(path).relative_to(STARTED_IN))
    return path


def line_of(path: str, number: int, strip: bool = True) -> str:
    """Return a line of a file; "" if there is none."""
    linecache.checkcache(path)  # it may have changed
    line = linecache.getline(path, number)
    return line.strip() if strip else line.rstrip()


def moved(source: Source, before: str, file: str) -> Source:
    """Return a source in the kernel's present file; Triton's cache may have an earlier one.

    Args:
        before: the kernel's file when it was compiled.
    """
    if source is None or not file:
        return source
    is_moved = source[0] == before or Path(source[0]).name == Path(file).name
    return (file, source[1]) if is_moved else source
