# SPDX-License-Identifier: MIT
"""Account of the launches of a test or a script: seconds that they have taken, and may take."""

from dataclasses import dataclass, field

from nogpu.record.launch import Launch, shown_grid
from nogpu.report.suite import Kernel


@dataclass
class Account:
    """Launches of an emulator, and of those that are entered within its block.

    Attributes:
        limit: seconds that the launches may take together; None: any.
        budget: seconds within which the launches stay by samples of their programs; None: all
            programs are executed.
        seconds: those that the launches have taken.
        launches: their number.
        kernels: those that were launched.
        constants: names of functions and other values that kernels were compiled for.
        sampled: a clause on each launch of which the budget allowed only a sample.
    """

    limit: float | None = None
    budget: float | None = None
    seconds: float = 0.0
    launches: int = 0
    kernels: set[Kernel] = field(default_factory=set)
    constants: set[str] = field(default_factory=set)
    sampled: list[str] = field(default_factory=list)

    def note(self, launch: Launch) -> None:
        """Note a launch that has ended."""
        self.launches += 1
        self.kernels.add((launch.file, launch.kernel))
        self.constants.update(launch.constants.values())
        if launch.executed is not None and self.budget is not None:
            name = f"{launch.kernel}[{shown_grid(launch.grid)}]"
            self.sampled.append(f"{launch.executed:,} of {launch.programs:,} programs of {name}")

    @property
    def left(self) -> float | None:
        """The seconds that launches may still take; None: any."""
        return None if self.limit is None else self.limit - self.seconds

    @property
    def of_next_launch(self) -> float | None:
        """The seconds of the budget that the next launch may take: half of those that are left.

        So there is something left for each of the launches after it, however many they are.
        """
        return None if self.budget is None else max(self.budget - self.seconds, 0.0) / 2
