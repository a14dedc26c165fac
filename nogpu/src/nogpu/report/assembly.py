# SPDX-License-Identifier: MIT
"""Refusals of a kernel by ptxas of Triton's wheel, in its words."""

import re

from nogpu.machine.parse import Sources
from nogpu.record.faults import Fault
from nogpu.record.resources import assemble
from nogpu.record.source import moved

NAME = "refused by ptxas"
SAID = re.compile(r"line (\d+); (?:error|fatal)\s*: (.*)")


def words_of(ptx: str, arch: str) -> str:
    """Assemble PTX for ``arch``, such as "sm_90", and return what ptxas says against it.

    It is "" if nothing is refused, or there is no ptxas.
    """
    try:
        made = assemble(ptx, arch)
    except OSError:
        return ""
    return (made.said.strip() or f"exit status {made.status}") if made.status else ""


def refusals(words: str, ptx: str, kernel: str, file: str) -> list[Fault]:
    """Return a fault for each line of the PTX that ptxas speaks of.

    Args:
        words: of ptxas.
        file: of the kernel's source.
    """
    by_line: dict[int, list[str]] = {}
    for line, why in SAID.findall(words):
        by_line.setdefault(int(line), []).append(why.strip())
    if not by_line:  # it does not say where
        return [Fault("error", NAME, " ".join(words.split()), kernel, (), 0, None)]
    sources, lines, found = Sources(ptx), ptx.split("\n"), []
    for line, reasons in sorted(by_line.items()):
        code = lines[line - 1].strip() if line <= len(lines) else ""
        source = moved(sources.at(len("\n".join(lines[:line]))), sources.of_head, file)
        message = f"{'; '.join(dict.fromkeys(reasons))}: {code}"
        found.append(Fault("error", NAME, message, kernel, (), line, source))
    return found
