# SPDX-License-Identifier: MIT
"""The training lessons by their command lines; a few of them as torchrun starts them."""

import re
import socket
import sys
from functools import partialmethod
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import ROOT, TORCHRUN, lesson, rows_of, run, scalars, start
from fake_data import fashion_mnist
from rich.console import Console
from support import console

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("tyro", reason="tyro reads the flags")

TRAIN_DDP = str(ROOT / "examples" / "train_ddp.py")
LAST_LINE = r"test accuracy [01]\.\d{4} \| loss \d+\.\d{4} \| \d+\.\d s \| (\d) ranks? \| (cpu|cuda)"
FORMULAS = "gradients by formulas, without autograd"


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
    # Rank 0 alone speaks: how gradients are computed, six epochs and the last line, none of them wrapped.
    assert len(lines) == 8, lines
    assert lines[0] == FORMULAS
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


@pytest.mark.parametrize(
    "flags, line",
    [
        ("", FORMULAS),
        ("--fused auto --graph auto", FORMULAS),
        ("--fused off --graph off", "gradients by autograd: --fused is off"),
        ("--compile", "gradients by autograd: --compile compiles the model"),
    ],
)
def test_the_first_line_says_how_gradients_are_computed(data, monkeypatch, flags, line):
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    code, out, err = lesson("train_ddp", *data, "--device", "cpu", "--epochs", "1", *flags.split())
    assert code == 0, err
    assert out.splitlines()[0] == line
    assert len(out.splitlines()) == 3  # and the epoch, and the result


def test_a_graph_that_is_asked_for_and_cannot_be_is_an_error(data):
    code, _, err = lesson("train_ddp", *data, "--device", "cpu", "--graph", "on")
    assert code == 2
    assert "--graph is on, but a step cannot be a CUDA graph: it needs a GPU" in err


TWO_EPOCHS = ["--epochs", "2", "--batch-size", "50"]
# The training of the other lessons, in train_ddp.
THEIRS = "--optimizer sgd --lr 0.5 --momentum 0.9 --weight-decay 3e-5"
THEIRS += " --activation sigmoid --label-smoothing 0 --crop 0 --pool 1"
SPLITS = [
    ("train_ddp", 2, THEIRS),
    ("train_ddp", 3, THEIRS),
    ("train_ddp", 1, f"{THEIRS} --fused off"),
    ("train_ddp", 2, f"{THEIRS} --fused off"),
    ("train_tensor_parallel", 2, ""),
    ("train_pipeline", 2, "--pipeline gpipe"),
    ("train_parallel", 4, "--dp 2 --tp 2"),
    ("train_parallel", 4, "--tp 2 --pp 2 --micro-batches 3"),
]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> list[dict[str, Any]]:
    """The metrics of two epochs of one process."""
    metrics = tmp_path_factory.mktemp("alone") / "metrics.jsonl"
    code, _, err = lesson("train_ddp", *data, *TWO_EPOCHS, *THEIRS.split(), "--metrics", str(metrics))
    assert code == 0, err
    return rows_of(metrics)


def check_collectives(out: str, world_size: int) -> None:
    """The printed collectives must be those expected."""
    rows = re.findall(r"│ (\w+) +│ (\w+) +│ +(\d+) \| (\d+) │ +([\d,]+) \| ([\d,]+) │", out)
    assert rows or world_size == 1, out
    for _, _, count, counted, nbytes, counted_bytes in rows:
        assert (count, nbytes) == (counted, counted_bytes), out


MUON = ["--optimizer", "muon", "--epochs", "2", "--lr", "0.01", "--batch-size", "100"]


