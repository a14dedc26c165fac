# SPDX-License-Identifier: MIT
"""Stop all ranks at the same step after SIGTERM, SIGINT, SIGHUP or SIGQUIT."""

import signal
import sys
from functools import partial
from types import FrameType

import torch
import torch.distributed as dist

from torchpar.parallel.launch.processes import (
    has_default_handler,
    has_lost_torchrun,
    stop_torchrun,
)
from torchpar.parallel.launch.world import World
from torchpar.training.answers import STOPPING, restore_handlers, unless_stopped
from torchpar.training.outcome import Stopped

# Added to the number of a signal that came from outside. A rank whose torchrun was killed sends
# itself SIGTERM; nothing is added to that.
SENT = 64


class StopSignal:
    """Handlers of `STOPPING`, and an all-reduce by which all ranks learn of a signal.

    A handler only stores the signal's number, because it may interrupt anything, even a collective
    or a save. In every step an all-reduce takes the maximum of the ranks' numbers, while the step
    computes. A second SIGINT interrupts at once. Further signals are ignored as long as `Stopped`
    passes up through the program.

    SIGHUP and SIGQUIT are handled where they would end the process: one that is ignored, as by
    nohup, stays ignored, and a handler of the program stays the program's.

    Attributes:
        signals: those that are handled.
    """

    def __init__(self, world: World):
        self._world = world
        self._received = self._largest = 0
        self._buffer = torch.zeros(1, dtype=torch.int32, device=world.device)

    def __enter__(self) -> "StopSignal":
        restore_handlers()
        always = signal.SIGTERM, signal.SIGINT
        self.signals = [n for n in STOPPING if n in always or has_default_handler(n)]
        self._before = {n: signal.signal(n, self._handle) for n in self.signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, partial(unless_stopped, handler) if self._largest else handler)
        is_stopped = isinstance(sys.exception(), Stopped)
        if is_stopped and self._largest > SENT and self._world.local_rank == 0:
            stop_torchrun(self._largest - SENT)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def start_all_reduce(self) -> None:
        """Start the maximum over all ranks of the signals received so far."""
        is_sent = self._received and not has_lost_torchrun()
        self._buffer.fill_(self._received + SENT * bool(is_sent))
        self._work = dist.all_reduce(self._buffer, dist.ReduceOp.MAX, async_op=True)

    def wait(self) -> int:
        """Wait for the all-reduce; return the largest number of a signal, or 0 without signals."""
        self._work.wait()
        self._largest = int(self._buffer.item())
        return self._largest % SENT
