# SPDX-License-Identifier: MIT
"""The doctor finds what works, and names a remedy for what does not."""

import importlib.util
import json
import runpy
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from operators import OPERATORS

import torchpar
from torchpar import doctor
from torchpar.doctor import Finding

find_spec = importlib.util.find_spec


def hide(*packages: str) -> Any:
    return lambda name: None if name in packages else find_spec(name)


def test_this_machine_is_well(capsys):
    assert doctor.main([]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("problems: 0, notes: ")
    assert not any("not tested" in line for line in lines)
    for name in OPERATORS:
        assert any(f" {name}, cpu " in line and "right, by ATen" in line for line in lines)


def test_json_has_the_findings_and_a_problem_makes_the_status_1(monkeypatch, capsys):
    """Printed for people, a problem is marked, and an arrow leads to its remedy."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none")
    monkeypatch.setattr(sys, "argv", ["torchpar", "doctor", "--json"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("torchpar", run_name="__main__")
    assert ended.value.code == 1
    findings = json.loads(capsys.readouterr().out)
    (gloo,) = (one for one in findings if one["state"] == "problem")
    assert (gloo["name"], gloo["area"]) == ("gloo", "communication")
    assert gloo["remedy"] == "unset GLOO_SOCKET_IFNAME, which names no interface"
    monkeypatch.setattr(doctor, "examine", lambda: iter([Finding(**one) for one in findings]))
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(" ! gloo "))
    assert lines[at + 1].strip() == f"→ {gloo['remedy']}"
    assert [line for line in lines if line.startswith(" !")] == [lines[at]]


@pytest.mark.parametrize(
    "area, name, replaced, by, finding",
    [
        ("extras", "baselines", "importlib.util.find_spec", hide("numba", "mpi4py"),
         ("note", "without numba, mpi4py", "pip install 'torchpar[baselines]'")),
        ("versions", "numpy", "importlib.util.find_spec", hide("numpy"),
         ("problem", "missing; torchpar needs it", "pip install numpy")),
        ("versions", "torch", "torch.__version__", "2.99.0+cu132",
         ("note", "2.99.0+cu132, not tested", "if something fails, take a version from 2.11 to 2.15")),
        ("processor", "threads", "torch.get_num_threads", lambda: 1000,
         ("problem", "1000, on ", "export OMP_NUM_THREADS=")),
        ("communication", "MPI", "shutil.which", lambda name, path: None,
         ("note", "no mpirun", "pip install 'torchpar[baselines]'")),
        ("folders", "Triton's cache", "os.access", lambda *_: False,
         ("note", "/cache cannot be written", "export TRITON_CACHE_DIR=FOLDER")),
        ("folders", "Triton's cache", "shutil.disk_usage", lambda _: SimpleNamespace(free=2**27),
         ("note", "/cache, 0.1 GiB free", "export TRITON_CACHE_DIR=FOLDER")),
    ],
)  # fmt: skip
def test_situations(monkeypatch, area, name, replaced, by, finding):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache")
    with patch(replaced, by):
        (found,) = (one for one in getattr(doctor, area)() if one.name == name)
    state, value, remedy = finding
    assert found.state == state
    assert found.value.startswith(value)
    assert found.remedy.startswith(remedy)


def test_wrong_operators_are_found(monkeypatch):
    for name in OPERATORS:
        right = getattr(torchpar, name)
        monkeypatch.setattr(torchpar, name, lambda *operands, right=right: right(*operands) + 1e-3)
    findings = list(doctor.operators())
    assert {finding.name.partition(",")[0] for finding in findings} == set(OPERATORS)
    assert {finding.state for finding in findings} == {"problem"}


def test_an_examination_that_fails_is_a_problem():
    def folders() -> None:
        raise OSError("no home\nin sight")

    with patch.object(doctor, "folders", folders):
        (failed,) = (finding for finding in doctor.examine() if finding.area == "folders")
    remedy = "please report it, with this output"
    assert failed == Finding("examination", "OSError: no home", "problem", remedy, "folders")
