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
        (one, place) for one in findings if not one.excused and (place := one.place) is not None
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
    location = _location(place)
    if finding.kernel:
        location["logicalLocations"] = [{"name": finding.kernel, "kind": "function"}]
    related = [] if finding.earlier is None else [(finding.earlier[1], finding.earlier[0])]
    if finding.launched is not None and finding.launched != place:
        related.append((finding.launched, "launched"))
    others = [
        _location(other) | {"message": {"text": word}}
        for other, word in related
        if in_repository(other[0]) is not None
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


def _location(place: Place) -> dict[str, object]:
    path, line = place
    region: dict[str, object] = {"startLine": max(line, 1)}
    if code := line_of(path, line):
        region["snippet"] = {"text": code}
    artifact = {"uri": quote(in_repository(path) or path), "uriBaseId": ROOT}
    return {"physicalLocation": {"artifactLocation": artifact, "region": region}}
