# SPDX-License-Identifier: MIT
"""Lines of an example whose output is a pipe: how far it is, and each of them at once."""

import os
import signal
import sys
from unittest.mock import patch

import pytest

pytest.importorskip("tyro", reason="tyro reads the flags")

from support import console, measure
from support.ending import ending

import quadrants
import torch

import torchpar.console


def test_a_loop_says_how_far_it_is(capsys):
    clock = iter([0.0, 0.0, 9.0, 11.0, 12.0, 22.0])
    with (
        patch.object(torchpar.console, "SILENCE", 10.0),
        patch.object(torchpar.console.time, "monotonic", lambda: next(clock)),
    ):
        assert [*console.progress(range(5), "epochs")] == [*range(5)]
    assert capsys.readouterr().err == "1 of 5 epochs after 9 s\n4 of 5 epochs after 22 s\n"
    with patch.object(torchpar.console, "SILENCE", 0.0):
        assert [*console.progress(range(2), "epochs", speaks=False)] == [0, 1]
    assert capsys.readouterr().err == ""


def test_a_lesson_says_how_far_slow_functions_and_its_first_network_are(capsys):
    with patch.object(torchpar.console, "SILENCE", 0.0):
        measure.interleaved_ms({"mine": lambda: None}, torch.device("cpu"))
        points = quadrants.draw(20, 0)
        model, optimizer = quadrants.build([2, 2, 1], 0.0, 0)
        quadrants.train(model, optimizer, points, 2, 10, 0, speaks=True)
        assert len([*console.progress(iter("ab"), "steps of epoch 1", total=2)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[30] == "30 of 31 rounds of timing after 0 s"
    assert lines[32:] == ["1 of 2 epochs after 0 s"] + [
        f"{done} of 2 steps of epoch 1 after 0 s" for done in (0, 1)
    ]


def test_the_reader_of_a_pipe_sees_a_line_at_once_and_may_leave(monkeypatch):
    read, write = os.pipe()
    os.set_blocking(read, False)  # a line that comes late is an error, and no endless wait
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with ending():
            print("first")
            assert os.read(read, 99) == b"first\n"
        os.close(read)
        with pytest.raises(SystemExit) as left, ending():
            print("second")
    assert left.value.code == 128 + signal.SIGPIPE
