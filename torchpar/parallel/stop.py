# SPDX-License-Identifier: MIT
"""SIGTERM, agreed on by all ranks."""

import signal
import threading
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from torchpar.parallel.world import World


class StopSignal:
    """Whether any rank was sent SIGTERM, known to all at the same step.

    The handler only notes the signal: it may interrupt anything, a collective or a save too. In every
    step the ranks take the maximum of what they noted, which travels while the step computes.
    """

    def __init__(self, world: World):
        self._several = world.world_size > 1
        self._noted = self._stopping = False
        self._asked = torch.zeros(1, dtype=torch.int32, device=world.device)
        self._work: dist.Work | None = None

    def __enter__(self) -> "StopSignal":
        self._before = None
        if threading.current_thread() is threading.main_thread():  # only there Python lets one be set
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            # Told to stop, a process is not to be killed by being told again while it leaves.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if self._stopping else self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def ask(self) -> None:
        """Begin to ask all ranks."""
        self._asked.fill_(self._noted)
        if self._several:
            self._work = dist.all_reduce(self._asked, dist.ReduceOp.MAX, async_op=True)

    def answer(self) -> bool:
        """Whether any rank had noted the signal when it asked; the same on all."""
        if self._work is not None:
            self._work.wait()
        self._stopping = bool(self._asked.item())
        return self._stopping
