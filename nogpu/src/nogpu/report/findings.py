# SPDX-License-Identifier: MIT
"""Findings: faults as other programs take them, of one script or of all tests of a suite."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nogpu.record.faults import MARKS, Fault, Kind
from nogpu.record.source import in_repository, shown_path

Place = tuple[str, int]  # a file and a line


@dataclass
class Finding:
    """A fault, with the tests that have it.

    Attributes:
        kind, name, message, kernel, source, launched, count: those of the `Fault`.
        earlier: a word on an earlier line of the program, and that line.
        tests: their identifiers; none for a script.
        excused: why it makes no test fail; "" if it does.
    """

    kind: Kind
    name: str
    message: str
    kernel: str
    source: Place | None
    launched: Place | None
    count: int
    earlier: tuple[str, Place] | None = None
    tests: list[str] = field(default_factory=list)
    excused: str = ""

    @property
    def title(self) -> str:
        """The name, and the kernel if there is one."""
        return f"{self.name} in {self.kernel}" if self.kernel else self.name

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for the findings of one fault in several tests."""
        return self.kind, self.name, self.kernel, self.source or self.launched, self.excused

    @property
    def where(self) -> str:
        """The file and the line, from the folder on that Python was started in."""
        place = self.source or self.launched
        return f"{shown_path(place[0])}:{place[1]}" if place else ""

    @property
    def in_tests(self) -> str:
        """The first test, and how many others there are."""
        others = len(self.tests) - 1
        return f"{self.tests[0]}, and {others} more" if others else self.tests[0]

    @property
    def place(self) -> Place | None:
        """Its line in the repository: of the kernel, or else the one that launches it."""
        for one in (self.source, self.launched):
            if one is not None and in_repository(one[0]) is not None:
                return one
        return None

    def described(self) -> str:
        """Return the message, and below it what else is known."""
        lines = [self.message]
        if self.launched is not None and self.launched != self.source:
            lines.append(f"launched at {shown_path(self.launched[0])}:{self.launched[1]}")
        if self.earlier is not None:
            word, (path, line) = self.earlier
            lines.append(f"{word} at {shown_path(path)}:{line}")
        if self.count > 1:
            lines.append(f"{self.count:,} times")
        if self.tests:
            lines.append(f"in {self.in_tests}")
        return "\n".join(lines)

    def as_plain(self) -> dict[str, Any]:
        """Return it as plain values, which pass between processes; `from_plain` takes them."""
        return asdict(self)


def from_plain(values: dict[str, Any]) -> Finding:
    """Return the finding that `Finding.as_plain` was asked of."""
    earlier = values["earlier"]
    return Finding(
        **values
        | {name: _place(values[name]) for name in ("source", "launched")}
        | {"earlier": None if earlier is None else (earlier[0], _place(earlier[1]))}
    )


def _place(values: Any) -> Place | None:
    return None if values is None else (values[0], values[1])


def findings_of(faults: Iterable[Fault]) -> list[Finding]:
    """Return the findings of a script, or of one test."""
    return [
        Finding(
            one.kind,
            one.name,
            one.message,
            one.kernel,
            one.source,
            one.launched,
            one.count,
            getattr(one, "earlier", None),
        )
        for one in faults
    ]


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Return one finding for each fault, errors first, with the tests of all of them."""
    by_key: dict[tuple[object, ...], Finding] = {}
    for one in findings:
        if one.key in by_key:
            first = by_key[one.key]
            first.count += one.count
            first.tests += [test for test in one.tests if test not in first.tests]
        else:
            by_key[one.key] = replace(one, tests=list(one.tests))
    return sorted(by_key.values(), key=lambda one: (list(MARKS).index(one.kind), one.where))
