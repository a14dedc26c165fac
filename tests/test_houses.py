# SPDX-License-Identifier: MIT
"""torchpar beside nogpu: the old command names the new one, and what needs nogpu says so."""

import runpy
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import torchpar
from benchmarks import driver
from nogpu.check import rows
from torchpar import errors, optional
from torchpar.ops import _operator
from torchpar.testing import check_operator, doctor
from torchpar.testing.operators import kernel_rules

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


@pytest.mark.parametrize("spec", [None, FOLDER])
def test_what_needs_nogpu_says_so_where_it_is_missing(spec):
    with patch.object(optional, "find_spec", lambda name: spec):
        assert not optional.has_nogpu()
        with pytest.raises(errors.ConfigError, match=r"^--all needs nogpu; pip install nogpu$"):
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
