# SPDX-License-Identifier: MIT
"""The ladder of recipes, from the customary script to the records. Each is the one before with a change.

The number of epochs is the least that reaches 98.0% of the last 10,000 training images, on which no recipe
was trained (``--validate``).
"""

import runpy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from benchmarks.speedrun.customary import CustomaryScript
from benchmarks.speedrun.recipe import Entry, Recipe
from torchpar.errors import ConfigError

CUSTOMARY = CustomaryScript(epochs=8)
IN_MEMORY = Recipe(name="in-memory", change="the images are one tensor; no DataLoader", epochs=8)
FORMULAS = replace(IN_MEMORY, name="formulas", change="gradients by formulas, not autograd", fused=True)
DECAY = replace(
    FORMULAS,
    name="falling-rate",
    change="a rate of 0.002 that falls to 0; 5 epochs",
    decay=True,
    lr=0.002,
    epochs=5,
)
MUON = replace(
    DECAY,
    name="muon",
    change="Muon for the weights; batches of 512, 2 epochs",
    optimizer="muon",
    lr=0.1,
    batch_size=512,
    epochs=2,
)
PIXELS = replace(
    MUON, name="pixels", change="11 × 11 pixels: 3 less on each side, then averages of 2 × 2", crop=3, pool=2
)
SMOOTHING = replace(PIXELS, name="smoothing", change="label smoothing of 0.1", smoothing=0.1)
LARGE = replace(
    SMOOTHING,
    name="large-batches",
    change="batches of 1536, a rate of 0.3; 320 units, not 512",
    batch_size=1536,
    lr=0.3,
    hidden=(320,),
)
BFLOAT16 = replace(LARGE, name="bfloat16", change="products in bfloat16", dtype=torch.bfloat16)
RECORD_98 = replace(BFLOAT16, name="record-98.0", change="3 iterations of Newton–Schulz, not 5", ns_steps=3)
RECORD_98_7 = replace(
    RECORD_98,
    name="record-98.7",
    change="6 epochs, each with the images moved by a pixel; 512 units",
    shift=True,
    hidden=(512,),
    epochs=6,
)

RECORDS: list[Entry] = [RECORD_98, RECORD_98_7]
BEFORE: list[Entry] = [CUSTOMARY, IN_MEMORY, FORMULAS, DECAY, MUON, PIXELS, SMOOTHING, LARGE, BFLOAT16]
LADDER = [*BEFORE, *RECORDS]


def names(chosen: Sequence[str] | None) -> list[str]:
    """The names of the chosen recipes, of which "ladder" is all; by default those of the records."""
    found = []
    for name in chosen or [entry.name for entry in RECORDS]:
        found += [entry.name for entry in LADDER] if name == "ladder" else [name]
    for name in found:
        find(name)
    return list(dict.fromkeys(found))


@cache
def find(name: str) -> Entry:
    """The recipe of this name, or the ``entry`` that a Python file of this name defines.

    Raises:
        ConfigError: there is none.
    """
    known = {entry.name: entry for entry in LADDER}
    if name in known:
        return known[name]
    if not name.endswith(".py"):
        raise ConfigError(f"no recipe is called {name!r}, expected ladder, {', '.join(known)} or a .py file")
    try:
        entry: Entry = runpy.run_path(name)["entry"]
    except KeyError:
        raise ConfigError(f"{name} defines no entry; see docs/speedrun.md") from None
    except Exception as e:
        raise ConfigError(f"{name} cannot be read ({type(e).__name__}: {e})") from e
    if missing := [part for part in ("name", "change", "prepare") if not hasattr(entry, part)]:
        raise ConfigError(f"the entry of {name} has no {' and no '.join(missing)}; see docs/speedrun.md")
    return entry
