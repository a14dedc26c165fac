# SPDX-License-Identifier: MIT
"""`Run`: what surrounds a training loop, such as batches, evaluation and checkpoints.

    with Run(model, optimizer, lr_scheduler, world, train, test, epochs=10, batch_size=128) as run:
        for epoch in run.epochs():
            for x, labels, global_size in run.batches(epoch):
                loss = cross_entropy(model(x), labels, reduction="sum")
                (loss / global_size).backward()
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
                run.log(loss.detach())

`Run` gives each rank its batches, evaluates after each epoch, saves and resumes, and stops all
ranks at the same step when one of them receives SIGTERM or SIGINT. A loop that accumulates the
gradients of several batches is saved and stopped after a step of the optimizer.

A ``break`` before `Run.batches` ends the run after the last whole epoch, as to stop early. What an
epoch's body does before `Run.batches` is done again when a run resumes within that epoch;
afterwards the random state is the saved one.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchpar.data import Batch, Samples, batches
from torchpar.errors import ConfigError, DivergedError, check_finite
from torchpar.outcome import EpochResult, Stopped
from torchpar.parallel.launch.agreement import check_same_bits, check_same_on_all_ranks
from torchpar.parallel.launch.world import World
from torchpar.parallel.save.checkpoint import CheckpointConfig, Checkpoints
from torchpar.parts import local
from torchpar.profile.phases import phase, step
from torchpar.training import state
from torchpar.training.losses import Loss, cross_entropy_sum, evaluate
from torchpar.training.stop import StopSignal


class RunLog:
    """Callbacks of a `Run`. Each does nothing unless it is overridden."""

    def active(self, run: "Run") -> AbstractContextManager[Any]:
        """Return a context that lasts as long as the run's."""
        return nullcontext()

    def on_resume(self, run: "Run") -> None:
        """The run's state is that of a checkpoint."""

    def steps(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches of an epoch; a step lasts from one to the next."""
        return batches

    def on_step(self, run: "Run", epoch: int, samples: int) -> None:
        """``samples`` of the epoch have been trained on."""

    def on_epoch(self, run: "Run", result: EpochResult) -> None:
        """An epoch has been evaluated, but not saved."""

    def on_end(self, run: "Run") -> None:
        """The run's context has ended without an error, on this rank."""


class Run:
    """One training run on this rank. All ranks make it with the same arguments.

    Args:
        model: this rank's part of the model; not its DistributedDataParallel wrapper.
        optimizer, lr_scheduler: over ``model``'s parameters; the training loop steps both.
            ``lr_scheduler`` may be None.
        world: the ranks and their mesh.
        train, test: the same samples on every rank.
        epochs: passes over ``train``, those of a resumed run included.
        batch_size: samples per step, over all ranks.
        predict: inputs → outputs, or None on ranks without outputs; by default ``model``.
        loss: for evaluation, outputs and labels → the sum of the losses; by default the
            cross-entropy.
        seed: of the samples' order.
        checkpoint: where and when to save, if at all. A run that was stopped at any step resumes
            there, with the same bits on the same ranks. On three ranks or more,
            DistributedDataParallel needs `register_shared_memory_hook` for this
            (docs/checkpoints.md).
        config: values that identify the run, as JSON; a checkpoint with other values is refused.
        log: is told what happens; by default nothing is shown.

    Attributes:
        results: of the complete epochs, those before a resumed one included.
        step: complete steps of the current epoch.

    Raises:
        ConfigError: ranks with different models, flags or samples; gradients that differ between
            the ranks that share a batch, in the optimizer's first step; a checkpoint that is
            damaged, of another run or of more epochs; a model or an optimizer of which a checkpoint
            would lose something. On every rank.
        DivergedError: the training or the test loss of an epoch is not finite, or a weight or a
            loss when it is to be saved. On every rank.
        RuntimeError: the loop was left within an epoch.
        Stopped: after SIGTERM or SIGINT, if there is a ``checkpoint``. On every rank.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None,
        world: World,
        train: Samples,
        test: Samples,
        *,
        epochs: int,
        batch_size: int,
        predict: Callable[[Tensor], Tensor | None] | None = None,
        loss: Loss = cross_entropy_sum,
        seed: int = 0,
        checkpoint: CheckpointConfig | None = None,
        config: dict[str, Any] | None = None,
        log: "RunLog | None" = None,
    ):
        own = {"batch_size": batch_size, "seed": seed, "train": len(train)}
        try:
            self.config = json.loads(json.dumps({**(config or {}), **own}))
        except TypeError as e:
            raise ConfigError(f"config is {config!r}, expected what JSON can hold ({e})") from e
        others = {"test": len(test), "saving": str(checkpoint), "epochs": epochs}
        others |= {"classes of train": train.classes, "classes of test": test.classes}
        check_same_on_all_ranks(None, "the ranks' flags", {**self.config, **others})
        # What is wrong on one rank alone has been found to differ.
        if not len(train) or not len(test):
            raise ConfigError(
                f"{len(train)} training and {len(test)} test samples, expected at least one of each"
            )
        for name, value in (("epochs", epochs), ("batch_size", batch_size)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} is {value!r}, expected a whole number from 1 on")
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.world = world
        self.train = train
        self.test = test
        self.num_epochs = epochs
        self.batch_size = batch_size
        self.steps_per_epoch = -(-len(train) // batch_size)
        self.predict = predict or model
        self.loss = loss
        self.seed = seed
        if world.world_size > 1:
            drawn = {"train.features": train.features, "train.labels": train.labels}
            drawn |= {"test.features": test.features, "test.labels": test.labels}
            check_same_bits(None, drawn, "make the same samples on all, such as by one seed")
        self.results: list[EpochResult] = []
        self.step = 0
        # This rank's losses of the current epoch, added in the order of the steps: in another order
        # the sum of a resumed run could differ from that of a whole one.
        self.loss_sum: float | Tensor = 0.0
        self._log = log or RunLog()
        self._stack = ExitStack()
        self._checkpoints = Checkpoints(checkpoint, world) if checkpoint else None
        self._stop: StopSignal | None = None
        self._logged = 0
        self._is_first_step = True
        self._is_within_epoch = False
        self.random_states: dict[str, Tensor] = {}  # of the checkpoint from which the run resumed
        self._has_stepped = False  # since the last batch was taken
        self._save_is_late = False  # until the optimizer has stepped
        if checkpoint is not None:
            state.check_saveable(self)
            self._stack.callback(optimizer.register_step_post_hook(self._note_step).remove)
        if world.dp_size > 1:
            # A hook that removed itself would disturb PyTorch's loop over the hooks.
            self._stack.callback(optimizer.register_step_pre_hook(self._check_gradients).remove)

    @property
    def total_steps(self) -> int:
        """Complete steps since the run began, those before it was resumed included."""
        return len(self.results) * self.steps_per_epoch + self.step

    def __enter__(self) -> Self:
        with self._stack.pop_all() as stack:
            stack.enter_context(self._log.active(self))
            if self._checkpoints is not None:
                if state.resume(self, self._checkpoints):
                    if (saved := len(self.results)) > (epochs := self.num_epochs):
                        folder = self._checkpoints.folder
                        raise ConfigError(
                            f"{folder} holds {saved} epochs, more than the {epochs} asked for"
                        )
                    self._log.on_resume(self)
                self._stop = stack.enter_context(StopSignal(self.world))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stack.close()
        if error is not None:
            return
        if self._checkpoints is not None:
            self._checkpoints.wait()
        if self._is_within_epoch:
            raise RuntimeError(
                f"the loop was left in epoch {len(self.results) + 1}, after {self._logged} of "
                f"{self.steps_per_epoch} batches: they were not evaluated, and not saved; take all "
                "batches of an epoch, or leave before run.batches"
            )
        self._log.on_end(self)

    def epochs(self) -> Iterator[int]:
        """Yield the number of each remaining epoch, from 1. After each, evaluate and save."""
        if self._checkpoints is not None and self._stop is None:
            raise RuntimeError(
                "the run was not entered, and would save nothing; use with Run(…) as run"
            )
        while len(self.results) < self.num_epochs:
            start, first, epoch = time.perf_counter(), self.step, len(self.results) + 1
            self._logged = first
            self._is_within_epoch = False  # until its first batch is taken
            yield epoch
            self._is_within_epoch = False
            if self.step != self.steps_per_epoch or self._logged != self.step:
                raise RuntimeError(
                    f"{self.step} of {self.steps_per_epoch} batches were taken and {self._logged} "
                    "losses logged; take all batches of an epoch and call run.log once for each"
                )
            self._end_epoch(epoch, start, first)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield this rank's share of each remaining batch of ``epoch``, the current one."""
        return self._log.steps(self._take(epoch))

    def _take(self, epoch: int) -> Iterator[Batch]:
        first = self.step
        if first:  # the epoch's body may have drawn random numbers
            state.restore_random_states(self.random_states)
        self._is_within_epoch = True
        shares = batches(
            self.train,
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            share=self.world.share,
            start=first,
        )
        for number in range(first + 1, self.steps_per_epoch + 1):
            if self._stop:
                self._stop.start_all_reduce()
            with phase("data"):
                batch = next(shares)
            self._has_stepped = False
            with step():
                yield batch
            if number == first + 1:
                self._check_replicas()
            self.step = number
            self._log.on_step(self, epoch, min(number * self.batch_size, len(self.train)))
            if number < self.steps_per_epoch:  # the last step's comes after the evaluation
                self._save_if_due()

    def log(self, loss: Tensor) -> None:
        """Add this rank's part of the sum of a step's losses; the ranks' parts add up to it."""
        self._logged += 1
        if self.world.owns_outputs:
            # A tensor: the host waits for no GPU.
            self.loss_sum = self.loss_sum + loss.detach().double()

    def evaluate(self) -> tuple[float, Tensor]:
        """Return the mean test loss and the outputs ``(n, classes)``, on every rank, in evaluation
        mode.

        Buffers, such as BatchNorm's statistics, are first copied from the first rank of "dp" to the
        others, as DistributedDataParallel copies them before each forward pass: the ranks evaluate,
        and save, one model.
        """
        self._share_buffers()
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            return evaluate(self.predict, self.test, self.world, self.loss)
        finally:
            for module, training in modes:
                module.training = training

    def _end_epoch(self, epoch: int, start: float, first: int) -> None:
        total = torch.tensor(float(self.loss_sum), dtype=torch.float64, device=self.world.device)
        train_loss = self.world.sum(total).item() / len(self.train)
        check_finite(f"the training loss of epoch {epoch}", train_loss)
        self._check_replicas()
        trained = time.perf_counter() - start
        test_loss, outputs = self.evaluate()
        check_finite(f"the test loss after epoch {epoch}", test_loss)
        result = EpochResult(
            epoch,
            train_loss,
            test_loss,
            test_accuracy=(outputs.argmax(1) == self.test.labels).sum().item() / len(self.test),
            samples_per_s=(len(self.train) - first * self.batch_size) / trained,
            seconds=time.perf_counter() - start,
            ranks=self.world.world_size,
            device=self.world.device.type,
        )
        self.results.append(result)
        self.step, self.loss_sum = 0, 0.0
        self._log.on_epoch(self, result)
        self._save_if_due()

    def _save_if_due(self) -> None:
        if self._checkpoints is None or self._stop is None:
            return
        every = self._checkpoints.config.every or self.steps_per_epoch
        stopping, at_end = self._stop.wait(), len(self.results) == self.num_epochs
        if not (stopping or at_end or self._save_is_late or self.total_steps % every == 0):
            return
        # Gradients that no step has taken are not saved: wait for the step.
        self._save_is_late = not at_end and not self._has_stepped and self._has_gradients()
        if self._save_is_late:
            return
        if self.step:  # at an epoch's end the evaluation has done so
            self._share_buffers()
        self._check_finite()
        state.save(self, self._checkpoints)
        if stopping and not at_end:
            self._checkpoints.wait()
            raise Stopped(stopping)

    def _note_step(self, *_: Any) -> None:
        self._has_stepped = True

    def _has_gradients(self) -> bool:
        """Whether a parameter has a gradient other than 0, on any rank."""
        mine = any(
            p.grad is not None and bool(local(p.grad).any()) for p in self.model.parameters()
        )
        count = torch.tensor(float(mine), dtype=torch.float64, device=self.world.device)
        return bool(self.world.sum(count).item())

    def _check_finite(self) -> None:
        """Refuse to save weights or a loss that are not finite; on every rank."""
        tensors = [local(p) for p in self.model.parameters()]
        finite = all(bool(t.isfinite().all()) for t in tensors) and math.isfinite(
            float(self.loss_sum)
        )
        count = torch.tensor(float(not finite), dtype=torch.float64, device=self.world.device)
        if self.world.sum(count).item():
            raise DivergedError(
                f"a weight or a loss is not finite after step {self.total_steps}, which is not "
                "saved; take a smaller learning rate"
            )

    def _share_buffers(self) -> None:
        """Copy the buffers of the first rank of "dp" to the others."""
        if self.world.dp_size > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, group=self.world.mesh.get_group("dp"), group_src=0)

    def _check_gradients(self, *_: Any) -> None:
        """Refuse gradients that nobody averaged, once, before the optimizer's first step.

        The parameters would not show it if the ranks share Muon's work: each gets the updates of
        all.
        """
        if self._is_first_step:
            self._is_first_step = False
            gradients = {
                f"the gradient of {name}": p.grad for name, p in self.model.named_parameters()
            }
            check_same_bits(self.world.mesh.get_group("dp"), gradients)

    def _check_replicas(self) -> None:
        """Check that the replicas are equal after a step; they differ if their gradients are not
        averaged."""
        if self.world.dp_size > 1:
            check_same_bits(self.world.mesh.get_group("dp"), dict(self.model.named_parameters()))
