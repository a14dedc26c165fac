# SPDX-License-Identifier: MIT
"""Modules that moved: their old names work, with a DeprecationWarning at the line that imports."""

import importlib
import sys
from pathlib import Path

import pytest

import torchpar

MOVED_PARTS = [name.split(".") for name in torchpar.MOVED]


@pytest.mark.parametrize("old", torchpar.MOVED)
def test_an_old_name_is_that_of_the_new_module(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    new = importlib.import_module(torchpar.MOVED[old])
    # A module's package warns, too.
    with pytest.warns(DeprecationWarning, match="^torchpar.* is now ") as found:
        moved = importlib.import_module(old)
    assert f"{old} is now {new.__name__}; " in "".join(str(one.message) for one in found)
    own = {name: value for name, value in vars(new).items() if not name.startswith("__")}
    assert {name: vars(moved)[name] for name in own} == own


def test_a_module_within_a_moved_package_is_the_same_and_the_warning_names_the_line():
    for name in [name for name in sys.modules if name.startswith("torchpar.profile")]:
        del sys.modules[name]
    with pytest.warns(DeprecationWarning, match="^torchpar.profile.* is now ") as found:
        from torchpar.profile.phases import Phases
    from torchpar.training.profile import phases

    assert Phases is phases.Phases
    assert {Path(one.filename).name for one in found} == {"test_moved.py"}


def test_a_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"torchpar\.nothing"):
        importlib.import_module("torchpar.nothing")


def test_all_modules_of_the_root_of_0_4_can_be_imported():
    """Those that stayed, and those that moved; each has the name that it is known for."""
    known = {
        "data": "Samples",
        "datasets": "read",
        "doctor": "Finding",
        "drawing": "Drawing",
        "errors": "ConfigError",
        "explain": "main",
        "machine": "describe",
        "nn": "MLP",
        "outcome": "EpochResult",
        "parts": "part_of",
        "processes": "end_with_parent",
        "profile.memory": "Memory",
        "profile.phases": "Phases",
        "rank_info": "find_rank_info",
        "reference": "orthogonalize",
        "tables": "in_columns",
        "verify.command": "EXPECTED",
        "verify.models": "MLP_STEPS",
    }
    for name in [name for name in sys.modules if name.split(".")[:2] in MOVED_PARTS]:
        del sys.modules[name]
    with pytest.warns(DeprecationWarning, match="version 0.6 removes the old name$"):
        modules = [importlib.import_module(f"torchpar.{module}") for module in known]
    for module, name in zip(modules, known.values(), strict=True):
        assert hasattr(module, name), f"{module.__name__} lacks {name}"
