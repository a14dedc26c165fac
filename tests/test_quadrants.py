# SPDX-License-Identifier: MIT
"""Tests of examples/quadrants.py, of Amdahl's law and of the report by it."""

import math
import re
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from commands import ROOT, error_of, rows_of, run

pytest.importorskip("tyro", reason="tyro reads the flags")
pytest.importorskip("matplotlib", reason="--plots draws with it")

import quadrants
from support import amdahl

from torchpar.errors import ConfigError
from torchpar.profile import amdahl as law

PNG = b"\x89PNG"


# The points and the network


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


def test_noise_turns_its_share_of_labels_and_moves_no_point():
    seed = 3 * (2**63 - 1)  # of the largest --seed
    true, noisy = (quadrants.draw(4000, seed, wrong) for wrong in (0.0, 0.1))
    assert torch.equal(true.features, noisy.features)
    assert 324 < (true.labels != noisy.labels).sum() < 476  # 400 ± 4 standard deviations


def test_the_loss_is_the_binary_cross_entropy():
    points = quadrants.draw(7, 0)
    model, _ = quadrants.build([2, 3, 1], 0.0, 0)
    p = model(points.features).squeeze(1).detach().double()
    t = points.labels.double()
    expected = -(t * p.log() + (1 - t) * (1 - p).log()).mean().item()
    loss, accuracy = quadrants.evaluate(model, points)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert accuracy == pytest.approx(((p > 0.5) == points.labels).double().mean().item())
    # A wrong label of probability 1 has the loss that PyTorch gives it.
    assert quadrants.loss_sum(torch.ones(1, 1), torch.zeros(1, dtype=torch.long)) == 100


def test_a_step_descends_by_the_mean_over_the_batch():
    """One step of plain SGD with rate 0.2; the first step of Nesterov momentum 0.9 is 1.9 times as long."""
    points = quadrants.draw(7, 0)
    model, optimizer = quadrants.build([2, 3, 1], 0.0, 0)
    parameters = [p.detach().clone() for p in model.parameters()]
    loss = quadrants.loss_sum(model(points.features), points.labels) / 7
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    quadrants.train(model, optimizer, points, epochs=1, batch_size=7, seed=0)
    expected = [p - 0.2 * 1.9 * g for p, g in zip(parameters, gradients, strict=True)]
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected)


# The lessons


@pytest.mark.parametrize("sizes", [[2, 1], [2, 1, 1]], ids=str)
def test_a_line_does_not_separate_them(sizes):
    """Nor does one ReLU."""
    model, optimizer = quadrants.build(sizes, 0.0, 0)
    points = quadrants.draw(1000, 0)
    quadrants.train(model, optimizer, points, epochs=10, batch_size=100, seed=0)
    loss, accuracy = quadrants.evaluate(model, points)
    assert accuracy < 0.8
    assert loss > 0.5


