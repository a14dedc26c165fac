# SPDX-License-Identifier: MIT
"""Under torchrun the error of a lesson is what a person sees last, and once."""

import re
import socket
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from commands import MPIRUN, ROOT, TORCHRUN, forked, lesson, needs_mpirun, run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

pytest.importorskip("tyro", reason="tyro reads the flags")

from support import ending

import train_ddp

from torchpar.errors import ConfigError, RankLostError

ERROR = "train_ddp.py: error: --epochs is 0, expected at least 1"
LAUNCHED = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


def root_cause(rank: int, file: Path) -> list[str]:
    """The last lines of torchrun's report of ``rank``, after which it has ended the other rank."""
    ended = ProcessFailure(1 - rank, 10, -15, "none")
    failures = {rank: ProcessFailure(rank, 11, 2, str(file)), 1 - rank: ended}
    report = str(ChildFailedError("train_ddp.py", dict(sorted(failures.items()))))
    root = report.rpartition("Root Cause")[2].partition("traceback : ")[2]
    *said, border = root.strip().splitlines()
    assert set(border) == {"="}
    return said


@pytest.mark.parametrize("rank", [0, 1])
def test_the_last_lines_of_torchruns_report_are_the_error(tmp_path, monkeypatch, rank):
    file = tmp_path / "error.json"
    for name, value in (
        LAUNCHED | {"RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(file)}
    ).items():
        monkeypatch.setenv(name, value)
    assert lesson("train_ddp", "--epochs", "0") == (2, "", "")
    assert root_cause(rank, file) == [ERROR]
    assert lesson("train_ddp", "--epoch", "3") == (2, "", "")
    _, _, first, *_, last = root_cause(rank, file)
    assert "Unrecognized options: --epoch" in first
    assert "For full helptext" in last


@pytest.mark.parametrize(
    "error, waits",
    [
        (ConfigError("the ranks' flags differ"), True),
        (RankLostError("rank 1 does not answer", [1]), True),
        (RankLostError("rank 0 does not answer", [0]), False),
        (MemoryError(), False),
        (torch.OutOfMemoryError(), False),
        (OSError(28, "no space"), False),
    ],
)
def test_another_rank_waits_with_an_error_that_rank_0_has_too(monkeypatch, error, waits):
    for name, value in (LAUNCHED | {"RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    slept: list[float] = []
    monkeypatch.setattr(ending.time, "sleep", slept.append)
    monkeypatch.setattr(train_ddp, "main", Mock(side_effect=error))
    code, _, err = lesson("train_ddp")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("train_ddp.py: error: ")
    assert len(slept) == waits


def test_a_rank_speaks_itself_where_torchrun_starts_the_ranks_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert lesson("train_ddp", "--epochs", "0") == (2, "", f"{ERROR}\n")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    assert lesson("train_ddp", "--epochs", "0") == (2, "", "")


@pytest.mark.parametrize("rank_0_waits", [True, False])
def test_under_mpirun_a_rank_is_silent_unless_rank_0_waits_for_it(monkeypatch, rank_0_waits):
    """Where rank 0 does not wait, its flags are wrong, too."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        places = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
        for name, value in (places | {"MASTER_PORT": str(server.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        if not rank_0_waits:
            server.close()
        expected = f"{ERROR}\n" if rank_0_waits else ""
        assert lesson("train_ddp", "--epochs", "0") == (2, "", expected)


@pytest.mark.slow
@needs_mpirun
def test_mpirun_says_it_once():
    script = str(ROOT / "examples" / "train_ddp.py")
    code, out, err = run(MPIRUN, "-n", "2", sys.executable, script, "--epochz=3")
    assert code == 2
    assert (out + err).count("--epochz") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, flags, line",
    [
        # One of each kind of error: other wrong flags and other lessons are tried in this process.
        ("train_ddp", "--epoch 3", "Unrecognized options: --epoch"),
        ("train_parallel", "--tp 3", "train_parallel.py: error: dp"),
        ("train_mpi", "", "train_mpi.py: error: torchrun started 2 of these processes"),
        ("train_lightning", "fit --data.root /nonexistent", "train_lightning.py: error: /nonexist"),
        ("train_lightning", "fit --no_such 1", "error: "),
    ],
)
def test_torchrun_says_it_once_and_last(fork_server, name, flags, line):
    if name == "train_lightning":
        pytest.importorskip("lightning", reason="lightning is not installed")
    code, out, err = forked(*TORCHRUN[1:], str(ROOT / "examples" / f"{name}.py"), *flags.split())
    assert code == 1
    assert (out + err).count(line) == 1, out + err
    *_, report = err.partition("Root Cause")
    assert line in report
    assert re.search(r"\n=+\s*$", report[report.index(line) :])
