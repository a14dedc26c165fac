# SPDX-License-Identifier: MIT
"""The timer, and the checks of ladder, train and scaling. `test_benchmarks` runs them."""

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("numba", reason="Numba compiles the loops")

from benchmarks import scaling, train
from benchmarks.ladder.cases import make_case
from benchmarks.timing import Rejected, Times, take_turns
from benchmarks.train import Inputs, Training
from torchpar import console
from torchpar.baselines import numpy_mlp

SHAPES = {"maximum": (3, 5), "matmul_t": (5, 7), "matmul": (3, 7, 5), "linear_sigmoid": (3, 7, 5)}


@pytest.mark.parametrize("operator", SHAPES)
def test_a_wrong_result_is_rejected(operator):
    case = make_case(operator, SHAPES[operator])
    function = getattr(numpy_mlp, operator)
    result = function(*case.arguments)
    case.check(result)
    case.check(result[:2], slice(2))
    off = np.zeros_like(result)
    off[-1, -1] = 1 if operator == "maximum" else 1e-4
    wrong = [
        result + off,
        result - off,
        result * np.where(off, np.nan, 1),
        result[::-1],
        result[:2],
    ]
    for i in range(len(case.arguments)):
        changed = [t.copy() for t in case.arguments]
        changed[i].flat[-1] += 300
        wrong.append(function(*changed))
    for one in wrong:
        with pytest.raises(Rejected, match=r"result\[\d, \d\] is .* numbers are wrong|has shape"):
            case.check(one)


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


# The timer


def test_rounds_say_on_a_pipe_how_far_they_are(monkeypatch, capsys):
    monkeypatch.setattr(console, "SILENCE", 0.0)
    take_turns({"a": lambda index: [1.0]}, 2, label="maximum")
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" after ")[0] for line in said] == [
        f"{done} of 3 rounds of maximum" for done in range(3)
    ]


def test_contestants_take_turns_after_a_warm_up():
    calls: list[str] = []

    def turn(name: str):
        return lambda index: calls.append(f"{name}{index}") or [9.0 if index == 0 else 1.0]

    befores: list[tuple[int, int]] = []
    turns = {name: turn(name) for name in "abc"}
    times = take_turns(
        turns, 2, before=lambda index: befores.append((index, len(calls))), label="calls"
    )
    assert calls == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]
    assert befores == [(0, 0), (1, 3), (2, 6)]
    assert all(found.rounds == [[1.0], [1.0]] and found.first >= 0 for found in times.values())


@pytest.mark.parametrize("good", [0, 2])
def test_a_contestant_that_fails_is_out_and_has_no_times(good):
    def reject(index: int) -> list[float]:
        raise Rejected("a number is off\nand more")

    calls = iter([lambda index: [1.0]] * good + [reject] * 9)
    turns = {"wrong": lambda index: next(calls)(index), "right": lambda index: [2.0]}
    times = take_turns(turns, 5, label="calls")
    assert len(list(calls)) == 9 - 1  # it is not called again
    wrong = times["wrong"].result({"n": 1}, "wrong", times["right"])
    assert (wrong.ok, wrong.reason) == (False, "Rejected: a number is off")
    assert (wrong.p20_ms, wrong.p50_ms, wrong.p80_ms, wrong.mean_ms, wrong.speedup) == (None,) * 5
    right = times["right"].result({"n": 1}, "right", times["wrong"])
    assert (right.ok, right.p50_ms, right.samples, right.speedup) == (True, 2000.0, 5, None)


def test_results_quote_quantiles_and_the_median_ratio_of_rounds():
    mine, reference = Times([[1.0], [2.0], [4.0]]), Times([[2.0], [8.0], [8.0], [100.0]])
    result = mine.result({"n": 3}, "mine", reference, color="red")
    assert (result.p50_ms, result.mean_ms, result.samples) == (2000, pytest.approx(7000 / 3), 3)
    assert result.speedup == 2.0  # the ratios are 2, 4 and 2
    row = result.row()
    assert (row["n"], row["contestant"], row["color"], row["ok"]) == (3, "mine", "red", True)
    result = Times([[float(i)] for i in reversed(range(101))]).result({}, "many")
    assert (result.p20_ms, result.p50_ms, result.p80_ms) == (20_000, 50_000, 80_000)
