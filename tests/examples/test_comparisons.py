# SPDX-License-Identifier: MIT
"""Comparisons of times on a busy machine: they say so, and print no impossible gain as a result."""

import os
from functools import partial

import pytest

pytest.importorskip("rich", reason="it prints the tables")

from support import console

import digits_report
import quadrants
import train_mpi


class Trained:
    """A run of one step, of which the forward pass took these seconds."""

    steps, sent, bytes = 1, (), 0

    def __init__(self, seconds: float):
        self.seconds = dict.fromkeys(train_mpi.PHASES, 0.0) | {"forward": seconds}


@pytest.mark.parametrize("seconds, cell", [(0.5, "2.00"), (0.165, "?")])
def test_a_gain_of_more_than_the_processes_is_no_result(capsys, seconds, cell):
    runs = {"1 process, 2 threads": Trained(1.0), "--split data": Trained(seconds)}
    train_mpi.print_comparison(train_mpi.Flags(), 2, runs, base="1 process, 2 threads")
    out = capsys.readouterr().out
    (row,) = (line for line in out.splitlines() if line.startswith("│ speed-up"))
    assert [one.strip() for one in row.split("│")[2:4]] == ["1.00", cell]
    assert ("?: a speed-up above 2 on 2 processes is no result;" in out) == (cell == "?")


@pytest.mark.parametrize("load, said", [(0.2, ""), (6.06, "The load average is 6.1: ")])
def test_a_busy_machine_is_named(monkeypatch, capsys, load, said):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    console.print_load()
    out = capsys.readouterr().out
    assert out.startswith(said)
    assert bool(out) == bool(said)


def test_quadrants_shows_no_speed_up_of_more_than_the_processes():
    row = {"batch_size": 512, "N": 2, "predicted": 1.7, "N_processes": 2.0, "N_threads": 3.386}
    assert quadrants.believed(row, 2) == {**row, "N_threads": "?"}
    assert quadrants.believed(row, 4) == row


def test_the_sweep_of_digits_says_that_the_machine_is_busy(monkeypatch, capsys):
    def study(choice: dict[str, float], epochs: int) -> tuple[None, list[dict[str, float]]]:
        cost = {"steps": 1, "ms_per_step": 1.0, "s_per_epoch": 1.0}
        return None, [{**choice, **cost, "validation_accuracy": 0.5}]

    monkeypatch.setattr(os, "getloadavg", lambda: (6.06, 0.0, 0.0))
    digits_report.sweep(digits_report.Flags(device="cpu"), partial(study))
    out = capsys.readouterr().out
    assert out.startswith("The load average is 6.1: ")
    assert "smallest to largest batch: 1.00× the time of an epoch" in out
