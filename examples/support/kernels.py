# SPDX-License-Identifier: MIT
"""A reader's kernels in the emulator: their faults in one line, and what bounds them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import triton

from torchpar.errors import ConfigError
from torchpar.ptx import Emulator


@contextmanager
def compiling(name: str) -> Iterator[None]:
    """Name the kernel that Triton cannot compile in the block, with its line and the reason.

    Raises:
        ConfigError: a kernel that Triton cannot compile.
    """
    try:
        yield
    except triton.CompilationError as error:  # its message shows the kernel up to the fault
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        # A fault inside a function of Triton, such as tl.zeros, is said by its cause alone.
        reason = "" if str(cause) in str(error) else f"\n{cause}"
        raise ConfigError(
            f"{name}: Triton cannot compile it: {error}{reason}; mend the kernel"
        ) from None


def check_faults(gpu: Emulator, name: str = "") -> None:
    """Raise ConfigError with the first fault of the launches that ``gpu`` has executed.

    Args:
        name: of what was launched, which begins the message.
    """
    if errors := gpu.report().errors:
        raise ConfigError(f"{name}{': ' if name else ''}{errors[0]}; mend the kernel or its launch")


def by_unit(kernels: Iterable[tuple[object, object]]) -> str:
    """Return the kernels of each unit, from pairs of a kernel and the unit that bounds it.

    Such as "by floating point: naive; by shared memory: tiled".
    """
    units: dict[str, list[str]] = {}
    for kernel, unit in kernels:
        units.setdefault(f"{unit}", []).append(f"{kernel}")
    return "; ".join(f"by {unit}: {', '.join(names)}" for unit, names in units.items())
