# SPDX-License-Identifier: MIT
"""A reader's kernels in the emulator: their faults in one line, and what bounds them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import getsourcelines
from pathlib import Path
from traceback import walk_tb
from types import TracebackType

import triton
from triton.runtime import KernelInterface

from nogpu import Emulator
from torchpar.errors import ConfigError


@contextmanager
def compiling(name: str) -> Iterator[None]:
    """Name the kernel that Triton cannot compile in the block, with its line and the reason.

    Raises:
        ConfigError: a kernel that Triton cannot compile.
    """
    try:
        yield
    except triton.CompilationError as error:  # its message shows the kernel up to the fault
        functions = list(functions_of(error.__traceback__))
        place, cause = line_in_file(error, functions), error
        # An error in a function that the kernel calls, of this file or of Triton, is the cause.
        while isinstance(cause.__cause__, triton.CompilationError):
            cause = cause.__cause__
            place = line_in_file(cause, functions) or place
        reason = " ".join((cause.error_message or f"{cause.__cause__ or cause}").split())
        raise ConfigError(
            f"{name}: Triton cannot compile it{f' at {place}' if place else ''}: {reason}; "
            "mend the kernel"
        ) from None


def functions_of(traceback: TracebackType | None) -> Iterator[triton.JITFunction]:
    """Yield the reader's jitted functions: variables of what was called, and what they may call."""
    for frame, _ in walk_tb(traceback):
        for kernel in _jitted({**frame.f_globals, **frame.f_locals}):
            yield kernel
            yield from _jitted(kernel.fn.__globals__)


def _jitted(variables: Mapping[str, object]) -> Iterator[triton.JITFunction]:
    for value in variables.values():
        while isinstance(value, KernelInterface) and not isinstance(value, triton.JITFunction):
            value = value.fn  # such as an autotuned kernel's
        if isinstance(value, triton.JITFunction) and not value.fn.__module__.startswith("triton."):
            yield value


def line_in_file(error: triton.CompilationError, functions: Iterable[triton.JITFunction]) -> str:
    """Return the file and line of an error, whose own number counts the lines of the function.

    The error holds the function's text, by which it is found among ``functions``. Without it, "".
    """
    for function in functions:
        if function.src == error.src:
            lines, first = getsourcelines(function.fn)  # with its decorators
            def_line = first + len(lines) - len(error.src.splitlines())
            file = Path(function.fn.__code__.co_filename).name
            return f"{file}:{def_line + getattr(error.node, 'lineno', 1) - 1}"
    return ""


def check_faults(gpu: Emulator, name: str = "") -> None:
    """Raise ConfigError with the first fault of the launches that ``gpu`` has executed.

    Args:
        name: of what was launched, which begins the message.
    """
    if errors := gpu.report().errors:
        said = errors[0].in_one_line()
        file, line = errors[0].launched or ("", 0)
        if file and Path(file).parent != Path(__file__).parent:  # a reader's
            said += f"; launched at {Path(file).name}:{line}"
        raise ConfigError(f"{name}{': ' if name else ''}{said}; mend the kernel or its launch")


def by_unit(kernels: Iterable[tuple[object, object]]) -> str:
    """Return the kernels of each unit, from pairs of a kernel and the unit that bounds it.

    Such as "by floating point: naive; by shared memory: tiled".
    """
    units: dict[str, list[str]] = {}
    for kernel, unit in kernels:
        units.setdefault(f"{unit}", []).append(f"{kernel}")
    return "; ".join(f"by {unit}: {', '.join(names)}" for unit, names in units.items())
