# SPDX-License-Identifier: MIT
"""The log of a training lesson: what its run shows and writes, as the flags ask for it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from support import console
from support.cli import TrainFlags
from torchpar import training
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.shared_memory import can_share_memory
from torchpar.profile.collectives import Call, Collectives
from torchpar.profile.phases import Phases
from torchpar.profile.trace import Trace
from torchpar.training import EpochResult, Run

B = TypeVar("B")


class Log(training.RunLog):
    """Progress, a line for each epoch, metrics, plots, tables of times and messages, and the last line."""

    def __init__(self, flags: TrainFlags, world: World):
        self.flags = flags
        self.world = world
        self.phases = Phases(world.device) if flags.phases else None
        self.calls: list[list[Call]] = []  # of each step
        self.trace = Trace(flags.profile, world.rank, world.device) if flags.profile else None

    @contextmanager
    def active(self, run: Run) -> Iterator[None]:
        outputs = self.flags.metrics, self.flags.log_dir
        self.progress = console.EpochProgress(self.world, run.num_epochs, len(run.train), *outputs)
        profiler = self.trace.profiler if self.trace else nullcontext()
        with self.progress, self.phases or nullcontext(), profiler:
            yield

    def on_resume(self, run: Run) -> None:
        self.progress.print_resumed(run.results, run.total_steps, len(run.results) == run.num_epochs)
        if self.world.dp_size > 2 and not can_share_memory(self.world.dp_size) and self.world.rank == 0:
            print("the weights may differ in the last bits from those of a run that was not stopped")

    def steps(self, batches: Iterator[B]) -> Iterator[B]:
        if self.trace:
            batches = self.trace.steps(batches)
        if not (self.flags.phases or self.flags.collectives):
            yield from batches
        for batch in batches:
            with Collectives(self.world) as collectives:
                yield batch
            self.calls.append(collectives.calls)

    def on_step(self, run: Run, epoch: int, samples: int) -> None:
        self.progress.update(epoch, samples)

    def on_epoch(self, run: Run, result: EpochResult) -> None:
        self.progress.print_epoch(result)

    def on_end(self, run: Run) -> None:
        flags, speaks = self.flags, self.world.rank == 0
        if flags.plots:
            _, outputs = run.evaluate()
            if speaks:
                from support import plots

                plots.save(flags.plots, run.results, outputs, run.test)
        profiles = self.world.gather_results(self.trace.save) if self.trace else []
        if not speaks:
            return
        if flags.collectives:
            console.print_collectives(self.calls[2:])  # DistributedDataParallel sets itself up in two steps
        if self.phases:
            console.print_phases(self.phases)
        if self.trace:
            console.print_profile(self.trace, profiles)
        print(console.summary(run.results))
