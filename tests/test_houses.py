# SPDX-License-Identifier: MIT
"""torchpar beside nogpu: the old command names the new one, and what needs nogpu says so."""

import ast
import inspect
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

from support import drawing

import pytest
import torch

import nogpu
import torchpar
from benchmarks import driver
from nogpu import console as nogpu_console
from nogpu import decorating as nogpu_decorating
from nogpu.check import compare as nogpu_compare
from nogpu.check import rows
from nogpu.report import drawing as nogpu_drawing
from torchpar import console, decorating, errors, optional
from torchpar.ops import _operator
from torchpar.testing import check_operator, doctor
from torchpar.testing.operators import compare, kernel_rules

ROOT = Path(__file__).parents[1]
FOLDER = SimpleNamespace(
    origin=None
)  # the folder nogpu of a checkout, where nogpu is not installed


def test_the_old_command_names_the_new_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torchpar", "ptx", "script.py"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("torchpar", run_name="__main__")
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "run python -m nogpu SCRIPT" in err


def test_no_message_installs_nogpu_from_an_index():
    """It is not on PyPI, where anybody may take its name."""
    sources = [
        path
        for room in ("torchpar", "benchmarks", "examples")
        for path in sorted((ROOT / room).rglob("*.py"))
    ]
    assert len(sources) > 100
    plain = re.compile(r"pip install ['\"]?nogpu\b")
    assert [path for path in sources if plain.search(path.read_text("utf-8"))] == []
    assert plain.search("pip install nogpu")
    assert not plain.search("pip install ./nogpu")


@pytest.mark.parametrize("spec", [None, FOLDER])
def test_what_needs_nogpu_says_so_where_it_is_missing(spec):
    with patch.object(optional, "find_spec", lambda name: spec):
        assert not optional.has_nogpu()
        with pytest.raises(
            errors.ConfigError, match=r"^--all needs nogpu; in a checkout, pip install \./nogpu$"
        ):
            optional.import_nogpu("--all")
        x = torch.ones(2)
        with pytest.raises(errors.ConfigError, match="emulate='sm_90' needs nogpu"):
            check_operator(torch.add, [(x, x)], rules="races", emulate="sm_90")
        assert [one.state for one in doctor.emulator()] == ["note"]
    assert optional.has_nogpu()


def test_a_folder_of_the_name_emulates_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "nogpu", SimpleNamespace())
    assert not _operator.is_emulating()
    assert torchpar.maximum(torch.ones(2), torch.zeros(2)).tolist() == [1.0, 1.0]


def test_the_rows_of_kernels_are_those_of_nogpu():
    assert (*rows.FAULT_ROWS, rows.OTHERS, rows.RESOURCES) == kernel_rules.FOUND


@pytest.mark.parametrize("is_there", [True, False])
def test_benchmarks_launch_kernels_for_cpu_tensors_without_nogpu(is_there, monkeypatch):
    if not is_there:
        monkeypatch.delitem(sys.modules, "nogpu")
    before = sys.modules.get("nogpu")
    with driver.gpu_of_cpu_tensors():
        assert _operator.is_emulating()
    assert sys.modules.get("nogpu") is before
    assert not _operator.is_emulating()


# CUDA C++ is launched by a module, which is imported where it is used.
OF_CUDA = {"nogpu.cuda", "nogpu.cuda.load", "nogpu.cuda.compile", "nogpu.cpp.nvrtc.CompileError"}


def inner_names(text: str) -> Iterator[str]:
    """Yield what a program imports or takes of nogpu that is no public name."""
    if "nogpu" not in text:
        return
    public = {"nogpu", *(f"nogpu.{name}" for name in nogpu.__all__)} | OF_CUDA
    for node in ast.walk(ast.parse(text)):
        named: list[str] = []
        if isinstance(node, ast.Import):
            named = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = [f"{node.module}.{one.name}" for one in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            named = [f"{node.value.id}.{node.attr}"]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            named = [str(one.value) for one in node.args if isinstance(one, ast.Constant)]
        yield from (one for one in named if one.split(".")[0] == "nogpu" and one not in public)


@pytest.mark.parametrize("house", ["torchpar", "kernels", "benchmarks", "examples"])
def test_torchpar_takes_public_names_of_nogpu_alone(house):
    files = list((ROOT / house).rglob("*.py"))
    found = {str(file): list(inner_names(file.read_text("utf-8"))) for file in files}
    assert files
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "text",
    [
        "from nogpu.check.rows import fault_rows",
        "from nogpu import triton",
        "import nogpu.native.core as core",
        "if later:\n    from nogpu.record.time import estimate",
        "nogpu.machine.gpu.Gpu",
        "importlib.import_module('nogpu.native')",
    ],
)
def test_an_inner_name_of_nogpu_is_found(text):
    assert list(inner_names(text))
    assert not list(inner_names("import nogpu\nfrom nogpu import emulate\nnogpu.estimate"))


# Neither house needs the other, so that each has these. One that is mended is mended in both.
COPIES = [
    (nogpu_console, console, "in_columns breaking_silence stop_printing can_print"),
    (nogpu_decorating, decorating, "_kind_of_function _ContextManager context_manager"),
    (nogpu_compare, compare, "_longest_repeat _errors farthest likely_cause"),
    (nogpu_drawing, drawing, "Drawing"),
]


def source(module: ModuleType, name: str) -> str:
    """The text of a function or a class, without the name of its house."""
    text = inspect.getsource(getattr(module, name))
    return text.replace("nogpu", "HOUSE").replace("torchpar", "HOUSE")


@pytest.mark.parametrize(
    "ours, theirs, name",
    [(ours, theirs, name) for ours, theirs, names in COPIES for name in names.split()],
)
def test_what_both_houses_have_is_the_same(ours, theirs, name):
    assert source(ours, name) == source(theirs, name)


# The page that plays a recording, whole: its code and its template.
@pytest.mark.parametrize("name", ["replay_page.py", "replay_page.html"])
def test_both_houses_have_the_same_player(name):
    ours = ROOT / "torchpar" / "training" / "profile" / name
    theirs = ROOT / "nogpu" / "src" / "nogpu" / "report" / name
    assert ours.read_bytes() == theirs.read_bytes()


def test_copies_that_differ_are_noticed():
    assert source(nogpu_console, "printing") != source(console, "printing")  # with another remedy
