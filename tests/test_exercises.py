# SPDX-License-Identifier: MIT
"""Exercises: their data, their choices, their formulas, and Amdahl's law.

`test_examples` runs them by their command lines.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import lesson, rows_of
from fake_data import fashion_mnist
from samples import normal

pytest.importorskip("tyro", reason="tyro reads the flags")

import matmul_attention
import matmul_convolution
import matmul_regression
import quadrants
from matmul_convolution import windows
from support.console import compare

from torchpar.errors import ConfigError

# The quadrants


def test_labels_are_those_of_the_quadrants():
    points = quadrants.draw(4000, 0)
    x, y = points.features.T
    for right, up, label in ((True, True, 0), (False, True, 1), (False, False, 0), (True, False, 1)):
        quadrant = ((x > 0) == right) & ((y > 0) == up)
        assert 900 < quadrant.sum() < 1100  # 1000 ± 4 standard deviations
        assert points.labels[quadrant].eq(label).all()
    nearest = points.features.abs().min()
    assert quadrants.MARGIN <= nearest < quadrants.MARGIN + 0.001  # the points are no farther than promised
    assert points.features.abs().max() <= 1
    noisy = quadrants.draw(4000, 0, 0.1)
    assert torch.equal(points.features, noisy.features)
    assert 324 < (points.labels != noisy.labels).sum() < 476  # 400 ± 4 standard deviations


def test_noise_is_learnt_by_wide_networks_and_not_under_a_penalty(monkeypatch, tmp_path, capsys):
    metrics = tmp_path / "metrics"
    monkeypatch.setattr(quadrants, "WIDTHS", (1, 32))
    monkeypatch.setattr(quadrants, "PENALTIES", (0.0, 1e-2, 1e-1))
    quadrants.main(quadrants.Flags(noise=True, epochs=40, device="cpu", metrics=metrics))
    rows = rows_of(metrics)
    assert len(rows) == 6
    of = {(row["width"], row["penalty"]): row for row in rows}
    gap = {key: row["validation_loss"] - row["train_loss"] for key, row in of.items()}
    assert gap[32, 0.0] > 2 * gap[32, 1e-2]
    assert of[32, 1e-2]["validation_loss"] < of[32, 0.0]["validation_loss"]
    assert of[1, 0.0]["train_loss"] > 2 * of[32, 0.0]["train_loss"]  # too narrow
    assert of[32, 0.1]["train_loss"] > 2 * of[32, 0.0]["train_loss"]  # too large a λ
    assert rows[-1]["validation_loss"] == min(row["validation_loss"] for row in rows)
    width, penalty = max(gap, key=gap.__getitem__)
    assert f"furthest above its training loss: width {width}, λ {penalty:g} (" in capsys.readouterr().out


# Digits

CHOICE = ("hidden", "batch_size", "lr")


def study(root: Path) -> list[dict[str, Any]]:
    """The metrics of a small study of the data in ``root``."""
    flags = "--dataset fashion-mnist --device cpu --sweep-epochs 1 --epochs 2 --hidden 4 8"
    flags += " --batch-size 64 16 --lr 0.2 0.002 --weight-decay 0 0.03"
    files = [f"--data={root}", f"--metrics={root / 'metrics'}"]
    assert lesson("digits_report", *files, *flags.split())[0] == 0
    return rows_of(root / "metrics")


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row["validation_accuracy"])


def test_the_choice_is_the_best_on_the_validation_set_and_not_by_the_test_set(tmp_path):
    """Other test labels change the test figures alone, and two runs give the same figures."""
    rows = study(fashion_mnist(tmp_path, train=600, test=100))
    swept, epochs, final = rows[:8], rows[8:-1], rows[-1]
    assert len({tuple(row[name] for name in CHOICE) for row in swept}) == 8
    assert {row["weight_decay"] for row in swept} == {0.0}
    assert [(row["weight_decay"], row["epoch"]) for row in epochs] == [(0, 1), (0, 2), (0.03, 1), (0.03, 2)]
    assert len({row["validation_accuracy"] for row in swept}) > 2  # there is something to choose
    assert {row["steps"] for row in swept if row["batch_size"] == 64} == {8}  # 500 samples: 7 and a rest
    assert all(row[name] == best(swept)[name] for name in CHOICE for row in epochs)
    assert epochs[3]["train_loss"] > epochs[1]["train_loss"]  # under a penalty
    chosen = best([row for row in epochs if row["epoch"] == 2])
    assert {key: final[key] for key in chosen} == chosen

    path = tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:8] + bytes((label + 1) % 10 for label in content[8:]))
    changed = set()
    for row, other in zip(rows, study(tmp_path), strict=True):
        changed |= {name for name in row if row[name] != other[name]}
    assert changed - {"ms_per_step", "s_per_epoch"} == {"test_accuracy", "test_loss"}


# Matrix products


def test_small_batches_and_a_larger_rate_reach_a_lower_cost(tmp_path):
    matmul_regression.main(matmul_regression.Flags(device="cpu", seed=1, metrics=tmp_path / "metrics"))
    (row,) = rows_of(tmp_path / "metrics")
    assert 0 <= row["error"] <= 2 * row["pytorch_error"] < 1e-3
    ends = {name: costs[-1] for name, costs in row["costs"].items()}
    assert ends["batch 4, learning rate 0.01"] < 0.1 < ends["batch 64, learning rate 0.01"]
    assert ends["batch 64, learning rate 0.1"] < ends["batch 64, learning rate 0.01"]


def test_more_than_twice_pytorchs_error_is_refused():
    x = normal(1000).float()
    exact = x.double().sin()
    native = (x.sin() - exact).abs().max().item()
    assert [*compare("sine", x.sin(), torch.sin, x).values()] == ["sine", native, native]
    compare("within", exact + 1.9 * native, torch.sin, x)
    compare("within", (exact + 9 * native).float(), torch.sin, x, terms=100)
    for wrong in (exact + 2.1 * native, 1.001 * x.sin(), x.sin() * torch.nan):
        with pytest.raises(ConfigError, match=r"^sine is off by .*, expected .* at most"):
            compare("sine", wrong, torch.sin, x)


@pytest.mark.parametrize(
    "module, part, name, wrong",
    [
        (matmul_regression, "gradient", "mse_gradient", lambda x, y, w: x.T @ (x @ w - y) / len(y)),
        (matmul_convolution, "convolution", "windows", lambda x, **at: windows(x, **at).flip(-1)),
        (matmul_attention, "attention", "matmul_t", lambda x: x @ x.mT * 1.01),
    ],
)
def test_a_lesson_stops_at_a_wrong_formula(monkeypatch, module, part, name, wrong):
    monkeypatch.setattr(module, name, wrong)
    code, _, err = lesson(module.__name__, "--device", "cpu")
    message = (
        rf"{part} is off by \S+, expected \S+ at most; mend its formula, which leaves its inputs as they are"
    )
    assert code == 2
    assert re.fullmatch(rf"{module.__name__}\.py: error: {message}\n", err)


# Amdahl's law


def test_fit_is_the_least_squares_of_relative_times():
    speedups = {1: 1.0, 2: 1.7, 4: 3.3, 8: 4.0}  # which lie on no curve of the law
    law = np.array([[1 - 1 / n, 1 - 1 / s] for n, s in speedups.items()])
    (best,), *_ = np.linalg.lstsq(law[:, :1], law[:, 1])
    assert quadrants.fit(speedups) == pytest.approx(best, abs=1e-12)
    assert quadrants.fit({2: 0.5}) == 0  # p stays a share
    assert quadrants.fit({2: 2.5}) == 1


def test_the_report_fits_the_medians_of_all_rounds_but_the_first(monkeypatch):
    rounds = {
        (64, 1): [(9.0, 0.5), (2.0, 0.1), (1.0, 0.2), (3.0, 0.3)],
        (64, 2): [(9.0, 0.5), (1.25, 0.1), (1.0, 0.2), (7.0, 0.3)],
    }
    monkeypatch.setattr(quadrants, "measure", lambda flags: rounds)
    report = partial(quadrants.report, quadrants.Flags(processes=(1, 2), sizes=(64,)))
    row = {"batch_size": 64, "ms_on_1": 2000.0, "speedup_on_1": 1.0, "speedup_on_2": 1.6}
    assert report() == [row | {"p": pytest.approx(0.75), "limit": pytest.approx(4.0)}]
    rounds[64, 2][1:] = [(1.0, 0.1)]
    assert report()[0]["limit"] is None  # everything is divided
    rounds[64, 2][0] = (9.0, 0.5001)
    with pytest.raises(ConfigError, match="is off by 2e-04 of that on one"):
        report()
