# SPDX-License-Identifier: MIT
"""Tables of the fastest tiles, which `python -m torchpar tune` measures for a device:

    {"device": "NVIDIA H200", "triton": "3.9.0", "torch": "2.15.0", "kernels": "9f2c…", "date": "2026-11-20",
     "tiles": {"symmetric_product": {"bfloat16": [
         [4096, 4096, 4096, 1, [128, 256, 64, 8, 4, "tma"]], [256, 256, 256, 1, null]]}}}

A problem is ``[m, n, k, batch, tiles]``. `KINDS` names its operands. ``null`` means that PyTorch's library
was faster. Tables lie in ``tuned/`` beside this file, named after the device. A table in the user's cache
(`folders.user_folder`) has priority.
"""

import json
from functools import cache, lru_cache
from math import log2
from pathlib import Path
from typing import Any

from . import folders
from .candidates import KERNELS, KINDS, Device, Tiles, configurations
from .launch import forget_plans

FAR = 6.0  # octaves from a measured problem, over all sizes; such as a fourth of m, n and k
_Entry = tuple[tuple[int, ...], Tiles | None]  # m, n, k and batch, and their tiles


@lru_cache(4096)
def nearest(present: Device, kernel: str, kind: str, sizes: tuple[int, ...]) -> _Entry | None:
    """The problem of the device's table that is nearest to ``sizes``, if it is no farther than `FAR`."""

    def distance(entry: _Entry) -> float:
        return sum(abs(log2(max(a, 1) / b)) for a, b in zip(sizes, entry[0], strict=True))

    entry = min(_table(present).get((kernel, kind), ()), key=distance, default=None)
    return entry if entry and distance(entry) <= FAR else None


def file_name(device_name: str) -> str:
    """The name of a device's table: lower case, with "-" for spaces and slashes."""
    return device_name.lower().replace(" ", "-").replace("/", "-") + ".json"


def load(present: Device) -> dict[str, Any] | None:
    """The table of a device as it was saved, or None; a damaged one gives a warning, and None."""
    hint = "default tiles are used; `python -m torchpar tune` writes a new table"
    found = folders.read(file_name(present.name), lambda table: _parse(table, present), hint)
    return found and found[1]


def save(present: Device, table: dict[str, Any]) -> Path:
    """Write the table of a device as `folders.write` does, and use it from now on; return its path.

    A wrong ``table`` raises a ValueError.
    """
    _parse(table, present)
    path = folders.write(file_name(present.name), json.dumps(table, indent=1) + "\n")
    forget_tables()
    return path


def forget_tables() -> None:
    """Read the tables again when tiles are chosen next."""
    _table.cache_clear()
    nearest.cache_clear()
    forget_plans()


@cache
def _table(present: Device) -> dict[tuple[str, str], list[_Entry]]:
    table = load(present)
    return _parse(table, present) if table else {}


def _parse(table: Any, present: Device) -> dict[tuple[str, str], list[_Entry]]:
    """The entries of a table; a ValueError says what is wrong with it."""
    parsed: dict[tuple[str, str], list[_Entry]] = {}
    try:
        if table["device"] != present.name:
            raise ValueError(f"the table is of {table['device']!r}, expected {present.name!r}")
        for kernel, kinds in table["tiles"].items():
            for kind, entries in kinds.items():
                if kernel not in KERNELS or kind not in KINDS:
                    raise ValueError(f"{kernel} of {kind} is not among {', '.join((*KERNELS, *KINDS))}")
                possible = (None, *configurations(kernel, *KINDS[kind][:2], present.capability))
                for entry in entries:
                    sizes, tiles = tuple(entry[:4]), None if entry[4] is None else Tiles(*entry[4])
                    known = all(type(size) is int and 0 < size < 2**63 for size in sizes)
                    if not known or tiles not in possible:
                        expected = "four sizes above 0 and a configuration of this device"
                        raise ValueError(f"{kernel}, {kind}: {entry}, expected {expected}")
                    tiles = possible[possible.index(tiles)]  # 64, where the file has 64.0
                    parsed.setdefault((kernel, kind), []).append((sizes, tiles))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"not the layout of a table ({type(error).__name__}: {error})") from error
    return parsed
