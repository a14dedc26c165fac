# SPDX-License-Identifier: MIT
"""The names of the benchmarks, and what each measures."""

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


def first_line(name: str) -> str:
    """Return the first line of a benchmark's docstring, without importing the benchmark."""
    spec = find_spec(f"benchmarks.{name}")
    assert spec is not None
    docstring = ast.get_docstring(ast.parse(Path(str(spec.origin)).read_text("utf-8"))) or ""
    return docstring.partition("\n")[0].partition(": ``")[0].rstrip(".:")
