# SPDX-License-Identifier: MIT
"""The timer of the benchmarks: turns, medians, and contestants that fail."""

import time

import pytest
import torch

from benchmarks.results import duration, number
from benchmarks.timing import Rejected, Times, take_turns, time_calls


def test_contestants_take_turns_after_a_warm_up():
    calls: list[str] = []

    def turn(name: str):
        return lambda index: calls.append(f"{name}{index}") or [9.0 if index == 0 else 1.0]

    befores: list[tuple[int, int]] = []
    turns = {name: turn(name) for name in "abc"}
    times = take_turns(turns, 2, before=lambda index: befores.append((index, len(calls))))
    assert calls == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]
    assert befores == [(0, 0), (1, 3), (2, 6)]
    assert all(found.rounds == [[1.0], [1.0]] and found.first >= 0 for found in times.values())


@pytest.mark.parametrize("good", [0, 2])
def test_a_contestant_that_fails_is_out_and_has_no_times(good):
    def reject(index: int) -> list[float]:
        raise Rejected("a number is off\nand more")

    calls = iter([lambda index: [1.0]] * good + [reject] * 9)
    times = take_turns({"wrong": lambda index: next(calls)(index), "right": lambda index: [2.0]}, 5)
    assert len(list(calls)) == 9 - 1  # it is not called again
    wrong = times["wrong"].result({"n": 1}, "wrong", times["right"])
    assert (wrong.ok, wrong.reason) == (False, "Rejected: a number is off")
    assert (wrong.p20_ms, wrong.p50_ms, wrong.p80_ms, wrong.mean_ms, wrong.speedup) == (None,) * 5
    right = times["right"].result({"n": 1}, "right", times["wrong"])
    assert (right.ok, right.p50_ms, right.samples, right.speedup) == (True, 2000.0, 5, None)


def test_a_contestant_that_spent_its_seconds_or_is_done_has_no_further_turn():
    turns = {"slow": lambda index: time.sleep(0.02 * (index > 0)) or [0.02], "fast": lambda index: [0.0]}
    times = take_turns(turns, 4, seconds=0.015)
    assert [len(found.rounds) for found in times.values()] == [1, 4]
    times = take_turns(turns, 4, seconds=0.015, least=3)
    assert [len(found.rounds) for found in times.values()] == [3, 4]
    parts = iter([[], [4.0], [2.0], None])
    turns = {"parts": lambda index: next(parts), "nothing": lambda index: None, "other": lambda index: [1.0]}
    times = take_turns(turns, 9)
    assert times["parts"].rounds == [[4.0], [2.0]]
    assert len(times["other"].rounds) == 9
    assert times["nothing"].result({}, "nothing").reason == "there was nothing to measure"


def test_results_quote_quantiles_and_the_median_ratio_of_rounds():
    mine, reference = Times([[1.0], [2.0], [4.0]]), Times([[2.0], [8.0], [8.0], [100.0]])
    result = mine.result({"n": 3}, "mine", reference, color="red")
    assert (result.p50_ms, result.mean_ms, result.samples) == (2000, pytest.approx(7000 / 3), 3)
    assert result.speedup == 2.0  # the ratios are 2, 4 and 2
    row = result.row()
    assert (row["n"], row["contestant"], row["color"], row["ok"]) == (3, "mine", "red", True)
    result = Times([[float(i)] for i in reversed(range(101))]).result({}, "many")
    assert (result.p20_ms, result.p50_ms, result.p80_ms) == (20_000, 50_000, 80_000)


def test_time_of_calls_in_a_row(device):
    calls: list[int] = []
    timed = time_calls(lambda: calls.append(1) or time.sleep(0.01) or 42, torch.device(device), calls=3)
    assert (timed.result, len(calls)) == (42, 3)
    assert timed.host >= 0.01
    assert timed.seconds() == timed.host if device == "cpu" else timed.seconds() > 0


def test_durations_and_large_numbers():
    seconds = [None, 0.0, 1.5e-9, 1.234e-6, 0.0009996, 0.0125, 59.94, 2512.0]
    texts = ["", "0 µs", "0.0015 µs", "1.23 µs", "1,000 µs", "12.5 ms", "59.9 s", "2,512 s"]
    assert [duration(one) for one in seconds] == texts
    assert (number(8_000_000.0), number(0.125), number(None)) == ("8,000,000", "0.125", "")
