# SPDX-License-Identifier: MIT
"""The examples as a user runs them."""

import re
import socket
import sys
from typing import Any

import pytest
import torch
from commands import ROOT, TORCHRUN, rows_of, run, start
from fake_data import fashion_mnist

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("tyro", reason="tyro reads the flags")

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TRAIN_DDP = str(ROOT / "examples" / "train_ddp.py")
LAST_LINE = r"test accuracy [01]\.\d{4} \| loss \d+\.\d{4} \| \d+\.\d s \| (\d) ranks? \| (cpu|cuda)"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Flags for a small data set that trains quickly."""
    root = tmp_path_factory.mktemp("data")
    fashion_mnist(root / "FashionMNIST" / "raw", train=600, test=100)
    return ["--dataset", "fashion-mnist", "--data", str(root), "--hidden", "16", "--device", "cpu"]


def test_two_ranks_train_and_report(data, tmp_path):
    flags = [
        "--epochs",
        "6",
        "--metrics",
        str(tmp_path / "metrics.jsonl"),
        "--plots",
        str(tmp_path / "plots"),
    ]
    code, out, err = run(*TORCHRUN, TRAIN_DDP, *data, *flags)
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 7, lines  # rank 0 alone speaks: six epochs and the last line, none of them wrapped
    assert re.fullmatch(LAST_LINE, lines[-1]).groups() == ("2", "cpu")
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert set(rows[0]) == {
        "epoch",
        "train_loss",
        "test_loss",
        "test_accuracy",
        "samples_per_s",
        "seconds",
        "ranks",
        "device",
    }
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert f"test accuracy {rows[-1]['test_accuracy']:.4f} | loss {rows[-1]['test_loss']:.4f}" in lines[-1]
    for name in ("curves", "confusion", "worst"):
        picture = (tmp_path / "plots" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")


TWO_EPOCHS = ["--epochs", "2", "--batch-size", "50"]
SPREADS = [
    ("train_ddp.py", 2, ""),
    ("train_tensor_parallel.py", 2, ""),
    ("train_pipeline.py", 2, "--pipeline gpipe"),
    ("train_parallel.py", 4, "--dp 2 --tp 2"),
    ("train_parallel.py", 4, "--tp 2 --pp 2 --micro-batches 3"),
]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> list[dict[str, Any]]:
    """The metrics of two epochs of one process."""
    metrics = tmp_path_factory.mktemp("alone") / "metrics.jsonl"
    code, _, err = run(sys.executable, TRAIN_DDP, *data, *TWO_EPOCHS, "--metrics", str(metrics))
    assert code == 0, err
    return rows_of(metrics)


@pytest.mark.parametrize("script, ranks, flags", SPREADS)
def test_every_spread_learns_the_same(data, alone, tmp_path, script, ranks, flags):
    """The same flags, the same last line, the same losses but for rounding, and what travels as predicted."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    metrics = tmp_path / "metrics.jsonl"
    shown = ["--plots", str(tmp_path), "--metrics", str(metrics), "--collectives", "--phases"]
    path = str(ROOT / "examples" / script)
    code, out, err = run(*torchrun, path, *data, *TWO_EPOCHS, *flags.split(), *shown)
    assert code == 0, err
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1]).groups() == (str(ranks), "cpu")
    for a, b in zip(alone, rows_of(metrics), strict=True):
        assert a.keys() == b.keys()
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)
        assert b["test_accuracy"] == a["test_accuracy"]
    rows = re.findall(r"│ (\w+) +│ (\w+) +│ +(\d+) \| (\d+) │ +([\d,]+) \| ([\d,]+) │", out)
    assert rows, out
    for _, _, count, counted, nbytes, counted_bytes in rows:
        assert (count, nbytes) == (counted, counted_bytes)
    assert re.search(r"│ optimizer +│ +\d", out)
    assert (tmp_path / "confusion.png").exists()


