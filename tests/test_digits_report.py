# SPDX-License-Identifier: MIT
"""Tests of examples/digits_report.py: its choices, the figures that they are made by, and its output."""

import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, error_of, rows_of, run
from fake_data import fashion_mnist

from torchpar.data import load
from torchpar.errors import ConfigError
from torchpar.parallel.launch.world import join_world

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("tyro", reason="tyro reads the flags")
pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")

import digits_report as example

TIMES = ("ms_per_step", "s_per_epoch")
CHOICE = ("hidden", "batch_size", "lr", "weight_decay")
SWEEP = {"hidden": (4, 8), "batch_size": (64, 16), "lr": (0.2, 0.002), "weight_decay": (0.0, 0.03)}
SINGLE = {"hidden": (8,), "batch_size": (16,), "lr": (0.2,), "weight_decay": (0.0,)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    fashion_mnist(root / "FashionMNIST" / "raw", train=600, test=100)
    return root


def study(data: Path, folder: Path, **flags: Any) -> list[dict[str, Any]]:
    """Return the metrics of a small study."""
    metrics = folder / "metrics.jsonl"
    small = {"sweep_epochs": 1, "epochs": 2, "dataset": "fashion-mnist", "device": "cpu", **SWEEP}
    example.main(example.Flags(data=data, metrics=metrics, **(small | flags)))
    return rows_of(metrics)


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory) -> tuple[list[dict[str, Any]], str, Path]:
    """The metrics, the output and the folder of one study that the tests share."""
    folder = tmp_path_factory.mktemp("study")
    with redirect_stdout(StringIO()) as out:
        rows = study(data, folder, plots=folder / "new" / "pictures")
    return rows, out.getvalue(), folder


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row["validation_accuracy"])


