# SPDX-License-Identifier: MIT
"""The benchmark of whole trainings: its checks reject a training that differs. `test_benchmarks` runs it."""

import csv

import numpy as np
import pytest
from commands import ROOT

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("torchvision", reason="torchvision reads the data sets")

from benchmarks import train as benchmark
from benchmarks.results import Result
from benchmarks.timing import Rejected
from benchmarks.train import Inputs, Training
from torchpar.baselines import numpy_mlp


@pytest.fixture(scope="module")
def epoch() -> Inputs:
    return Inputs(Training((784, 30, 10), 10, samples=205))


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
