# SPDX-License-Identifier: MIT
"""Signals are answered while the main thread is in compiled code, and handlers cannot be called."""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from torchpar.training import answers
from torchpar.training.answers import answering_signals
from torchpar.training.outcome import Stopped
from torchpar.training.stop import StopSignal

SAVES = "received {}: the run stops after the next step, and saves it; "
HANDLED = answers.STOPPING
ENDS = "received {}: the run ends when the present operation has ended; "


class Heard:
    """What is said, and a pipe by which this wakes the main thread."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.reading, self.writing = os.pipe()

    def say(self, line: object) -> None:
        self.lines.append(str(line))
        os.write(self.writing, b".")

    def compute(self, *signals: signal.Signals) -> None:
        """Stay in C until something is said of ``signals``, which this process receives there."""

        def send() -> None:
            for one in signals:  # to this thread: `read` would return
                signal.pthread_kill(threading.get_ident(), one)

        sender = threading.Timer(0.1, send)
        last = threading.Timer(30, self.say, ["nothing was said"])
        sender.start()
        last.start()
        try:
            ctypes.CDLL(None).read(self.reading, ctypes.create_string_buffer(1), 1)
        finally:
            last.cancel()
            sender.join()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    one = Heard()
    monkeypatch.setattr(answers, "PATIENCE", 0.01)
    monkeypatch.setattr(answers, "logger", SimpleNamespace(warning=one.say))
    defaults = dict.fromkeys(HANDLED, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield one
    for number, handler in before.items():
        signal.signal(number, handler)
    os.close(one.reading)
    os.close(one.writing)


def world(rank: int = 0) -> Any:
    return SimpleNamespace(rank=rank)


def handle() -> None:
    """As `StopSignal` does, keep the signals from ending the program."""
    for number in HANDLED:
        signal.signal(number, lambda *_: None)


@pytest.mark.parametrize(
    "number, torchrun, line",
    [
        (signal.SIGINT, False, f"{SAVES}press Ctrl-C again to end it at once, without saving"),
        (signal.SIGTERM, False, f"{SAVES}SIGKILL ends it at once"),
        (signal.SIGHUP, False, f"{SAVES}SIGKILL ends it at once"),
        (signal.SIGQUIT, False, f"{SAVES}SIGKILL ends it at once"),
        (signal.SIGINT, True, f"{SAVES}torchrun kills it after 7 s"),
        (signal.SIGTERM, True, f"{SAVES}torchrun kills it after 7 s"),
    ],
)
def test_a_run_that_saves_says_when_it_stops(monkeypatch, heard, number, torchrun, line):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(torchrun))
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "7")
    handle()
    with answering_signals(world(), HANDLED):
        heard.compute(number)
        assert heard.lines == [line.format(number.name)]


def test_a_run_without_a_checkpoint_says_that_it_ends(heard):
    with pytest.raises(KeyboardInterrupt), answering_signals(world(), ()):
        heard.compute(signal.SIGINT)
    line = ENDS.format("SIGINT") + "press Ctrl-C again to end it at once"
    assert heard.lines == [line]


def test_a_run_after_one_that_was_stopped_is_answered_too(heard):
    with (
        contextlib.suppress(Stopped),
        StopSignal(SimpleNamespace(device="cpu", local_rank=0)) as stop,
    ):
        stop._largest = signal.SIGINT  # as after the all-reduce of its step
        raise Stopped(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    test_a_run_without_a_checkpoint_says_that_it_ends(heard)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_rank_is_silent_and_every_rank_ends_at_a_second_ctrl_c(monkeypatch, heard):
    monkeypatch.setattr(answers, "AGAIN", 0.01)
    ended: list[int] = []
    monkeypatch.setattr(
        answers, "os", SimpleNamespace(**vars(os) | {"_exit": lambda n: heard.say(ended.append(n))})
    )
    handle()
    with answering_signals(world(rank=1), HANDLED):
        os.kill(os.getpid(), signal.SIGINT)  # which this thread handles at once
        heard.compute(signal.SIGINT)
        assert ended == [130]
    assert heard.lines == ["None"]


def test_a_program_that_catches_ctrl_c_is_not_ended(monkeypatch, heard):
    """As a debugger does: each Ctrl-C is answered, the computation goes on, and the next is new."""
    monkeypatch.setattr(answers, "AGAIN", 0.01)
    ended: list[int] = []
    monkeypatch.setattr(
        answers, "os", SimpleNamespace(**vars(os) | {"_exit": lambda n: heard.say(ended.append(n))})
    )
    monkeypatch.setattr(answers, "PATIENCE", 0.2)
    with answering_signals(world(), ()):
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        ctypes.CDLL(None).usleep(400_000)  # an answer would have come
        assert (heard.lines, ended) == ([], [])
        with pytest.raises(KeyboardInterrupt):
            heard.compute(signal.SIGINT)
        line = ENDS.format("SIGINT") + "press Ctrl-C again to end it at once"
        assert (heard.lines, ended) == ([line], [])
        monkeypatch.setattr(answers, "PATIENCE", 60.0)
        with pytest.raises(KeyboardInterrupt):  # two that this thread has not answered
            heard.compute(signal.SIGINT, signal.SIGINT)
        assert ended == [130]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_the_program_sets_in_a_run_is_its_own(heard):
    """As that of pdb after its command "continue"; it stays after the run, too."""
    received: list[int] = []

    def own(number: int, _frame: object) -> None:
        received.append(number)

    with answering_signals(world(), ()):
        signal.signal(signal.SIGINT, own)
        signal.raise_signal(signal.SIGINT)
        ctypes.CDLL(None).usleep(100_000)
    assert (received, heard.lines) == ([signal.SIGINT], [])
    assert signal.getsignal(signal.SIGINT) is own


def test_a_run_that_ends_at_once_says_nothing_and_others_still_hear_of_signals(monkeypatch, heard):
    monkeypatch.setattr(answers, "PATIENCE", 60.0)
    handle()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    try:
        with answering_signals(world(), HANDLED):
            os.kill(os.getpid(), signal.SIGTERM)
        assert os.read(reading, 1) == bytes([signal.SIGTERM])
        assert signal.set_wakeup_fd(before) == writing
    finally:
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)
    assert heard.lines == []
    assert "answering_signals" not in [thread.name for thread in threading.enumerate()]


def test_signals_of_others_are_not_answered(heard):
    """A SIGINT that the program handles, others without a checkpoint, and a thread's run."""
    handle()
    with answering_signals(world(), ()):
        for number in HANDLED:
            os.kill(os.getpid(), number)

    with answering_signals(world(), [signal.SIGTERM]):  # the program handles the others
        os.kill(os.getpid(), signal.SIGHUP)
        ctypes.CDLL(None).usleep(100_000)
    assert heard.lines == []

    def within_a_thread() -> None:
        with answering_signals(world(), HANDLED):
            assert "answering_signals" not in [one.name for one in threading.enumerate()]

    thread = threading.Thread(target=within_a_thread)
    thread.start()
    thread.join()
    assert heard.lines == []
