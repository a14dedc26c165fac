# SPDX-License-Identifier: MIT
"""Parts that the training lessons share: data, optimizers, adjusted gradients, and the log of a
run."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from statistics import median
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.profiler import profile, schedule

from support import console, plots
from support.cli import TrainFlags
from torchpar import data, training
from torchpar.data import Samples
from torchpar.parallel.launch.agreement import check_same_on_all_ranks
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.clip import clip_grad_norm_
from torchpar.parallel.split.shared_memory import can_share_memory
from torchpar.profile.collectives import Call, Collectives
from torchpar.profile.memory import Memory
from torchpar.profile.phases import Phases
from torchpar.training import EpochResult, Run

B = TypeVar("B")
# Steps that are not traced: two in which DistributedDataParallel sets itself up, one warms up.
SKIP = 3


def load(flags: TrainFlags, world: World) -> tuple[Samples, Samples]:
    """Return the training and test samples on the device of this rank.

    First compare the flags of all ranks: all but the data folder and the device.

    Raises:
        ConfigError: different flags, or no data; on every rank.
    """
    shared = {
        name: value for name, value in asdict(flags).items() if name not in ("data", "device")
    }
    check_same_on_all_ranks(None, "the ranks' flags", shared)
    loaded: list[Samples] = []

    def read() -> None:
        for samples in data.load(flags.dataset, flags.data, world.device):
            fewer = flags.crop or flags.pool > 1
            loaded.append(samples.pooled(flags.crop, flags.pool) if fewer else samples)

    world.gather_results(read)  # an error is raised on every rank
    train, test = loaded
    train = train[: flags.samples]
    return train[: 10 * flags.batch_size] if flags.dry_run else train, test


def make_optimizer(
    flags: TrainFlags, model: torch.nn.Module, mesh: DeviceMesh | None = None
) -> Optimizer:
    """Return SGD, or Muon for the weights and SGD for the biases.

    Args:
        mesh: ranks that share the work of Muon's iterations on a split matrix.
    """
    if flags.optimizer == "sgd":
        options = flags.optimizer_options(flags.SGD)
        return training.sgd(model, **options, decay_biases=flags.decay_biases, fused=True)
    return training.muon(model, **flags.optimizer_options(flags.MUON), mesh=mesh)


def adjust_gradients(flags: TrainFlags, model: torch.nn.Module, world: World) -> None:
    """Add the orthogonality penalty's gradient and clip the gradient's norm, if ``flags`` ask for
    it."""
    if flags.orthogonality:
        training.add_orthogonality_gradient(model, flags.orthogonality)
    if flags.clip is not None:
        clip_grad_norm_(model, flags.clip, world)


class Log(training.RunLog):
    """Progress, a line for each epoch, metrics, plots, tables of times and messages, and the last
    line."""

    def __init__(self, flags: TrainFlags, world: World):
        self.flags = flags
        self.world = world
        self.speaks = world.rank == 0
        self.phases = Phases(world.device) if flags.phases else None
        self.calls: list[list[Call]] = []  # of each step
        self.profiler: profile | None = None
        if flags.profile:
            # Otherwise it logs each start and end to stderr.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            self.profiler = profile(schedule=schedule(wait=SKIP - 1, warmup=1, active=10, repeat=1))
        terminal = Console()
        hidden = not (self.speaks and terminal.is_terminal)
        self.bar = Progress(console=terminal, transient=True, disable=hidden)

    @contextmanager
    def active(self, run: Run) -> Iterator[None]:
        self.task = self.bar.add_task("samples", total=run.num_epochs * run.task.samples)
        with self.bar, self.phases or nullcontext(), self.profiler or nullcontext():
            yield

    def on_resume(self, run: Run) -> None:
        complete = len(run.results) == run.num_epochs
        steps = run.total_steps
        self._print(
            f"complete already, at step {steps}" if complete else f"resumed from step {steps}"
        )
        if self.world.dp_size > 2 and not can_share_memory(self.world.dp_size):
            self._print(
                "the weights may differ in the last bits from those of a run that was not stopped"
            )
        self._write(run, first=0)

    def _print(self, line: str) -> None:
        if self.speaks:
            self.bar.console.print(line, soft_wrap=True)

    def steps(self, batches: Iterator[B]) -> Iterator[B]:
        counted = self.flags.phases or self.flags.collectives
        if self.phases:
            batches = self.phases.steps(batches)
        return self._watched(batches, counted) if counted or self.profiler else batches

    def _watched(self, batches: Iterator[B], counted: bool) -> Iterator[B]:
        for batch in batches:
            with Collectives(self.world) if counted else nullcontext() as collectives:
                yield batch
            if collectives:
                self.calls.append(collectives.calls)
            if self.profiler:
                self.profiler.step()

    def on_step(self, run: Run, epoch: int, samples: int) -> None:
        if self.phases:
            self.phases.end_step()
        if not self.bar.disable:
            self.bar.update(self.task, completed=(epoch - 1) * run.task.samples + samples)

    def on_epoch(self, run: Run, result: EpochResult) -> None:
        self._print(console.epoch_line(result, run.num_epochs))
        self._write(run, first=-1)

    def _write(self, run: Run, first: int) -> None:
        rows = [asdict(result) for result in run.results]
        if self.speaks:
            console.write_metrics(self.flags.metrics, rows)
            console.write_log(self.flags.log_dir, rows[first:], "epoch")

    def on_end(self, run: Run) -> None:
        flags = self.flags
        if flags.plots:
            assert isinstance(run.task, training.Classification)
            outputs = run.evaluate().outputs
            assert outputs is not None
            if self.speaks:
                plots.save(flags.plots, run.results, outputs, run.task.test)
        profiled = self.world.gather_results(self._save_trace) if self.profiler else [""]
        if not self.speaks:
            return
        if flags.collectives:
            # DistributedDataParallel sets itself up in two steps.
            _print_collectives(self.calls[2:])
        if self.phases:
            console.print_phases(self.phases)
        print(profiled[0], end="")
        print(console.summary(run.results))

    def _save_trace(self) -> str:
        """Write this rank's trace, and return a table of its costliest operators, both by
        torch.profiler."""
        assert self.profiler is not None
        assert self.flags.profile is not None
        if self.profiler.step_num <= SKIP:  # complete already, or a short run
            return f"profile: nothing was recorded, no more than {SKIP} steps were trained\n"
        self.profiler.export_chrome_trace(
            str(self.flags.profile / f"rank-{self.world.rank}.json.gz")
        )
        by = "self_device_time_total" if self.world.device.type == "cuda" else "self_cpu_time_total"
        table = self.profiler.key_averages().table(by, row_limit=10, max_name_column_width=40)
        return f"costliest operators of rank {self.world.rank}\n{table}"


def print_memory(memory: Memory, world: World) -> None:
    """Print a table of the bytes of each rank, on rank 0. All ranks call it."""
    dimensions = ("dp", "tp", "pp")
    place = " ".join(str(world.mesh.get_local_rank(name)) for name in dimensions)
    mine = memory.measured()
    mine["sum"] = sum(mine.values())
    rank = {f"rank: {' '.join(dimensions)}": f"{world.rank}: {place}"}
    rows = world.gather_results(lambda: rank | {name: f"{n:,}" for name, n in mine.items()})
    if world.rank == 0:
        console.print_rows(rows, list(rows[0]), "bytes of each rank")


def _print_collectives(calls: Sequence[Sequence[Call]]) -> None:
    """Print a table of rank 0's collectives in a step, the median of the recorded steps."""
    rows = []
    for kind in dict.fromkeys((c.dimension, c.operation) for step in calls for c in step):
        counted = [[c for c in step if (c.dimension, c.operation) == kind] for step in calls]
        ms = 1000 * median(sum(c.seconds for c in step) for step in counted)
        row = {"dimension": kind[0] or "several", "operation": kind[1]}
        row["count"] = f"{median(map(len, counted)):g}"
        row["bytes"] = f"{median(sum(c.bytes for c in step) for step in counted):,.0f}"
        # A receiver waits for its neighbour's work more than for the message.
        rows.append(row | {"ms": "-" if kind[1] == "recv" else f"{ms:.2f}"})
    if rows:
        console.print_rows(rows, list(rows[0]), "collectives of a step, rank 0")
    else:
        print(
            "collectives per step: none was recorded, as there is one rank, or no more than two "
            "steps"
        )
