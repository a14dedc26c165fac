# SPDX-License-Identifier: MIT
"""The quadrants' lessons, and the report by Amdahl's law."""

import math
import re
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from commands import ROOT, rows_of, run

pytest.importorskip("tyro", reason="tyro reads the flags")
pytest.importorskip("matplotlib", reason="--plots draws with it")

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ErrorHandler, ProcessFailure

from benchmarks.amdahl import law, measure, show
from benchmarks.scaling.plan import CORES
from torchpar import training
from torchpar.errors import ConfigError
from torchpar.parallel.world import World, join_world

SCRIPT = str(ROOT / "examples" / "quadrants.py")
PNG = b"\x89PNG"


@pytest.fixture
def quadrants(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import quadrants

    return quadrants


def without_report(monkeypatch) -> None:
    monkeypatch.setattr(show, "report", lambda *arguments: [])


# The points


def test_labels_are_those_of_the_quadrants(quadrants):
    with join_world("cpu") as world:
        points = quadrants.draw(4000, 0, world)
        x, y = points.images.T
        for right, up, label in ((True, True, 0), (False, True, 1), (False, False, 0), (True, False, 1)):
            quadrant = ((x > 0) == right) & ((y > 0) == up)
            assert 900 < quadrant.sum() < 1100  # 1000 ± 4 standard deviations
            assert points.labels[quadrant].eq(label).all()
        assert points.images.abs().min() >= quadrants.MARGIN
        assert (
            points.images.abs().min() < quadrants.MARGIN + 0.001
        )  # the test is not made easier than it says
        assert points.images.abs().max() <= 1
        assert torch.equal(points.inputs(torch.tensor([2, 1])), points.images[[2, 1]])


def test_noise_turns_its_share_of_labels_and_moves_no_point(quadrants):
    with join_world("cpu") as world:
        seed = 3 * (2**63 - 1)  # of the largest --seed
        true, noisy = (quadrants.draw(4000, seed, world, wrong) for wrong in (0.0, 0.1))
    assert torch.equal(true.images, noisy.images)
    assert 324 < (true.labels != noisy.labels).sum() < 476  # 400 ± 4 standard deviations


# The step of a network with one output


def test_one_output_has_the_binary_cross_entropy(quadrants):
    x, labels = torch.tensor([[0.5, -0.25], [1.0, 2.0], [-1.0, 0.5]]), torch.tensor([1, 0, 1])
    with join_world("cpu") as world:
        model, _ = quadrants.build([2, 3, 1], 0.0, 0, world)
        step = quadrants.OneOutput(model)
        part = step.gradients(x, labels, 6, lambda *_: pytest.fail("fit's own loss"), training.NoPhases())
        p = model(x).squeeze(1)
        expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).sum()
        gradients = torch.autograd.grad(expected / 6, list(model.parameters()))
        torch.testing.assert_close(part, expected.detach())
        torch.testing.assert_close([q.grad for q in model.parameters()], list(gradients))
        points = quadrants.Points(x, labels, ("0", "1"))
        loss, outputs = training.evaluate(step, points, world, "cross-entropy")
        assert loss == pytest.approx(expected.item() / 3, rel=1e-6)
        assert torch.equal(outputs.argmax(1) == 1, p > 0.5)


def test_certainty_that_is_wrong_has_the_loss_that_torch_gives_it(quadrants):
    certain = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Sigmoid())
    certain[0].weight.data.fill_(1e4)
    points = quadrants.Points(torch.ones(1, 2), torch.tensor([0]), ("0", "1"))
    with join_world("cpu") as world:
        loss, _ = training.evaluate(quadrants.OneOutput(certain), points, world, "cross-entropy")
    assert loss == torch.nn.functional.binary_cross_entropy(torch.ones(1), torch.zeros(1)).item() == 100


# The lessons


