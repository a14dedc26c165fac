# SPDX-License-Identifier: MIT
"""The doctor finds what works, and names a remedy for what does not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import torchpar
from torchpar import doctor
from torchpar.doctor import Finding

ROOT = Path(__file__).parents[1]
OPERATORS = {"maximum", "matmul_t", "symmetric_matmul", "linear_sigmoid", "exact_matmul", "exact_matmul_t"}


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torchpar", "doctor", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def of(findings: list[Finding], name: str) -> Finding:
    (found,) = (finding for finding in findings if finding.name == name)
    return found


def test_this_machine_is_well():
    """Also: these versions are among those that it calls tested."""
    process = run()
    assert (process.returncode, process.stderr) == (0, ""), process
    *_, last = process.stdout.splitlines()
    assert last.startswith("problems: 0, notes: ")
    assert "not tested" not in process.stdout
    for name in OPERATORS:
        assert f"{name}, cpu " in process.stdout


def test_json_has_the_same_findings():
    process = run("--json", GLOO_SOCKET_IFNAME="none")
    findings = [Finding(**one) for one in json.loads(process.stdout)]
    assert process.returncode == 1
    gloo = of(findings, "gloo")
    assert (gloo.state, gloo.remedy) == ("problem", "unset GLOO_SOCKET_IFNAME, which names no interface")
    assert [finding.name for finding in findings if finding.state == "problem"] == ["gloo"]


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_a_wrong_operator_is_found(name):
    right = getattr(torchpar, name)
    with patch.object(torchpar, name, lambda *operands: right(*operands) + 1e-3):
        states = {finding.name: finding.state for finding in doctor.operators()}
    assert [operator for operator, state in states.items() if state == "problem"] == [f"{name}, cpu"]


def test_a_hidden_package_is_named_with_its_extra():
    with patch("importlib.util.find_spec", lambda name: None if name in ("numba", "triton") else name):
        with patch.object(doctor, "EXTRAS", {"baselines": ("numba", "numpy")}):
            (extra,) = doctor.extras()
        triton = of(list(doctor.kernels()), "Triton")
    assert (extra.state, extra.value) == ("note", "without numba")
    assert extra.remedy == "pip install 'torchpar[baselines]'"
    assert (triton.state, triton.remedy) == ("note", "pip install triton")


@pytest.mark.parametrize("compiler, state", [(sys.executable, "ok"), ("/nonexistent/g++", "note")])
def test_a_missing_cpp_compiler_is_noted(monkeypatch, compiler, state):
    monkeypatch.setenv("CXX", compiler)
    found = of(list(doctor.processor()), "C++ compiler")
    assert found.state == state
    assert bool(found.remedy) == (state == "note")


def test_too_many_threads_are_a_problem():
    with patch.object(torch, "get_num_threads", lambda: 1000):
        threads = of(list(doctor.processor()), "threads")
    assert threads.state == "problem"
    assert threads.remedy.startswith("export OMP_NUM_THREADS=")


@pytest.mark.parametrize("text", ["2.10.1", "2.99.0+cu132", "3.0"])
def test_a_version_that_was_not_tested_is_named(text):
    with patch.object(torch, "__version__", text):
        found = of(list(doctor.versions()), "torch")
    assert (found.state, found.value) == ("note", f"{text}, not tested")


def test_a_folder_that_cannot_be_written_or_is_full_is_named():
    folder = Path("/there/is/no/such")
    with patch.object(os, "access", lambda *_: False):
        closed = doctor._folder("cache", folder, 0, "export IT")
    assert (closed.value, closed.remedy) == ("/there/is/no/such cannot be written", "export IT")
    assert doctor._folder("cache", folder, 2**80, "export IT").state == "note"
    assert doctor._folder("cache", folder, 0, "export IT").state == "ok"


def test_an_examination_that_fails_is_a_problem(capsys):
    def folders():
        raise OSError("no home\nin sight")

    with patch.object(doctor, "folders", folders):
        assert doctor.main([]) == 1
    assert "! examination" in capsys.readouterr().out
    with patch.object(doctor, "folders", folders):
        (failed,) = (finding for finding in doctor.examine() if finding.state == "problem")
    assert (failed.area, failed.value) == ("folders", "OSError: no home")
