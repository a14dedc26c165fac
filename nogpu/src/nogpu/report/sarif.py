# SPDX-License-Identifier: MIT
"""Findings as SARIF 2.1.0, which code scanners and editors read.

The format is that of https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html.
"""

import json
from collections.abc import Iterable
from urllib.parse import quote

from nogpu.record.fault_names import NAMES
from nogpu.record.source import in_repository, line_of
from nogpu.report.findings import Finding, Place
from nogpu.version import __version__

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
ROOT = "%SRCROOT%"  # the root of the repository, by the name that viewers know


def as_sarif(findings: Iterable[Finding]) -> str:
    """Return the findings that have a line in the repository: GitHub refuses others."""
    results = [
        (one, place)
        for one in findings
        if not one.excused and (place := one.in_repository()) is not None
    ]
    names = list(dict.fromkeys(one.name for one, _ in results))
    run = {
        "tool": {
            "driver": {
                "name": "nogpu",
                "version": __version__,
                "rules": [_rule(name) for name in names],
            }
        },
        "columnKind": "unicodeCodePoints",
        "results": [_result(one, place, names.index(one.name)) for one, place in results],
    }
    return f"{json.dumps({'$schema': SCHEMA, 'version': '2.1.0', 'runs': [run]}, indent=1)}\n"


def identifier(name: str) -> str:
    """Return the identifier of a fault's rule, such as "out-of-bounds"."""
    return name.replace("'", "").replace(".", "-").replace(" ", "-")


def _rule(name: str) -> dict[str, object]:
    told = NAMES.get(name, name)
    return {
        "id": identifier(name),
        "name": name,
        "shortDescription": {"text": name},
        "fullDescription": {"text": told},
        "help": {"text": told},
    }


def _result(finding: Finding, place: Place, rule: int) -> dict[str, object]:
    location = _location(place, finding.source or finding.launched)
    if finding.kernel:
        location["logicalLocations"] = [{"name": finding.kernel, "kind": "function"}]
    related = [] if finding.earlier is None else [(finding.earlier[1], finding.earlier[0])]
    if finding.launched is not None and finding.launched != finding.source:
        related.append((finding.launched, "launched"))
    others = [
        _location((path, there[1]), there) | {"message": {"text": word}}
        for there, word in related
        if (path := in_repository(there[0])) is not None
    ]
    return {
        "ruleId": identifier(finding.name),
        "ruleIndex": rule,
        "level": finding.kind,  # SARIF has the same words
        "message": {"text": f"{finding.title}: {finding.described()}"},
        "locations": [location],
        **({"relatedLocations": others} if others else {}),
        "occurrenceCount": finding.count,
        "properties": {"tests": finding.tests},
    }


def _location(place: Place, there: Place | None) -> dict[str, object]:
    """Return a line of the repository.

    Args:
        there: the same line, by the name of its file on this machine.
    """
    region: dict[str, object] = {"startLine": max(place[1], 1)}
    code = line_of(*there) if there is not None and there[1] == place[1] else ""
    if code:
        region["snippet"] = {"text": code}
    artifact = {"uri": quote(place[0]), "uriBaseId": ROOT}
    return {"physicalLocation": {"artifactLocation": artifact, "region": region}}
