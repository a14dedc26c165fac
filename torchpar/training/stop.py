# SPDX-License-Identifier: MIT
"""Stop all ranks at the same step after SIGTERM or SIGINT."""

import signal
from functools import partial
from types import FrameType

import torch
import torch.distributed as dist

from torchpar.parallel.launch.world import World
from torchpar.training.answers import restore_handlers, unless_stopped


class StopSignal:
    """Handlers of SIGTERM and SIGINT, and an all-reduce by which all ranks learn of a signal.

    A handler only stores the signal's number, because it may interrupt anything, even a collective
    or a save. In every step an all-reduce takes the maximum of the ranks' numbers, while the step
    computes. A second SIGINT interrupts at once. Further signals are ignored as long as `Stopped`
    passes up through the program.
    """

    def __init__(self, world: World):
        self._received = self._largest = 0
        self._buffer = torch.zeros(1, dtype=torch.int32, device=world.device)

    def __enter__(self) -> "StopSignal":
        restore_handlers()
        self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, partial(unless_stopped, handler) if self._largest else handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def start_all_reduce(self) -> None:
        """Start the maximum over all ranks of the signals received so far."""
        self._buffer.fill_(self._received)
        self._work = dist.all_reduce(self._buffer, dist.ReduceOp.MAX, async_op=True)

    def wait(self) -> int:
        """Wait for the all-reduce; return the largest number of a signal, or 0 without signals."""
        self._work.wait()
        self._largest = int(self._buffer.item())
        return self._largest
