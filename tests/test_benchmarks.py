# SPDX-License-Identifier: MIT
"""The benchmarks' commands: what they write, print and refuse."""

import csv
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, import_path

pytest.importorskip("rich", reason="rich prints the tables")
from benchmarks import muon, operators
from benchmarks.__main__ import NAMES, main
from benchmarks.command import run
from torchpar.errors import ConfigError

# Columns that each CSV has, and some of its own; True for a benchmark that takes long to start.
COLUMNS = "contestant p20_ms p50_ms p80_ms samples ok reason torch device instruction_sets commit clocks date"
BENCHMARKS = {
    "operators": ("operator mode shape dtype speedup gb_per_s gflop_per_s roofline max_error", False),
    "muon": ("weight distance epoch", False),
    "train": ("network batch samples_per_s", True),
    "speedrun": ("seed seconds accuracy", True),
    "scaling": ("kind batch dp tp threads alpha_s", True),
    "ladder": ("workload note over_pure_python first_s intensity cores", True),
    "host": ("operator n", False),
    "autotune": ("kernel dtype n registers spills shared_memory target", False),
    "scale_model": ("ranks width batch bytes", True),
}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def benchmarks(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``python -m benchmarks`` as a user does."""
    command = [sys.executable, "-m", "benchmarks", *arguments]
    environment = os.environ | {"PYTHONPATH": import_path(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_all_benchmarks_are_listed(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert tuple(line.split()[0] for line in lines[: len(NAMES)]) == NAMES == tuple(BENCHMARKS)
    assert "scale_model  Count what a rank sends in a step on 64 to 4096 ranks" in lines
    assert "benchmarks/results/cpu-" in lines[-1] or torch.cuda.is_available()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * slow) for name, (_, slow) in BENCHMARKS.items()]
)
def test_a_benchmark_runs_and_its_csv_has_the_columns(tmp_path, name):
    own, slow = BENCHMARKS[name]
    flags = ["--quick", f"--output={tmp_path}"]
    if slow:
        done = benchmarks("run", name, *flags, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        flags += ["--kernels=symmetric_product", "--sizes=512"] * (name == "autotune")
        assert importlib.import_module(f"benchmarks.{name}").main(flags) == 0
    (path,) = tmp_path.glob("*.csv")
    rows = rows_of(path)
    assert rows[0].keys() >= {*COLUMNS.split(), *own.split()}
    assert all((row["ok"], row["reason"]) == ("True", "") for row in rows)
    for column in own.split():
        assert any(row[column] for row in rows), f"nothing in {column}"


def test_every_operator_is_measured():
    """An operator that is registered and left out of the benchmark fails here."""
    from torchpar import ops

    registered = {name for name in ops.__all__ if hasattr(torch.ops.torchpar, name)}
    assert {*registered, "linear_sigmoid_backward"} == operators.NATIVE.keys() == operators.OURS.keys()
    assert operators.CPU.keys() >= registered
    assert operators.GPU.keys() == operators.NATIVE.keys()


def test_a_wrong_operator_has_no_speed(monkeypatch, capsys):
    """Addmm leaves the sigmoid out, which is done to its result before that is checked."""
    monkeypatch.setitem(operators.FINISH, "addmm", lambda z: torch.sigmoid(1.01 * z))
    flags = ["--quick", "--device=cpu", "--operators=linear_sigmoid", "--modes=forward"]
    assert operators.main(flags) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("not ok:"))
    assert line.startswith("not ok: addmm linear_sigmoid forward 8x33->5 float32 errors")


def test_another_optimizer_goes_elsewhere(monkeypatch, capsys):
    monkeypatch.setitem(muon.OPTIMIZERS, "torchpar", lambda params: torch.optim.SGD(params, lr=1e-3))
    monkeypatch.setattr(muon, "train", lambda epochs, samples: [])
    assert muon.main(["--quick"]) == 1
    assert "not ok: torchpar 24x64 the weights ended" in capsys.readouterr().out


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ConfigError, match="--output /dev/null/x cannot be made a folder"):
        operators.main(["--output=/dev/null/x"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device is cuda, but PyTorch finds no GPU"):
        operators.main(["--device=cuda"])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == "rich" else find(x))
    with pytest.raises(ConfigError, match="rich not installed; pip install rich"):
        operators.main([])


@pytest.mark.parametrize(
    "error, status, said",
    [(ConfigError("--rounds is 0"), 2, "error: --rounds is 0"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_an_end_is_one_line(monkeypatch, capsys, error, status, said):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks/ladder.py")])
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def fail() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(fail)
    assert ended.value.code == status
    assert capsys.readouterr().err == f"python -m benchmarks run ladder: {said}\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("run muon none --quick", "run muon none --quick: expected first some of operators, muon,"),
        ("run --quick", "run --quick: expected first some of operators, muon,"),
        ("", "no command given"),
        ("lists", "'lists', expected list, run or report"),
    ],
)
def test_wrong_commands_are_refused(capsys, arguments, message):
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_several_benchmarks_run_in_turn_and_those_that_fail_are_named(tmp_path):
    done = benchmarks("run", "host", "operators", "--quick", "--modes=warm", folder=tmp_path)
    assert "== host\n== operators\n" in done.stdout  # which host refuses
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "failed: host (status 2)")
    assert list(tmp_path.iterdir()) == []
