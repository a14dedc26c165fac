# SPDX-License-Identifier: MIT
"""Parts of the training lessons: flags, data, optimizers, schedules, adjusted gradients, the log.

The model, its split and the loop are the lessons' own.
"""

import math
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from support import cli, console, report, timeline
from support.cli import Bounds, Count, Free, Number, Output, Share, Size, Switch
from support.learning_rate import LRSchedule
from support.orthogonality import add_orthogonality_gradient

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from torchpar import data, training
from torchpar.data import Samples
from torchpar.errors import ConfigError, writing
from torchpar.exact.verify.weights import sha256_of
from torchpar.parallel.launch.agreement import check_same_on_all_ranks
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.clip import clip_grad_norm_
from torchpar.parallel.split.shared_memory import can_share_memory
from torchpar.training import (
    CheckpointConfig,
    Classification,
    EpochResult,
    Run,
    Stopped,
)
from torchpar.training.profile.recorder import Recorder
from torchpar.training.profile.replay_trace import write
from torchpar.training.profile.replaying import TOO_FEW, Replay

# Steps that are not traced: two in which DistributedDataParallel sets itself up, one warms up.
SKIP = 3
# What a played page says of a pipeline's schedule.
SCHEDULES = {
    "gpipe": "gpipe runs the forward passes of all micro-batches, and then their backward passes.",
    "1f1b": "1f1b runs one forward pass and one backward pass in turn, each backward pass as early "
    "as it can, so that it keeps the activations of fewer micro-batches.",
}
Shared = Annotated[Path | None, Output(is_folder=True), Free()]  # a folder of all ranks


