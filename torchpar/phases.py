# SPDX-License-Identifier: MIT
"""Where the time of a training step goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

PHASES = ("data", "forward", "backward", "pipeline", "collectives", "optimizer")


@dataclass
class Phases:
    """Seconds spent in each phase of training on this rank.

    While it measures, a phase waits for the device, and a collective for its end: the phases add up, and
    the overlap that a plain run has is absent. "pipeline" is a pipeline's forward and backward passes
    and its waiting. Collectives are counted within a `torchpar.collectives.WatchedStep`.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, inner = self._now(), sum(self.seconds.values())
        yield
        # What an inner phase (a collective within the backward pass) took is its own.
        spent = self._now() - start - (sum(self.seconds.values()) - inner)
        self.seconds[phase] += spent

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class NoPhases:
    """In the place of `Phases` where nothing is measured."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        yield
