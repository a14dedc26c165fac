# SPDX-License-Identifier: MIT
"""The checks of ladder, train and scaling reject what is wrong. `test_benchmarks` runs them."""

import csv

import numpy as np
import pytest
import torch
from commands import ROOT
from torch import Tensor

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("numba", reason="Numba compiles the loops")
pytest.importorskip("torchvision", reason="torchvision reads the data sets")

from benchmarks import ladder, scaling, train
from benchmarks.ladder import Contestant, make_case, measure, timed_turn
from benchmarks.results import Result
from benchmarks.timing import Rejected, Timed
from benchmarks.train import Inputs, Training
from torchpar.baselines import numpy_mlp

SHAPES = {"maximum": (3, 5), "matmul_t": (5, 7), "linear_sigmoid": (3, 7, 5)}


@pytest.mark.parametrize("operator", SHAPES)
def test_a_wrong_result_is_rejected(operator):
    case = make_case(operator, SHAPES[operator])
    function = getattr(numpy_mlp, operator)
    result = function(*case.arguments)
    case.check(result)
    case.check(result[:2], slice(2))
    off = np.zeros_like(result)
    off[-1, -1] = 1 if operator == "maximum" else 1e-4
    wrong = [result + off, result - off, result * np.where(off, np.nan, 1), result[::-1], result[:2]]
    for i in range(len(case.arguments)):
        changed = [t.copy() for t in case.arguments]
        changed[i].flat[-1] += 300
        wrong.append(function(*changed))
    for one in wrong:
        with pytest.raises(Rejected, match=r"more than rounding|has shape"):
            case.check(one)


def test_results_are_compared_with_the_first_and_the_previous(monkeypatch):
    def reject(index: int) -> list[float]:
        raise Rejected("a number is off")

    case = make_case("maximum", (1000, 1000))  # 12 MB
    seconds = {"pure Python": 8.0, "njit": 2.0, "NumPy": 0.5}
    ways = [Contestant(name, lambda index, s=s: [s], compiles=name == "njit") for name, s in seconds.items()]
    first, second, wrong, last = measure(case, [*ways[:2], Contestant("wrong", reject), ways[2]], 3)
    right = [one.columns for one in (first, second, last)]
    assert [columns["over_pure_python"] for columns in right] == [1.0, 4.0, 16.0]
    assert [columns["over_previous"] for columns in right] == [None, 4.0, None]
    assert second.columns["gb_per_s"] == pytest.approx(0.006)
    assert (first.columns["first_s"] is None, second.columns["first_s"] >= 0) == (True, True)
    assert (wrong.ok, wrong.p50_ms, "over_pure_python" in wrong.columns) == (False, None, False)
    assert ladder.as_markdown([first, wrong]).splitlines() == [
        "| maximum of 1000×1000 int32 | time | × pure Python | × previous |",
        "|---|---|---|---|",
        "| pure Python | 8 s | 1 |  |",
        "| wrong |  |  |  |",
    ]


def test_a_part_is_extrapolated(monkeypatch):
    case = make_case("matmul_t", SHAPES["matmul_t"])
    monkeypatch.setattr(ladder, "time_calls", lambda call, *_: Timed(call(), 0.5, None, 1))
    assert timed_turn(case, lambda: case.expected[:2], rows=2)(0) == [0.5 / (2 / 5)]


@pytest.fixture(scope="module")
def epoch() -> Inputs:
    return Inputs(Training((784, 30, 10), 10, samples=205))


def test_losses_of_another_training_are_rejected(epoch):
    losses = epoch.losses_of(epoch.order)
    epoch.check(losses[:5], 5)
    swapped = [epoch.order[1], epoch.order[0], *epoch.order[2:]]
    last = losses.copy()
    last[-1] = np.nan
    for wrong in (epoch.losses_of(swapped), losses[::-1], 1.01 * losses, last):
        with pytest.raises(Rejected, match="a loss is off"):
            epoch.check(wrong, 21)
    with pytest.raises(Rejected, match="2 losses of 3 batches"):
        epoch.check(losses[:2], 3)


def test_a_program_that_trains_in_another_order_is_rejected(epoch):
    weights = [len(batch) for batch in epoch.order]
    mean = float(np.average(epoch.losses, weights=weights))
    turn = train.program_turn(epoch, epoch.order, lambda: (20.5, mean))
    assert (turn(0), turn(1)) == ([], [1.0])
    other = list(numpy_mlp.batches(205, 10, np.random.default_rng(1)))
    with pytest.raises(Rejected, match="the mean loss is"):
        train.program_turn(epoch, other, lambda: (20.5, mean))(1)


def test_the_committed_table_is_that_of_the_csv():
    folder = ROOT / "benchmarks" / "results" / "cpu-2-cores-avx512"
    tables: dict[str, list[Result]] = {}
    for row in csv.DictReader((folder / "train.csv").read_text().splitlines()):
        ms, speedup = float(row["p50_ms"]), float(row["speedup"])
        parts = {"case": row, "contestant": row["contestant"], "columns": row}
        tables.setdefault(row["network"], []).append(Result(p50_ms=ms, speedup=speedup, **parts))
    assert train.summary(list(tables.values()), 1) == (folder / "train.md").read_text()


def test_a_wrong_gradient_and_a_wrong_loss_are_rejected():
    torch.manual_seed(0)
    exact = torch.randn(1000, dtype=torch.float64)
    single, other = (exact + 1e-7 * torch.randn(1000).double() for _ in range(2))

    def error(grad: Tensor, loss: float) -> float:
        return scaling.compare_with_one_rank(grad, (single, exact), loss, (2.3, 2.3), 100)

    one_off = other.clone()
    one_off[7] += 1e-4
    assert error(other, 2.3) == pytest.approx(1e-7, rel=0.1)
    for wrong in (2 * other, one_off, other * torch.nan):  # summed and not averaged; one; all
        with pytest.raises(Rejected, match="gradient"):
            error(wrong, 2.3)
    for loss in (2.3001, torch.nan):
        with pytest.raises(Rejected, match="loss"):
            error(other, loss)