def test_every_mesh_learns_the_same_by_muon(ranks, data, tmp_path):
    """Up to roundings of other shares' sums, which Muon takes to bfloat16."""
    found = []
    for world_size, flags in [
        *((1, ""), (2, "--dp 2"), (3, "--tp 3"), (4, "--dp 2 --tp 2")),
        *((4, "--tp 2 --pp 2"), (2, "--pp 2"), (8, "--dp 2 --tp 2 --pp 2")),
    ]:
        metrics = tmp_path / f"{len(found)}.jsonl"
        shown = ["--metrics", str(metrics), "--collectives"]
        (code, out, err), *_ = ranks(
            world_size, lesson, "train_parallel", *data, *MUON, *flags.split(), *shown
        )
        assert code == 0, err
        check_collectives(out, world_size)
        assert out.count("all_to_all") == (world_size > 1 and flags != "--pp 2")
        found.append(rows_of(metrics)[-1])
    for row in found[1:]:
        assert row["test_accuracy"] == pytest.approx(found[0]["test_accuracy"], abs=0.01)
        assert row["train_loss"] == pytest.approx(found[0]["train_loss"], rel=2**-8)


@pytest.mark.parametrize("name, world_size, flags", SPLITS)
def test_every_split_learns_the_same(ranks, data, alone, tmp_path, name, world_size, flags):
    """The same flags, the same last line, the same losses but for rounding, and the collectives expected."""
    metrics = tmp_path / "metrics.jsonl"
    shown = ["--plots", str(tmp_path), "--metrics", str(metrics), "--collectives", "--phases"]
    (code, out, err), *others = ranks(world_size, lesson, name, *data, *TWO_EPOCHS, *flags.split(), *shown)
    assert code == 0, err
    assert others == [(0, "", "")] * (world_size - 1)
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1]).groups() == (str(world_size), "cpu")
    for a, b in zip(alone, rows_of(metrics), strict=True):
        assert a.keys() == b.keys()
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)
        assert b["test_accuracy"] == a["test_accuracy"]
    assert ("gradients by" in out) == (name == "train_ddp")
    check_collectives(out, world_size)
    assert re.search(r"│ optimizer +│ +\d", out)
    assert (tmp_path / "confusion.png").exists()


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_default_network_learns_the_same_by_autograd(ranks, data, tmp_path, world_size):
    """ReLU layers, smoothed labels and fewer pixels; SGD, because Muon enlarges roundings."""
    losses = []
    for fused in ("auto", "off"):
        metrics = tmp_path / fused
        flags = [*data, *TWO_EPOCHS, "--optimizer", "sgd", "--lr", "0.1", "--fused", fused]
        (code, out, err), *_ = ranks(world_size, lesson, "train_ddp", *flags, "--metrics", str(metrics))
        assert (code, FORMULAS in out) == (0, fused == "auto"), err
        losses += [[row[name] for row in rows_of(metrics) for name in ("train_loss", "test_loss")]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    metrics = tmp_path / "plain"
    unsmoothed = [*flags, "--label-smoothing", "0", "--metrics", str(metrics)]
    assert lesson("train_ddp", *unsmoothed)[0] == 0
    assert rows_of(metrics)[-1]["train_loss"] < losses[1][-2] - 0.05


@pytest.mark.slow
def test_two_machines_meet(data, alone):
    """Two torchruns, as two machines would start them, that find each other by c10d's rendezvous."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", "--rdzv_id=two"]
    machines = [
        start(*torchrun, *rendezvous, TRAIN_DDP, *data, *TWO_EPOCHS, *THEIRS.split()) for _ in range(2)
    ]
    ended = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], [err for _, err in ended]
    (out,) = (out for out, _ in ended if out)  # rank 0's machine alone speaks
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1]).groups() == ("2", "cpu")
    assert f"| loss {alone[-1]['test_loss']:.4f} |" in out.splitlines()[-1]


def test_one_process_with_every_other_flag(data):
    flags = "--epochs 2 --batch-size 50 --lr 0.2 --momentum 0 --schedule cosine --weight-decay 1e-4"
    flags += " --orthogonality 1e-3 --hidden 8 8 --seed 3 --phases"
    code, out, err = lesson("train_ddp", *data, *flags.split())
    assert code == 0, err
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1]).groups() == ("1", "cpu")
    for phase in ("data", "backward", "optimizer"):
        assert re.search(rf"│ {phase} +│ +\d", out)
    assert "forward" not in out  # formulas compute both at once


@pytest.mark.parametrize("name", ["train_ddp", "train_tensor_parallel", "train_pipeline", "train_parallel"])
def test_compiling_reaches_what_runs(data, monkeypatch, name):
    """The backend is asked for graphs when the first batch comes; it runs them as they are."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    flags = [*data, *(THEIRS.split() if name == "train_ddp" else []), "--dry-run"]
    code, out, err = lesson(name, *flags)
    assert (code, graphs) == (0, []), err
    code, compiled, err = lesson(name, *flags, "--compile")
    assert code == 0, err
    assert graphs
    assert compiled.split(" | ")[1:4] == out.split(" | ")[1:4]  # losses and accuracy
    assert compiled.startswith("gradients by autograd: --compile") == (name == "train_ddp")


def test_a_model_that_cannot_be_compiled_runs_as_it_is(data, monkeypatch):
    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        raise RuntimeError("there is no compiler")

    torch.compiler.reset()  # what other tests have compiled
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    code, out, err = lesson("train_ddp", *data, "--dry-run", "--fused", "off")
    assert code == 0, err
    code, compiled, err = lesson("train_ddp", *data, "--dry-run", "--compile")
    assert code == 0, err
    (line,) = [line for line in compiled.splitlines() if line.startswith("not compiled: ")]
    assert "there is no compiler" in line
    assert compiled.split(" | ")[1:4] == out.split(" | ")[1:4]  # losses and accuracy


def test_tensorboard_has_the_figures_of_each_epoch(data, tmp_path):
    files = ["--metrics", str(tmp_path / "metrics"), "--log-dir", str(tmp_path / "log")]
    code, _, err = lesson("train_ddp", *data, *TWO_EPOCHS, *files)
    assert code == 0, err
    rows = rows_of(tmp_path / "metrics")
    for name in ("train_loss", "test_loss", "test_accuracy", "samples_per_s"):
        assert [(row["epoch"], row[name]) for row in rows] == scalars(tmp_path / "log", name)


def test_the_bar_shows_speed_and_loss(monkeypatch):
    monkeypatch.setattr(console, "Console", lambda: Console(file=StringIO(), force_terminal=True))
    monkeypatch.setattr(console, "REFRESH", -1)
    with console.EpochProgress(SimpleNamespace(rank=0), 2, 100, None) as progress:
        for samples in (10, 20, 30):
            progress.update(1, samples, lambda: 0.25)
        assert re.fullmatch(r"[\d,]+ samples/s \| loss 0\.2500", progress.bar.tasks[0].description)
        progress.update(2, 10)
        assert progress.bar.tasks[0].completed == 110


def test_dry_run_writes_nothing(data, tmp_path):
    flags = [
        f"--{name}={tmp_path / name}" for name in ("metrics", "log-dir", "plots", "profile", "checkpoint")
    ]
    code, out, _ = lesson("train_ddp", *data, "--dry-run", *flags)
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
    ("--label-smoothing 1", r"--label-smoothing is 1\.0, expected less than 1"),
    ("--pool 0", "--pool is 0, expected at least 1"),
    ("--crop 14", "crop 14 and pool 2 leave nothing of images of 28 × 28"),
    ("--activation tanh", "invalid choice 'tanh' for argument '--activation'"),
    ("--seed 9223372036854775808", "--seed is 9223372036854775808, expected less than"),
    ("--schedule steps", "invalid choice 'steps' for argument '--schedule'"),
    ("--optimizer adam", "invalid choice 'adam' for argument '--optimizer'"),
    ("--dataset cifar", "invalid choice 'cifar' for argument '--dataset'"),
    ("--data /nonexistent", "/nonexistent/FashionMNIST/raw/train-images-idx3-ubyte.gz is missing"),
    ("--metrics /dev/null/m.jsonl", "cannot be written.*/dev/null"),
    ("--checkpoint /dev/null/c", "cannot be written.*/dev/null"),
    ("--plots /dev/null/p", "cannot be written.*/dev/null"),
    ("--profile /dev/null/t", "cannot be written.*/dev/null"),
]
if not torch.cuda.is_available():
    ERRORS.append(("--device cuda", "no CUDA device is available here; use cpu"))


