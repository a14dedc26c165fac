# SPDX-License-Identifier: MIT
"""The benchmark of whole trainings: its checks reject a training that differs, and contestants pass them."""

import csv
from functools import partial

import numpy as np
import pytest
from commands import ROOT

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("torchvision", reason="torchvision reads the data sets")

from benchmarks import train as benchmark
from benchmarks.results import Result
from benchmarks.timing import Rejected
from benchmarks.train import Inputs, Training, advance_by, epoch_turn
from torchpar.baselines import numpy_mlp
from torchpar.nn import MLP
from torchpar.parallel.launch.world import join_world_of_one

SMALL = Training((784, 30, 10), 10, samples=205)


@pytest.fixture(scope="module")
def epoch() -> Inputs:
    return Inputs(SMALL)


def test_losses_of_another_training_are_rejected(epoch):
    losses = epoch.losses_of(epoch.order)
    epoch.check(losses[3:5], 3, 5)
    swapped = [epoch.order[1], epoch.order[0], *epoch.order[2:]]
    last = losses.copy()
    last[-1] = np.nan
    for wrong in (epoch.losses_of(swapped), losses[::-1], 1.01 * losses, last):
        with pytest.raises(Rejected, match="a loss is off"):
            epoch.check(wrong, 0, 21)
    with pytest.raises(Rejected, match="2 losses of 3 batches"):
        epoch.check(losses[:2], 0, 3)


@pytest.mark.parametrize("name", ["pure Python", "NumPy", "torch", "customary", "autograd", "fused"])
def test_contestants_train_as_float64_does(name, monkeypatch):
    """A rate that is 1% off is rejected. The remainder comes first where the order can be chosen."""
    epoch = Inputs(SMALL)
    if name not in ("autograd", "fused"):
        epoch.order = [epoch.order[-1], *epoch.order[:-1]]
    with join_world_of_one("cpu") as world:
        train = {
            "pure Python": benchmark.by_pure_python,
            "NumPy": benchmark.by_numpy,
            "torch": benchmark.by_torch(MLP(SMALL.sizes)),
            "customary": benchmark.by_customary_script,
            "autograd": benchmark.by_lesson(world, fused=False),
            "fused": benchmark.by_lesson(world, fused=True),
        }[name]
        turn = epoch_turn(epoch, lambda order: advance_by(train(epoch, order)), 7)
        assert turn(0) == []
        assert len(list(iter(partial(turn, 1), None))) == 3  # of 21 batches
        turn = epoch_turn(epoch, lambda order: advance_by(train(epoch, order)), 21)
        monkeypatch.setattr(benchmark, "LR", 1.01 * benchmark.LR)
        turn(0)
        with pytest.raises(Rejected, match="a loss is off"):
            turn(1)


def test_a_program_that_trains_in_another_order_is_rejected(epoch):
    weights = [len(batch) for batch in epoch.order]
    mean = float(np.average(epoch.losses, weights=weights))
    turn = benchmark.program_turn(epoch, epoch.order, lambda: (20.5, mean))
    assert (turn(0), turn(1), turn(1 + benchmark.PROGRAM_EPOCHS)) == ([], [1.0], None)
    other = list(numpy_mlp.batches(205, 10, np.random.default_rng(1)))
    with pytest.raises(Rejected, match="the mean loss is"):
        benchmark.program_turn(epoch, other, lambda: (20.5, mean))(1)


def test_the_committed_table_is_that_of_the_csv():
    folder = ROOT / "benchmarks" / "results" / "cpu-2-cores-avx512"
    tables: dict[str, list[Result]] = {}
    for row in csv.DictReader((folder / "train.csv").read_text().splitlines()):
        ms, speedup = float(row["p50_ms"]), float(row["speedup"])
        found = {"case": row, "contestant": row["contestant"], "found": row}
        tables.setdefault(row["network"], []).append(Result(p50_ms=ms, speedup=speedup, **found))
    assert benchmark.summary(list(tables.values()), 1) == (folder / "train.md").read_text()
