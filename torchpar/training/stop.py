# SPDX-License-Identifier: MIT
"""Stop all ranks at the same step after SIGTERM or SIGINT."""

import signal
import threading
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from torchpar.parallel.launch.world import World


class StopSignal:
    """Handlers of SIGTERM and SIGINT, and the largest signal that any rank has received.

    A handler only notes the signal, because it may interrupt anything, even a collective or a save. In every
    step the ranks take the maximum of their notes, while the step computes. A second SIGINT interrupts at
    once.
    """

    def __init__(self, world: World):
        self._several = world.world_size > 1
        self._noted = self._stopping = 0
        self._asked = torch.zeros(1, dtype=torch.int32, device=world.device)
        self._work: dist.Work | None = None

    def __enter__(self) -> "StopSignal":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # While this process shuts down, ignore another signal.
            signal.signal(number, signal.SIG_IGN if self._stopping else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self._noted == signal.SIGINT:
            raise KeyboardInterrupt
        self._noted = number

    def ask(self) -> None:
        """Start to take the maximum over all ranks."""
        self._asked.fill_(self._noted)
        if self._several:
            self._work = dist.all_reduce(self._asked, dist.ReduceOp.MAX, async_op=True)

    def answer(self) -> int:
        """Return the largest signal number that any rank had noted at `ask`, 0 if none."""
        if self._work is not None:
            self._work.wait()
        self._stopping = int(self._asked.item())
        return self._stopping
