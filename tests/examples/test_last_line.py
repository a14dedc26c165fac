# SPDX-License-Identifier: MIT
"""Under torchrun the error of a lesson is what a person sees last, and once."""

import re
from pathlib import Path

import pytest
from commands import ROOT, TORCHRUN, lesson, run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

pytest.importorskip("tyro", reason="tyro reads the flags")

ERROR = "train_ddp.py: error: --epochs is 0, expected at least 1"
RANK_0 = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


def report_of_torchrun(file: Path) -> str:
    """What torchrun prints when rank 0 has failed, and it has ended rank 1."""
    failures = {0: ProcessFailure(0, 10, 2, str(file)), 1: ProcessFailure(1, 11, -15, "none")}
    return str(ChildFailedError("train_ddp.py", failures))


@pytest.mark.parametrize(
    "flag, lines",
    [
        (["--epochs", "0"], [ERROR]),
        (["--epoch", "3"], ["Unrecognized options: --epoch", "For full helptext"]),
    ],
)
def test_the_last_lines_of_torchruns_report_are_the_error(tmp_path, monkeypatch, flag, lines):
    file = tmp_path / "error.json"
    for name, value in (RANK_0 | {"TORCHELASTIC_ERROR_FILE": str(file)}).items():
        monkeypatch.setenv(name, value)
    assert lesson("train_ddp", *flag) == (2, "", "")
    root = report_of_torchrun(file).rpartition("Root Cause")[2]
    *said, border = root.partition("traceback : ")[2].strip().splitlines()
    assert set(border) == {"="}
    assert lines[0] in said[0 if len(lines) == 1 else 2]
    assert lines[-1] in said[-1]


@pytest.mark.parametrize("file", ["error.json", "no folder/error.json"])
def test_a_rank_speaks_itself_where_torchrun_would_not(tmp_path, monkeypatch, file):
    """Because it starts the ranks again, or finds no file."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / file))
    restarts = "3" if file == "error.json" else "0"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert lesson("train_ddp", "--epochs", "0") == (2, "", f"{ERROR}\n")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    assert lesson("train_ddp", "--epochs", "0")[2] == ("" if restarts == "3" else f"{ERROR}\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, flags, line",
    [
        ("train_ddp", "--epochs 0", ERROR),
        ("train_ddp", "--epoch 3", "Unrecognized options: --epoch"),
        ("train_parallel", "--tp 3", "train_parallel.py: error: dp"),
        ("train_transformer", "--batch-size 33", "train_transformer.py: error: --batch-size is 33"),
        ("train_mpi", "", "train_mpi.py: error: torchrun started 2 of these processes"),
        ("train_lightning", "fit --data.root /nonexistent", "train_lightning.py: error: /nonexist"),
        ("train_lightning", "fit --no_such 1", "error: "),
    ],
)
def test_torchrun_says_it_once_and_last(name, flags, line):
    if name == "train_lightning":
        pytest.importorskip("lightning", reason="lightning is not installed")
    code, out, err = run(*TORCHRUN, str(ROOT / "examples" / f"{name}.py"), *flags.split())
    assert code == 1
    assert (out + err).count(line) == 1, out + err
    *_, report = err.partition("Root Cause")
    assert line in report
    assert re.search(r"\n=+\s*$", report[report.index(line) :])
