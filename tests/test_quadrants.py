# SPDX-License-Identifier: MIT
"""The quadrants, over-fitting and its cures, and Amdahl's law."""

import math

import pytest
import torch
from commands import rows_of

pytest.importorskip("tyro", reason="tyro reads the flags")

import quadrants

from torchpar.errors import ConfigError
from torchpar.profile import amdahl as law


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


def test_a_step_descends_by_the_mean_binary_cross_entropy():
    """One step of plain SGD with rate 0.2; the first step of Nesterov momentum 0.9 is 1.9 times as long."""
    points = quadrants.draw(7, 0)
    model, optimizer = quadrants.build([2, 3, 1], 0.0, 0)
    parameters = [p.detach().clone() for p in model.parameters()]
    p, t = model(points.features).squeeze(1).double(), points.labels.double()
    loss = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    found, accuracy = quadrants.evaluate(model, points)
    assert found == pytest.approx(loss.item(), rel=1e-6)
    assert accuracy == pytest.approx(((p > 0.5) == points.labels).double().mean().item())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    quadrants.train(model, optimizer, points, epochs=1, batch_size=7, seed=0)
    expected = [p - 0.2 * 1.9 * g for p, g in zip(parameters, gradients, strict=True)]
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected)


def test_a_line_does_not_separate_them():
    """Nor does one ReLU."""
    points = quadrants.draw(1000, 0)
    for sizes in ([2, 1], [2, 1, 1]):
        model, optimizer = quadrants.build(sizes, 0.0, 0)
        quadrants.train(model, optimizer, points, epochs=10, batch_size=100, seed=0)
        loss, accuracy = quadrants.evaluate(model, points)
        assert loss > 0.5
        assert accuracy < 0.8


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


# Amdahl's law


def test_the_law():
    assert law.speedup(0.9801, math.inf) == pytest.approx(50.25, abs=0.01)
    assert law.speedup(0.9801, 768) == pytest.approx(47.2, abs=0.05)
    assert law.speedup(0.0, 8) == 1
    assert law.speedup(1.0, 8) == 8
    assert law.speedup(1.0, math.inf) == math.inf


def test_fit_is_the_least_squares_of_relative_times():
    for p in (0.0, 0.3, 1.0):
        assert law.fit({n: law.speedup(p, n) for n in (1, 2, 8)}) == pytest.approx(p, abs=1e-12)
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
    assert "limit 4.55×, achieved 1.64× on 2; collectives limits, 6000.0 ms" in str(s)
    slower = scaling(**ideal | {"collectives": 4.0, "optimizer": 90.0})
    assert "limit 1.00×, achieved 0.72× on 2, slower than one; optimizer limits" in str(slower)
    faster = scaling(**ideal | {"forward": 1.0})
    assert "p 1.000 (0.800 by the profile), limit none, achieved 2.44× on 2, more than" in str(faster)
    one, two = s.rows()
    assert (one["processes"], one["speedup"], one["epoch_ms"]) == (1, 1, 100_000)
    assert (two["processes"], two["speedup"], two["collectives_ms"]) == (2, pytest.approx(100 / 61), 6000)
    assert (two["limiting_phase"], two["p"], two["loss"]) == ("collectives", s.p, 0.5)