@dataclass(kw_only=True)
class TrainFlags(cli.DataFlags):
    """Flags of every training lesson."""

    # Each optimizer's defaults, for a deep sigmoid MLP.
    SGD: ClassVar = {"lr": 0.5, "momentum": 0.9, "weight_decay": 3e-5}
    MUON: ClassVar = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.01}

    epochs: Annotated[Count, Free()] = 10  # Passes over the training samples.
    batch_size: Count = 128  # Samples per step, over all ranks.
    samples: Count | None = None  # Train on the first ones only.
    # Optimizer; muon updates the weight matrices, and SGD updates the biases.
    optimizer: Literal["sgd", "muon"] = "sgd"
    lr: Number | None = None  # Learning rate at the start; the default depends on the optimizer.
    momentum: Share | None = None  # Nesterov momentum; the default depends on the optimizer.
    # Learning-rate schedule over the run; linear and cosine end at 0.
    schedule: LRSchedule = "linear"
    # λ of the weights: for muon decoupled decay, for sgd an L2 penalty λ/2·‖W‖² in the loss.
    weight_decay: Number | None = None
    # Count the biases in the L2 penalty of sgd, too. Muon's decay is no part of the loss, so it
    # refuses this.
    decay_biases: bool = False
    orthogonality: Number = 0.0  # Factor of the penalty Σ‖W·Wᵀ − I‖² in the loss.
    hidden: tuple[Size, ...] = (128, 64)  # Widths of the hidden layers.
    # Pixels to leave out on each side of an image.
    crop: Annotated[int, Bounds(0, 2**31)] = 0
    pool: Size = 1  # Side of the squares of pixels that are averaged to one.
    compile: Switch = False  # Compile the model by torch.compile.
    # Train on ten batches and evaluate; write no metrics, logs, report, replay, profile or
    # checkpoint.
    dry_run: Switch = False
    # Measure the time of each phase of a step (data, forward, backward, collectives, optimizer).
    phases: Switch = False
    collectives: Switch = False  # Count and time the collectives of a step.
    # Measure the bytes of weights, gradients, optimizer state and activations on each rank.
    memory: Switch = False
    report: cli.Report = None  # Folder for a page of the run, run.html.
    replay: cli.Replay = None  # A page that plays some recorded steps, such as step.html.
    log_dir: cli.LogDir = None  # Folder for TensorBoard: losses, accuracy and speed.
    # Folder for torch.profiler's trace of some steps, one file per rank.
    profile: Shared = None
    # Folder of checkpoints, to save to and to resume from, on a file system of all ranks.
    checkpoint: Shared = None
    # Steps between two saves; by default one save per epoch.
    save_every: Annotated[Count | None, Free()] = None
    keep: Annotated[Count, Free()] = 2  # Checkpoints to keep.
    async_save: Switch = False  # Save while training continues.
    # Norm to which larger gradients are scaled down.
    clip: Number | None = None
    # Seconds after which a rank that waits for another gives up.
    timeout: Annotated[float, Bounds(1, 1e6), Free()] = 600.0

    def completed(self) -> Self:
        flags = super().completed()
        if not self.dry_run:
            return flags
        files: dict[str, Any] = dict.fromkeys(
            ("metrics", "log_dir", "report", "replay", "profile", "checkpoint")
        )
        return replace(flags, epochs=1, **files)

    def check(self) -> None:
        if self.decay_biases and self.optimizer == "muon":
            raise ConfigError(
                "--decay-biases changes sgd's L2 penalty, and the optimizer is muon; take "
                "--optimizer sgd"
            )
        if self.clip == 0:
            raise ConfigError("--clip is 0.0, expected more than 0")
        if self.memory and self.compile:
            raise ConfigError(
                "--memory sees no activations of compiled code; drop --compile or --memory"
            )
        if self.replay:
            names = ("phases", "collectives", "memory", "report", "draw", "profile")
            beside = next((f"--{name}" for name in names if getattr(self, name, None)), "")
            cli.check_replay(self.replay, self.compile, beside)
        super().check()

    def load(self, world: World) -> tuple[Samples, Samples]:
        """Return the training and test samples on the device of this rank.

        First compare the flags of all ranks.

        Raises:
            ConfigError: different flags, or no data; on every rank.
        """
        if world.world_size > 1:
            check_same_on_all_ranks(None, "the ranks' flags", self.shared())
        loaded: list[Samples] = []

        def read() -> None:
            for samples in data.load(self.dataset, self.data, world.device):
                fewer = self.crop or self.pool > 1
                loaded.append(samples.pooled(self.crop, self.pool) if fewer else samples)
            cli.check_samples(self.samples, len(loaded[0]))

        world.gather_results(read)  # an error is raised on every rank
        train, test = loaded
        train = train[: self.samples]
        if world.world_size == 1:
            largest = cli.largest_product(self.layer_sizes(train), self.batch_size)
            cli.take_threads(world.device.type, largest)
        return train[: 10 * self.batch_size] if self.dry_run else train, test

    def layer_sizes(self, train: Samples) -> list[int]:
        """Return the widths of the MLP: of its input, its hidden layers and its output.

        Raises:
            ConfigError: the weights do not fit into this machine's memory.
        """
        sizes = [train.inputs(slice(0, 1)).shape[1], *self.hidden, len(train.classes)]
        cli.check_memory(sizes)
        return sizes

    def make_optimizer(
        self, model: torch.nn.Module, mesh: DeviceMesh | None = None, exact: bool = False
    ) -> Optimizer:
        """Return SGD, or Muon for the weights and SGD for the biases.

        Args:
            mesh: ranks that share the work of Muon's iterations on a split matrix.
            exact: whether the optimizer steps in `torchpar.exact.mode`.
        """
        foreach = False if exact else None
        defaults = self.SGD if self.optimizer == "sgd" else self.MUON
        given = {name: getattr(self, name) for name in defaults}
        options: dict[str, Any] = {
            name: defaults[name] if value is None else value for name, value in given.items()
        }
        if self.optimizer == "sgd":
            options |= {"decay_biases": self.decay_biases, "fused": not exact}
            return training.sgd(model, **options, foreach=foreach)
        return training.muon(model, **options, mesh=mesh, foreach=foreach)

    def total_steps(self, train: Samples) -> int:
        """Return the number of steps of the run."""
        return self.epochs * math.ceil(len(train) / self.batch_size)

    def saving(self) -> CheckpointConfig | None:
        """Return where and when to save, if at all."""
        how = self.save_every, self.keep, self.async_save
        return CheckpointConfig(self.checkpoint, *how) if self.checkpoint else None

    def config(self) -> dict[str, object]:
        """Return the flags that a resumed run must share with the saved one."""
        # Of the lessons that lack these flags
        config: dict[str, object] = {
            "activation": "sigmoid",
            "label_smoothing": 0.0,
            "arithmetic": "fast",
        }
        for flag, value, marks in self.marked():
            if not any(isinstance(mark, Free) for mark in marks):
                config[flag.removeprefix("--").replace("-", "_")] = value
        if self.schedule != "constant":
            config["epochs"] = self.epochs  # the schedule depends on them
        return config

    def adjust_gradients(self, model: torch.nn.Module, world: World) -> None:
        """Add the orthogonality penalty's gradient and clip the gradient's norm, if asked for."""
        if self.orthogonality:
            add_orthogonality_gradient(model, self.orthogonality)
        if self.clip is not None:
            clip_grad_norm_(model, self.clip, world)