def line_of(err: str) -> str:
    """The message that tyro prints in a frame, or a script without one, as one line."""
    return " ".join(re.sub(r"[╭╮│╰╯─]", " ", err).split())


@pytest.mark.parametrize("flags, message", ERRORS)
def test_errors_in_flags(data, flags, message):
    """tyro frames what it finds; what a script finds is one line."""
    code, out, err = lesson("train_ddp", *data, *flags.split())
    assert (code, out) == (2, "")
    assert re.search(message, line_of(err))
    assert "Traceback" not in err
    assert ("full helptext" in err) != bool(re.fullmatch(r"train_ddp\.py: error: .*\n", err))


@pytest.mark.slow
def test_torchrun_shows_rank_0s_error(data):
    """It ends rank 1 before that prints the same line, if rank 0 ends within `cli.GRACE` seconds."""
    code, out, err = run(*TORCHRUN, TRAIN_DDP, *data, "--batch-size", "1")
    assert (code, out) == (1, f"{FORMULAS}\n")
    (ours,) = {line for line in err.splitlines() if line.startswith("train_ddp.py: error: ")}
    assert "smaller than the number of ranks" in ours
    assert 'train_ddp.py", line' not in err  # no traceback of a rank


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--no-such-flag", "Unrecognized options: --no-such-flag"),
        ("--data /nonexistent", "train-images-idx3-ubyte.gz is missing"),
    ],
)
def test_an_error_ends_every_rank(ranks, data, flags, message):
    """Both ranks print the error here. A launcher ends rank 1 before it prints."""
    ended = ranks(2, lesson, "train_ddp", *data, *flags.split())
    assert [(code, out) for code, out, _ in ended] == [(2, "")] * 2
    assert all(message in line_of(err) for _, _, err in ended)


