# SPDX-License-Identifier: MIT
"""Filters of the warnings of other packages, which are shown, while all others are errors.

An interpreter is as little ours as a processor: what other packages say of it, or of each other,
must not fail a stranger's tests. A warning belongs to the module of the line that it names. Code
that is neither installed nor Python's own, such as a script that a test writes, counts as ours.
CI sets ``FOREIGN_WARNINGS=error``, and then all warnings are errors.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = {"site-packages", "dist-packages"}  # one of them holds what is installed
ARE_ERRORS = os.environ.get("FOREIGN_WARNINGS") == "error"
# torchpar raises these at the line that calls it, which can be another package's. `test_warnings`
# compares the list with the code.
RAISED = (
    r".+ outside of torchpar\.exact\.mode\(\) has an operand that was computed in it",
    r"\d+ calls of a step were not captured",
    r"the step was captured \d+ times",
    r"The CUDA Graph is empty",
    r".+ has no formula, and stays one operator in the export to ONNX",
)


def filters(own_folders: Sequence[Path]) -> list[str]:
    """Lines for pytest's ``filterwarnings``, to stand after "error". Later lines have priority.

    Modules in ``own_folders`` are ours, and so is torchpar where it is installed.
    """
    if ARE_ERRORS:
        return []
    return [
        f"default:::{foreign_modules(own_folders)}",
        # What pytest says is of our tests, and what it calls old is of its plugins.
        "error::pytest.PytestWarning",
        "default::pytest.PytestDeprecationWarning",
        *(f"error:{message}" for message in RAISED),
    ]


def foreign_modules(own_folders: Sequence[Path]) -> str:
    """A regular expression of the names of all modules that are installed, or Python's own.

    While Python compiles a file, its warnings have the path in place of a name.
    """
    folders = {*foreign_folders(map(Path, sys.path), own_folders)}
    foreign = {*sys.stdlib_module_names, *_modules_in(folders)}
    # The folder kernels is imported as torchpar.kernels; a package of Hugging Face has its name.
    foreign -= {"torchpar", "nogpu", *_modules_in(own_folders)} - {"kernels"}
    names = "|".join(map(re.escape, sorted(foreign)))
    # A colon would end the field.
    paths = "|".join(re.escape(str(folder)).replace(":", ".") for folder in sorted(folders))
    return rf"(({names})(\.|$)|({paths})[/\\])"


def foreign_folders(folders: Iterable[Path], own_folders: Sequence[Path]) -> Iterator[Path]:
    """Those of ``folders`` that hold no code of ours.

    A folder of our tests is ours, also if pytest or PYTHONPATH adds it. One that holds the checkout
    is nobody's. An environment may lie in the checkout.
    """
    for folder in map(Path.resolve, folders):
        is_installed = not INSTALLED.isdisjoint(folder.parts)
        is_ours = folder.is_relative_to(ROOT) and not is_installed
        if not is_ours and not any(own.is_relative_to(folder) for own in (ROOT, *own_folders)):
            yield folder


def _modules_in(folders: Iterable[Path]) -> set[str]:
    """The first parts of the names of the modules in folders of ``sys.path``."""
    entries = (entry for folder in folders if folder.is_dir() for entry in folder.iterdir())
    return {name for entry in entries if (name := entry.name.partition(".")[0]).isidentifier()}