def test_the_quadrants_are_learnt(monkeypatch, tmp_path):
    monkeypatch.setattr(amdahl, "report", lambda *arguments: [])
    metrics = tmp_path / "metrics.jsonl"
    quadrants.main(quadrants.Flags(seed=1, device="cpu", metrics=metrics, plots=tmp_path))
    last = rows_of(metrics)[-1]
    assert last["test_accuracy"] == 1
    assert last["test_loss"] < 0.11
    assert (tmp_path / "boundaries.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_noise_is_learnt_by_wide_networks_and_not_under_a_penalty(monkeypatch, tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(amdahl, "report", lambda *arguments: pytest.fail("a report with --noise"))
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
    best, widest, last = capsys.readouterr().out.splitlines()[-3:]
    assert best.startswith(f"lowest validation loss: width {rows[-1]['width']}, λ {rows[-1]['penalty']:g} (")
    width, penalty = max(gap, key=gap.__getitem__)
    assert widest.startswith(f"furthest above its training loss: width {width}, λ {penalty:g} (")
    expected = f"test accuracy {rows[-1]['test_accuracy']:.4f} | loss {rows[-1]['test_loss']:.4f} | "
    assert re.fullmatch(re.escape(expected) + r"\d+\.\d s \| 1 rank \| cpu", last)


# Amdahl's law


def test_the_law():
    assert law.speedup(0.9801, math.inf) == pytest.approx(50.25, abs=0.01)
    assert law.speedup(0.9801, 768) == pytest.approx(47.2, abs=0.05)
    assert law.speedup(0.0, 8) == 1
    assert law.speedup(1.0, 8) == 8
    assert law.speedup(1.0, math.inf) == math.inf


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("processes", [(1, 2), (1, 2, 4, 8), (3,)], ids=str)
def test_fit_recovers_p(p, processes):
    assert law.fit({n: law.speedup(p, n) for n in processes}) == pytest.approx(p, abs=1e-12)


def test_fit_is_the_least_squares_of_relative_times():
    speedups = {1: 1.0, 2: 1.7, 4: 3.3, 8: 4.0}

    def squares(p: float) -> float:
        return sum((1 / law.speedup(p, n) - 1 / s) ** 2 for n, s in speedups.items())

    best = min(range(10001), key=lambda i: squares(i / 10000)) / 10000
    assert law.fit(speedups) == pytest.approx(best, abs=1e-4)
    assert squares(best) > 0.001  # the points lie on no curve of the law
    assert law.fit({2: 0.5}) == 0  # p stays a share
    assert law.fit({2: 2.5}) == 1


@pytest.mark.parametrize("speedups", [{}, {1: 1.0}, {0: 1.0, 2: 2.0}, {2: 0.0}, {2: math.nan}], ids=str)
def test_fit_refuses(speedups):
    with pytest.raises(ConfigError, match=r"expected (a number above 1 and none below it|positive numbers)"):
        law.fit(speedups)


def scaling(**of_two: float) -> law.Scaling:
    """One process needs 10, 20, 60, 0 and 10 s for the phases, two processes the given seconds."""
    of_one = dict(zip(law.PHASES, (10.0, 20.0, 60.0, 0.0, 10.0), strict=True))
    return law.Scaling(64, {1: of_one, 2: of_one | of_two}, {1: 0.5, 2: 0.5})


def test_a_scaling_names_the_phase_that_limits():
    ideal = {phase: t / 2 for phase, t in scaling().seconds[1].items()}
    s = scaling(**ideal | {"collectives": 6.0, "optimizer": 10.0})
    assert s.p_of_profile == pytest.approx(0.8)
    assert s.speedups == {1: 1.0, 2: pytest.approx(100 / 61)}
    assert s.p == pytest.approx(0.78)  # 0.39 / 0.5
    excess = {"data": 0.0, "forward": 0.0, "backward": 0.0, "collectives": 6.0, "optimizer": 5.0}
    assert s.excess(2) == pytest.approx(excess)
    assert sum(s.excess(2).values()) == pytest.approx(61 - 100 / 2)
    assert "limit 4.55×, achieved 1.64× on 2; collectives limits, 6000.0 ms" in str(s)
    slower = scaling(**ideal | {"collectives": 4.0, "optimizer": 90.0})
    assert "limit 1.00×, achieved 0.72× on 2, slower than one; optimizer limits" in str(slower)
    faster = scaling(**ideal | {"forward": 1.0})
    assert "p 1.000 (0.800 by the profile), limit none, achieved 2.44× on 2, more than" in str(faster)
    assert [row["speedup"] for row in s.rows()] == [1.0, pytest.approx(100 / 61)]
    assert s.rows()[1]["collectives_ms"] == 6000


# The report


@pytest.mark.parametrize("flags", ["1", "2 4", "1 2 3", "1 2 2", "1 0"])
def test_processes_that_do_not_fit(monkeypatch, capsys, flags):
    error = error_of(quadrants, f"--processes {flags}", monkeypatch, capsys)
    assert "expected 1 and then multiples of the last" in error


def test_batches_smaller_than_the_processes(monkeypatch, capsys):
    error = error_of(quadrants, "--processes 1 2 4 --sizes 3 16", monkeypatch, capsys)
    assert "expected at least 4, one sample a process" in error


@pytest.mark.slow
def test_the_script_as_a_user_runs_it(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    outputs = ["--plots", str(tmp_path), "--metrics", str(metrics)]
    reduced = "--device cpu --epochs 2 --processes 1 2 --sizes 16384"
    script = str(ROOT / "examples" / "quadrants.py")
    code, out, err = run(sys.executable, script, *reduced.split(), *outputs)
    assert code == 0, err
    one, two, last = rows_of(metrics)
    assert [(row["batch_size"], row["processes"]) for row in (one, two)] == [(16384, 1), (16384, 2)]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert (one["collectives_ms"], one["speedup"]) == (0, 1)
    assert two["speedup"] == pytest.approx(one["epoch_ms"] / two["epoch_ms"])
    assert two["p"] == pytest.approx(min(max(2 * (1 - 1 / two["speedup"]), 0), 1))
    for row in (one, two):
        phases = [row[f"{phase}_ms"] for phase in law.PHASES]
        assert sum(phases) == pytest.approx(row["epoch_ms"])
        assert min(phases) > 0 or row is one
    lines = out.splitlines()
    assert sum(line.startswith("batch 16384: p ") for line in lines) == 1
    assert ("oversubscribed" in out) is (amdahl.CORES < 2)
    ending = f"test accuracy {last['test_accuracy']:.4f} | loss {last['test_loss']:.4f} | "
    assert re.fullmatch(re.escape(ending) + r"\d+\.\d s \| 1 rank \| cpu", lines[-1])
    for name in ("boundaries.png", "amdahl.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_a_launcher_is_refused(monkeypatch):
    @contextmanager
    def join_two(device):
        yield SimpleNamespace(world_size=2)

    monkeypatch.setattr("torchpar.parallel.launch.world.join_world", join_two)
    with pytest.raises(ConfigError, match="2 processes were started, expected 1"):
        quadrants.main(quadrants.Flags(device="cpu"))
