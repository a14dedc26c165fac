# SPDX-License-Identifier: MIT
"""`Run`: the position of a training loop, its checkpoints, and its evaluation.

    task = Classification(train, test, batch_size=128)
    with Run(model, optimizer, lr_scheduler, world, task, epochs=10) as run:
        run.resume()  # from the newest checkpoint, if there is one
        for epoch in run.epochs():
            for x, labels, global_size in run.batches(epoch):  # of this rank, those that remain
                loss = cross_entropy(model(x), labels, reduction="sum")
                (loss / global_size).backward()
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
                run.end_step(loss_sum=loss)  # counts and checks; saves and stops if it is time to
            result = run.end_epoch()  # evaluates and saves

The model, the optimizer and the loop are the program's own. A `Task` says what is trained on, in
which batches, and how the model is judged; a loop over data of its own is a Task of its own. A loop
that accumulates the gradients of several batches calls `end_step` after each batch, and is saved
and stopped after a step of the optimizer.

A ``break`` before `Run.batches` ends the run after the last whole epoch, as to stop early. What an
epoch's body does before `Run.batches` is done again when a run resumes within that epoch;
afterwards the random state is the saved one.
"""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import FrameType
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from torchpar.errors import ConfigError, DivergedError, check_finite, check_whole, whole_or_text
from torchpar.library.sharding import local
from torchpar.parallel.launch.agreement import check_same_bits, check_same_on_all_ranks
from torchpar.parallel.launch.silence import naming_silent_ranks
from torchpar.parallel.launch.world import World, check_module, check_world
from torchpar.parallel.save.checkpoint import CheckpointConfig, Checkpoints
from torchpar.parallel.split.parts import reshard
from torchpar.training import state
from torchpar.training.answers import answering_signals
from torchpar.training.consistency import check_consistency, has_gradients, lengths
from torchpar.training.graphed import count_replays
from torchpar.training.optimizer_state import evaluation_weights, has_modes
from torchpar.training.outcome import EpochResult, Evaluation, Stopped
from torchpar.training.replicas import check_replicas
from torchpar.training.stateful import check_stateful
from torchpar.training.stop import StopSignal
from torchpar.training.train_state import TrainState
from torchpar.training.unsaved import Unsaved


class Task(Protocol):
    """What a `Run` trains on, and how it is judged; `torchpar.training.Classification` is one.

    Attributes:
        samples: of an epoch, over all ranks.
        batch_size: samples of a step, over all ranks; an epoch's last step has the remainder.
        config: values that identify the task in checkpoints, as JSON.
    """

    samples: int
    batch_size: int
    config: dict[str, Any]

    def check(self, world: World) -> None:
        """Raise a ConfigError, on every rank, if the task cannot be trained."""

    def batches(self, epoch: int, start: int, world: World) -> Iterable[Any]:
        """Yield this rank's share of each batch of ``epoch``, from the batch number ``start``."""

    def evaluate(self, model: torch.nn.Module, world: World) -> Evaluation:
        """Judge the model, which is in evaluation mode. Every rank calls it."""


def _check_kinds(model: object, optimizer: object, world: object, checkpoint: object) -> None:
    """Refuse arguments of another kind, such as those of another order."""
    check_world("Run", world)
    check_module("Run", model)
    for name, value, kind, expected in (
        ("optimizer", optimizer, Optimizer, "one of torch.optim or torchpar.optim"),
        ("checkpoint", checkpoint, CheckpointConfig | None, "CheckpointConfig(folder), or None"),
    ):
        if not isinstance(value, kind):
            raise ConfigError(f"Run: {name} is of type {type(value).__name__}, expected {expected}")


