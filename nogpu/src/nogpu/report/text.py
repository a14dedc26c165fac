# SPDX-License-Identifier: MIT
"""The report as text: groups of launches, those that took longest, and last the faults.

A screen shows the end of a text, so that errors stand before the last line.
"""

import re
import textwrap
from collections.abc import Iterable, Sequence

from nogpu.console import in_columns
from nogpu.record.faults import MARKS, Fault
from nogpu.record.launch import (
    CapturedGraph,
    Launch,
    of_ended,
    of_sample,
    shown_grid,
)
from nogpu.record.time import ESTIMATE_ACCURACY, shown
from nogpu.report.groups import Group, Numbered, longest, shown_line

WIDTH = 100  # of lines that can be broken
GAP = "  "  # between columns
INDENT = "    "
TERMS = 3  # of an estimate, in a table


def as_text(
    groups: Sequence[Group],
    launches: Sequence[Launch],
    graphs: Iterable[CapturedGraph],
    faults: Sequence[Fault],
    lists_launches: bool = False,
) -> str:
    """Return the report as text.

    Args:
        lists_launches: also list each launch.
    """
    numbered = list(enumerate(launches, 1))
    lines = printed(numbered)
    if lists_launches and launches:
        lines += of_launches(numbered)
    lines += of_groups(groups)
    if slowest := longest(launches):
        lines += [f"the {len(slowest)} launches that took longest:", *of_launches(slowest)]
    lines += map(str, graphs)
    lines += map(str, reversed(in_order(faults)))
    return "\n".join([*lines, summary(launches, faults)])


def in_order(faults: Iterable[Fault]) -> list[Fault]:
    """Return the faults, errors first."""
    return sorted(faults, key=lambda fault: list(MARKS).index(fault.kind))


def summary(launches: Sequence[Launch], faults: Iterable[Fault]) -> str:
    """Return one line: the numbers of launches, errors, warnings and notes."""
    kinds = [fault.kind for fault in faults]
    numbers = {kind: kinds.count(kind) for kind in MARKS}
    counts = ", ".join(f"{n} {kind}{'s' * (n != 1)}" for kind, n in numbers.items())
    return f"launches: {len(launches)}; {counts}"


def printed(launches: Iterable[Numbered]) -> list[str]:
    """Return what launches have printed, each below its launch."""
    lines = []
    for number, launch in launches:
        if launch.printed:
            grid = shown_grid(launch.grid)
            lines.append(f"printed by launch {number}, {launch.kernel}[{grid}]:")
            lines += [f"  {line}" for line in launch.printed]
    return lines


def of_groups(groups: Sequence[Group]) -> list[str]:
    """Return a row for each group, its head first; its configuration stands below it."""
    if not groups:
        return []
    archs = ", ".join(dict.fromkeys(group.first.arch for group in groups))
    rows = [("launches", "instructions", "seconds", f"kernel, for {archs}")]
    below: list[tuple[str, ...]] = [()]
    for group in groups:
        rows.append(
            (
                f"{len(group.launches):,}",
                f"{group.instructions:,}",
                f"{group.seconds:.3f}",
                group.name,
            )
        )
        more = "; ".join(filter(None, (group.configuration, group.launched)))
        below.append((more, of_sample(group.launches), of_ended(group.launches)))
    lines = []
    for line, sentences in zip(aligned(rows), below, strict=True):
        lines += [line, *(part for text in sentences for part in wrapped(text))]
    return lines


def of_times(groups: Iterable[Group]) -> str:
    """Return the estimated times of each group's first launch as text; "" without a launch."""
    blocks = []
    for group in groups:
        launch, count = group.first, len(group.launches)
        title = f"{launch.kernel}[{shown_grid(launch.grid)}]: {group.configuration}"
        title += f"; the first of {count:,} launches" if count > 1 else ""
        if launch.ended:
            blocks.append(f"{title}\nno estimate: {launch.ended} has ended the launch early")
            continue
        table = [["GPU", "about", "bound by", "waves", "terms, which overlap"]]
        for one in launch.time.values():
            terms = list(one.terms.items())[:TERMS]
            words = ", ".join(f"{name} {shown(value)}" for name, value in terms)
            waves = f"{one.waves:.2f}"
            table.append([one.gpu, shown(one.microseconds), one.binds, waves, words])
        blocks.append(f"{title}\n{in_columns(table)}")
    return "\n\n".join([*blocks, ESTIMATE_ACCURACY]) if blocks else ""


def wrapped(text: str) -> list[str]:
    """Return a sentence, indented, in lines that end behind a comma or a semicolon."""
    kept_together = re.sub(r"(?<![,;]) ", "\xa0", text)
    lines = textwrap.wrap(
        kept_together,
        WIDTH,
        break_long_words=False,
        break_on_hyphens=False,
        initial_indent=INDENT,
        subsequent_indent=INDENT,
    )
    return [line.replace("\xa0", " ") for line in lines]


def of_launches(launches: Iterable[Numbered]) -> list[str]:
    """Return a row for each launch, its head first."""
    rows = [("launch", "instructions", "seconds", "kernel")]
    for number, launch in launches:
        kernel = f"{launch.kernel}[{shown_grid(launch.grid)}]"
        where = shown_line(launch)
        rows.append(
            (
                str(number),
                f"{launch.instructions:,}",
                f"{launch.seconds:.3f}",
                f"{kernel}, launched at {where}" if where else kernel,
            )
        )
    return aligned(rows)


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows whose cells are numbers, but for the last one."""
    columns = list(zip(*rows, strict=True))[:-1]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for *numbers, last in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths, strict=True)]
        lines.append(GAP.join([*cells, last]))
    return lines
