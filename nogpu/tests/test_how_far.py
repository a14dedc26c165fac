# SPDX-License-Identifier: MIT
"""A silent script under ``python -m nogpu``: lines say how many launches are executed."""

import sys
from threading import Event
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl

from nogpu import command, console, emulate
from nogpu.machine import gpu as machine
from nogpu.machine import workers
from nogpu.triton.driver import how_far
from nogpu.triton.emulator import Emulator

RUN = machine.Gpu._run


@triton.jit
def double(x, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, 2 * tl.load(x + i))


@triton.jit
def write_twice(x, BLOCK: tl.constexpr):
    i = tl.program_id(0) % 5 * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, 2.0)


@pytest.mark.parametrize("schedules, count", [("one", 1), ("one", 2), ("all", 1)])
def test_programs_are_counted_in_python_in_c_and_by_workers(schedules, count, monkeypatch):
    said = []

    def run(gpu, positions):
        said.append(how_far())
        RUN(gpu, positions)
        said.append(how_far())

    monkeypatch.setattr(machine.Gpu, "_run", run)
    monkeypatch.setattr(machine, "least_seconds", lambda places: 0.0)
    monkeypatch.setattr(workers, "worker_count", lambda: count)
    x = torch.ones(8 * 32)
    with emulate():
        assert how_far() == "0 launches executed"
        with emulate(schedules=schedules):
            double[(8,)](x, BLOCK=32, num_warps=1)
            double[(8,)](x, BLOCK=32, num_warps=1)
            assert how_far() == "2 launches executed"
        assert how_far() == "2 launches executed"
    launches = ("0 launches", "1 launch")
    assert said == [
        line
        for text in launches
        for _ in range(3 if schedules == "all" else 1)
        for line in (
            f"{text} executed",
            f"{text} executed, and 8 of 8 programs of double",
        )
    ]


def test_undone_programs_of_workers_are_not_counted(monkeypatch):
    monkeypatch.setattr(machine, "least_seconds", lambda places: 0.0)
    monkeypatch.setattr(workers, "worker_count", lambda: 2)
    x = torch.ones(5 * 32)  # where the workers' programs write the same
    said = []
    monkeypatch.setattr(Emulator, "_end", lambda *arguments: said.append(how_far()))
    with emulate():
        write_twice[(8,)](x, BLOCK=32, num_warps=1)
    assert said == ["0 launches executed, and 8 of 8 programs of write_twice"]


def test_only_silence_is_broken(monkeypatch, capsys):
    """By a clock that the thread itself advances."""
    clock, waits = [0.0], []

    class Ended(Event):
        def wait(self, seconds=None):
            if seconds is None:  # a thread waits for another one to begin
                return super().wait()
            waits.append(seconds)
            clock[0] = (0.0, 9.0, 10.0, 19.0, 29.0, 30.0)[len(waits)]
            if len(waits) == 1:
                print("printed by the block")
            return len(waits) == 5

    monkeypatch.setattr(console, "SILENCE", 10.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(console.threading, "Event", Ended)
    with console.breaking_silence(lambda: "3 launches executed"):
        pass  # whose end awaits the thread
    captured = capsys.readouterr()
    assert captured.out == "printed by the block\n"
    assert captured.err == "3 launches executed after 19 s\n3 launches executed after 29 s\n"
    assert waits == [10.0, 10.0, 9.0, 10.0, 10.0]


def test_the_command_says_how_far_a_silent_script_is(tmp_path, capsys, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("import said\nsaid.event.wait(60)\nprint('end')")
    said = type(sys)("said")
    said.event = Event()
    monkeypatch.setitem(sys.modules, "said", said)

    def asked():
        said.event.set()
        return how_far()

    with patch.object(command, "how_far", asked), patch.object(console, "SILENCE", 0.05):
        assert command.main([str(script)]) == 0
    long = capsys.readouterr()
    assert "0 launches executed after 0 s\n" in long.err
    assert command.main([str(script)]) == 0
    assert capsys.readouterr() == (long.out, "")  # a short run is silent
