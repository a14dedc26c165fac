# SPDX-License-Identifier: MIT
"""The report of launches, captured graphs and faults: as text, as a page, and as JSON."""

from dataclasses import dataclass, field

from nogpu.record.faults import Fault
from nogpu.record.launch import CapturedGraph, Launch
from nogpu.report import page, replay_page
from nogpu.report.data import as_json
from nogpu.report.groups import Group, grouped
from nogpu.report.launch_recording import recording
from nogpu.report.text import as_text, of_times, summary


@dataclass
class Report:
    """Launches and captured graphs, and what is wrong with them."""

    launches: list[Launch]
    faults: list[Fault]
    graphs: list[CapturedGraph] = field(default_factory=list)

    @property
    def errors(self) -> list[Fault]:
        """The faults of the kind "error"."""
        return [fault for fault in self.faults if fault.kind == "error"]

    @property
    def summary(self) -> str:
        """One line: the numbers of launches, errors, warnings and notes."""
        return summary(self.launches, self.faults)

    def groups(self) -> list[Group]:
        """Return the launches by kernel and configuration."""
        return grouped(self.launches)

    def counted(self) -> str:
        """Return the counters of each group's first launch as text."""
        blocks = []
        for group in self.groups():
            launch, count = group.first, len(group.launches)
            title = str(launch) if count == 1 else f"{launch}; the first of {count} launches"
            blocks.append(f"{title}\n{launch.counted()}")
        return "\n\n".join(blocks)

    def timed(self) -> str:
        """Return what ``--time`` prints: the estimates of `text.of_times`."""
        return of_times(self.groups())

    def as_text(self, lists_launches: bool = False) -> str:
        """Return what ``print(report)`` prints.

        Args:
            lists_launches: also list each launch.
        """
        return as_text(self.groups(), self.launches, self.graphs, self.faults, lists_launches)

    def as_html(self, title: str) -> str:
        """Return a page that needs no other file."""
        return page.as_html(self.groups(), self.launches, self.graphs, self.faults, title)

    def as_json(self) -> str:
        """Return the report for machines. docs/ptx.md says what the keys mean."""
        return as_json(self.groups(), self.launches, self.graphs, self.faults)

    def recording(self, title: str, command: str = "") -> dict[str, object]:
        """Return a launch as a recording, which is a Chrome trace: `json.dump` writes it.

        It is the first recorded launch with an error, or else the first recorded one.

        Args:
            title: of its page, such as the name of the script.
            command: that repeats it.

        Raises:
            ValueError: no launch was recorded, as `nogpu.emulate(traces=8)` does.
        """
        return recording(self.launches, self.faults, title, command)

    def as_replay(self, title: str, command: str = "") -> str:
        """Return a page that plays `recording`, and needs no other file.

        Raises:
            ValueError: as `recording` does.
        """
        return replay_page.page([self.recording(title, command)])

    def __str__(self) -> str:
        return self.as_text()
