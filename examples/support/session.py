# SPDX-License-Identifier: MIT
"""Everything in a training example that is not its subject: data, optimizer, progress, checkpoints, plots."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from support import console
from support.cli import OPTIMIZER_DEFAULTS, StepFlags, TrainFlags
from torchpar import data, training
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.optim import ChainedOptimizer, Muon
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.clip import clip_grad_norm_
from torchpar.parallel.split.layers import Arithmetic, split_parameters
from torchpar.profile.collectives import StepRecorder
from torchpar.profile.phases import Phases
from torchpar.profile.trace import Trace
from torchpar.training import cost
from torchpar.training.fused import FusedGradients, why_not_fused
from torchpar.training.graph import GraphedStep, Step, why_not_graphed

B = TypeVar("B")


def prepare(flags: TrainFlags, world: World) -> tuple[Samples, Samples, list[int]]:
    """Compare the flags of all ranks, load the data, and seed the generators of all ranks alike.

    Returns:
        Training samples, test samples, and the sizes of the MLP that ``flags`` describe.
    """
    world.check_same_on_all_ranks("the ranks' flags", flags.same_on_all_ranks())
    loaded: list[Samples] = []
    world.gather_results(lambda: loaded.extend(_load(flags, world)))
    train, test = loaded
    if flags.dry_run:
        train, flags.epochs = train[: 10 * flags.batch_size], 1
        flags.metrics = flags.log_dir = flags.plots = flags.profile = flags.checkpoint = None
    console.check_outputs(
        world, folders=[flags.plots, flags.checkpoint, flags.log_dir], files=[flags.metrics]
    )
    # Each rank writes its own trace, perhaps to a disk of its machine.
    world.gather_results(lambda: console.create_outputs(folders=[flags.profile], files=[]))
    torch.manual_seed(flags.seed)
    return train, test, [train.inputs(slice(0, 1)).shape[1], *flags.hidden, len(train.classes)]


def _load(flags: TrainFlags, world: World) -> Iterator[Samples]:
    for samples in data.load(flags.dataset, flags.data, world.device):
        fewer = flags.crop or flags.pool > 1
        yield samples.pooled(flags.crop, flags.pool) if fewer else samples


def make_optimizer(
    flags: TrainFlags,
    model: torch.nn.Module,
    samples: int,
    arithmetic: Arithmetic = "fast",
    mesh: DeviceMesh | None = None,
) -> tuple[Optimizer, LambdaLR]:
    """Return the optimizer and the learning-rate scheduler for epochs of ``samples``.

    Args:
        mesh: the ranks that share the work of Muon.
    """
    make: Callable[..., Optimizer] = partial(training.muon, mesh=mesh)
    if flags.optimizer == "sgd":
        make = partial(training.sgd, arithmetic=arithmetic)
    elif arithmetic == "exact":
        raise ConfigError(
            "Muon has no exact arithmetic, which would take several times a step; take --optimizer sgd"
        )
    optimizer = make(model, **{name: getattr(flags, name) for name in OPTIMIZER_DEFAULTS[flags.optimizer]})
    if arithmetic == "exact" and flags.schedule == "cosine":
        raise ConfigError("a cosine differs between processors; take --schedule linear, or --arithmetic fast")
    steps = flags.epochs * -(-samples // flags.batch_size)
    return optimizer, training.lr_scheduler(optimizer, flags.schedule, steps)


def fused_gradients(flags: StepFlags, model: torch.nn.Module, world: World) -> FusedGradients | None:
    """Return what computes the gradients by formulas, or None for autograd. Rank 0 prints which, and why."""
    reason = "--fused is off" if flags.fused == "off" else why_not_fused(model)
    if flags.compile:
        reason = "--compile compiles the model"
    if world.rank == 0:
        print(f"gradients by autograd: {reason}" if reason else "gradients by formulas, without autograd")
    return None if reason else FusedGradients(model, world, flags.label_smoothing)


def graphed_step(
    flags: StepFlags, world: World, step: Step, samples: Samples, optimizer: Optimizer, fused: bool
) -> AbstractContextManager[GraphedStep | None]:
    """Return ``step`` as one CUDA graph, or None if it cannot be one. Rank 0 prints which, and why."""

    def refuse(reason: str) -> None:
        if flags.graph == "on":
            raise ConfigError(f"--graph is on, but a step cannot be a CUDA graph: {reason}")
        # Nobody expects a graph on a CPU.
        if world.rank == 0 and world.device.type == "cuda":
            print(f"no CUDA graph: {reason}")

    reason = why_not_graphed(optimizer, world, fused)
    if flags.phases or flags.collectives or flags.profile:
        reason = "--phases, --collectives and --profile look into a step"
    if flags.graph == "off":
        reason = "--graph is off"
    if reason:
        refuse(reason)
        return nullcontext()
    if world.rank == 0:
        print("each step is one CUDA graph, from the second batch of a size on")
    return GraphedStep(step, samples, optimizer, on_failure=refuse)


def compile_model(module: torch.nn.Module, world: World) -> None:
    """Compile ``module``. If that fails, it runs uncompiled from then on, and rank 0 prints why."""
    module.compile()
    compiled: Any = module._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException

        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as e:
            module._compiled_call_impl = None
            if world.rank == 0:
                reason = " ".join(str(e).partition("\n\n")[0].split())
                print(f"not compiled: {reason}")
            return module(*args, **kwargs)

    module._compiled_call_impl = call


def adjust_gradients(
    flags: TrainFlags, model: torch.nn.Module, world: World, arithmetic: Arithmetic = "fast"
) -> None:
    """Add the orthogonality penalty's gradient and clip the gradient's norm, if ``flags`` ask for it."""
    if flags.orthogonality:
        training.add_orthogonality_gradient(model, flags.orthogonality, arithmetic)
    if flags.clip is not None:
        clip_grad_norm_(model, flags.clip, world, arithmetic)


class Run(training.Run):
    """A `torchpar.training.Run` configured by flags, with progress, metrics, plots and the last line.

    Args:
        micro_batches: of a pipeline, as `torchpar.training.cost.collectives` takes them.
        fused: whether `FusedGradients` computes the gradients, for the same.
        arithmetic: of the layers, for the same.
    """

    def __init__(
        self,
        flags: TrainFlags,
        world: World,
        model: torch.nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LambdaLR,
        train: Samples,
        test: Samples,
        predict: Callable[[Tensor], Tensor | None] | None = None,
        micro_batches: int | Sequence[int] = 1,
        fused: bool = False,
        arithmetic: Arithmetic = "fast",
    ):
        checkpoint = None
        if flags.checkpoint:
            checkpoint = training.CheckpointConfig(
                flags.checkpoint, flags.save_every, flags.keep, flags.async_save
            )
        super().__init__(
            *(model, optimizer, lr_scheduler, world, train, test),
            epochs=flags.epochs,
            batch_size=flags.batch_size,
            predict=predict,
            seed=flags.seed,
            checkpoint=checkpoint,
            config=flags.run_config(),
        )
        self.flags = flags
        steps = optimizer.optimizers if isinstance(optimizer, ChainedOptimizer) else []
        self.sharing_muon = next((one.process_group for one in steps if isinstance(one, Muon)), None)
        self.micro_batches = micro_batches
        self.fused = fused
        self.arithmetic: Arithmetic = arithmetic
        self.phases = Phases(world.device) if flags.phases else None
        self.recorder = StepRecorder(world) if flags.phases or flags.collectives else None
        self.trace = Trace(flags.profile, world.rank, world.device) if flags.profile else None

    def __enter__(self) -> Self:
        self.progress = self._stack.enter_context(
            console.EpochProgress(
                *(self.world, self.num_epochs, len(self.train)), self.flags.metrics, self.flags.log_dir
            )
        )
        try:
            super().__enter__()
        except BaseException:  # the bar has hidden the cursor
            self._stack.close()
            raise
        if self.phases:
            self._stack.enter_context(self.phases)
        if self.trace:
            self._stack.enter_context(self.trace.profiler)
        return self

    def _take(self, epoch: int, kind: Callable[..., Iterator[B]]) -> Iterator[B]:
        batches = super()._take(epoch, kind)
        if self.trace:
            batches = self.trace.steps(batches)
        if self.recorder is None:
            yield from batches
            return
        for batch in batches:
            with self.recorder.step():
                yield batch

    def on_step(self, epoch: int, samples: int) -> None:
        def loss() -> float:  # of rank 0's samples
            return self.state.loss() * self.world.dp_size / samples

        self.progress.update(epoch, samples, loss if self.world.owns_outputs else None)

    def on_epoch(self, result: training.EpochResult) -> None:
        self.progress.print_epoch(result)

    def on_resume(self) -> None:
        complete = len(self.results) == self.num_epochs
        self.progress.print_resumed(self.results, self.total_steps, complete)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if error is None:
            self._report()

    def _report(self) -> None:
        flags, speaks = self.flags, self.world.rank == 0
        if flags.plots:
            _, outputs = self.evaluate()
            if speaks:
                from support import plots

                plots.save(flags.plots, self.results, outputs, self.test)
        profiles = self.world.gather_results(lambda: self.trace and self.trace.result())
        if not speaks:
            return
        if self.recorder and flags.collectives:
            console.print_collectives(self.recorder.calls, self._expected_collectives())
        if self.phases:
            console.print_phases(self.phases)
        if self.trace:
            console.print_profiles(profiles)
        print(console.summary(self.results))

    def _expected_collectives(self) -> list[cost.Expected]:
        return cost.collectives(
            [self.train.inputs(slice(0, 1)).shape[1], *self.flags.hidden, len(self.train.classes)],
            min(self.batch_size, len(self.train)),
            self.world.mesh,
            arithmetic=self.arithmetic,
            micro_batches=self.micro_batches,
            fused=self.fused,
            tensor_split=any(split_parameters(self.model)),
            muon=self.sharing_muon if isinstance(self.sharing_muon, DeviceMesh) else None,
        )
