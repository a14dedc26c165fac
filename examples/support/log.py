# SPDX-License-Identifier: MIT
"""The log of a training lesson: what its run shows and writes, as the flags ask for it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from torch.distributed.device_mesh import DeviceMesh

from support import console
from support.cli import TrainFlags
from torchpar import training
from torchpar.optim import ChainedOptimizer, Muon
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.layers import split_parameters
from torchpar.parallel.split.shared_memory import can_share_memory
from torchpar.profile.collectives import StepRecorder
from torchpar.profile.phases import Phases
from torchpar.profile.trace import Trace
from torchpar.training import EpochResult, Run, cost

B = TypeVar("B")


class Log(training.RunLog):
    """Progress, a line for each epoch, metrics, plots, tables of times and messages, and the last line.

    Args:
        expected: arguments of `torchpar.training.cost.collectives`, which predicts a step's messages.
    """

    def __init__(self, flags: TrainFlags, world: World, **expected: Any):
        self.flags = flags
        self.world = world
        self.expected = expected
        self.phases = Phases(world.device) if flags.phases else None
        self.recorder = StepRecorder(world) if flags.phases or flags.collectives else None
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
        for batch in batches:
            with self.recorder.step() if self.recorder else nullcontext():
                yield batch

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
        profiles = self.world.gather_results(lambda: self.trace and self.trace.result())
        if not speaks:
            return
        if self.recorder and flags.collectives:
            console.print_collectives(self.recorder.calls, self._expected_collectives(run))
        if self.phases:
            console.print_phases(self.phases)
        if self.trace:
            console.print_profiles(profiles)
        print(console.summary(run.results))

    def _expected_collectives(self, run: Run) -> list[cost.Expected]:
        one = run.optimizer
        steps = one.optimizers if isinstance(one, ChainedOptimizer) else (one,)
        groups = [one.process_group for one in steps if isinstance(one, Muon)]
        return cost.collectives(
            self.flags.layer_sizes(run.train),
            min(run.batch_size, len(run.train)),
            self.world.mesh,
            tensor_split=any(split_parameters(run.model)),
            muon=next((group for group in groups if isinstance(group, DeviceMesh)), None),
            **self.expected,
        )
