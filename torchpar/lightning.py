# SPDX-License-Identifier: MIT
"""Data and evaluation for Lightning: the batches of `torchpar.training.Run`, and metrics over all ranks.

    class LitMLP(LitClassifier):
        ...  # __init__, forward, training_step and configure_optimizers: examples/train_lightning.py

    trainer = lightning.pytorch.Trainer(max_epochs=10, strategy="ddp", devices=2)
    trainer.fit(LitMLP(), MNISTDataModule("examples/data"))

A run takes the steps of `torchpar.training.Run`: the same batches in the same order for every number of
ranks, and the gradient of the mean loss over each whole batch. A DataLoader with Lightning's samplers would
not: it pads the ranks' shares to one size, and DistributedDataParallel averages the ranks' means.

Only this module imports Lightning; ``pip install 'torchpar[lightning]'``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from torchpar.data import Batch, Dataset, Samples, batches, load
from torchpar.errors import ConfigError
from torchpar.parallel.launch.agreement import check_same_on_all_ranks
from torchpar.partition import Partition
from torchpar.training import loss_sum
from torchpar.training.evaluation import EVALUATION_BATCH
from torchpar.training.losses import Loss

try:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.trainer.states import TrainerFn
    from torchmetrics import Metric
    from torchmetrics.classification import MulticlassAccuracy
except ImportError as error:
    raise ImportError(
        f"torchpar.lightning needs Lightning ({error}); pip install 'torchpar[lightning]'"
    ) from error


class SampleMean(Metric):
    """Mean of a loss over the samples of all ranks, in double precision.

    torchmetrics' MeanMetric checks every update for NaN, which synchronises with the GPU. Without that check
    its version 1.9 ignores the weights.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: int) -> None:
        """Add the sum of the losses of ``count`` samples."""
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        return self.total / self.count


