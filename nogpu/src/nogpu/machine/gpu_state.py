# SPDX-License-Identifier: MIT
"""State of a GPU in a launch, which its blocks share, and the schedule of that launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from nogpu.machine.instruction_counts import Progress
from nogpu.machine.memory import Space
from nogpu.machine.parse import Kernel, PtxError
from nogpu.machine.registers import Values
from nogpu.machine.vector_clocks import Events
from nogpu.native.warps import LaunchState

LIMIT = 3_000_000  # instructions of a warp
BETWEEN_CHECKS = 64  # instructions of Python, about, between two looks at the launch's limits


@dataclass(frozen=True)
class Schedule:
    """When asynchronous operations complete ("early", "late", "random"), and the order in which
    warps run."""

    completion: str
    order: str
    seed: int = 0


SCHEDULES = (
    Schedule("early", "forward"),
    Schedule("late", "reverse"),
    Schedule("random", "random", 1),
)


class TooLarge(MemoryError):
    """A launch takes more memory than is free, or more time than it may take."""


class GpuState:
    """The state that the blocks of a launch share.

    Attributes:
        kernel, grid: of the launch, as are those that follow.
        programs: clusters in each dimension of the grid.
        parameters: the bits of the kernel's parameters, by their names.
        symbols: addresses of the kernel's constants.
        variables: addresses of those that the module keeps from one launch to the next.
        shared_types: of arrays in shared memory the bytes of an element, and the sizes.
        released: what blocks have released, by address.
        changes: stores, and atomics that changed a value.
        printed: by the program that is executed.
        executed_instructions: those of the warps.
        controls: what blocks do to control grids.
        counts: also those of a launch that is over.
        native: what the core in C needs; None: Python executes all of it.
    """

    limit = LIMIT
    multiprocessors = 132
    kernel: Kernel
    grid: tuple[int, int, int]
    programs: tuple[int, int, int]
    shared_bytes: int
    parameters: dict[str, int]
    random: Random
    events: Events
    native: LaunchState | None

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.space = Space("global memory")
        self.symbols: dict[str, int] = {}
        self.variables: dict[str, int] = {}
        self.shared_types: Mapping[str, tuple[int, tuple[int, ...]]] = {}
        self.released: dict[int, dict[int, Values]] = {}
        self.changes = self.executed_instructions = 0
        self.printed: list[str] = []
        self.controls: Values | None = None
        self.counts: Any = None
        self.progress = Progress()

    def fault(
        self, kind: str, name: str, line: int, message: str, program: tuple[int, ...]
    ) -> None:
        """A fault was found: an error or a warning ends the launch.

        Args:
            program: the one that does it, by its number in each dimension of the grid.
        """
        if kind != "note":
            raise PtxError(line, message)

    def is_counted_only(self, kind: str, name: str, line: int) -> bool:
        """Whether a fault has been described so often at a line that its message is not needed."""
        return False

    def check_limits(self) -> None:
        """Raise `TooLarge` if the launch has no time or memory left; it is asked now and then."""

    def place_of(self, line: int) -> str:
        """Name a line of the PTX in a message."""
        return f"line {line} of the PTX"
