# SPDX-License-Identifier: MIT
"""Signals that end a command: put off while processes start, raised, ignored, and never lost.

And the one that ends torchrun with a run that was stopped.
"""

import signal
import subprocess
import sys
import time
from unittest.mock import patch

import pytest

from torchpar.parallel.launch import processes
from torchpar.parallel.launch.processes import (
    ENDING,
    Terminated,
    putting_off_signals,
    stop_torchrun,
    terminable,
)

pytestmark = pytest.mark.usefixtures("ending_signals")


@pytest.mark.parametrize("number", [signal.SIGINT, *ENDING])
def test_a_signal_is_not_lost_where_a_start_fails(number):
    received: list[int] = []
    before = signal.signal(number, lambda number, _: received.append(number))

    @putting_off_signals()
    def start() -> None:
        signal.raise_signal(number)
        raise OSError("no process")

    try:
        with pytest.raises(OSError, match="no process"):
            start()
    finally:
        signal.signal(number, before)
    assert received == [number]


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_is_not_lost_in_a_destructor(number):
    """Python drops the exceptions of destructors."""

    class Destroyed:
        def __del__(self) -> None:
            signal.raise_signal(number)

    @terminable()
    def run() -> None:
        Destroyed()
        time.sleep(60)

    with pytest.raises(Terminated, match=f"^ended by {number.name}$"):
        run()


def test_an_ignored_signal_stays_ignored():
    """Such as SIGHUP under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with terminable():
        signal.raise_signal(signal.SIGHUP)
        handler = signal.getsignal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) != handler  # the block's


@pytest.mark.parametrize(
    "starts, restarts, parent, is_sent",
    [
        ("0", "3", sys.executable, True),
        ("3", "3", sys.executable, False),  # torchrun starts nothing again
        ("0", "3", "/bin/sh", False),  # a script between torchrun and its rank
        (None, None, sys.executable, False),
    ],
)
def test_torchrun_is_stopped_where_it_would_start_the_ranks_again(
    monkeypatch, starts, restarts, parent, is_sent
):
    for name, value in (("RESTART_COUNT", starts), ("MAX_RESTARTS", restarts)):
        monkeypatch.delenv(f"TORCHELASTIC_{name}", raising=False)
        if value is not None:
            monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    wait = ["-c", "input()"] if parent == sys.executable else ["-c", "read line"]
    with subprocess.Popen([parent, *wait], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 30
        while parent == sys.executable and not processes._runs_python(process.pid):  # it forks
            assert time.monotonic() < deadline
        with (
            patch.object(processes.os, "getppid", lambda: process.pid),
            patch.object(processes.os, "kill") as kill,
        ):
            stop_torchrun(signal.SIGHUP)
        process.stdin.close()
    assert [call.args for call in kill.mock_calls] == [(process.pid, signal.SIGHUP)] * is_sent
