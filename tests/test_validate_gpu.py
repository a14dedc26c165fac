# SPDX-License-Identifier: MIT
"""Rehearsals of benchmarks/validate_gpu.sh on a GPU in name only.

Each stage runs to where it first reaches for the GPU; of tests, all are collected. The interpreter is the one
that runs this, and so are the versions.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import ROOT, import_path

SCRIPT = ROOT / "benchmarks" / "validate_gpu.sh"
END = "the rehearsal ends at the GPU"


class Stage(NamedTuple):
    last: str  # of its lines
    needs: str  # a module without which it fails
    files: str = ""  # those it writes beside the log, which all write


STAGES = {
    "values": Stage("tests collected", "triton", "values.xml"),
    "variants": Stage(END, "rich", "autotune.csv specialized/autotune.csv"),
    "operators": Stage(END, "rich", "operators.csv"),
    "tune": Stage(END, "triton", "cuda-90.json"),
    "anything": Stage("tests collected", "xdist", "anything.xml"),
    "huge": Stage("tests collected", "expecttest", "huge.xml"),
}


def validate(*arguments: str, cwd: Path, gpu: bool = True, **environment: str) -> tuple[int, str]:
    """The exit status of the script, and what it printed."""
    folders = [Path(os.path.relpath(ROOT / "tests" / "rehearsal", cwd))] if gpu else []
    path = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": f":{import_path(*folders)}:",
        "CDPATH": str(cwd),
    }
    given = {"TORCHPAR_COMMIT": "abc123", "PYTEST_ADDOPTS": "--collect-only"} | path | environment
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        cwd=cwd,
        env=os.environ | given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "arguments", ["", "out no_stage", "out values tune", "out values\\ variants", "--wheels"]
)
def test_a_wrong_usage_is_refused(tmp_path, arguments):
    status, printed = validate(*shlex.split(arguments), cwd=tmp_path)
    assert status == 2
    assert printed.startswith("usage: ")
    assert all(stage in printed for stage in STAGES)


@pytest.mark.parametrize(
    "gpu, environment, reason",
    [
        (False, {"CUDA_VISIBLE_DEVICES": ""}, "PyTorch finds no CUDA GPU"),
        (True, {"TORCHPAR_COMMIT": "", "GIT_DIR": "/none"}, "TORCHPAR_COMMIT must name the commit"),
    ],
)
def test_there_is_nothing_to_run_on(tmp_path, gpu, environment, reason):
    status, printed = validate("out", cwd=tmp_path, gpu=gpu, **environment)
    *_, why, last = printed.splitlines()
    assert (status, last) == (2, "validate_gpu.sh: there is nothing to run on")
    assert reason in why
    assert files(tmp_path / "out") == set()


def test_a_stage_that_fails_is_named(tmp_path):
    status, printed = validate("out", "tune", cwd=tmp_path, REHEARSAL_STATUS="3")
    assert (status, printed.splitlines()[-1]) == (1, "failed: tune (status 3)"), printed
    assert "commit abc123" in (tmp_path / "out" / "validate.log").read_text()
    assert files(tmp_path / "out") == {"validate.log"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_needs_nothing_of_another(tmp_path, stage):
    """In folders of odd names; without a module that it needs it fails, and says so."""
    folder = tmp_path / "a|b & c"
    folder.mkdir()
    status, printed = validate("o u t", stage, cwd=folder)
    out = folder / "o u t"
    log = (out / "validate.log").read_text()
    assert status == 0, log
    assert printed.splitlines()[-1] == f"passed: {stage}"
    assert STAGES[stage].last in printed.splitlines()[0]
    assert {"validate.log"} <= files(out) <= {"validate.log", *STAGES[stage].files.split()}
    if STAGES[stage].files.endswith(".xml"):
        assert "commit abc123" in (out / f"{stage}.xml").read_text()
        (collected,) = re.findall(r"^(\d+)(?:/\d+)? tests collected", log, re.MULTILINE)
        assert int(collected) >= {"values": 500, "anything": 4, "huge": 7}[stage]
    status, printed = validate("o u t", stage, cwd=folder, REHEARSAL_BLOCKED=STAGES[stage].needs)
    assert status == 1
    assert STAGES[stage].needs in printed.splitlines()[0]
    assert printed.splitlines()[-1] == f"failed: {stage} (status 1)"
