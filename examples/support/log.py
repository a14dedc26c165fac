# SPDX-License-Identifier: MIT
"""The log of a training lesson: what its run shows and writes, as the flags ask for it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile, schedule

from support import console
from support.cli import TrainFlags
from torchpar import training
from torchpar.errors import ConfigError
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.shared_memory import can_share_memory
from torchpar.profile.collectives import Call, Collectives
from torchpar.profile.phases import Phases
from torchpar.training import EpochResult, Run

B = TypeVar("B")
SKIP = 3  # steps that are not traced: two in which DistributedDataParallel sets itself up, one warms up


class Log(training.RunLog):
    """Progress, a line for each epoch, metrics, plots, tables of times and messages, and the last line."""

    def __init__(self, flags: TrainFlags, world: World):
        self.flags = flags
        self.world = world
        self.phases = Phases(world.device) if flags.phases else None
        self.calls: list[list[Call]] = []  # of each step
        self.profiler: profile | None = None
        if flags.profile:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it logs each start and end to stderr
            on_gpu = [ProfilerActivity.CUDA] * (world.device.type == "cuda")
            self.profiler = profile(
                activities=[ProfilerActivity.CPU, *on_gpu],
                schedule=schedule(wait=SKIP - 1, warmup=1, active=10, repeat=1),
            )

    @contextmanager
    def active(self, run: Run) -> Iterator[None]:
        outputs = self.flags.metrics, self.flags.log_dir
        self.progress = console.EpochProgress(self.world, run.num_epochs, len(run.train), *outputs)
        with self.progress, self.phases or nullcontext(), self.profiler or nullcontext():
            yield

    def on_resume(self, run: Run) -> None:
        self.progress.print_resumed(run.results, run.total_steps, len(run.results) == run.num_epochs)
        if self.world.dp_size > 2 and not can_share_memory(self.world.dp_size) and self.world.rank == 0:
            print("the weights may differ in the last bits from those of a run that was not stopped")

    def steps(self, batches: Iterator[B]) -> Iterator[B]:
        counted = self.flags.phases or self.flags.collectives
        for batch in batches:
            with Collectives(self.world) if counted else nullcontext() as collectives:
                yield batch
            if collectives:
                self.calls.append(collectives.calls)
            if self.profiler:
                self.profiler.step()

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
        profiled = self.world.gather_results(self._save_trace) if self.profiler else [""]
        if not speaks:
            return
        if flags.collectives:
            console.print_collectives(self.calls[2:])  # DistributedDataParallel sets itself up in two steps
        if self.phases:
            console.print_phases(self.phases)
        print(profiled[0], end="")
        print(console.summary(run.results))

    def _save_trace(self) -> str:
        """Write this rank's trace, and return a table of its costliest operators, both by torch.profiler."""
        assert self.profiler is not None
        assert self.flags.profile is not None
        if self.profiler.step_num <= SKIP:  # complete already, or a short run
            return f"profile: nothing was recorded, no more than {SKIP} steps were trained\n"
        path = self.flags.profile / f"rank-{self.world.rank}.json.gz"
        try:
            self.profiler.export_chrome_trace(str(path))
        except OSError as e:
            raise ConfigError(f"{path} cannot be written: {e}") from e
        by = "self_device_time_total" if self.world.device.type == "cuda" else "self_cpu_time_total"
        table = self.profiler.key_averages().table(by, row_limit=10, max_name_column_width=40)
        return f"costliest operators of rank {self.world.rank}\n{table}"