def test_the_choice_is_the_best_on_the_validation_set(plain):
    rows, out, folder = plain
    swept, epochs, final = rows[:8], rows[8:-1], rows[-1]
    assert len({tuple(row[name] for name in CHOICE[:3]) for row in swept}) == 8
    assert {row["weight_decay"] for row in swept} == {0.0}
    assert [(row["weight_decay"], row["epoch"]) for row in epochs] == [(0, 1), (0, 2), (0.03, 1), (0.03, 2)]
    assert len({row["validation_accuracy"] for row in swept}) > 2  # there is something to choose
    assert {row["steps"] for row in swept if row["batch_size"] == 64} == {8}  # 500 samples: 7 and a rest
    assert all(row[name] == best(swept)[name] for name in CHOICE[:3] for row in epochs)
    chosen = best([row for row in epochs if row["epoch"] == 2])
    assert {key: final[key] for key in chosen} == chosen
    ending = f"test accuracy {final['test_accuracy']:.4f} | loss {final['test_loss']:.4f} | "
    assert re.fullmatch(re.escape(ending) + r"\d+\.\d s \| 1 rank \| cpu", out.splitlines()[-1])
    wide = [row for row in swept if row["hidden"] == best(swept)["hidden"]]
    few, many = (best([row for row in wide if row["batch_size"] == size]) for size in (16, 64))
    gain = many["validation_accuracy"] - few["validation_accuracy"]
    ratio = many["s_per_epoch"] / few["s_per_epoch"]
    assert f"{ratio:.2f}× the time of an epoch, accuracy {gain:+.4f}\n" in out
    assert (folder / "new" / "pictures" / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_penalty_is_chosen_wherever_it_stands(data, tmp_path):
    rows = study(data, tmp_path, **SINGLE | {"weight_decay": (0.3, 0.0, 0.1)})
    lasts = [row for row in rows[1:-1] if row["epoch"] == 2]
    assert best(lasts)["weight_decay"] == rows[-1]["weight_decay"] == 0.0
    assert sorted(row["validation_accuracy"] for row in lasts)[-2] < best(lasts)["validation_accuracy"]


def test_figures_are_of_the_right_samples(data, tmp_path, monkeypatch):
    """The validation set is the last sixth of the training file. A depth of 3 has three hidden layers."""
    runs = []

    class Spy(example.Run):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            runs.append(self)

    monkeypatch.setattr(example, "Run", Spy)
    options = {**SINGLE, "samples": 300, "seed": 3, "depth": 3}
    final = study(data, tmp_path, **options)[-1]
    file, test = load("fashion-mnist", data)
    assert runs[-1].seed == 3
    assert runs[-1].model.sizes == (784, 8, 8, 8, 10)
    assert torch.equal(runs[-1].train.features, file.features[:300])
    assert torch.equal(runs[-1].test.features, file.features[500:])
    for samples, name in ((file[500:], "validation"), (test, "test")):
        outputs = runs[-1].model(samples.inputs(slice(None))).double()
        loss = torch.nn.functional.cross_entropy(outputs, samples.labels).item()
        assert final[f"{name}_loss"] == pytest.approx(loss, rel=1e-6)
        right = (outputs.argmax(1) == samples.labels).double().mean().item()
        assert final[f"{name}_accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("files, first", [("t10k-labels-idx1-ubyte", 0), ("train-labels-idx1-ubyte", 500)])
def test_the_test_set_is_not_used_to_choose(plain, tmp_path, files, first):
    """Other test labels change the test figures alone; other validation labels change all figures."""
    rows, _, _ = plain
    fashion_mnist(tmp_path / "FashionMNIST" / "raw", train=600, test=100)
    path = tmp_path / "FashionMNIST" / "raw" / files
    labels = bytearray(path.read_bytes())
    labels[8 + first :] = bytes((label + 1) % 10 for label in labels[8 + first :])
    path.write_bytes(bytes(labels))
    others = study(tmp_path, tmp_path)
    if files.startswith("t10k"):
        assert timeless(others)[:-1] == timeless(rows)[:-1]  # and two runs give the same figures
        differing = {key for key in rows[-1] if others[-1][key] != rows[-1][key]}
        assert differing <= {"test_accuracy", "test_loss", *TIMES}
        assert others[-1]["test_loss"] > rows[-1]["test_loss"]
    else:
        assert all(a["validation_loss"] != b["validation_loss"] for a, b in zip(rows, others, strict=True))


def test_another_seed_and_a_larger_penalty_matter(data):
    norms = []
    file, _ = load("fashion-mnist", data)
    with join_world("cpu") as world:
        for decay, seed in ((0.0, 0), (1e-3, 0), (1e-2, 0), (0.0, 1)):
            choice = {"hidden": 8, "batch_size": 16, "lr": 0.2, "weight_decay": decay}
            flags = example.Flags(seed=seed)
            model, rows = example.train(choice, 3, flags, (file[:500], file[500:]), world)
            norm = sum(p.norm() ** 2 for p in model.parameters() if p.dim() > 1).sqrt().item()
            norms.append((norm, rows[-1]["train_loss"]))
    assert norms[0][0] > 1.01 * norms[1][0] > 1.01**2 * norms[2][0]
    assert norms[0][1] != norms[3][1]


def test_changes_of_the_penalty_that_losses_ask_for(monkeypatch, capsys):
    """Below a quarter of the validation loss is over-fitting; above a smaller λ's is too much λ."""
    losses = {0.0: (0.1, 0.5), 1e-3: (0.2, 0.4), 1e-2: (0.41, 0.45)}

    def study(choice, epochs):
        train_loss, validation_loss = losses[choice["weight_decay"]]
        row = {**choice, "train_loss": train_loss, "validation_loss": validation_loss}
        return None, [row | {"validation_accuracy": 0.5}]

    flags = example.Flags(weight_decay=tuple(losses))
    runs = example.penalties(flags, study, chosen={})
    assert [rows[-1]["asks_for"] for _, rows in runs] == ["more λ", "this λ", "less λ"]


ERRORS = [
    *(
        (f"--{name}", "take one value or more each")
        for name in ("hidden", "batch-size", "lr", "weight-decay")
    ),
    ("--hidden 8 0", "--hidden is (8, 0), expected at least 1"),
    ("--lr 0.1 nan", "--lr is (0.1, nan), expected at least 0"),
    ("--sweep-epochs 0", "--sweep-epochs is 0, expected at least 1"),
    ("--data /nonexistent", "/nonexistent/MNIST/raw/train-images-idx3-ubyte.gz is missing"),
]


@pytest.mark.parametrize("flags, message", ERRORS)
def test_errors(monkeypatch, capsys, flags, message):
    assert message in error_of(example, f"--device cpu {flags}", monkeypatch, capsys)


@pytest.mark.parametrize("wrong", [{"lr": (0.2, 1e37)}, {"weight_decay": (0.0, 1e37)}], ids=str)
def test_a_run_that_diverges_is_refused(data, tmp_path, wrong):
    message = r"^the training loss of epoch \d is (nan|inf); take a smaller rate$"
    with pytest.raises(ConfigError, match=message):
        study(data, tmp_path, **SINGLE | wrong)
    assert (tmp_path / "metrics.jsonl").read_text() == ""  # and no NaN in it


@pytest.mark.slow
def test_as_a_user_runs_it(data):
    flags = "--dataset fashion-mnist --device cpu --hidden 8 --batch-size 16 --lr 0.2 --epochs 1"
    script = str(ROOT / "examples" / "digits_report.py")
    code, out, err = run(sys.executable, script, *flags.split(), "--data", str(data))
    assert (code, err) == (0, "")
    assert re.search(r"1\.00× the time of an epoch, accuracy \+0\.0000", out)  # of a single choice
    ending = r"test accuracy [01]\.\d{4} \| loss \d+\.\d{4} \| \d+\.\d s \| 1 rank \| cpu"
    assert re.fullmatch(ending, out.splitlines()[-1])
    assert max(map(len, out.splitlines())) <= 80


def test_legends_and_axes_name_their_values(monkeypatch, tmp_path):
    from matplotlib.figure import Figure
    from support import plots

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: figures.append(figure))
    rows = [{"lr": lr, "hidden": h, "loss": lr * h, "cost": h} for h in (4, 8) for lr in (0.1, 0.2)]
    both = plots.Panel(rows, "lr", ["loss", "cost"], ["hidden"], log=True)
    plots.save_panels(tmp_path / "p.png", [plots.Panel(rows, "lr", ["loss"], ["hidden", "lr"]), both])
    labels = [axes.get_legend_handles_labels()[1] for axes in figures[0].axes[:2]]
    assert labels[0][0] == "hidden 4, lr 0.1"
    assert labels[1] == ["loss, hidden 4", "loss, hidden 8", "cost, hidden 4", "cost, hidden 8"]
    plots.save_attention(tmp_path / "a.png", torch.eye(3), torch.tensor([1, 1, 2]), ("a", "b", "c"))
    axes = figures[1].axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["b", "c"]
    assert list(axes.get_yticks()) == [0.5, 2.0]  # the middle of each class
