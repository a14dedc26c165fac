# SPDX-License-Identifier: MIT
"""`Recorder`: the times, messages and memory of a training's steps, measured while it runs."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self, TypeVar

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from torchpar.data import samples
from torchpar.training.profile.collectives import Collectives
from torchpar.training.profile.phases import Phases
from torchpar.training.profile.record import RankRecord
from torchpar.training.profile.step_memory import Memory

if TYPE_CHECKING:
    from torchpar.parallel.launch.world import World

B = TypeVar("B")


class Recorder:
    """Record the steps of a training on this rank.

        with Recorder(model, optimizer, world) as recorder:
            for x, labels, global_size in torchpar.data.batches(samples, 64, seed=0, epoch=1):
                cross_entropy(model(x), labels).backward()
                optimizer.step()
        records = recorder.gather()  # of all ranks

    A step lasts from the making of its batch until the optimizer has stepped. Batches that are
    made under `torch.no_grad`, as in an evaluation, begin none. A loop over other batches takes
    them from `steps`.

    Memory is measured in the first step: this takes time, and the first steps' times do not count.
    See `Phases`, `Collectives` and `Memory` for what is measured, and what measuring changes.

    Args:
        model: this rank's part of the model.
        optimizer: over its parameters.
        world: its mesh names the dimensions of messages. Without it the device is that of the
            first parameter, and all ranks are on "dp".
        activations: measure them; of compiled code they cannot be seen.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        world: "World | None" = None,
        activations: bool = True,
    ):
        self._world = world
        self._memory = Memory(model, optimizer)
        self._activations = activations
        self._optimizer = optimizer
        device = world.device if world else next(model.parameters()).device
        self._phases = Phases(device)
        self._is_first = True
        self._step = ExitStack()  # what is active within a step

    def __enter__(self) -> Self:
        self._phases.__enter__()
        self._watch_before, samples.watch = samples.watch, self._follow
        self._hook = self._optimizer.register_step_post_hook(lambda *_: self._end_step())
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
        samples.watch = self._watch_before
        self._end_step()
        self._phases.__exit__(*error)

    def steps(self, batches: Iterable[B]) -> Iterator[B]:
        """Yield ``batches``, and record the steps that are taken with them."""
        remaining = iter(batches)
        while True:
            self._end_step()
            samples.watch, began = None, time.perf_counter()
            try:
                batch = next(remaining)
            except StopIteration:
                return
            self._begin_step(began)
            yield batch

    def _follow(self, began: float) -> None:
        """Begin a step, unless the batch is of an evaluation."""
        if torch.is_grad_enabled():
            self._begin_step(began)

    def _begin_step(self, began: float) -> None:
        self._end_step()
        self._phases.begin_step(began)
        collectives = self._step.enter_context(Collectives(self._world))
        self._phases.current.calls = collectives.calls
        if self._is_first:
            self._step.enter_context(self._memory.measure(self._activations))
            self._is_first = False

    def _end_step(self) -> None:
        self._step.close()
        self._phases.end_step()

    def record(self) -> RankRecord:
        """Return what has been recorded on this rank."""
        world, memory = self._world, self._memory.measured()
        if self._is_first:  # no step was measured, of a run that was complete
            del memory["gradients"]
        if self._is_first or not self._activations:
            del memory["activations"]
        place = {}
        if world is not None:
            names = world.mesh.mesh_dim_names or ()
            place = {name: world.mesh.get_local_rank(name) for name in names}
        device = self._phases.device
        if device is not None and device.type == "cuda":
            memory["GPU, peak"] = torch.cuda.max_memory_allocated(device)
        rank = dist.get_rank() if dist.is_initialized() else 0
        return self._phases.record(rank, memory, place)

    def gather(self) -> list[RankRecord]:
        """Return the records of all ranks, in their order. Every rank calls it."""
        mine = self.record()
        records = [mine] * (dist.get_world_size() if dist.is_initialized() else 1)
        if len(records) > 1:
            dist.all_gather_object(records, mine)
        return records
