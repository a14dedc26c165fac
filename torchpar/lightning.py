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
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from torchpar.data import Batch, Dataset, Samples, batches, load
from torchpar.errors import ConfigError
from torchpar.partition import Partition
from torchpar.training import loss_sum
from torchpar.training.losses import EVALUATION_BATCH, Loss

try:
    from lightning.pytorch import LightningDataModule, LightningModule
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
        classes: of the data.
        loss: see `torchpar.training.losses.loss_sum`.
    """

    def __init__(self, classes: int, loss: Loss = "cross-entropy"):
        super().__init__()
        self.loss: Loss = loss
        self.train_loss, self.val_loss, self.test_loss = SampleMean(), SampleMean(), SampleMean()
        self.val_accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False)
        self.test_accuracy = self.val_accuracy.clone()

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
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        outputs, loss, accuracy = self(batch.x), f"{stage}_loss", f"{stage}_accuracy"
        getattr(self, loss).update(self.loss_sum(outputs.double(), batch.labels), len(batch.labels))
        getattr(self, accuracy).update(outputs, batch.labels)
        metrics = {name: getattr(self, name) for name in (loss, accuracy)}
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch.labels))


class Batches:
    """The ``length`` batches of each epoch, which ``make`` yields."""

    def __init__(self, length: int, make: Callable[[], Iterator[Batch]]):
        self.length = length
        self.make = make

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return self.make()

    # Lightning resumes within an epoch only with a loader that has these two.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


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
            ranks, no sample left to train on.
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
        assert self.trainer is not None
        self.share = partial(Partition, ranks=self.trainer.world_size, rank=self.trainer.global_rank)
        if self.batch_size < self.trainer.world_size:
            raise ConfigError(
                f"batch_size is {self.batch_size}, expected at least the number of ranks that share it, "
                f"{self.trainer.world_size}; it counts the samples of all ranks together"
            )
        train, self.test = load(self.dataset, self.root, self.trainer.strategy.root_device)
        kept = 0 if self.validation == "test" else self.validation
        if not 0 <= kept < len(train):
            raise ConfigError(f"validation is {kept}, expected 'test' or 0 to {len(train) - 1} samples")
        split = len(train) - kept
        self.train, self.val = train[:split], self.test if self.validation == "test" else train[split:]

    def train_dataloader(self) -> Batches:
        return Batches(-(-len(self.train) // self.batch_size), self._train_batches)

    def val_dataloader(self) -> Batches | list[Any]:
        return self._in_order(self.val) if len(self.val) else []

    def test_dataloader(self) -> Batches:
        return self._in_order(self.test)

    def _train_batches(self) -> Iterator[Batch]:
        # A generator reads the trainer's position at the first batch. The trainer has restored it by then,
        # which it has not when it makes the iterator.
        assert self.trainer is not None
        start = self.trainer.fit_loop.batch_idx + 1
        order: dict[str, Any] = {"seed": self.seed, "epoch": self.trainer.current_epoch + 1, "start": start}
        yield from batches(self.train, self.batch_size, share=self.share, **order)

    def _in_order(self, samples: Samples) -> Batches:
        """Each sample on one rank; every rank has as many batches, some of which may be empty."""
        order = torch.arange(len(samples), device=samples.labels.device)
        chunks = order.split(EVALUATION_BATCH * self.share(0).ranks)

        def make() -> Iterator[Batch]:
            for chunk in chunks:
                mine = self.share(len(chunk)).narrow(chunk, 0)
                yield Batch(samples.inputs(mine), samples.labels[mine], len(chunk))

        return Batches(len(chunks), make)
