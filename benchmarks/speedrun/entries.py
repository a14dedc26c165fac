# SPDX-License-Identifier: MIT
"""Entries by their names: recipes of this repository, and files."""

import runpy
from collections.abc import Sequence
from functools import cache

from benchmarks.speedrun.recipe import Entry
from benchmarks.speedrun.recipes import GROUPS
from torchpar.errors import ConfigError


def chosen(names: Sequence[str] | None) -> list[str]:
    """The names of the chosen entries and groups of recipes; by default those of the records.

    Raises:
        ConfigError: as `find`; two entries have one name.
    """
    found = []
    for name in names or ["records"]:
        found += [entry.name for entry in GROUPS[name]] if name in GROUPS else [name]
    found = list(dict.fromkeys(found))
    entries = [find(name).name for name in found]
    if twice := sorted({name for name in entries if entries.count(name) > 1}):
        raise ConfigError(f"two entries are called {' and '.join(twice)}; give them other names")
    return found


@cache
def find(name: str) -> Entry:
    """The recipe of this name, or the ``entry`` that a Python file of this name defines.

    Raises:
        ConfigError: there is none.
    """
    known = {entry.name: entry for group in GROUPS.values() for entry in group}
    if name in known:
        return known[name]
    if not name.endswith(".py"):
        expected = ", ".join([*GROUPS, *known])
        raise ConfigError(f"no recipe is called {name!r}, expected a .py file or one of {expected}")
    try:
        defined = runpy.run_path(name)
    except (Exception, SystemExit) as e:
        raise ConfigError(f"{name} cannot be read ({type(e).__name__}: {e})") from e
    if "entry" not in defined:
        raise ConfigError(f"{name} defines no entry; see docs/speedrun.md")
    entry: Entry = defined["entry"]
    if missing := [part for part in ("name", "change", "prepare") if not hasattr(entry, part)]:
        raise ConfigError(f"the entry of {name} has no {' and no '.join(missing)}; see docs/speedrun.md")
    if not (isinstance(entry.name, str) and isinstance(entry.change, str)):
        raise ConfigError(f"the entry of {name} has a name or a change that is no string")
    return entry