class LitClassifier(LightningModule):
    """Evaluation and logging of a classifier. A subclass adds what trains it.

    The subclass defines ``__init__``, ``forward`` (``x (b, features)`` → outputs ``(b, classes)``),
    ``configure_optimizers`` and ``training_step``, which calls ``self.train_loss.update``.

    Logged after each epoch: ``train_loss``, and ``val_loss`` and ``val_accuracy`` where there is something to
    validate on; by a test, ``test_loss`` and ``test_accuracy``. A loss is a mean over samples, each counted
    once. ``train_loss`` is that of each sample at the step that trained on it; in a resumed epoch, since it
    was resumed.

    Args:
        features, classes: of the data.
        loss: see `torchpar.training.losses.loss_sum`.

    Raises:
        ConfigError: from `setup`, the data have other features or classes.
    """

    def __init__(self, features: int, classes: int, loss: Loss = "cross-entropy"):
        super().__init__()
        self.features = features
        self.classes = classes
        self.loss: Loss = loss
        self.train_loss, self.val_loss, self.test_loss = SampleMean(), SampleMean(), SampleMean()
        self.val_accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False)
        self.test_accuracy = self.val_accuracy.clone()

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, MNISTDataModule) and (self.features, self.classes) != data.shape:
            raise ConfigError(
                f"the model has {self.features} inputs and {self.classes} outputs, expected the data's "
                f"{data.shape[0]} features and {data.shape[1]} classes"
            )

    def loss_sum(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss summed over samples, at least in float32."""
        # binary_cross_entropy refuses to run under autocast.
        with torch.autocast(outputs.device.type, enabled=False):
            dtype = torch.promote_types(outputs.dtype, torch.float32)
            return loss_sum(self.loss, outputs.to(dtype), labels)

    def on_train_epoch_end(self) -> None:
        if self.train_loss.update_called:  # not in a run that is resumed at an epoch's end
            self.log("train_loss", self.train_loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.val_loss, self.val_accuracy)

    def on_validation_epoch_end(self) -> None:
        self.log_dict({"val_loss": self.val_loss, "val_accuracy": self.val_accuracy}, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.test_loss, self.test_accuracy)

    def on_test_epoch_end(self) -> None:
        self.log_dict({"test_loss": self.test_loss, "test_accuracy": self.test_accuracy})

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the class of each sample, ``(b)`` int64."""
        return self(batch.x).argmax(1)  # type: ignore[no-any-return]

    def _evaluate(self, batch: Batch, loss: SampleMean, accuracy: Metric) -> None:
        outputs = self(batch.x)
        loss.update(self.loss_sum(outputs.double(), batch.labels), len(batch.labels))
        accuracy.update(outputs, batch.labels)


@dataclass(eq=False)
class TrainBatches:
    """Training batches from the trainer's epoch and batch on, so that a resumed run continues."""

    samples: Samples
    batch_size: int
    seed: int
    share: Callable[[int], Partition]
    trainer: Trainer

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # A generator reads the trainer's position at the first batch. The trainer has restored it by then,
        # which it has not when it makes the iterator.
        trainer = self.trainer
        overfit = getattr(trainer, "overfit_batches", 0)  # repeats the first batches of one epoch
        epoch = 1 if overfit else trainer.current_epoch + 1
        start = trainer.fit_loop.batch_idx + 1
        if start < len(self):
            yield from batches(
                self.samples, self.batch_size, seed=self.seed, epoch=epoch, share=self.share, start=start
            )

    # Lightning resumes within an epoch only with a loader that has these two.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class EvaluationBatches:
    """Samples in order, each on one rank. Every rank has as many batches, some of which may be empty."""

    def __init__(self, samples: Samples, share: Callable[[int], Partition]):
        self.samples = samples
        self.share = share
        self.batch_size = EVALUATION_BATCH * share(0).ranks

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.arange(len(self.samples), device=self.samples.labels.device)
        for chunk in order.split(self.batch_size):
            mine = self.share(len(chunk)).narrow(chunk, 0)
            yield Batch(self.samples.inputs(mine), self.samples.labels[mine], len(chunk))


class MNISTDataModule(LightningDataModule):
    """MNIST and its relatives, on the device, in the batches of `torchpar.training.Run`.

    A resumed run continues with the batches that it would have had, also within an epoch and on another
    number of ranks.

    Args:
        root: folder of the data sets, as torchvision's.
        dataset: see `torchpar.data.load`.
        batch_size: samples per step, over all ranks.
        seed: of the samples' order.
        validation: number of training samples, the last ones, to keep for validation; 0 does not validate.
            "test" validates on the test set: it shows a run's course and must not decide anything in it,
            such as when to stop.

    Raises:
        ConfigError: from `setup`, files that are missing or damaged, a batch smaller than the number of
            ranks, no sample left to train on; from `load_state_dict`, a checkpoint with other batches.
    """

    def __init__(
        self,
        root: str | Path,
        dataset: Dataset = "mnist",
        batch_size: int = 128,
        seed: int = 0,
        validation: int | Literal["test"] = 0,
    ):
        super().__init__()
        self.root = Path(root)
        self.dataset: Dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.validation = validation

    def setup(self, stage: str) -> None:
        trainer = self._trainer
        self.share = partial(Partition, ranks=trainer.world_size, rank=trainer.global_rank)
        if trainer.world_size > 1:
            check_same_on_all_ranks(None, "the ranks' data", self.state_dict())
        if self.batch_size < trainer.world_size:
            raise ConfigError(
                f"batch_size is {self.batch_size}, expected at least the number of ranks that share it, "
                f"{trainer.world_size}; it counts the samples of all ranks together"
            )
        train, self.test = load(self.dataset, self.root, trainer.strategy.root_device)
        kept = 0 if self.validation == "test" else self.validation
        if not 0 <= kept < len(train):
            raise ConfigError(f"validation is {kept}, expected 'test' or 0 to {len(train) - 1} samples")
        split = len(train) - kept
        self.train, self.val = train[:split], self.test if self.validation == "test" else train[split:]

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of features and of classes."""
        return self.test.features[0].numel(), len(self.test.classes)

    def train_dataloader(self) -> TrainBatches:
        return TrainBatches(self.train, self.batch_size, self.seed, self.share, self._trainer)

    def val_dataloader(self) -> EvaluationBatches | list[Any]:
        return EvaluationBatches(self.val, self.share) if len(self.val) else []

    def test_dataloader(self) -> EvaluationBatches:
        return EvaluationBatches(self.test, self.share)

    def predict_dataloader(self) -> EvaluationBatches:
        """Return the test set."""
        return self.test_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Return the arguments that determine the training batches."""
        return {name: getattr(self, name) for name in ("dataset", "batch_size", "seed", "validation")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        now = self.state_dict()
        differing = [name for name in now if now[name] != state[name]]
        if differing and self._trainer.state.fn == TrainerFn.FITTING:
            was, have = (", ".join(f"{name} {of[name]}" for name in differing) for of in (state, now))
            raise ConfigError(f"the checkpoint's run has {was}, this one has {have}; continue with the same")

    def __str__(self) -> str:  # Lightning's expects DataLoaders
        return f"MNISTDataModule({str(self.root)!r}, {self.state_dict()})"

    @property
    def _trainer(self) -> Trainer:
        if self.trainer is None:
            raise ConfigError("the data module has no trainer; give it to Trainer.fit or Trainer.test")
        return self.trainer
