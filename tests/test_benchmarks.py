# SPDX-License-Identifier: MIT
"""The benchmarks' commands: what they write, print and refuse."""

import csv
import importlib
import signal
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT
from commands import run as run_command

pytest.importorskip("rich", reason="rich prints the tables")
from benchmarks import muon, operators, train
from benchmarks.__main__ import NAMES, main
from benchmarks.command import run
from torchpar.errors import ConfigError, DivergedError

# Columns that each CSV has, and some of its own.
COLUMNS = "contestant p20_ms p50_ms p80_ms samples ok reason torch device processor commit clocks date"
QUICK = {
    "operators": "mode dtype speedup rounds calls threads gb_per_s gflop_per_s",
    "calls": "mode speedup",
    "muon": "weight distance epoch",
    "host": "operator n",
}
SLOW = {
    "optimizers": "library version promises situation verdict rounding",
    "train": "network batch samples_per_s",
    "speedrun": "seed seconds accuracy",
    "scaling": "kind batch dp tp threads nbytes",
    "ladder": "workload note over_pure_python first_s intensity cores",
}
OTHERS = {
    "operators": ["crossover.png"],
    "train": ["train.md"],
    "speedrun": ["speedrun.md"],
    "ladder": ["ladder.md", "intensity.png"],
}
slow = pytest.mark.slow


def check(path: Path, own: str) -> None:
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert rows[0].keys() >= {*COLUMNS.split(), *own.split()}
    assert all((row["ok"], row["reason"]) == ("True", "") for row in rows)
    for column in own.split():
        assert any(row[column] for row in rows), f"nothing in {column}"


def test_all_benchmarks_are_listed(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert tuple(line.split()[0] for line in lines[: len(NAMES)]) == NAMES
    assert set(NAMES) == {*QUICK, *SLOW}
    assert "train       Train MLPs on MNIST in many ways, side by side" in lines
    assert "benchmarks/results/cpu-" in lines[-1] or torch.cuda.is_available()


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=slow) for name in SLOW)])
def test_a_benchmark_runs_and_its_csv_has_the_columns(tmp_path, monkeypatch, capsys, name):
    # Enough to see that each contestant is right.
    monkeypatch.setattr(train, "ROUNDS", 1)
    monkeypatch.setattr(train, "QUICK", [train.Training((784, 10, 10), 10, samples=35)])
    flags = ["--quick", f"--output={tmp_path}"]
    flags += ["--only=torch"] * (name == "optimizers")
    assert importlib.import_module(f"benchmarks.{name}").main(flags) == 0
    check(tmp_path / f"{name}.csv", (QUICK | SLOW)[name])
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.csv", *OTHERS.get(name, [])}
    assert ("shared memory, speed-up" in capsys.readouterr().out) == (name == "scaling")


@slow
def test_several_benchmarks_run_in_turn(tmp_path):
    """As scripts of their own, which set the environment before they import libraries."""
    status, out, err = run_command(
        *(sys.executable, "-m", "benchmarks", "run", "train", "ladder", "--help"), cwd=tmp_path
    )
    assert (status, err) == (0, "")
    order = [out.index(text) for name in ("train", "ladder") for text in (f"== {name}\n", f"run {name} [-h]")]
    assert order == sorted(order)


def test_every_operator_is_measured():
    from torchpar import ops

    registered = {name for name in ops.__all__ if hasattr(torch.ops.torchpar, name)}
    assert (
        {*registered, "linear_sigmoid_backward", "exact_matmul_t"}
        == operators.NATIVE.keys()
        == operators.OURS.keys()
    )
    assert operators.CPU.keys() >= registered
    assert operators.GPU.keys() == operators.NATIVE.keys()


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
    [
        (ConfigError("--rounds is 0"), 2, "error: --rounds is 0"),
        (DivergedError("an output is not finite"), 2, "error: an output is not finite"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
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


def test_wrong_commands_are_refused(capsys):
    for arguments, message in (
        ("run muon none --quick", "run muon none --quick: expected first some of operators, calls, muon,"),
        ("", "no command given"),
        ("lists", "'lists', expected list, run or report"),
    ):
        assert main(arguments.split()) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
