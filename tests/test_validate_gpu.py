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
import time
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import NamedTuple
from zipfile import Path as ZipPath

import pytest
from commands import ROOT, import_path

SCRIPT = ROOT / "benchmarks" / "validate_gpu.sh"
END = "the rehearsal ends at the GPU"


class Stage(NamedTuple):
    last: str  # of its lines
    needs: str  # the modules without which it fails
    files: str = ""  # those it writes beside the log, which all write


STAGES = {
    "values": Stage(
        "tests collected", "execnet expecttest hypothesis pytest sortedcontainers triton xdist", "values.xml"
    ),
    "variants": Stage(END, "rich triton", "autotune.csv specialized/autotune.csv"),
    "operators": Stage(END, "rich", "operators.csv"),
    "tune": Stage(END, "triton", "cuda-90.json"),
    "anything": Stage("tests collected", "xdist", "anything.xml"),
    "huge": Stage("tests collected", "expecttest", "huge.xml"),
}


def validate(
    *arguments: str | Path, cwd: Path, gpu: bool = True, wait: str = "", **environment: str
) -> tuple[int, str]:
    """The exit status of the script, and what it printed. ``wait`` is what runs instead of a module."""
    tools = cwd / "tools"
    tools.mkdir(exist_ok=True)
    if wait:
        (tools / "python3").write_text(f'#!/bin/sh\n[ $1 != -m ] && exec {sys.executable} "$@"\n{wait}\n')
        (tools / "python3").chmod(0o755)
    folders = [Path(os.path.relpath(ROOT / "tests" / "rehearsal", cwd))] if gpu else []
    path = {
        "PATH": f"{tools}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": import_path(*folders),
    }
    given = {"TORCHPAR_COMMIT": "abc123", "PYTEST_ADDOPTS": "--collect-only"} | path | environment
    done = subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
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
    "arguments", ["", "out no_stage", "out values tune", "out values\\ variants", "--wheels", "--quick"]
)
def test_a_wrong_usage_is_refused(tmp_path, arguments):
    status, printed = validate(*shlex.split(arguments), cwd=tmp_path)
    assert status == 2
    assert printed.startswith("usage: ")
    assert f"[{'|'.join(STAGES)}]" in printed


@pytest.mark.parametrize(
    "gpu, environment, reason",
    [
        (False, {"CUDA_VISIBLE_DEVICES": ""}, "PyTorch finds no CUDA GPU"),
        (True, {"REHEARSAL_BLOCKED": "torch"}, "torch"),
        (True, {"TORCHPAR_COMMIT": "", "GIT_DIR": "/none"}, "TORCHPAR_COMMIT must name the commit"),
    ],
)
def test_there_is_nothing_to_run_on(tmp_path, gpu, environment, reason):
    status, printed = validate("out", cwd=tmp_path, gpu=gpu, **environment)
    *_, why, last = printed.splitlines()
    assert (status, last) == (2, "validate_gpu.sh: there is nothing to run on")
    assert reason in why
    assert files(tmp_path / "out") == set()


def test_all_stages_write_eight_files_at_most():
    assert 1 + sum(len(stage.files.split()) for stage in STAGES.values()) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_needs_nothing_of_another(tmp_path, stage):
    status, printed = validate("out", stage, cwd=tmp_path)
    log = (tmp_path / "out" / "validate.log").read_text()
    assert status == 0, log
    assert printed.splitlines()[-1] == f"passed: {stage}"
    assert STAGES[stage].last in printed.splitlines()[0]
    assert "commit abc123" in log
    assert {"validate.log"} <= files(tmp_path / "out") <= {"validate.log", *STAGES[stage].files.split()}
    if STAGES[stage].files.endswith(".xml"):
        assert "commit abc123" in (tmp_path / "out" / f"{stage}.xml").read_text()
        (collected,) = re.findall(r"^(\d+)(?:/\d+)? tests collected", log, re.MULTILINE)
        assert int(collected) >= {"values": 1500, "anything": 4, "huge": 7}[stage]
        assert "no tests" not in log


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["values", "tune"])
def test_a_stage_that_fails_is_named(tmp_path, stage):
    status, printed = validate(
        "out", stage, cwd=tmp_path, REHEARSAL_STATUS="3", PYTEST_ADDOPTS="--collect-only --no-such-flag"
    )
    assert status == 1
    assert printed.splitlines()[-1] in (f"failed: {stage} (status 3)", f"failed: {stage} (status 4)")


@pytest.mark.slow
def test_odd_folders(tmp_path):
    folder = tmp_path / "a|b & c"
    folder.mkdir()
    path = f"::{os.path.relpath(ROOT / 'tests' / 'rehearsal', folder)}:"
    status, printed = validate("o u t", "operators", cwd=folder, PYTHONPATH=path, CDPATH=str(folder))
    assert status == 0, printed
    assert files(folder / "o u t") == {"validate.log"}


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["INT", "TERM"])
def test_a_signal_ends_the_script_and_its_stage(tmp_path, sent):
    """The command of the stage sends it to the script, two levels above, and then takes a minute."""
    start = time.monotonic()
    wait = f"ps -o ppid= -p $PPID | xargs kill -s {sent}; exec sleep 60"
    status, printed = validate("out", "tune", cwd=tmp_path, wait=wait)
    assert status == 130, printed
    assert time.monotonic() - start < 50


@pytest.mark.slow
@pytest.mark.parametrize("stage, module", [(name, stage.needs.split()[-1]) for name, stage in STAGES.items()])
def test_a_missing_module_fails_the_stage(tmp_path, stage, module):
    status, printed = validate("out", stage, cwd=tmp_path, REHEARSAL_BLOCKED=module)
    assert status == 1
    assert module in printed.splitlines()[0]
    assert printed.splitlines()[-1] == f"failed: {stage} (status 1)"


@pytest.mark.slow
def test_the_wheels_are_complete(tmp_path):
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    status, printed = validate("--wheels", "wheels", cwd=tmp_path)
    if status:
        pytest.skip(f"there is no package index: {printed.splitlines()[-1]}")
    target = {"python_version": "3.12", "python_full_version": "3.12.1", "sys_platform": "linux", "extra": ""}
    there, needed = set(), set()
    for wheel in (tmp_path / "wheels").iterdir():
        (info,) = (path for path in ZipPath(wheel).iterdir() if path.name.endswith(".dist-info"))
        metadata = PathDistribution(info)
        there.add(canonicalize_name(metadata.name))
        requirements = map(Requirement, metadata.requires or [])
        needed |= {
            canonicalize_name(r.name) for r in requirements if not r.marker or r.marker.evaluate(target)
        }
    assert needed <= there
    assert there >= {"pytest", "pytest-xdist", "hypothesis", "expecttest", "rich", "tyro"}
    assert shlex.split(printed.splitlines()[-1])[:4] == ["python3", "-m", "pip", "install"]
