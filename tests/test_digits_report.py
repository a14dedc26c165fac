# SPDX-License-Identifier: MIT
"""Tests of examples/digits_report.py: its choices, and the figures that they are made by."""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import rows_of
from fake_data import fashion_mnist

from torchpar.data import load

pytest.importorskip("torchvision", reason="torchvision reads the data sets")
pytest.importorskip("tyro", reason="tyro reads the flags")

import digits_report as example

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
    metrics = folder / "metrics"
    small = {"sweep_epochs": 1, "epochs": 2, "dataset": "fashion-mnist", "device": "cpu", **SWEEP}
    example.main(example.Flags(data=data, metrics=metrics, **(small | flags)))
    return rows_of(metrics)


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory) -> tuple[list[dict[str, Any]], str]:
    """The metrics and the output of one study that the tests share."""
    with redirect_stdout(StringIO()) as out:
        return study(data, tmp_path_factory.mktemp("study")), out.getvalue()


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row["validation_accuracy"])


def test_the_choice_is_the_best_on_the_validation_set(plain):
    rows, out = plain
    swept, epochs, final = rows[:8], rows[8:-1], rows[-1]
    assert len({tuple(row[name] for name in CHOICE[:3]) for row in swept}) == 8
    assert {row["weight_decay"] for row in swept} == {0.0}
    assert [(row["weight_decay"], row["epoch"]) for row in epochs] == [(0, 1), (0, 2), (0.03, 1), (0.03, 2)]
    assert len({row["validation_accuracy"] for row in swept}) > 2  # there is something to choose
    assert {row["steps"] for row in swept if row["batch_size"] == 64} == {8}  # 500 samples: 7 and a rest
    assert all(row[name] == best(swept)[name] for name in CHOICE[:3] for row in epochs)
    assert epochs[3]["train_loss"] > epochs[1]["train_loss"]  # under a penalty
    chosen = best([row for row in epochs if row["epoch"] == 2])
    assert {key: final[key] for key in chosen} == chosen
    wide = [row for row in swept if row["hidden"] == best(swept)["hidden"]]
    few, many = (best([row for row in wide if row["batch_size"] == size]) for size in (16, 64))
    gain = many["validation_accuracy"] - few["validation_accuracy"]
    ratio = many["s_per_epoch"] / few["s_per_epoch"]
    assert f"{ratio:.2f}× the time of an epoch, accuracy {gain:+.4f}\n" in out


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
    for samples, name in ((file[500:], "validation"), (test, "test")):
        outputs = runs[-1].model(samples.inputs(slice(None))).double()
        loss = torch.nn.functional.cross_entropy(outputs, samples.labels).item()
        assert final[f"{name}_loss"] == pytest.approx(loss, rel=1e-6)
        right = (outputs.argmax(1) == samples.labels).double().mean().item()
        assert final[f"{name}_accuracy"] == pytest.approx(right)


def test_the_test_set_is_not_used_to_choose(plain, tmp_path):
    """Other test labels change the test figures alone, and two runs give the same figures."""
    fashion_mnist(tmp_path / "FashionMNIST" / "raw", train=600, test=100)
    path = tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:8] + bytes((label + 1) % 10 for label in content[8:]))
    changed = set()
    for row, other in zip(plain[0], study(tmp_path, tmp_path), strict=True):
        changed |= {name for name in row if row[name] != other[name]}
    assert changed - {"ms_per_step", "s_per_epoch"} == {"test_accuracy", "test_loss"}


def test_changes_of_the_penalty_that_losses_ask_for(capsys):
    """Below a quarter of the validation loss is over-fitting; above a smaller λ's is too much λ."""
    losses = {0.0: (0.1, 0.5), 1e-3: (0.2, 0.4), 1e-2: (0.41, 0.45)}

    def study(choice, epochs):
        train_loss, validation_loss = losses[choice["weight_decay"]]
        row = {**choice, "train_loss": train_loss, "validation_loss": validation_loss}
        return None, [row | {"validation_accuracy": 0.5}]

    flags = example.Flags(weight_decay=tuple(losses))
    runs = example.penalties(flags, study, chosen={})
    assert [rows[-1]["asks_for"] for _, rows in runs] == ["more λ", "this λ", "less λ"]