class Run:
    """One training run on this rank. All ranks make it with the same arguments.

    Args:
        model: this rank's part of the model; not its DistributedDataParallel wrapper.
        optimizer, lr_scheduler: over all of ``model``'s parameters that require a gradient; the
            training loop steps both. ``lr_scheduler`` may be None.
        world: the ranks and their mesh.
        task: what is trained on, and how it is judged.
        epochs: passes over the training samples, those of a resumed run included.
        checkpoint: where and when to save, if at all. A run that was stopped at any step resumes
            there, with the same bits on the same ranks. On three ranks or more,
            DistributedDataParallel needs `register_shared_memory_hook` for this
            (docs/checkpoints.md).
        config: values that identify the run, as JSON, the same on all ranks; a checkpoint with
            other values is refused.
        stateful: other objects that the checkpoints hold, by name: whatever has ``state_dict`` and
            ``load_state_dict``, such as an `AveragedModel`, a `GradScaler` or a second optimizer,
            and generators of PyTorch, NumPy and Python. The process's own generators are saved
            without it. Modules are evaluated in evaluation mode, as the model is.

    Attributes:
        resumed_from: the step at which the run was resumed; None if it was not.

    Raises:
        ConfigError: ranks with different models, arguments or samples; an optimizer of other
            parameters than the model's, an lr_scheduler of another optimizer or longer than the
            run, or a task that judges another model; in the optimizer's first step, a model
            without gradients, gradients that differ between the ranks of "dp", or those of whole
            parameters between the ranks of "tp"; a checkpoint that is damaged, of another run or
            of more epochs; a model or an optimizer of which a checkpoint would lose something; an
            average of the model, a gradient scaler, or a module that the loop changes, which
            ``stateful`` lacks. On every rank.
        DivergedError: the training or the test loss of an epoch is not finite, or a weight or a
            loss when it is to be saved. On every rank.
        RuntimeError: a loop that leaves out a step's end, or an epoch's beginning or end, or was
            left in an epoch.
        Stopped: after SIGTERM, SIGINT, SIGHUP or SIGQUIT, if there is a ``checkpoint``. On every
            rank.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None,
        world: World,
        task: Task,
        *,
        epochs: int,
        checkpoint: CheckpointConfig | None = None,
        config: dict[str, Any] | None = None,
        stateful: Mapping[str, Any] | None = None,
    ):
        _check_kinds(model, optimizer, world, checkpoint)
        kept = check_stateful(stateful)
        identity = {**(config or {}), **task.config}
        try:
            saved = json.loads(json.dumps(identity))
        except TypeError as e:
            raise ConfigError(f"config is {identity}, expected what JSON can hold ({e})") from e
        if world.world_size > 1:
            numbers = {"epochs": epochs, "batch_size": task.batch_size}
            given = task.config | {name: whole_or_text(value) for name, value in numbers.items()}
            given["checkpoint"] = str(checkpoint)
            given["stateful"] = {name: type(x).__name__ for name, x in kept.items()}
            check_same_on_all_ranks(None, "the ranks' runs", given)
        # What is wrong on one rank alone has been found to differ.
        epochs = check_whole("epochs", epochs)
        check_whole("batch_size", task.batch_size)
        task.check(world)
        steps_per_epoch = math.ceil(task.samples / task.batch_size)
        parts = model, optimizer, lr_scheduler, task, kept
        world.gather_results(lambda: check_consistency(*parts, epochs, steps_per_epoch))
        self.state = TrainState(model, optimizer, lr_scheduler, world, saved, stateful=kept)
        self.world = world
        self.task = task
        self.num_epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.resumed_from: int | None = None
        self._stack = ExitStack()
        self._checkpoints = Checkpoints(checkpoint, world) if checkpoint else None
        self._is_resumed = checkpoint is None  # there is nothing to resume from
        self._stop: StopSignal | None = None
        self._first = 0  # the step at which this process began the epoch
        self._start = 0.0  # when it did
        self._is_within_epoch = False
        self._has_stepped = False  # since the last batch was taken
        self._replays = 0  # of the optimizer, when the last batch was taken
        self._save_is_late = False  # until the optimizer has stepped
        self._is_first_step = True
        self._unsaved = Unsaved(self.state, task)
        if checkpoint is not None:
            state.check_saveable(self.state)
            self._stack.callback(optimizer.register_step_post_hook(self._note_step).remove)
        # A hook that removed itself would disturb PyTorch's loop over the hooks.
        self._stack.callback(optimizer.register_step_pre_hook(self._check_gradients).remove)

    @property
    def results(self) -> list[EpochResult]:
        """The figures of the complete epochs, those before a resumed one included."""
        return self.state.results

    @property
    def total_steps(self) -> int:
        """Complete steps since the run began, those before it was resumed included."""
        return len(self.results) * self.steps_per_epoch + self.state.step

    def __enter__(self) -> Self:
        with self._stack.pop_all() as stack:
            if self.world.world_size > 1:
                stack.enter_context(naming_silent_ranks(self.world, self._steps_in_epoch))
            if self._checkpoints is not None:
                self._stop = stack.enter_context(StopSignal(self.world))
            stack.enter_context(
                answering_signals(self.world, self._stop.signals if self._stop else ())
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stack.close()
        if error is not None:
            return
        self.wait()
        if self._is_within_epoch:
            raise RuntimeError(
                f"the loop was left in epoch {len(self.results) + 1}, after {self.state.step} of "
                f"{self.steps_per_epoch} batches: they were not evaluated, and not saved; take all "
                "batches of an epoch and call run.end_epoch(), or leave before run.batches"
            )

    def wait(self) -> None:
        """Wait for a save that is under way."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        if self._checkpoints is None:
            return
        if self._stop is None:
            raise RuntimeError(
                "the run was not entered, and would save nothing; use with Run(…) as run"
            )
        self._checkpoints.lock()
        self._is_resumed = True
        planned = lengths(self.state.lr_scheduler)
        if not state.resume(self.state, self._checkpoints):
            return
        for (name, length), (_, saved) in zip(
            planned, lengths(self.state.lr_scheduler), strict=True
        ):
            if length != saved:  # loading has replaced it
                raise ConfigError(
                    f"{self._checkpoints.folder} was saved with {name} {saved}, and this run's is "
                    f"{length}; take {saved}, or another folder"
                )
        if len(self.results) > self.num_epochs:
            raise ConfigError(
                f"{self._checkpoints.folder} holds {len(self.results)} epochs, more than the "
                f"{self.num_epochs} asked for; ask for more, or use another folder"
            )
        self.resumed_from = self.total_steps

    def epochs(self) -> range:
        """The numbers of the remaining epochs; the first epoch is 1."""
        if not self._is_resumed:
            raise RuntimeError(
                "the run has a checkpoint, and may have been saved before; call run.resume() first"
            )
        return range(len(self.results) + 1, self.num_epochs + 1)

    def batches(self, epoch: int) -> Iterator[Any]:
        """Begin ``epoch``; return this rank's share of each of the task's remaining batches.

        Where the epoch is resumed, random numbers go on as they would have.
        """
        if epoch != len(self.results) + 1:
            raise RuntimeError(
                f"{len(self.results)} epochs have ended, and the batches are of epoch {epoch}; "
                "call run.end_epoch() after the batches of each epoch"
            )
        first = self.state.step
        if self._checkpoints is not None:
            self._unsaved.begin(sys._getframe(1))
        if has_modes(self.state.optimizer):
            self.state.optimizer.train()  # type: ignore[attr-defined]
        if first:  # the epoch's body may have drawn random numbers
            state.restore_random_states(self.state)
        self._first, self._start = first, time.perf_counter()
        self._is_within_epoch = True
        self._begin_step()
        return iter(self.task.batches(epoch, first, self.world))

    def _steps_in_epoch(self) -> int | None:
        """`total_steps`, or None outside of an epoch, where other ranks may leave before this."""
        return self.total_steps if self._is_within_epoch else None

    def _begin_step(self) -> None:
        """Let the ranks agree, while the step computes, whether they stop after it."""
        if self._stop is not None:
            self._has_stepped = False
            self._replays = count_replays(self.state.optimizer)
            self._stop.start_all_reduce()

    def end_step(self, *, loss_sum: Tensor) -> None:
        """End a step: count it and check it, and save and stop if it is time to.

        Args:
            loss_sum: this rank's part of the sum, not of the mean, of the losses of the step's
                samples; the ranks' parts add up to the sum.
        """
        step = self.state.step + 1
        if not self._is_within_epoch or step > self.steps_per_epoch:
            raise RuntimeError(
                f"step {step} ends in an epoch of {self.steps_per_epoch} batches; take the batches "
                "of run.batches(epoch), and call run.end_step(loss_sum=…) once for each"
            )
        self.state.step = step
        if self.world.owns_outputs:
            # A tensor: the host waits for no GPU.
            self.state.loss_sum = self.state.loss_sum + loss_sum.detach().double()
        if step == self._first + 1:
            self._check_replicas()
        if step < self.steps_per_epoch:  # the last step's comes after the evaluation
            self._save_if_due(sys._getframe(1))
            self._begin_step()

    def end_epoch(self) -> EpochResult:
        """End an epoch: evaluate the model, and save. Return the epoch's figures."""
        epoch, step = len(self.results) + 1, self.state.step
        if step != self.steps_per_epoch:
            raise RuntimeError(
                f"epoch {epoch} ends after {step} of {self.steps_per_epoch} batches, which the "
                f"task has by its samples ({self.task.samples}) and batch_size "
                f"({self.task.batch_size}); take all of them, and call run.end_step(loss_sum=…) "
                "once after each"
            )
        self._is_within_epoch = False
        loss = torch.tensor(
            float(self.state.loss_sum), dtype=torch.float64, device=self.world.device
        )
        train_loss = self.world.sum(loss).item() / self.task.samples
        check_finite(f"the training loss of epoch {epoch}", train_loss)
        self._check_replicas()
        trained = time.perf_counter() - self._start
        evaluation = self.evaluate()
        check_finite(f"the test loss after epoch {epoch}", evaluation.loss)
        result = EpochResult(
            epoch,
            train_loss,
            evaluation.loss,
            evaluation.accuracy,
            samples_per_s=(self.task.samples - self._first * self.task.batch_size) / trained,
            seconds=time.perf_counter() - self._start,
            ranks=self.world.world_size,
            device=self.world.device.type,
        )
        self.results.append(result)
        self.state.step, self.state.loss_sum = 0, 0.0
        self._save_if_due(sys._getframe(1))
        return result

    def evaluate(self) -> Evaluation:
        """Judge the model by the task, on every rank, in evaluation mode.

        An optimizer that has ``train()`` and ``eval()`` is switched, too. Buffers, such as
        BatchNorm's statistics, are first copied from the first rank of "dp" to the others, as
        DistributedDataParallel copies them before each forward pass: the ranks evaluate, and save,
        one model.
        """
        self._share_buffers()
        model, optimizer = self.state.model, self.state.optimizer
        others = (*self.state.stateful.values(), getattr(self.task, "predict", None))
        judged = [model, *(x for x in others if isinstance(x, nn.Module))]
        modes = {module: module.training for one in judged for module in one.modules()}
        for module in judged:
            module.eval()
        try:
            with evaluation_weights(optimizer):
                return self.task.evaluate(model, self.world)
        finally:
            for module, training in modes.items():
                module.training = training
            for module in judged:
                reshard(module)

    def _save_if_due(self, loop: FrameType) -> None:
        """Save if it is time to.

        Args:
            loop: the frame that ends the step or the epoch.
        """
        if self._checkpoints is None or self._stop is None:
            return
        every = self._checkpoints.config.every or self.steps_per_epoch
        stopping, at_end = self._stop.wait(), len(self.results) == self.num_epochs
        if not (stopping or at_end or self._save_is_late or self.total_steps % every == 0):
            return
        # Gradients that no step has taken are not saved: wait for the step.
        has_stepped = self._has_stepped or count_replays(self.state.optimizer) != self._replays
        self._save_is_late = not at_end and not has_stepped and self._has_gradients()
        if self._save_is_late:
            return
        if self.state.step:  # at an epoch's end the evaluation has done so
            self._share_buffers()
        self._check_finite()
        self._unsaved.check(loop)
        state.save(self.state, self._checkpoints, self.total_steps)
        if stopping and not at_end:
            self._checkpoints.wait()
            raise Stopped(stopping)

    def _note_step(self, *_: Any) -> None:
        self._has_stepped = True

    def _has_gradients(self) -> bool:
        """Whether a parameter has a gradient other than 0, on any rank."""
        parameters = self.state.model.parameters()
        return self._is_on_any_rank(
            any(p.grad is not None and bool(local(p.grad).any()) for p in parameters)
        )

    def _check_finite(self) -> None:
        """Refuse to save weights or a loss that are not finite; on every rank."""
        weights = [local(p) for p in self.state.model.parameters()]
        is_finite = all(bool(t.isfinite().all()) for t in weights)
        if self._is_on_any_rank(not is_finite or not math.isfinite(float(self.state.loss_sum))):
            raise DivergedError(
                f"a weight or a loss is not finite after step {self.total_steps}, which is not "
                "saved; take a smaller learning rate"
            )

    def _is_on_any_rank(self, mine: bool) -> bool:
        count = torch.tensor(float(mine), dtype=torch.float64, device=self.world.device)
        return bool(self.world.sum(count).item())

    def _share_buffers(self) -> None:
        """Copy the first rank's buffers of the model and of its averages to the others of "dp"."""
        if self.world.dp_size > 1:
            group = self.world.mesh.get_group("dp")
            averages = [x for x in self.state.stateful.values() if isinstance(x, AveragedModel)]
            for buffer in (b for one in (self.state.model, *averages) for b in one.buffers()):
                # An average counts its updates on the host, and NCCL sends no tensor of the host.
                sent = buffer.to(self.world.device)
                dist.broadcast(sent, group=group, group_src=0)
                if sent is not buffer:
                    buffer.copy_(sent)

    def _check_gradients(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Refuse a model without gradients, and gradients that nobody added up.

        The check is made once, before the first step of the optimizer within an epoch. Comparing
        parameters would miss the gradients where ranks share Muon's work: every rank gets every
        update.
        """
        if not (self._is_first_step and self._is_within_epoch):
            return
        self._is_first_step = False
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # A closure computes the gradients later.
        is_right = closure is not None or has_gradients(parameters)
        # A rank of a pipeline has a stage of its own, whose first step others need not take.
        is_replicated = self.world.dp_size * self.world.tp_size > 1
        if not any(self.world.gather_results(lambda: is_right) if is_replicated else [is_right]):
            raise ConfigError(
                "no parameter of the run's model has a gradient in the optimizer's first step: the "
                "loop trains another model, or calls no loss.backward() before the step; train the "
                "model that Run got"
            )
        if is_replicated:
            check_replicas(self.state.model, self.world)

    def _check_replicas(self) -> None:
        """Check that the replicas are equal after a step; they differ if their gradients are not
        averaged.
        """
        if self.world.dp_size > 1:
            parameters = dict(self.state.model.named_parameters())
            check_same_bits(self.world.mesh.get_group("dp"), parameters)
