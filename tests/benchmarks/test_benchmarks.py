# SPDX-License-Identifier: MIT
"""The benchmarks' commands: what they write, print and refuse."""

import csv
import errno
import importlib
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, TextIOWrapper
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
from commands import forked
from fake_data import fashion_mnist

pytest.importorskip("rich", reason="rich prints the tables")
from benchmarks import NAMES, module_of, operators, products, train
from benchmarks.__main__ import main
from benchmarks.ddp import lessons as ddp
from benchmarks.flags import Command, run
from benchmarks.muon import steps as muon
from benchmarks.results import Result, Table, print_bounds
from torchpar.errors import ConfigError
from torchpar.parallel.launch.processes import ENDING, putting_off_signals

# Columns that each CSV has, and some of its own.
COLUMNS = (
    "contestant p20_ms p50_ms p80_ms samples ok reason torch device processor commit clocks load "
    "date"
)
QUICK = {
    "operators": "mode dtype speedup rounds calls threads gb_per_s gflop_per_s",
    "calls": "mode speedup over_us",
    "products": "operator mode shape dtype threads ratio",
    "muon": "weight distance epoch",
    "exact": "part operator mode dtype threads slowdown slowdown_of_dtype phase arithmetic batch",
}
SLOW = {
    "autotune": (
        "GPU registers spilled_bytes shared_kb blocks blocks_per_multiprocessor waves estimate_ms"
    ),
    "host": "operator n mode over_us over_aten",
    "ptx": "kernel ratio",
    "optimizers": "library version promises situation verdict rounding",
    "train": "network batch samples_per_s",
    "ddp": "network batch ranks ratio",
    "speedrun": "seed seconds accuracy",
    "scaling": "kind batch dp tp threads nbytes",
}
OTHERS = {
    "operators": ["crossover.png"],
    "train": ["train.md"],
    "speedrun": ["speedrun.md"],
}


