# SPDX-License-Identifier: MIT
"""The timer of the benchmarks: turns, medians, and contestants that fail."""

import math
import time

import pytest
import torch

from benchmarks.results import duration, number
from benchmarks.timing import Rejected, Times, quantiles, take_turns, time_calls


def steady(*seconds: float):
    return lambda index: list(seconds)


def fail(index: int) -> list[float]:
    raise RuntimeError("out of order\nand more")


def reject(index: int) -> list[float]:
    raise Rejected("a number is off")


def test_contestants_take_turns_after_a_warm_up():
    calls: list[str] = []

    def turn(name: str):
        return lambda index: calls.append(f"{name}{index}") or [1.0]

    befores: list[tuple[int, int]] = []
    turns = {name: turn(name) for name in "abc"}
    times = take_turns(turns, 2, before=lambda index: befores.append((index, len(calls))))
    assert calls == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]
    assert befores == [(0, 0), (1, 3), (2, 6)]
    assert all(found.rounds == [[1.0], [1.0]] for found in times.values())


def test_the_warm_up_is_no_sample():
    times = take_turns({"a": lambda index: [9.0] if index == 0 else [1.0]}, 3)["a"]
    assert times.all == [1.0, 1.0, 1.0]
    assert times.first >= 0


@pytest.mark.parametrize(
    "turn, reason", [(reject, "Rejected: a number is off"), (fail, "RuntimeError: out of order")]
)
@pytest.mark.parametrize("good", [0, 1, 3])
def test_a_contestant_that_fails_is_out_and_has_no_times(turn, reason, good):
    """At once, or after some samples."""
    calls = iter([steady(1.0)] * good + [turn] * 9)
    times = take_turns({"wrong": lambda index: next(calls)(index), "right": steady(2.0)}, 5)
    assert len(list(calls)) == 9 - 1  # it is not called again
    row = times["wrong"].row({"n": 1}, "wrong", times["right"])
    assert (row.ok, row.reason) == (False, reason)
    assert (row.p20_ms, row.p50_ms, row.p80_ms, row.mean_ms, row.speedup) == (None,) * 5
    row = times["right"].row({"n": 1}, "right", times["wrong"])
    assert (row.ok, row.p50_ms, row.samples, row.speedup) == (True, 2000.0, 5, None)


def test_a_contestant_that_spent_its_seconds_has_no_further_turn():
    calls: list[str] = []

    def turn(name: str, seconds: float):
        return lambda index: calls.append(name) or time.sleep(seconds * (index > 0)) or [seconds]

    turns = {"slow": turn("slow", 0.02), "fast": turn("fast", 0.0)}
    times = take_turns(turns, 4, seconds=0.015)
    assert "".join(name[0] for name in calls) == "sf" * 2 + "f" * 3
    assert [len(found.rounds) for found in times.values()] == [1, 4]
    times = take_turns(turns, 4, seconds=0.015, least=3)
    assert [len(found.rounds) for found in times.values()] == [3, 4]


def test_a_contestant_that_is_done_stops():
    parts = iter([[], [4.0], [2.0], None])
    times = take_turns({"parts": lambda index: next(parts), "other": steady(1.0)}, 9)
    assert times["parts"].rounds == [[4.0], [2.0]]
    assert len(times["other"].rounds) == 9


def test_nothing_measured_is_not_ok():
    times = take_turns({"a": lambda index: None}, 3)["a"]
    assert times.row({}, "a").reason == "there was nothing to measure"
    assert not times.row({}, "a").ok


def test_rows_quote_quantiles_and_the_median_ratio_of_rounds():
    mine, reference = Times([[1.0], [2.0], [4.0]]), Times([[2.0], [8.0], [8.0], [100.0]])
    row = mine.row({"n": 3}, "mine", reference, color="red")
    assert (row.p50_ms, row.mean_ms, row.samples) == (2000, pytest.approx(7000 / 3), 3)
    assert row.speedup == 2.0  # the ratios are 2, 4 and 2
    columns = row.columns()
    assert (columns["n"], columns["contestant"], columns["color"], columns["ok"]) == (3, "mine", "red", True)


def test_quantiles():
    assert quantiles([float(i) for i in reversed(range(101))]) == (20, 50, 80)
    assert quantiles([7.0]) == (7, 7, 7)
    assert quantiles([1.0, 2.0, 3.0, 1000.0, 4.0, 5.0]) == (2, 3.5, 5)


def test_time_of_calls_in_a_row(device):
    calls: list[int] = []
    timed = time_calls(lambda: calls.append(1) or time.sleep(0.01) or 42, torch.device(device), calls=3)
    assert (timed.result, len(calls)) == (42, 3)
    assert timed.host >= 0.01
    assert timed.seconds() > 0
    if device == "cpu":
        assert timed.seconds() == timed.host


@pytest.mark.parametrize(
    "seconds, text",
    [
        (None, ""),
        (0.0, "0 µs"),
        (1.5e-9, "0.0015 µs"),
        (1.234e-6, "1.23 µs"),
        (0.00025, "250 µs"),
        (0.0009996, "1,000 µs"),
        (0.0125, "12.5 ms"),
        (59.94, "59.9 s"),
        (2512.0, "2,512 s"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_large_numbers_are_written_out():
    assert (number(8_000_000.0), number(0.125), number(None)) == ("8,000,000", "0.125", "")
    assert math.isnan(Times().first)