@pytest.mark.parametrize("seed", [0, 1])
def test_the_quadrants_are_learnt(quadrants, monkeypatch, tmp_path, seed):
    without_report(monkeypatch)
    metrics = tmp_path / "metrics.jsonl"
    quadrants.main(quadrants.Flags(seed=seed, device="cpu", metrics=metrics, plots=tmp_path))
    last = rows_of(metrics)[-1]
    assert last["test_accuracy"] == 1
    assert last["test_loss"] < 0.11
    assert (tmp_path / "boundaries.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("sizes", [[2, 1], [2, 1, 1]], ids=str)
def test_a_line_does_not_part_them(quadrants, sizes):
    """Nor does one ReLU, which bends none."""
    with join_world("cpu") as world:
        model, optimizer = quadrants.build(sizes, 0.0, 0, world)
        points = quadrants.draw(1000, 0, world)
        step = quadrants.OneOutput(model)
        last = training.fit(model, optimizer, points, points, world, step=step, epochs=10, batch_size=100)[-1]
    assert last.test_accuracy < 0.8
    assert last.test_loss > 0.5


def test_noise_is_learnt_by_wide_networks_and_not_under_a_penalty(quadrants, monkeypatch, tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(show, "report", lambda *arguments: pytest.fail("a report with --noise"))
    quadrants.main(quadrants.Flags(noise=True, epochs=40, device="cpu", metrics=metrics, plots=tmp_path))
    rows = rows_of(metrics)
    assert len(rows) == 16
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
    assert (tmp_path / "boundaries.png").read_bytes().startswith(PNG)


# The law


def test_the_law():
    assert law.speedup(0.9801, math.inf) == pytest.approx(50.25, abs=0.01)
    assert law.speedup(0.9801, 768) == pytest.approx(47.2, abs=0.05)
    assert law.speedup(0.0, 8) == 1
    assert law.speedup(1.0, 8) == 8
    assert law.speedup(1.0, math.inf) == math.inf


@pytest.mark.parametrize("p", [0.0, 0.3, 0.98, 1.0])
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


@pytest.mark.parametrize("speedups, p", [({2: 0.5}, 0.0), ({2: 2.5}, 1.0)])
def test_fit_stays_a_share(speedups, p):
    assert law.fit(speedups) == p


@pytest.mark.parametrize("speedups", [{}, {1: 1.0}, {0: 1.0, 2: 2.0}], ids=str)
def test_fit_needs_more_than_one_process(speedups):
    with pytest.raises(
        ConfigError, match=r"processes are \[.*\], expected a number above 1 and none below it"
    ):
        law.fit(speedups)


@pytest.mark.parametrize("s", [0.0, -1.0, math.nan, math.inf])
def test_fit_needs_speedups(s):
    with pytest.raises(ConfigError, match="expected positive numbers"):
        law.fit({2: s})


def scaling(**of_two: float) -> law.Scaling:
    """One process needs 10, 20, 60, 0 and 10 s, two what is given."""
    alone = dict(zip(law.PHASES, (10.0, 20.0, 60.0, 0.0, 10.0), strict=True))
    return law.Scaling(64, {1: alone, 2: alone | of_two}, {1: 0.5, 2: 0.5})


def test_a_scaling_names_the_phase_that_limits():
    ideal = {phase: t / 2 for phase, t in scaling().seconds[1].items()}
    s = scaling(**ideal | {"collectives": 6.0, "optimizer": 10.0})
    assert s.p_of_profile == pytest.approx(0.8)
    assert s.speedups == {1: 1.0, 2: pytest.approx(100 / 61)}
    assert s.p == pytest.approx(0.78)  # 0.39 / 0.5
    excess = {"data": 0.0, "forward": 0.0, "backward": 0.0, "collectives": 6.0, "optimizer": 5.0}
    assert s.excess(2) == pytest.approx(excess)
    assert sum(s.excess(2).values()) == pytest.approx(61 - 100 / 2)
    assert "limit 4.55×, achieved 1.64× on 2; collectives limits, 6000.0 ms" in s.finding()
    assert "slower" not in s.finding()
    slower = scaling(**ideal | {"collectives": 4.0, "optimizer": 90.0})
    assert "limit 1.00×, achieved 0.72× on 2, slower than one; optimizer limits" in slower.finding()
    faster = scaling(**ideal | {"forward": 1.0})
    assert "p 1.000 (0.800 by the profile), limit none, achieved 2.44× on 2, more than" in faster.finding()
    assert [row["speedup"] for row in s.rows()] == [1.0, pytest.approx(100 / 61)]
    assert s.rows()[1]["collectives_ms"] == 6000


# The report


def no_job(world: World) -> Any:
    raise AssertionError(f"{world} was asked to train")


JOB = measure.Job(no_job, no_job)


@pytest.mark.parametrize(
    "status, error, told",
    [
        (1, RuntimeError("no memory\nfor this"), "RuntimeError: no memory"),
        (-9, None, "exit status -9"),
    ],
)
def test_a_process_that_fails_is_told_in_one_line(monkeypatch, tmp_path, status, error, told):
    """With the failure as torch's launcher tells it: by the error's file, or by the exit status alone."""
    file = tmp_path / "error.json"
    if error:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        ErrorHandler().record_exception(error)
    failure = ProcessFailure(local_rank=1, pid=0, exitcode=status, error_file=str(file))

    def launched(*arguments: Any) -> None:
        raise ChildFailedError("_rank", {1: failure})

    monkeypatch.setattr(measure, "elastic_launch", lambda config, function: launched)
    with pytest.raises(ConfigError) as caught:
        measure.measure(JOB, (1, 2), (16,))
    assert str(caught.value) == f"process 1 of 2 failed: {told}"


@pytest.mark.parametrize("processes", [(), (1,), (2, 4), (1, 2, 3), (1, 2, 2), (1, 0)], ids=str)
def test_processes_that_do_not_fit(processes):
    with pytest.raises(ConfigError, match="expected 1 and then multiples of the last"):
        measure.measure(JOB, processes, (16,))


@pytest.mark.parametrize("sizes", [(), (3, 16)], ids=str)
def test_batches_smaller_than_the_processes(sizes):
    with pytest.raises(ConfigError, match="expected at least 4, one sample a process"):
        measure.measure(JOB, (1, 2, 4), sizes)


def test_the_script_as_a_user_runs_it(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    outputs = ["--plots", str(tmp_path), "--metrics", str(metrics)]
    reduced = "--device cpu --epochs 2 --processes 1 2 --sizes 16384"
    code, out, err = run(sys.executable, SCRIPT, *reduced.split(), *outputs)
    assert code == 0, err
    alone, both, last = rows_of(metrics)
    assert [(row["batch_size"], row["processes"]) for row in (alone, both)] == [(16384, 1), (16384, 2)]
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert (alone["collectives_ms"], alone["speedup"]) == (0, 1)
    assert both["speedup"] == pytest.approx(alone["epoch_ms"] / both["epoch_ms"])
    assert both["p"] == pytest.approx(min(max(2 * (1 - 1 / both["speedup"]), 0), 1))
    for row in (alone, both):
        phases = [row[f"{phase}_ms"] for phase in law.PHASES]
        assert sum(phases) == pytest.approx(row["epoch_ms"])
        assert min(phases) > 0 or row is alone
    lines = out.splitlines()
    assert sum(line.startswith("batch 16384: p ") for line in lines) == 1
    assert sum(line.startswith("p is of N = 2 alone") for line in lines) == 1
    assert ("oversubscribed" in out) is (CORES < 2)
    ending = f"test accuracy {last['test_accuracy']:.4f} | loss {last['test_loss']:.4f} | "
    assert re.fullmatch(re.escape(ending) + r"\d+\.\d s \| 1 rank \| cpu", lines[-1])
    for name in ("boundaries.png", "amdahl.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_a_launcher_is_refused(quadrants, monkeypatch):
    two = World(0, 0, 2, torch.device("cpu"))
    monkeypatch.setattr("torchpar.parallel.world.join_world", lambda device: nullcontext(two))
    with pytest.raises(ConfigError, match="2 processes were started, expected 1"):
        quadrants.main(quadrants.Flags(device="cpu"))