def test_all_benchmarks_are_listed(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert tuple(line.split()[0] for line in lines[: len(NAMES)]) == NAMES
    assert set(NAMES) == {*QUICK, *SLOW, "ladder"}  # which test_ladder.py runs
    assert "train       Train MLPs on MNIST in many ways, side by side" in lines
    assert not any(line.endswith((":", ",")) for line in lines[: len(NAMES)])
    assert "benchmarks/results/cpu-" in lines[-1] or torch.cuda.is_available()


def run_forked(
    command: list[str], *, env: dict[str, str], cwd: Path, **_: object
) -> SimpleNamespace:
    """Do what torchrun does on two ranks, without the time of their imports."""
    *launcher, _log_dir = command[:5]
    assert launcher == [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = env | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(
                forked, *command[5:], cwd=cwd, **shared | {"RANK": rank, "LOCAL_RANK": rank}
            )
            for rank in "01"
        ]
        (status, out, err), other = (rank.result() for rank in ranks)
    return SimpleNamespace(returncode=status or other[0], stdout=out, stderr=err or other[2])


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_benchmark_runs_and_its_csv_has_the_columns(
    request, tmp_path, tmp_path_factory, monkeypatch, capsys, name
):
    if name in SLOW:  # most of these start ranks
        request.getfixturevalue("fork_server")
    # Enough to see that each contestant is right. Samples still have one call, and more.
    monkeypatch.setattr(products, "SAMPLE", 2**25)
    monkeypatch.setattr(operators, "WARM_CALLS", 2)
    monkeypatch.setattr("benchmarks.exact.WARM_CALLS", 2)
    if not torch.cuda.is_available():
        # A CPU's caches, whose eviction takes longer than a call.
        monkeypatch.setattr("benchmarks.compare.flush", lambda device: None)
    if name == "ddp":
        monkeypatch.setattr(ddp, "subprocess", SimpleNamespace(run=run_forked))
        digits = fashion_mnist(tmp_path_factory.mktemp("data"), train=700)
        (digits / "FashionMNIST").rename(digits / "MNIST")
        monkeypatch.setattr(ddp, "DATA", digits)
        monkeypatch.setattr(ddp, "SAMPLES", 700)
        monkeypatch.setattr(ddp, "QUICK", [ddp.Network((30,), 128)])
        scripts = {name: path for name, path in ddp.SCRIPTS.items() if name != "train_fast.py"}
        monkeypatch.setattr(ddp, "SCRIPTS", scripts)  # whose losses test_examples.py compares
    monkeypatch.setattr(train, "ROUNDS", 1)
    monkeypatch.setattr(train, "QUICK", [train.Training((784, 10, 10), 10, samples=35)])
    flags = ["--quick", f"--output={tmp_path}"]
    flags += ["--only=torch"] * (name == "optimizers")
    status = importlib.import_module(module_of(name)).main(flags)
    printed = capsys.readouterr().out
    assert status == 0, printed
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
    own = (QUICK | SLOW)[name].split()
    assert rows[0].keys() >= {*COLUMNS.split(), *own}
    assert all((row["ok"], row["reason"]) == ("True", "") for row in rows)
    for column in own:
        assert any(row[column] for row in rows), f"nothing in {column}"
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.csv", *OTHERS.get(name, [])}
    assert ("an all-reduce between 2 ranks" in printed) == (name == "scaling")


def test_what_misses_its_bound_is_named(capsys):
    table = Table(None, torch.device("cpu"))
    columns = (
        {"ratio": 0.96, "bound": 0.97},
        {"ratio": 0.98, "bound": 0.97},
        {"over_us": 7.0, "bound_us": 6},
    )
    table.add(
        Result(case={"shape": i}, contestant="ours", columns=one) for i, one in enumerate(columns)
    )
    assert print_bounds(table) == 1
    printed = capsys.readouterr().out
    assert "missed: ours 0 0.960, expected at least 0.97" in printed
    assert "missed: ours 2 7.00 µs more, expected at most 6" in printed
    assert "2 of 3 bounds are missed (load average" in printed


def test_another_optimizer_goes_elsewhere(monkeypatch, capsys):
    monkeypatch.setitem(
        muon.OPTIMIZERS, "torchpar", lambda params: torch.optim.SGD(params, lr=1e-3)
    )
    monkeypatch.setattr(muon, "train", lambda epochs, samples: [])
    assert muon.main(["--quick"]) == 1
    assert "not ok: torchpar 24x64 the weights ended" in capsys.readouterr().out


def test_a_csv_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    table = Table(tmp_path / "muon.csv", torch.device("cpu"))
    table.add([Result(case={}, contestant="one")])
    before = (tmp_path / "muon.csv").read_text()
    monkeypatch.setattr(csv.DictWriter, "writerows", full)
    with pytest.raises(ConfigError, match=r"muon\.csv cannot be written \(No space left.*; make"):
        table.add([Result(case={}, contestant="two")])
    assert (tmp_path / "muon.csv").read_text() == before
    assert [one.name for one in tmp_path.iterdir()] == ["muon.csv"]


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_ways_of_a_gpu_are_refused_on_a_cpu(capsys):
    pytest.importorskip("numba", reason="the benchmark needs it on a CPU")
    from benchmarks import train

    with pytest.raises(ConfigError, match="--ways are those of a GPU; add --device cuda"):
        train.main(["--quick", "--ways", "torch.compile"])


def test_a_folder_in_the_place_of_the_csv_is_refused(tmp_path):
    (tmp_path / "muon.csv").mkdir()
    command = Command("muon")
    with pytest.raises(ConfigError, match=r"muon\.csv is a folder, expected a file"):
        command.csv(command.parse(["--output", str(tmp_path)]))


@pytest.fixture
def printing(monkeypatch, capsys):
    """``printing(stdout)``: the status of a command that prints there, and its standard error.

    A process with a closed pipe of its own is in tests/test_package.py.
    """

    def ended(stdout):
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as end:
            run(lambda: print(f"5 µs{'.' * 2**17}"), "run muon")
        return end.value.code or 0, capsys.readouterr().err

    return ended


def test_an_output_that_cannot_be_written_is_one_line(printing):
    with open("/dev/full", "w") as stdout:
        status, error = printing(stdout)
    assert status == 1
    expected = "python -m benchmarks run muon: error: the output cannot be written: [Errno 28]"
    assert error.startswith(expected)
    assert error.count("\n") == 1


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/dev/null/i")
    with pytest.raises(SystemExit, match="1"):
        run(lambda: os.makedirs("/dev/null/i"), "run muon")
    error = "error: [Errno 20] Not a directory: '/dev/null/i'; let TORCHINDUCTOR_CACHE_DIR name"
    assert capsys.readouterr().err.startswith(f"python -m benchmarks run muon: {error} a folder")
    with pytest.raises(NotADirectoryError):  # another file
        run(lambda: os.makedirs("/dev/null/j"), "run muon")


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    pytest.importorskip("matplotlib", reason="it draws")
    (path := tmp_path / "one.png").mkdir()
    with pytest.raises(ConfigError, match=r"one\.png cannot be written \(Is a directory\); make"):
        operators.draw_crossover(path, [])


def test_a_reader_may_have_read_enough(printing):
    """As ``head -c 2`` has."""
    read, write = os.pipe()
    found = []
    head = Thread(target=lambda: (found.append(os.read(read, 2)), os.close(read)), daemon=True)
    head.start()
    with os.fdopen(write, "w", encoding="utf-8") as stdout:
        assert printing(stdout) == (141, "")
    head.join()
    assert found == [b"5 "]


def test_an_output_may_be_closed(printing):
    assert printing(None) == (0, "")
    sys.stdout.close()  # which goes nowhere


def test_a_terminal_with_only_ascii_has_the_table(printing):
    with TextIOWrapper(BytesIO(), encoding="ascii") as stdout:
        assert printing(stdout) == (0, "")
        assert stdout.buffer.getvalue().startswith(b"5 ?s.")


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_in_one_line_once_processes_have_started(
    monkeypatch, capsys, ending_signals, number
):
    """A rank whose start is interrupted prints a traceback of the fork server."""
    started = []
    monkeypatch.setenv("TORCHPAR_COMMAND", "python -m torchpar ladder")

    def start() -> None:
        with putting_off_signals():
            signal.raise_signal(number)
            started.append("a rank")
        started.append("another")

    with pytest.raises(SystemExit) as ended:
        run(start, "")
    assert {signal.getsignal(one) for one in ENDING} == {signal.SIG_IGN}  # while the ranks end
    assert (ended.value.code, started) == (128 + number, ["a rank"])
    said = f"ended by {number.name}; a CSV in --output holds complete cases only"
    assert capsys.readouterr().err == f"python -m torchpar ladder: {said}\n"


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_the_benchmark_that_runs_and_those_after_it(ending_signals, number):
    child = MagicMock()
    child.__enter__().wait.side_effect = lambda: signal.raise_signal(number)
    with patch.object(subprocess, "Popen", return_value=child) as started:
        assert main(["run", "ladder", "scaling"]) == 128 + number
    assert started.call_count == 1
    child.__enter__().terminate.assert_called_once_with()


def test_sigterm_in_a_file_of_a_student_is_no_error_of_the_file(ending_signals, tmp_path):
    from torchpar.baselines.grader import execute

    verdicts = []
    file = tmp_path / "my.py"
    file.write_text("import signal\nsignal.raise_signal(signal.SIGTERM)\n")
    with pytest.raises(SystemExit) as ended:
        run(lambda: verdicts.append(execute(str(file))), "")
    assert (ended.value.code, verdicts) == (143, [])
