# SPDX-License-Identifier: MIT
"""Signals that end a command: put off while processes start, raised, ignored, and never lost."""

import signal
import time

import pytest

from torchpar.parallel.launch.processes import ENDING, Terminated, putting_off_signals, terminable

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