def test_a_launcher_that_counts_wrong_is_reported_in_one_line(data, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "train_ddp.py: error: env says rank 5 of 2, expected less than 2\n"
    assert lesson("train_ddp", *data) == (2, "", message)


def test_a_run_too_short_to_record(data):
    """All steps but the first two are recorded; here there is one."""
    code, out, err = lesson("train_ddp", *data, "--epochs", "1", "--batch-size", "600", "--collectives")
    assert code == 0, err
    assert "none was recorded" in out


def epoch_lines(out: str) -> list[str]:
    return re.findall(r"^epoch (\d)/\d", out, re.MULTILINE)


def test_a_run_says_where_it_resumes_and_that_it_is_complete(data, tmp_path):
    """Epochs trained before are not printed again; the metrics file has all."""
    metrics, folder = tmp_path / "metrics.jsonl", str(tmp_path / "checkpoint")
    flags = [*data, "--batch-size", "50", "--schedule", "constant", "--checkpoint", folder]
    flags += ["--metrics", str(metrics)]
    lines = {}
    for name, epochs in (("first", 1), ("resumed", 3), ("again", 3)):
        metrics.unlink(missing_ok=True)
        code, out, err = lesson("train_ddp", *flags, "--epochs", str(epochs))
        assert code == 0, err
        lines[name] = out
        assert [row["epoch"] for row in rows_of(metrics)] == [*range(1, epochs + 1)]
    assert "resumed" not in lines["first"]
    assert "complete" not in lines["first"]
    assert lines["resumed"].startswith(f"{FORMULAS}\nresumed from step 12\nepoch 2/3 |")
    assert epoch_lines(lines["resumed"]) == ["2", "3"]
    assert re.fullmatch(rf"{FORMULAS}\ncomplete already, at step 36\n{LAST_LINE}\n", lines["again"])
    assert lines["again"].splitlines()[-1] == lines["resumed"].splitlines()[-1]
    code, out, err = lesson("train_ddp", *flags, "--epochs", "2")
    assert (code, out) == (2, f"{FORMULAS}\n")
    assert "holds 3 epochs, more than the 2 asked for" in err


def test_a_falling_rate_is_resumed_with_as_many_epochs_alone(data, tmp_path):
    """With a schedule that depends on the number of epochs, another number is another run."""
    flags = [*data, "--checkpoint", str(tmp_path), "--epochs"]
    assert lesson("train_ddp", *flags, "1")[0] == 0
    code, out, err = lesson("train_ddp", *flags, "2")
    assert (code, out) == (2, f"{FORMULAS}\n")
    assert "holds a run with epochs 1, this one has epochs 2" in err
