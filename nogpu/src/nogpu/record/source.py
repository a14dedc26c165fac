# SPDX-License-Identifier: MIT
"""Lines of the source: their text, and the names by which files are shown."""

import linecache
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType

from nogpu.libraries import is_library
from nogpu.machine.parse import Source

STARTED_IN = os.environ.get("PWD", "/")
with suppress(OSError):  # the folder may be gone
    STARTED_IN = os.getcwd()


def program_line() -> tuple[str, int] | None:
    """Return the file and the line of the program that is executed, outside of the libraries.

    Of a library's operator, that is the line that calls the operator.
    """
    frame = _program_frame()
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def name_in_program(value: object) -> str:
    """Return the variable of a value where the program is executed; "" if it has none there."""
    frame = _program_frame()
    for names in () if frame is None else (variables_of(frame), frame.f_globals):
        for name, one in list(names.items()):  # another thread may change them
            if one is value:
                return name
    return ""


HOLDERS = 3  # of a frame's dictionary: the frame, a name, and the call of getrefcount


def variables_of(frame: FrameType) -> dict[str, object]:
    """Return the variables of a function, and let its frame keep none of them alive.

    Before Python 3.13 a frame keeps the dictionary of ``f_locals``, and with it each tensor that
    the function has replaced since then. Limitation: under a debugger, or another function of
    `sys.settrace` that sees each line, the dictionary keeps them, and a graph's input that the
    function has freed is not found.
    """
    held = frame.f_locals
    found = dict(held)
    is_of_function = frame.f_code.co_flags & CO_OPTIMIZED and isinstance(held, dict)
    if is_of_function and sys.getrefcount(held) <= HOLDERS:  # or the program has it, by locals()
        held.clear()
    return found


def calls_under_way() -> Iterator[FrameType]:
    """Yield the frames of the functions that have been called, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _program_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not is_library(name):
            return frame
        frame = frame.f_back
    return None


def shown_path(path: str) -> str:
    """Return the name of a file, without the folder that Python was started in."""
    with suppress(ValueError):
        return str(Path(path).relative_to(STARTED_IN))
    return path


def in_repository(path: str) -> str | None:
    """Return the name of a file from the root of its repository on.

    A repository is the nearest folder with ``.git``; without one it is the folder that Python was
    started in. The name is None for files outside, and for packages that are installed within.
    """
    file = Path(path).absolute()
    if file.parts.count("site-packages") or not file.is_file():
        return None
    root = repository(file.parent)
    return None if root is None else file.relative_to(root).as_posix()


@lru_cache
def repository(folder: Path) -> Path | None:
    """Return the root of a folder's repository, as `in_repository` knows it."""
    for one in (folder, *folder.parents):
        if (one / ".git").exists():
            return one
    return Path(STARTED_IN) if folder.is_relative_to(STARTED_IN) else None


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
    is_moved = source[0] in (before, file) or _name(source[0]) == _name(file)
    return (file, source[1]) if is_moved else source


@lru_cache
def _name(path: str) -> str:  # each launch asks for each of its instructions
    return Path(path).name
