# SPDX-License-Identifier: MIT
"""Parts that the training lessons share: data, optimizers, adjusted gradients, a run's output."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.profiler import profile, schedule

from support import console, report, timeline
from support.cli import TrainFlags
from torchpar import data, training
from torchpar.data import Samples
from torchpar.parallel.launch.agreement import check_same_on_all_ranks
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.clip import clip_grad_norm_
from torchpar.parallel.split.shared_memory import can_share_memory
from torchpar.training import EpochResult, Run
from torchpar.training.profile.record import RankRecord
from torchpar.training.profile.recorder import Recorder

B = TypeVar("B")
# Steps that are not traced: two in which DistributedDataParallel sets itself up, one warms up.
SKIP = 3


def load(flags: TrainFlags, world: World) -> tuple[Samples, Samples]:
    """Return the training and test samples on the device of this rank.

    First compare the flags of all ranks: all but the data folder and the device.

    Raises:
        ConfigError: different flags, or no data; on every rank.
    """
    if world.world_size > 1:
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


class Recording(training.RunLog):
    """The records of a run's steps, if they are wanted.

    Attributes:
        records: of all ranks, after the run.
    """

    def __init__(self, world: World, wanted: bool, activations: bool = True):
        self.world = world
        self.records: list[RankRecord] = []
        self._wanted, self._activations = wanted, activations
        self._recorder: Recorder | None = None

    @contextmanager
    def active(self, run: Run) -> Iterator[None]:
        if not self._wanted:
            yield
            return
        parts = (run.state.model, run.state.optimizer, self.world)
        with Recorder(*parts, activations=self._activations) as self._recorder:
            yield

    def steps(self, batches: Iterator[B]) -> Iterator[B]:
        return self._recorder.steps(batches) if self._recorder else batches

    def on_step(self, run: Run, epoch: int, samples: int) -> None:  # noqa: ARG002  # RunLog's
        if self._recorder:
            self._recorder.end_step()

    def on_end(self, run: Run) -> None:  # noqa: ARG002  # RunLog's
        if self._recorder:
            self.records = self._recorder.gather()


class Log(Recording):
    """The output of a run: on a terminal, in files, and as a page.

    Args:
        draw: print the timeline of a pipeline's step, too.
    """

    def __init__(self, flags: TrainFlags, world: World, draw: bool = False):
        wanted = flags.phases or flags.collectives or flags.memory or flags.report is not None
        super().__init__(world, wanted or draw, activations=not flags.compile)
        self.flags = flags
        self.draw = draw
        self.speaks = world.rank == 0
        self.profiler: profile | None = None
        if draw:
            timeline.check_one_machine(world)
        if flags.profile:
            # Otherwise it logs each start and end to stderr.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            self.profiler = profile(schedule=schedule(wait=SKIP - 1, warmup=1, active=10, repeat=1))
        self.bar = console.progress_bar(hidden=not self.speaks)

    @contextmanager
    def active(self, run: Run) -> Iterator[None]:
        self.task = self.bar.add_task("samples", total=run.num_epochs * run.task.samples)
        with self.bar, super().active(run), self.profiler or nullcontext():
            yield

    def on_resume(self, run: Run) -> None:
        complete = len(run.results) == run.num_epochs
        steps = run.total_steps
        self._show(
            f"complete already, at step {steps}" if complete else f"resumed from step {steps}"
        )
        if self.world.dp_size > 2 and not can_share_memory(self.world.dp_size):
            self._show(
                "the weights may differ in the last bits from those of a run that was not stopped"
            )
        self._write(run, first=0)

    def _show(self, line: str) -> None:
        if self.speaks:
            console.show(line, self.bar)

    def steps(self, batches: Iterator[B]) -> Iterator[B]:
        recorded = super().steps(batches)
        return self._traced(recorded, self.profiler) if self.profiler else recorded

    def _traced(self, batches: Iterator[B], profiler: profile) -> Iterator[B]:
        for batch in batches:
            yield batch
            profiler.step()

    def on_step(self, run: Run, epoch: int, samples: int) -> None:
        super().on_step(run, epoch, samples)
        if not self.bar.disable:
            self.bar.update(self.task, completed=(epoch - 1) * run.task.samples + samples)

    def on_epoch(self, run: Run, result: EpochResult) -> None:
        self._show(console.epoch_line(result, run.num_epochs))
        self._write(run, first=-1)

    def _write(self, run: Run, first: int) -> None:
        rows = [asdict(result) for result in run.results]
        if self.speaks:
            console.write_metrics(self.flags.metrics, rows)
            console.write_log(self.flags.log_dir, rows[first:], "epoch")

    def on_end(self, run: Run) -> None:
        flags = self.flags
        super().on_end(run)
        records = self.records
        traces = self.world.gather_results(self._save_trace) if self.profiler else []
        outputs = run.evaluate().outputs if flags.report else None
        if not self.speaks:
            return
        if flags.report:
            assert isinstance(run.task, training.Classification)
            page = {"": report.as_run(run.results, records)}
            report.write(flags.report, page, outputs, run.task.test)
        if flags.collectives:
            console.print_messages(records[0])
        if flags.phases:
            console.print_phases(records[0].seconds)
        if flags.memory:
            console.print_memory(records)
        for line in timeline.draw(records) if self.draw else ():
            console.show(line)
        for table in traces[:1]:
            console.show(table)
        console.show(console.summary(run.results))

    def _save_trace(self) -> str:
        """Write this rank's trace, and return a table of its costliest operators."""
        assert self.profiler is not None
        assert self.flags.profile is not None
        if self.profiler.step_num <= SKIP:  # complete already, or a short run
            return f"profile: nothing was recorded, no more than {SKIP} steps were trained"
        self.profiler.export_chrome_trace(
            str(self.flags.profile / f"rank-{self.world.rank}.json.gz")
        )
        by = "self_device_time_total" if self.world.device.type == "cuda" else "self_cpu_time_total"
        table = self.profiler.key_averages().table(by, row_limit=10, max_name_column_width=40)
        return f"costliest operators of rank {self.world.rank}\n{table.rstrip()}"
