# SPDX-License-Identifier: MIT
"""Groups of launches of one kernel in one configuration, so that a report has a line for each."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nogpu.record.launch import Launch, shown_grid
from nogpu.record.source import shown_path

LONGEST = 10  # launches that a report names one by one
Numbered = tuple[int, Launch]  # a launch and its number, from 1 on


@dataclass
class Group:
    """Launches of one kernel that share the compiled code; their grids may differ.

    Attributes:
        numbers: of the launches in the report, from 1 on.
        told_by: types of arguments in which this group differs from others of the kernel.
    """

    launches: list[Launch]
    numbers: list[int]
    told_by: dict[str, str] = field(default_factory=dict)

    @property
    def first(self) -> Launch:
        return self.launches[0]

    @property
    def last(self) -> Launch:
        return self.launches[-1]

    @cached_property
    def instructions(self) -> int:
        """Instructions of warps, of all launches."""
        return sum(launch.instructions for launch in self.launches)

    @cached_property
    def seconds(self) -> float:
        """Seconds that executing all launches took."""
        return sum(launch.seconds for launch in self.launches)

    @cached_property
    def grids(self) -> list[tuple[int, int, int]]:
        """The different grids; that with the fewest programs is the first one."""
        programs = {launch.grid: launch.programs for launch in self.launches}
        return sorted(programs, key=lambda grid: (programs[grid], grid))

    @property
    def name(self) -> str:
        """The kernel and its grids, such as "scale[4×1×1]" or "scale[1×1×1 to 8×1×1]"."""
        ends = dict.fromkeys((self.grids[0], self.grids[-1]))
        return f"{self.first.kernel}[{' to '.join(map(shown_grid, ends))}]"

    @property
    def configuration(self) -> str:
        """What the kernel was compiled for, and what a program takes."""
        launch = self.first
        words = [f"{name}={value}" for name, value in launch.constants.items()]
        words += [f"{name}: {kind}" for name, kind in self.told_by.items()]
        if launch.ctas > 1:
            words.append(f"clusters of {launch.ctas} CTAs")
        words.append(f"{launch.warps} warp{'s' * (launch.warps != 1)}")
        if launch.shared:
            words.append(f"{launch.shared:,} bytes of shared memory")
        text = ", ".join(words)
        return f"{text}; autotuned: {launch.configuration}" if launch.configuration else text

    @property
    def launched(self) -> str:
        """The first and the last line that launched; "" if they are not known."""
        first, last = shown_line(self.first), shown_line(self.last)
        if first == last:
            return f"launched at {first}" if first else ""
        return f"launched first at {first}, last at {last}"


def shown_line(launch: Launch) -> str:
    """The line that launched; "" if it is not known."""
    return f"{shown_path(launch.launched[0])}:{launch.launched[1]}" if launch.launched else ""


def grouped(launches: Iterable[Launch]) -> list[Group]:
    """Return the groups; that with the most instructions is the first one.

    Instructions and not seconds order them, so that two runs show the same order.
    """
    found: dict[object, Group] = {}
    for number, launch in enumerate(launches, 1):
        group = found.setdefault((launch.key, launch.configuration), Group([], []))
        group.launches.append(launch)
        group.numbers.append(number)
    of_kernel: dict[str, list[Group]] = defaultdict(list)
    for group in found.values():
        of_kernel[group.first.kernel].append(group)
    for groups in of_kernel.values():
        known = [group.first.specialization for group in groups]
        names = dict.fromkeys(name for one in known for name in one)
        differing = [name for name in names if len({one.get(name) for one in known}) > 1]
        for group in groups:
            own = group.first.specialization
            group.told_by = {name: own[name] for name in differing if name in own}
    return sorted(found.values(), key=lambda group: -group.instructions)


def longest(launches: Sequence[Launch]) -> list[Numbered]:
    """Return the launches that took longest, if there are more than can be named one by one."""
    if len(launches) <= LONGEST:
        return []
    return sorted(enumerate(launches, 1), key=lambda one: -one[1].seconds)[:LONGEST]
