# SPDX-License-Identifier: MIT
"""Measurements: one timer (`timing`), one result and one table (`results`), one record of each
operator (`records`). A benchmark is a file, or a folder of those that serve its table."""

import ast
from importlib.util import find_spec
from pathlib import Path

NAMES = (
    "operators",
    "autotune",
    "calls",
    "products",
    "ddp",
    "muon",
    "optimizers",
    "train",
    "speedrun",
    "scaling",
    "ptx",
    "ladder",
    "host",
)


def module_of(name: str) -> str:
    """The module that runs a benchmark."""
    return "benchmarks.ladder.rungs" if name == "ladder" else f"benchmarks.{name}"


def first_line(name: str) -> str:
    """Return the first line of a benchmark's docstring, without importing the benchmark."""
    spec = find_spec(module_of(name))
    assert spec is not None
    docstring = ast.get_docstring(ast.parse(Path(str(spec.origin)).read_text("utf-8"))) or ""
    return docstring.partition("\n")[0].partition(": ``")[0].rstrip(".:")