class Log:
    """The output of a run: on a terminal, in files, and as a page.

        with Run(…) as run, Log(flags, run) as log:
            run.resume()
            log.resumed()
            for epoch in run.epochs():
                for … in run.batches(epoch):
                    …
                    run.end_step(loss_sum=loss)
                    log.step()
                log.epoch(run.end_epoch())

    The last lines follow where the context ends without an error.

    Args:
        draw: print the timeline of a pipeline's step, too.
    """

    def __init__(self, flags: TrainFlags, run: Run, draw: bool = False):
        self.flags, self.run, self.world, self.draws = flags, run, run.world, draw
        self.speaks = run.world.rank == 0
        self.bar = console.progress_bar(hidden=not self.speaks)
        self.recorder: Recorder | None = None
        self.profiler: torch.profiler.profile | None = None
        self.replay: Replay | None = None
        self._shown = 0  # epochs
        self._active = ExitStack()
        self._is_exact = getattr(flags, "arithmetic", "fast") == "exact"
        if draw:
            timeline.check_one_machine(run.world)
        if draw or flags.phases or flags.collectives or flags.memory or flags.report:
            parts = run.state.model, run.state.optimizer, run.world
            self.recorder = Recorder(*parts, activations=not flags.compile)
        if flags.replay:
            self.replay = Replay(run.state.model, run.state.optimizer, run.world)
        if flags.profile:
            # Otherwise it logs each start and end to stderr.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            when = torch.profiler.schedule(wait=SKIP - 1, warmup=1, active=10, repeat=1)
            self.profiler = torch.profiler.profile(schedule=when)

    def __enter__(self) -> Self:
        self.task = self.bar.add_task("samples", total=self.run.num_epochs * self.run.task.samples)
        for context in (self.bar, self.recorder, self.profiler, self.replay):
            if context is not None:
                self._active.enter_context(context)
        return self

    def resumed(self) -> None:
        """Show where the run was resumed, if it was."""
        run, step = self.run, self.run.resumed_from
        self._shown = len(run.results)
        if step is not None:
            complete = self._shown == run.num_epochs
            where = f"complete already, at step {step}" if complete else f"resumed from step {step}"
            self._print(where)
            if self.world.dp_size > 2 and not can_share_memory(self.world.dp_size):
                self._print(
                    "the weights may differ in the last bits from those of a run that was not "
                    "stopped"
                )
            self._write(first=0)
        self._advance()

    def step(self) -> None:
        """Show on the progress bar that a step of the lesson has ended."""
        if self.profiler is not None:
            self.profiler.step()
        self._advance()

    def epoch(self, result: EpochResult) -> None:
        """Show and write the figures of an epoch that has ended."""
        self._shown = result.epoch
        self._print(console.epoch_line(result, self.run.num_epochs))
        self._write(first=-1)
        self._advance()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._active:
            if kind is not None and not issubclass(kind, Stopped):
                return
            if len(self.run.results) > self._shown:  # its save stopped the run
                self.epoch(self.run.results[-1])
        if kind is None:
            self.run.wait()
            self._end()

    def _advance(self) -> None:
        """Move the progress bar to the samples that were trained on."""
        if not self.bar.disable:
            run = self.run
            samples = min(run.state.step * run.task.batch_size, run.task.samples)
            self.bar.update(self.task, completed=len(run.results) * run.task.samples + samples)

    def _print(self, *lines: str) -> None:
        for line in lines if self.speaks else ():
            print(line)

    def _write(self, first: int) -> None:
        rows = [asdict(result) for result in self.run.results]
        if self.speaks:
            console.write_metrics(self.flags.metrics, rows)
            console.write_log(self.flags.log_dir, rows[first:], "epoch")

    def _end(self) -> None:
        flags, run = self.flags, self.run
        records = self.recorder.gather() if self.recorder else []
        traces = self.world.gather_results(self._save_trace) if self.profiler else []
        found = self._gather_replay(self.replay) if self.replay else None
        outputs = run.evaluate().outputs if flags.report else None
        if not self.speaks:
            return
        if flags.report:
            assert isinstance(run.task, Classification)
            page = {"": report.as_run(run.results, records)}
            report.write(flags.report, page, outputs, run.task.test)
        if flags.replay:
            self._print(f"replay: {write(flags.replay, found) if found else TOO_FEW}")
        if flags.collectives:
            console.print_messages(records[0])
        if flags.phases:
            console.print_phases(records[0].seconds)
        if flags.memory:
            console.print_memory(records)
        if self.draws:
            self._print(*timeline.draw(records))
        self._print(*traces[:1])
        if getattr(flags, "label_smoothing", 0.0) and run.resumed_from != run.total_steps:
            self._print(
                "train loss: the mean over an epoch's steps, with smoothed labels; test loss: "
                "after it, with the labels as they are"
            )
        self._print(console.summary(run.results))
        if self._is_exact:
            digest = sha256_of(run.state.model.named_parameters())
            self._print(f"SHA-256 of the weights: {digest}")

    def _gather_replay(self, recorded: Replay) -> dict[str, Any] | None:
        """Return the recording of all ranks; of a pipeline the schedule is named."""
        schedule = getattr(self.flags, "pipeline", "") if self.world.mesh["pp"].size() > 1 else ""
        title = ", ".join(filter(None, [Path(sys.argv[0]).name, schedule]))
        return recorded.gather(title, SCHEDULES.get(schedule, ""))

    def _save_trace(self) -> str:
        """Write this rank's trace, and return a table of its costliest operators."""
        assert self.profiler is not None
        assert self.flags.profile is not None
        if self.profiler.step_num <= SKIP:  # complete already, or a short run
            return f"profile: nothing was recorded, no more than {SKIP} steps were trained"
        path = self.flags.profile / f"rank-{self.world.rank}.json.gz"
        with writing(path, "--profile"):
            self.profiler.export_chrome_trace(str(path))
        by = "self_device_time_total" if self.world.device.type == "cuda" else "self_cpu_time_total"
        table = self.profiler.key_averages().table(by, row_limit=10, max_name_column_width=40)
        return f"costliest operators of rank {self.world.rank}\n{table.rstrip()}"
