# SPDX-License-Identifier: MIT
"""Annotations of GitHub: commands in the log of a workflow, which it shows at the lines of a diff.

The commands are those of https://docs.github.com/actions/reference/workflow-commands-for-github-actions.
"""

from collections.abc import Iterable

from nogpu.record.faults import Kind
from nogpu.record.source import in_repository
from nogpu.report.findings import Finding

COMMANDS: dict[Kind, str] = {"error": "error", "warning": "warning", "note": "notice"}


def annotations(findings: Iterable[Finding]) -> list[str]:
    """Return a line for each finding; one without a line in the repository has no file."""
    return [_annotation(one) for one in findings if not one.excused]


def _annotation(finding: Finding) -> str:
    properties = {}
    if finding.place is not None:
        path, line = finding.place
        properties = {"file": in_repository(path) or path, "line": str(line)}
    properties["title"] = finding.title
    given = ",".join(f"{name}={_escaped(value, ':,')}" for name, value in properties.items())
    return f"::{COMMANDS[finding.kind]} {given}::{_escaped(finding.described())}"


def _escaped(text: str, others: str = "") -> str:
    """Return a text in which the characters that end a line, or a property, are numbers."""
    for character in f"%\r\n{others}":  # "%" first, since the numbers have it
        text = text.replace(character, f"%{ord(character):02X}")
    return text
