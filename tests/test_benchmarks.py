# SPDX-License-Identifier: MIT
"""The benchmarks' commands, at small sizes: what they print, write and refuse."""

import csv
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import ROOT, import_path, start

pytest.importorskip("rich", reason="rich prints the tables")
from benchmarks import matmul_t, muon, ncu, operators
from benchmarks.__main__ import NAMES
from benchmarks.command import run
from torchpar.errors import ConfigError


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_operators_beside_eager(tmp_path, capsys):
    assert operators.main(["--quick", "--device=cpu", "--threads=1", f"--output={tmp_path}"]) == 0
    rows = rows_of(tmp_path / "operators.csv")
    assert all(row["ok"] == "True" and float(row["p50_ms"]) > 0 for row in rows)
    for operator in operators.NATIVE:
        found = {(row["mode"], row["contestant"]) for row in rows if row["operator"] == operator}
        modes = ("forward", "backward", "full")
        assert found >= {(mode, name) for mode in modes for name in ("eager", "torchpar")}
    printed = capsys.readouterr().out
    assert "a small call, linear_sigmoid 64x128->10 forward and backward on one thread: eager" in printed
    assert all(f"\n{operator}\n" in f"\n{printed}" for operator in operators.NATIVE)
    assert "GFLOP/s" in printed
    assert "torch.float32: ceiling " in printed


def test_the_exercise_beside_njit(monkeypatch, capsys):
    pytest.importorskip("numba", reason="an extra")
    assert exercise(monkeypatch) == 0
    printed = capsys.readouterr().out
    rows = [line.split("│")[1].split() for line in printed.splitlines() if line.startswith("│")]
    assert rows[:3] == [["eager"], ["torchpar"], ["njit"]]
    assert re.search(
        r"two 1000×1000 int64: eager .*; torchpar [\d.]+ .s, [\d.]+× njit; njit [\d.]+ .s\n", printed
    )


def test_a_wrong_njit_is_rejected(monkeypatch, capsys):
    pytest.importorskip("numba", reason="an extra")
    monkeypatch.setattr(operators, "njit_maximum", lambda a, b: torch.maximum(a, b).clamp(max=254))
    assert exercise(monkeypatch) == 1
    printed = capsys.readouterr().out
    assert "not ok: njit maximum forward 1000x1000 1000x1000 int64 errors [1.0]" in printed
    assert "× njit" not in printed


