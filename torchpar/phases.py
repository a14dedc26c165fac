# SPDX-License-Identifier: MIT
"""Where the time of a training step goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

PHASES = ("data", "forward", "backward", "collectives", "optimizer")


@dataclass
class Phases:
    """Seconds spent in each phase of training on this rank.

    While it measures, a phase waits for the device, and gradients are reduced one bucket at a time
    after they are computed: the phases add up, and the overlap that a plain run has is absent.
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

    def watch(self, ddp: DistributedDataParallel) -> None:
        """Count ``ddp``'s collectives, and average its gradients as it does by itself."""

        def reduce(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
            with self("collectives"):
                gradients = bucket.buffer().div_(dist.get_world_size())
                dist.all_reduce(gradients)
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(gradients)
            return future

        ddp.register_comm_hook(None, reduce)


class NoPhases:
    """In the place of `Phases` where nothing is measured."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        yield
