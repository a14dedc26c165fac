# SPDX-License-Identifier: MIT
"""Measurements: one timer (`timing`), one result and one table (`results`), one record of each
operator (`records`). A benchmark is a file, or a folder of those that serve its table."""

import ast
from importlib.util import find_spec
from pathlib import Path

# The module of each benchmark, by its name.
MODULES = {
    "operators": "operators",
    "autotune": "autotune",
    "calls": "calls",
    "products": "products",
    "ddp": "ddp.lessons",
    "muon": "muon.steps",
    "exact": "exact",
    "optimizers": "optimizers",
    "train": "train",
    "speedrun": "speedrun",
    "scaling": "scaling",
    "ptx": "ptx.speed",
    "ladder": "ladder.rungs",
    "host": "host.callers",
}
NAMES = tuple(MODULES)


def module_of(name: str) -> str:
    """The module that runs a benchmark."""
    return f"{__name__}.{MODULES[name]}"


def title(name: str) -> str:
    """The first line of a benchmark's docstring, without an import of the benchmark."""
    spec = find_spec(module_of(name))
    assert spec is not None
    docstring = ast.get_docstring(ast.parse(Path(str(spec.origin)).read_text("utf-8"))) or ""
    return docstring.partition("\n")[0].partition(": ``")[0].rstrip(".:")