def test_without_numba_the_exercise_has_no_njit(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == "numba" else find(x))
    assert exercise(monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "njit is left out: Numba is missing; pip install -e '.[baselines]'" in printed
    assert "× njit" not in printed


def exercise(monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the exercise alone; the status."""
    every = operators.cases

    def integers(*args):
        return [one for one in every(*args) if one.dtype == torch.int64]

    monkeypatch.setattr(operators, "cases", integers)
    return operators.main(["--quick", "--device=cpu", "--threads=1", "--operators=maximum"])


def test_on_a_gpu_some_shapes_are_compiled(monkeypatch):
    """A name of a shape that is not measured fails here."""
    properties = SimpleNamespace(total_memory=2**38)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    listed = list(operators.cases(torch.device("cuda"), False))
    assert set(operators.AUTOTUNED) < set(operators.COMPILED["linear_sigmoid"])
    for name, compiled in operators.COMPILED.items():
        assert set(compiled) < {one.shape for one in listed if one.operator == name}
    dtypes = {one.dtype for one in listed if one.operator == "maximum"}
    assert dtypes == {torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.int64}
    properties.total_memory = 2**35  # for 2^26 elements, but not for 2^28
    small = {one.shape for one in operators.cases(torch.device("cuda"), False)}
    assert "67108864 67108864" in small
    assert not small & {"268435456 268435456", "16384x16384 16384"}


def test_every_operator_is_measured():
    """An operator that is registered and left out of the benchmark fails here."""
    from torchpar import ops

    assert set(operators.NATIVE) == {name for name in ops.__all__ if hasattr(torch.ops.torchpar, name)}


@pytest.mark.parametrize("name", ["matmul_t", "symmetric_matmul", "linear_sigmoid"])
def test_a_wrong_operator_is_rejected(monkeypatch, name, capsys):
    ours = operators.OURS[name]
    monkeypatch.setitem(operators.OURS, name, lambda *args: ours(*args) * 1.001)
    monkeypatch.setattr(operators, "cases", lambda *_: [make(name)])
    assert operators.main(["--quick", "--device=cpu", "--modes=forward"]) == 1
    assert f"not ok: torchpar {name} forward" in capsys.readouterr().out


def make(name: str) -> Any:
    sizes = {"matmul_t": (9, 5), "symmetric_matmul": (9, 5), "linear_sigmoid": (7, 9, 5)}[name]
    return getattr(operators, f"{name}_case")(torch.float32, torch.device("cpu"), *sizes)


def test_matmul_t_beside_torch_and_numpy(tmp_path, capsys):
    assert matmul_t.main(["--quick", "--device=cpu", "--threads=1", f"--output={tmp_path}"]) == 0
    rows = rows_of(tmp_path / "matmul_t.csv")
    found = {(row["mode"], row["contestant"]) for row in rows}
    assert found == {
        *(("forward", name) for name in ("torch.mm", "torchpar", "numpy")),
        *(("backward", name) for name in ("torch.mm", "torchpar")),
    }
    assert all(row["ok"] == "True" and float(row["speedup"]) > 0 for row in rows)
    calls = [row["configuration"].split(", ")[0].split(" of ")[1] for row in rows if row["mode"] == "forward"]
    assert calls == ["1 calls"] * 3 + [f"{matmul_t.WARM_CALLS} calls"] * 3
    assert "65x65" in capsys.readouterr().out.splitlines()[-2]


def test_of_linear_sigmoid_the_product_is_measured_alone(monkeypatch, capsys):
    """Its sigmoid is taken before the check, which rejects another product."""
    arguments = ["--quick", "--device=cpu", "--operators", "linear_sigmoid", "--modes", "forward", "full"]
    assert operators.main(arguments) == 0
    shown = [line.split("│") for line in capsys.readouterr().out.splitlines()]
    assert [cells[1].split() for cells in shown if "addmm" in str(cells)] == [["forward"]]
    assert not any("matmul" in str(cells) for cells in shown)
    monkeypatch.setitem(operators.FINISH, "addmm", lambda z: torch.sigmoid(1.01 * z))
    assert operators.main(arguments) == 1
    assert "not ok: addmm linear_sigmoid forward" in capsys.readouterr().out


def test_a_wrong_product_has_no_speed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torchpar.matmul_t", lambda x: x @ x)
    arguments = ["--quick", "--device=cpu", "--threads=1", "--modes", "forward", f"--output={tmp_path}"]
    assert matmul_t.main(arguments) == 1
    rows = rows_of(tmp_path / "matmul_t.csv")
    assert [row["speedup"] for row in rows if row["contestant"] == "torchpar"] == ["", ""]
    assert "wrong" in capsys.readouterr().out


def test_muon_takes_the_way_of_torchs(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="an extra")
    pytest.importorskip("torchvision", reason="torchvision reads MNIST")
    assert muon.main(["--quick", f"--output={tmp_path}"]) == 0
    rows = rows_of(tmp_path / "muon.csv")
    steps, epochs = [row for row in rows if row["p50_ms"]], [row for row in rows if row["epoch"]]
    assert {row["weight"] for row in steps} == {"24x64", "3 of 64x24"}
    assert {row["contestant"] for row in steps} == set(muon.OPTIMIZERS)
    assert all(float(row["distance"]) < muon.DISTANCE for row in steps)
    assert [(row["contestant"], row["epoch"]) for row in epochs] == [("sgd", "1"), ("muon", "1")]
    assert (tmp_path / "muon.png").read_bytes().startswith(b"\x89PNG")
    assert "error_percent" in capsys.readouterr().out


def test_another_optimizer_goes_elsewhere(monkeypatch, capsys):
    monkeypatch.setitem(muon.OPTIMIZERS, "torchpar", lambda params: torch.optim.SGD(params, lr=1e-3))
    assert muon.main(["--quick", "--epochs=0"]) == 1
    printed = capsys.readouterr().out
    assert "not ok: torchpar 24x64 the weights ended" in printed
    assert "not ok: torchpar 3 of 64x24 the weights ended" in printed


def main_of(name: str) -> Any:
    module = importlib.import_module(f"benchmarks.{name}")
    if hasattr(module, "main"):
        return module.main
    return importlib.import_module(f"benchmarks.{name}.__main__").main


@pytest.mark.parametrize(
    "name, flags, complaint",
    [
        ("operators", ["--threads=0"], "--threads is 0, expected at least 1"),
        ("matmul_t", ["--output=/dev/null/x"], "--output /dev/null/x cannot be made a folder"),
        ("muon", ["--rounds=0"], "--rounds is 0, expected at least 1"),
        ("muon", ["--epochs=-1"], "--epochs is -1, expected at least 0"),
        ("autotune", ["--sizes", "512", "0"], "--sizes is 0, expected at least 1"),
        ("scaling", ["--rounds=0"], "--rounds is 0, expected at least 1"),
        ("scale_model", ["--layers=7"], "--layers is 7, expected at least 8, the number of stages"),
    ],
)
def test_a_bad_flag_is_refused(name, flags, complaint):
    with pytest.raises(ConfigError, match=complaint):
        main_of(name)(flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ConfigError, match="--device is cuda, but PyTorch finds no GPU"):
        operators.main(["--device=cuda"])
    with pytest.raises(ConfigError, match="PyTorch finds no GPU, expected one to profile"):
        ncu.main([])


@pytest.mark.parametrize("name", NAMES)
def test_without_rich_a_command_says_so(monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == "rich" else find(x))
    with pytest.raises(ConfigError, match=r"rich.* not installed; pip install rich"):
        main_of(name)([])


@pytest.mark.parametrize(
    "error, status, said",
    [
        (ConfigError("--rounds is 0"), 2, "error: --rounds is 0"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_end_is_one_line(monkeypatch, capsys, error, status, said):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks/ladder/__main__.py")])

    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == status
    assert capsys.readouterr().err == f"python -m benchmarks run ladder: {said}\n"


@pytest.mark.parametrize("name", NAMES)
def test_all_commands_share_their_flags(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main_of(name)(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: python -m benchmarks run {name} [-h] [--quick] [--output DIR]" in printed


def benchmarks(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``python -m benchmarks`` as a user does."""
    command = [sys.executable, "-m", "benchmarks", *arguments]
    environment = os.environ | {"PYTHONPATH": import_path(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_all_benchmarks_are_listed(tmp_path):
    paths = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "benchmarks").glob("*/__main__.py")]
    commands = {
        path.parent.name if path.stem == "__main__" else path.stem
        for path in paths
        if "Command(" in path.read_text() and path.stem != "command"
    }
    lines = benchmarks("list", folder=tmp_path).stdout.splitlines()
    assert {line.split()[0] for line in lines} == commands
    assert "matmul_t     Compare X·Xᵀ with PyTorch's and NumPy's, over shapes and dtypes" in lines


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("run none", "no benchmark 'none', expected some of operators, matmul_t,"),
        ("run --quick", "no benchmark is named in front of the flags; python -m benchmarks list shows them"),
        ("", "no command given"),
        ("lists", "'lists', expected list, run or report"),
        ("run muon --speed 3", "python -m benchmarks run muon: error: unrecognized arguments: --speed 3"),
        ("report --results /nonexistent", "/nonexistent has no results, expected MACHINE/NAME.csv"),
    ],
)
def test_wrong_commands_are_refused(tmp_path, arguments, message):
    done = benchmarks(*arguments.split(), folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_several_benchmarks_run_in_turn(tmp_path):
    done = benchmarks("run", "ncu", "matmul_t", "--quick", "--output", "out", folder=tmp_path)
    assert "== ncu\n== matmul_t\n" in done.stdout
    assert rows_of(tmp_path / "out" / "matmul_t.csv")
    if not torch.cuda.is_available():  # which ncu needs
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == "failed: ncu (status 2)"


@pytest.mark.slow
def test_without_output_nothing_is_written(tmp_path):
    for folder in ("benchmarks", "torchpar", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(tmp_path.rglob("*"))
    environment = os.environ | {"PYTHONPATH": import_path(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "benchmarks", "run", "ladder", "scaling", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaling"])
def test_ctrl_c_is_one_line(name):
    """Ranks that were started end too, without a line of their own."""
    process = start(sys.executable, "-m", f"benchmarks.{name}")
    time.sleep(15)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"python -m benchmarks run {name}: interrupted"
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_several_benchmarks_and_their_ranks(tmp_path, number):
    command = [sys.executable, "-m", "benchmarks", "run", "scaling", "host"]
    environment = os.environ | {"PYTHONPATH": import_path(ROOT)}
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    time.sleep(15)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.terminate()
    assert process.wait(60) == 128 + number
    assert "== host" not in (tmp_path / "out").read_text()
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("processes are left")
