# SPDX-License-Identifier: MIT
"""The report as JSON, for machines. docs/ptx.md says what the keys mean.

A key is only added to a version; `VERSION` grows if one is removed, or gets another meaning.
"""

import json
from collections.abc import Iterable, Sequence

from nogpu.machine.counters import Access, Line
from nogpu.record.faults import MARKS, Fault, HostFault
from nogpu.record.launch import CapturedGraph, Launch
from nogpu.report.groups import Group

VERSION = 1
COUNTED = (
    "instructions",
    "threads",
    "flops",
    "tensor_flops",
    "special",
    "barriers",
    "waits",
    "in_flight",
    "most_in_flight",
)
ACCESSED = ("requests", "bytes", "transactions", "least", "distinct")


def as_json(
    groups: Iterable[Group],
    launches: Sequence[Launch],
    graphs: Iterable[CapturedGraph],
    faults: Sequence[Fault],
) -> str:
    """Return the report as an object of JSON."""
    kinds = [fault.kind for fault in faults]
    report = {
        "version": VERSION,
        "counts": {"launches": len(launches), **{f"{kind}s": kinds.count(kind) for kind in MARKS}},
        "groups": [of_group(group) for group in groups],
        "launches": [of_launch(launch) for launch in launches],
        "graphs": [of_graph(graph) for graph in graphs],
        "faults": [of_fault(fault) for fault in faults],
    }
    return f"{json.dumps(report, indent=1)}\n"


def of_group(group: Group) -> dict[str, object]:
    first = group.first
    return {
        "kernel": first.kernel,
        "arch": first.arch,
        "constants": first.constants,
        "specialization": first.specialization,
        "autotuned": first.configuration or None,
        "ctas": first.ctas,
        "warps": first.warps,
        "shared_bytes": first.shared,
        "grids": [list(grid) for grid in group.grids],
        "launches": [number - 1 for number in group.numbers],
        "instructions": group.instructions,
        "seconds": group.seconds,
        "first_launched": place(first.launched),
        "last_launched": place(group.last.launched),
        "sampled_programs": first.executed,
        "ended": first.ended or None,
        "counters": of_counters(group.launches),
        "time": of_time(first),
    }


def of_counters(launches: Iterable[Launch]) -> dict[str, object]:
    """Return the sums of the launches' counters, by the names of `Line` and `Access`."""
    total = Line(None)
    spaces = {space: Access(None, space, "all") for space in ("global", "shared")}
    distinct_read = distinct_written = 0
    for counters in (launch.counters for launch in launches):
        total.add(counters.total)
        for space, access in spaces.items():
            access.add(counters.sums(space))
        distinct_read += counters.distinct_read
        distinct_written += counters.distinct_written
    return {
        **{name: getattr(total, name) for name in COUNTED},
        "distinct_read": distinct_read,
        "distinct_written": distinct_written,
        **{
            space: {name: getattr(access, name) for name in ACCESSED}
            for space, access in spaces.items()
        },
    }


def of_time(launch: Launch) -> dict[str, object]:
    """Return the estimated time by GPU."""
    names = ("microseconds", "binds", "waves", "terms")
    return {gpu: {name: getattr(one, name) for name in names} for gpu, one in launch.time.items()}


def of_launch(launch: Launch) -> dict[str, object]:
    return {
        "kernel": launch.kernel,
        "grid": list(launch.grid),
        "sampled_programs": launch.executed,
        "ended": launch.ended or None,
        "instructions": launch.instructions,
        "seconds": launch.seconds,
        "launched": place(launch.launched),
        "printed": launch.printed,
    }


def of_graph(graph: CapturedGraph) -> dict[str, object]:
    return {
        "captured": place(graph.captured),
        "operators": graph.operators,
        "launches": graph.launches,
        "replays": graph.replays,
    }


def of_fault(fault: Fault) -> dict[str, object]:
    """Return a fault; one of the program has no kernel."""
    found = {
        "kind": fault.kind,
        "name": fault.name,
        "message": fault.message,
        "count": fault.count,
        "source": place(fault.source),
        "launched": place(fault.launched),
        "launch": fault.launch - 1 if fault.launched else None,
        "configuration": fault.configuration or None,
        "other_configurations": fault.other_configurations,
        "kernel": fault.kernel or None,
        "program": list(fault.program) or None,
        "ptx_line": fault.line or None,
        "earlier": None,
    }
    if isinstance(fault, HostFault) and fault.earlier is not None:
        word, where = fault.earlier
        found["earlier"] = {"word": word, **(place(where) or {})}
    return found


def place(where: tuple[str, int] | None) -> dict[str, object] | None:
    """Return a file and a line."""
    return None if where is None else {"file": where[0], "line": where[1]}
