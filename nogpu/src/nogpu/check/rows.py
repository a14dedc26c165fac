# SPDX-License-Identifier: MIT
"""Rows of a kernel's table that say what the emulator has found: faults by kind, and resources."""

from collections.abc import Iterator, Sequence

from nogpu.record.faults import Fault
from nogpu.record.resources import resources
from nogpu.triton.emulator import Emulator

# Faults by row; docs/ptx.md says what each means. Those of no row are of "execution".
FAULT_ROWS = {
    "races": (
        "race",
        "race between programs",
        "race between launches",
        "missing fence",
        "different values",
        "unfinished copy",
        "overwritten mbarrier",
    ),
    "bounds": ("out of bounds", "misaligned access"),
    "uninitialised memory": (
        "uninitialised memory",
        "uninitialised register",
        "undefined value",
    ),
}
OTHERS = "execution"  # deadlocks, endless loops, assertions, and what is not emulated
RESOURCES = "registers and spills"
NO_LAUNCH = "no Triton kernel was launched"
EMPTY_GRID = "the grid has no programs"


def fault_rows(faults: Sequence[Fault]) -> Iterator[tuple[str, str, str]]:
    """Yield for each kind of faults the row, its outcome, and the first fault with its line.

    The outcome is "wrong" if one of them is an error, and "works" otherwise.
    """
    named = {name for names in FAULT_ROWS.values() for name in names}
    for row, names in {**FAULT_ROWS, OTHERS: ()}.items():
        mine = [one for one in faults if (one.name in names if names else one.name not in named)]
        mine = [one for one in mine if one.kind != "note"]
        errors = [one for one in mine if one.kind == "error"]
        first = next(iter(errors or mine), None)
        yield row, "wrong" if errors else "works", "" if first is None else first.in_one_line()


def resource_row(gpus: Sequence[Emulator]) -> tuple[str, str, str]:
    """Return the row of what each kernel takes of a multiprocessor, by ptxas.

    The outcome is "not run" if nothing was launched, or if there is no ptxas; otherwise "works".
    """
    found: dict[str, str] = {}
    for launch in (launch for gpu in gpus for launch in gpu.launches):
        try:
            found[launch.kernel] = str(resources(launch.ptx, launch.arch))
        except (OSError, RuntimeError) as e:
            return RESOURCES, "not run", f"ptxas: {e}"
    if not found:
        return RESOURCES, "not run", NO_LAUNCH
    return RESOURCES, "works", "; ".join(f"{name}: {text}" for name, text in found.items())
