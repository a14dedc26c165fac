# SPDX-License-Identifier: MIT
"""The processes that train together."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchpar.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        rank: 0 … world_size − 1 over all machines.
        local_rank: its number on its own machine.
        device: where it keeps its tensors.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    def sum(self, t: Tensor) -> Tensor:
        """``t`` summed over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(t)
        return t

    def once_per_machine(self, prepare: Callable[[], None]) -> None:
        """Run ``prepare`` on each machine's first rank while the others wait.

        Raises:
            Exception: what ``prepare`` raised, on every rank.
        """
        self._agree(prepare if self.local_rank == 0 else None)

    def on_rank_0(self, function: Callable[[], T]) -> T:
        """The result of ``function`` on rank 0, on every rank.

        Raises:
            Exception: what ``function`` raised, on every rank.
        """
        result: T = self._agree(function if self.rank == 0 else None)[0]
        return result

    def _agree(self, function: Callable[[], Any] | None) -> list[Any]:
        """Each rank's result of ``function``, None where it has none to run; the first error, on all."""
        outcome: tuple[Any, Exception | None] = (None, None)
        if function is not None:
            try:
                outcome = (function(), None)
            except Exception as e:
                outcome = (None, e)
        outcomes = [outcome]
        if self.world_size > 1:
            outcomes *= self.world_size
            dist.all_gather_object(outcomes, outcome)
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for result, _ in outcomes]


@contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started; a world of one without torchrun.

    NCCL connects ranks with a GPU each; gloo connects ranks on CPUs, and ranks that share a GPU.

    Args:
        device: "cpu", "cuda", or "auto": CUDA where there is any.

    Raises:
        ConfigError: an unknown device, or CUDA on a machine without.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {device!r}, expected 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: no CUDA device is available here; use cpu or auto")
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cpu" or not torch.cuda.is_available():
        own, backend = torch.device("cpu"), "gloo"
    else:
        own = torch.device("cuda", local_rank % torch.cuda.device_count())
        shared = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count()
        backend = "gloo" if shared else "nccl"
        torch.cuda.set_device(own)
    joined = "RANK" in os.environ and not dist.is_initialized()
    if joined:
        dist.init_process_group(backend, device_id=own if backend == "nccl" else None)
    try:
        yield World(rank, local_rank, dist.get_world_size() if dist.is_initialized() else 1, own)
    finally:
        if joined:
            # A group's threads end with its last reference, and abort the process if that is after the
            # interpreter has begun to exit. DistributedDataParallel keeps one, in a reference cycle.
            gc.collect()
            dist.destroy_process_group()
