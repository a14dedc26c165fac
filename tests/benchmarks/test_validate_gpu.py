# SPDX-License-Identifier: MIT
"""Rehearsals of benchmarks/validate_gpu.sh on a GPU in name only.

Each stage runs to where it first reaches for the GPU; of tests, all are collected. The interpreter
is the one that runs this, and so are the versions.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from commands import ROOT, import_path

SCRIPT = ROOT / "benchmarks" / "validate_gpu.sh"
# Each stage, and how many tests it collects at least.
FIRST = ("verify", "host", "rule", "muon", "graphs", "captures", "counters")
THEN = ("compiled_steps", "ladder", "matmul_t", "linear_sigmoid", "operators")
LATER = ("autotune", "autotune_float32", "max_autotune")
STAGES = {
    **{"compile": 0, "values": 500, "by_cpp": 120},
    **dict.fromkeys(FIRST, 0),
    **{"cuda_cpp": 10, "exact": 10},
    **dict.fromkeys(THEN + LATER, 0),
    "huge": 4,
}
IN_EIGHT_MINUTES = [*STAGES][: [*STAGES].index("compiled_steps")]


def validate(*arguments: str, cwd: Path, gpu: bool = True, **environment: str) -> tuple[int, str]:
    folders = [Path(os.path.relpath(ROOT / "tests" / "rehearsal", cwd))] if gpu else []
    path = {
        "PATH": f"{Path(sys.executable).parent}:{ROOT}/tests/rehearsal:/usr/bin:/bin",
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


@pytest.mark.parametrize(
    "arguments", ["", "out no_stage", "out values no_stage", "out values\\ huge", "--wheels"]
)
def test_a_wrong_usage_is_refused(tmp_path, arguments):
    status, printed = validate(*shlex.split(arguments), cwd=tmp_path)
    assert status == 2
    expected = f"OUTDIR [STAGE ...] | --wheels DIR; STAGE: {' '.join(STAGES)} nccl"
    assert printed == f"usage: bash benchmarks/validate_gpu.sh {expected}\n"


def test_the_first_stages_take_eight_minutes_at_most():
    (given,) = re.findall(r"declare -A limits=\(([^)]*)\)", SCRIPT.read_text())
    limits = {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", given)}
    assert sum(limits[name] for name in IN_EIGHT_MINUTES) <= 480
    assert limits["nccl"] <= 480


@pytest.mark.slow
def test_ranks_by_nccl_need_two_gpus(tmp_path):
    pytest.importorskip("tyro", reason="the lessons need tyro")
    status, printed = validate("out", "nccl", cwd=tmp_path)
    first, last = printed.splitlines()
    assert (status, last) == (1, "failed: nccl (status 2)")
    assert first.endswith("ranks_on_gpus.py: PyTorch finds 1 GPU, expected 2 or more")


@pytest.mark.slow
def test_ranks_by_nccl_come_to_their_gpus(tmp_path):
    pytest.importorskip("tyro", reason="the lessons need tyro")
    given = {"REHEARSAL_GPUS": "2", "PART": "Muon's exchanges"}
    status, printed = validate("out", "nccl", cwd=tmp_path, **given)
    out = tmp_path / "out"
    row = json.loads((out / "nccl" / "ranks.jsonl").read_text())
    assert row["reason"] == "0 hashes on the GPUs, and 3 on the CPUs", row
    (log,) = (out / "nccl" / "logs").glob("*.gpus.txt")
    assert log.read_text().count("the rehearsal ends at the GPU") == 2
    first, last = printed.splitlines()
    assert first.endswith("1 of 1 parts wrong")
    assert (status, last) == (1, "failed: nccl (status 1)")
    with tarfile.open(out / "validate.tar.gz") as archive:
        assert {"./validate.log", "./nccl/ranks.jsonl"} <= {*archive.getnames()}


@pytest.mark.slow
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
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_stage_that_fails_is_named(tmp_path):
    """Without Triton most tests would be skipped."""
    status, printed = validate("out", "values", cwd=tmp_path, REHEARSAL_BLOCKED="triton")
    first, last = printed.splitlines()
    assert "triton" in first
    assert (status, last) == (1, "failed: values (status 1)")
    assert "commit abc123" in (tmp_path / "out" / "validate.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_needs_nothing_of_another(tmp_path, stage):
    if stage == "graphs":
        pytest.importorskip("tyro", reason="the lessons need tyro")
    folder = tmp_path / "a|b & c"
    folder.mkdir()
    environment = {
        "CASE": "strided33",
        "REHEARSAL_BLOCKED": "nothing" if stage == "graphs" else "tyro",
    }
    if stage != "by_cpp":
        # The stage's limit is for a GPU's machine, which compiles the C++ sooner.
        environment["CXX"] = "no-compiler"
    status, printed = validate("o u t", stage, cwd=folder, **environment)
    out = folder / "o u t"
    log = (out / "validate.log").read_text()
    # What comes to the GPU in a process of its own is missed.
    in_a_rank = {"verify": 2, "host": 2, "graphs": 1, "captures": 1}.get(stage, 0)
    assert status == bool(in_a_rank), log
    lines = printed.splitlines()
    assert len(lines) == 2, printed
    first, last = lines
    assert last == (f"failed: {stage} (status {in_a_rank})" if in_a_rank else f"passed: {stage}")
    if stage == "graphs":  # the lessons come to the GPU, and then a rank of the speedrun does
        assert log.count("the rehearsal ends at the GPU") == 4, log
    elif stage == "host":
        assert "the process that makes the calls has ended" in first
        assert "the rehearsal ends at the GPU" in log
    elif stage == "captures":
        assert re.search(r"\d+ programs, \d+ of them otherwise than emulated", first)
        assert "right, own_kernel: ended with status 0" in log
    elif stage == "counters":
        assert "the rehearsal ends at the GPU" in log
        assert '"case": "strided33"' in (out / stage / "emulated.jsonl").read_text()
    elif in_a_rank:
        assert (
            "the rehearsal ends at the GPU\npython -m torchpar verify: error: a rank was killed"
            in log
        )
    elif stage == "compile":
        assert " kernels compiled by " in first
        assert ", 0 failed" in first
    elif not STAGES[stage]:
        assert "the rehearsal ends at the GPU" in first
    else:
        assert "commit abc123" in (out / f"{stage}.xml").read_text()
        (collected,) = re.findall(r"^(\d+)(?:/\d+)? tests collected", log, re.MULTILINE)
        assert int(collected) >= STAGES[stage]