def test_two_machines_meet(data, alone):
    """Two torchruns, as two machines would start them, that find each other by c10d's rendezvous."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", "--rdzv_id=two"]
    machines = [start(*torchrun, *rendezvous, TRAIN_DDP, *data, *TWO_EPOCHS) for _ in range(2)]
    ended = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], [err for _, err in ended]
    (out,) = (out for out, _ in ended if out)  # rank 0's machine alone speaks
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1]).groups() == ("2", "cpu")
    assert f"| loss {alone[-1]['test_loss']:.4f} |" in out.splitlines()[-1]


def test_one_process_with_every_other_flag(data, tmp_path):
    flags = "--epochs 2 --batch-size 50 --lr 0.2 --momentum 0 --schedule cosine --weight-decay 1e-4"
    flags += " --orthogonality 1e-3 --hidden 8 8 --seed 3 --compile --phases"
    code, out, err = run(sys.executable, TRAIN_DDP, *data, *flags.split())
    assert code == 0, err
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1]).groups() == ("1", "cpu")
    for phase in ("data", "forward", "backward", "optimizer"):
        assert re.search(rf"│ {phase} +│ +\d", out)


def test_dry_run_writes_nothing(data, tmp_path):
    flags = [f"--{name}={tmp_path / name}" for name in ("metrics", "plots", "checkpoint")]
    code, out, _ = run(sys.executable, TRAIN_DDP, *data, "--dry-run", *flags)
    assert code == 0
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


ERRORS = [
    ("--epoch 3", "Unrecognized options: --epoch"),
    ("--epochs many", "--epochs: invalid literal for int"),
    ("--epochs 0", "--epochs is 0, expected at least 1"),
    ("--hidden 0", r"--hidden is \(0,\), expected at least 1"),
    ("--lr nan", "--lr is nan, expected at least 0"),
    ("--lr inf", r"--lr is inf, expected less than 1e\+38"),
    ("--momentum 1", r"--momentum is 1\.0, expected less than 1"),
    ("--seed 9223372036854775808", "--seed is 9223372036854775808, expected less than"),
    ("--schedule steps", "invalid choice 'steps' for argument '--schedule'"),
    ("--optimizer adam", "invalid choice 'adam' for argument '--optimizer'"),
    ("--dataset cifar", "invalid choice 'cifar' for argument '--dataset'"),
    ("--data /nonexistent", "/nonexistent/FashionMNIST/raw/train-images-idx3-ubyte.gz is missing"),
    ("--metrics /dev/null/m.jsonl", "cannot be written.*/dev/null"),
    ("--checkpoint /dev/null/c", "cannot be written.*/dev/null"),
    ("--plots /dev/null/p", "cannot be written.*/dev/null"),
]
if not torch.cuda.is_available():
    ERRORS.append(("--device cuda", "no CUDA device is available here; use cpu or auto"))


@pytest.mark.parametrize("flags, message", ERRORS)
def test_errors_are_one_line(data, monkeypatch, capsys, flags, message):
    sys_path = [str(ROOT / "examples"), *sys.path]
    monkeypatch.setattr(sys, "path", sys_path)
    import train_ddp

    from torchpar import cli

    monkeypatch.setattr(sys, "argv", [TRAIN_DDP, *data, *flags.split()])
    with pytest.raises(SystemExit) as caught:
        cli.main(train_ddp.main, train_ddp.Flags)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert re.fullmatch(rf"train_ddp\.py: error: .*{message}.*\n", err)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--no-such-flag", "Unrecognized options: --no-such-flag"),
        ("--batch-size 1", "smaller than the number"),
    ],
)
def test_errors_on_two_ranks_come_from_rank_0_alone(data, flags, message):
    code, out, err = run(*TORCHRUN, TRAIN_DDP, *data, *flags.split())
    assert code != 0
    ours = [line for line in err.splitlines() if line.startswith("train_ddp.py: error: ")]
    assert len(ours) == 1
    assert message in ours[0]
    assert 'train_ddp.py", line' not in err  # no traceback of a rank
    assert out == ""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_fit_on_a_page(example):
    assert len(example.read_text().splitlines()) <= 150


def test_compiling_reaches_what_runs(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    import train_parallel

    from torchpar.nn import MLP
    from torchpar.parallel.world import join_world

    for compiled in (False, True):
        with join_world("cpu") as world:
            own = train_parallel.spread(MLP([4, 3, 2]), train_parallel.Flags(compile=compiled), world.split())
        assert (own.step.forward._compiled_call_impl is not None) is compiled


def test_a_run_too_short_to_record(capsys):
    from torchpar import report

    report.print_collectives([], [], None)
    assert "none was recorded" in capsys.readouterr().out


def test_a_launcher_that_counts_wrong_is_told_in_one_line(data, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = run(sys.executable, TRAIN_DDP, *data)
    assert (code, out) == (2, "")
    assert err == "train_ddp.py: error: env says rank 5 of 2, expected less than 2\n"
