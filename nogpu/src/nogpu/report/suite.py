# SPDX-License-Identifier: MIT
"""Launches and faults of a suite of tests, summed over processes, and a summary of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nogpu.console import plural
from nogpu.record.faults import MARKS
from nogpu.record.source import shown_path
from nogpu.report.findings import Finding, from_plain, merged
from nogpu.report.text import aligned

SLOWEST = 10  # tests that are named
MOST_NAMES = 20  # of kernels that were never launched
INDENT = "    "
Kernel = tuple[str, str]  # its file and its name


@dataclass
class OfTest:
    """The launches of a test.

    Attributes:
        test: its identifier.
        launches: their number.
        seconds: that they took here.
        kernels: those that were launched.
        constants: what they were compiled for, such as the names of functions that they call.
        sampled: the number of launches of which only a sample was executed.
        findings: the faults.
    """

    test: str
    launches: int
    seconds: float
    kernels: list[Kernel]
    constants: list[str]
    sampled: int
    findings: list[Finding]

    def as_plain(self) -> dict[str, Any]:
        """Return it as plain values, which pass between processes."""
        plain = [one.as_plain() for one in self.findings]
        return vars(self) | {"kernels": [list(one) for one in self.kernels], "findings": plain}


@dataclass
class Suite:
    """The launches of all tests.

    Attributes:
        tests: those that have launched something, or have faults.
        defined: by kernel of the project its line.
    """

    tests: list[OfTest] = field(default_factory=list)
    defined: dict[Kernel, int] = field(default_factory=dict)

    def add(self, plain: dict[str, Any]) -> None:
        """Add a test, by what `OfTest.as_plain` has returned."""
        one = OfTest(
            **plain
            | {
                "kernels": [(file, name) for file, name in plain["kernels"]],
                "findings": [from_plain(values) for values in plain["findings"]],
            }
        )
        if one.launches or one.findings:
            self.tests.append(one)

    def define(self, kernels: Iterable[tuple[str, str, int]]) -> None:
        """Add the kernels that a process has imported: files, names and lines."""
        self.defined |= {(file, name): line for file, name, line in kernels}

    def findings(self) -> list[Finding]:
        """Return one finding for each fault, with all its tests."""
        return merged(finding for one in self.tests for finding in one.findings)

    def never_launched(self) -> list[tuple[Kernel, int]]:
        """Return the kernels of the project that no test has launched, with their lines.

        A function that was given to a kernel as a constant is none.
        """
        launched = {kernel for one in self.tests for kernel in one.kernels}
        given = {name for one in self.tests for name in one.constants}
        return sorted(
            (kernel, line)
            for kernel, line in self.defined.items()
            if kernel not in launched and kernel[1] not in given
        )

    def summary(self, advice: str) -> list[str]:
        """Return lines: launches, faults by kernel and line, kernels never launched, slow tests.

        Args:
            advice: for a suite without a launch; "" if there is none.
        """
        return [*self._launches(advice), *self._faults(), *self._never_launched(), *self._slowest()]

    def _launches(self, advice: str) -> list[str]:
        total = sum(one.launches for one in self.tests)
        if not total:
            return [f"no kernel was launched; {advice}" if advice else "no kernel was launched"]
        kernels = {kernel for one in self.tests for kernel in one.kernels}
        seconds = sum(one.seconds for one in self.tests)
        tests = sum(one.launches > 0 for one in self.tests)
        line = (
            f"{plural(total, 'launch', 'es')} of {plural(len(kernels), 'kernel')} in "
            f"{plural(tests, 'test')}, executed in {seconds:.1f} s"
        )
        sampled = sum(one.sampled for one in self.tests)
        return [f"{line}; {sampled:,} of them by a sample of their programs" if sampled else line]

    def _faults(self) -> list[str]:
        findings = self.findings()
        if not findings:
            return ["no faults"] if self.tests else []
        lines = ["faults by kernel and line:"]
        for one in findings:
            excused = f" ({one.excused})" if one.excused else ""
            place = f" {one.where}" if one.where else ""
            lines += [
                f"{MARKS[one.kind]} {one.kind}: {one.title}{excused},{place}",
                f"{INDENT}{plural(one.count, 'time')}, in {one.in_tests}",
            ]
        return lines

    def _never_launched(self) -> list[str]:
        found = self.never_launched()
        if not found:
            return []
        lines = ["kernels never launched:"]
        lines += [
            f"{INDENT}{shown_path(file)}:{line} {name}" for (file, name), line in found[:MOST_NAMES]
        ]
        left = len(found) - MOST_NAMES
        return [*lines, f"{INDENT}and {left} more"] if left > 0 else lines

    def _slowest(self) -> list[str]:
        slowest = sorted(self.tests, key=lambda one: one.seconds, reverse=True)[:SLOWEST]
        rows = [(f"{one.seconds:.2f}", f"{one.launches:,}", one.test) for one in slowest]
        if not any(one.launches for one in self.tests):
            return []
        table = aligned([("seconds", "launches", "test"), *rows])
        return ["the tests whose launches took longest:", *(f"{INDENT}{row}" for row in table)]
