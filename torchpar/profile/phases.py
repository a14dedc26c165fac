# SPDX-License-Identifier: MIT
"""Seconds of a training step by phase: data, forward, backward, pipeline, collectives, optimizer.

    with Phases(device) as phases:
        with phase("forward"):
            loss = model(x)
    print(phases.seconds)

Outside of `Phases`, `phase` does nothing, so that it can stay in the code, as
`torch.profiler.record_function` can.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import ClassVar

import torch

_NOTHING = nullcontext()
PHASES = ("data", "forward", "backward", "pipeline", "collectives", "optimizer")


def phase(name: str) -> AbstractContextManager[None]:
    """Count the seconds of the block as phase ``name``, one of `PHASES`, if a `Phases` is active."""
    return _NOTHING if Phases.active is None else Phases.active.measure(name)


class Phases:
    """Seconds of each phase on this rank, counted while the context is active.

    The device is synchronised at both ends of a phase, so the phases add up but no longer overlap. A phase
    inside another one (a collective in the backward pass) is counted once, as the inner phase.

    Attributes:
        seconds: of each of `PHASES`.
    """

    active: ClassVar["Phases | None"] = None

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def __enter__(self) -> "Phases":
        if Phases.active is not None:
            raise RuntimeError("another Phases is active; leave it first")
        Phases.active = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Phases.active = None

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to phase ``name``."""
        start, inner = self._now(), sum(self.seconds.values())
        yield
        self.seconds[name] += self._now() - start - (sum(self.seconds.values()) - inner)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
