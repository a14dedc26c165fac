# SPDX-License-Identifier: MIT
"""torchpar's MLP and data sets in Lightning, whose Trainer brings the loop, the loggers and the checkpoints.

    trainer = lightning.pytorch.Trainer(max_epochs=10, strategy="ddp", devices=2)
    trainer.fit(LitMLP(), MNISTDataModule("examples/data"))

A run takes the steps of `torchpar.training.fit`: the same batches in the same order, whatever the number
of ranks, and the gradient of the mean loss over each whole batch. A DataLoader with Lightning's samplers
would not: it pads the ranks' shares to one size, and DistributedDataParallel averages the ranks' means.

Lightning is imported by this module alone; ``pip install 'torchpar[lightning]'``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from torchpar.data import Batch, Dataset, Samples, batches, load
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel.world import World
from torchpar.training import EVALUATION_BATCH, Loss, Schedule, loss_sum, scheduler, sgd

try:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
    from torchmetrics import Metric
    from torchmetrics.classification import MulticlassAccuracy
except ImportError as error:
    raise ImportError(
        f"torchpar.lightning needs Lightning ({error}); pip install 'torchpar[lightning]'"
    ) from error


class SampleMean(Metric):
    """The mean of a loss over samples, of all ranks, in double precision.

    torchmetrics' MeanMetric looks for NaN in every update, for which a GPU's queue must run empty, and
    without that search its version 1.9 ignores the weights.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: int) -> None:
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        return self.total / self.count


class LitMLP(LightningModule):
    """`torchpar.nn.MLP` with its loss, its optimizer and torchmetrics' accuracy.

    ``x (*, sizes[0])`` → ``y (*, sizes[-1])``. Logged after each epoch: ``train_loss``, ``val_loss`` and
    ``val_accuracy`` where there is something to validate on, ``test_loss`` and ``test_accuracy`` by a
    test. A loss is a mean over samples, each counted once; ``train_loss`` is that of each sample as it was
    trained on, of a resumed epoch since it was resumed. The defaults are those of ``examples/train_ddp.py``.

    Args:
        sizes: of the layers, input first.
        hidden: the activation between layers.
        loss: "cross-entropy" on logits, "bce" or "mse" on sigmoid outputs (`torchpar.training.loss_sum`).
        lr: learning rate at the start.
        momentum: Nesterov momentum.
        weight_decay: L2 penalty λ of the weights: λ/2·‖W‖² in the loss.
        schedule: course of the learning rate over the run, in steps; linear and cosine end at 0.
        compile: compile the MLP by torch.compile; ``torch.compile(LitMLP())`` compiles whole steps.

    Raises:
        ConfigError: sizes, an activation, a rate, momentum or penalty that make no network or optimizer;
            from `setup`, sizes that are not those of the data.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (784, 128, 64, 10),
        hidden: Literal["sigmoid", "relu"] = "sigmoid",
        loss: Loss = "cross-entropy",
        lr: float = 0.5,
        momentum: float = 0.9,
        weight_decay: float = 3e-5,
        schedule: Schedule = "linear",
        compile: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.loss: Loss = loss
        try:
            self.mlp = MLP(list(sizes), hidden, "logits" if loss == "cross-entropy" else "sigmoid")
        except ValueError as e:
            raise ConfigError(str(e)) from e
        rates = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        if not all(0 <= rate < 1e38 for rate in rates.values()):  # float32 ends at 3.4e38
            raise ConfigError(f"rates are {rates}, expected 0 to 1e38")
        if compile:
            self.mlp.compile()
        self.train_loss, self.val_loss, self.test_loss = SampleMean(), SampleMean(), SampleMean()
        self.val_accuracy = MulticlassAccuracy(sizes[-1], average="micro", validate_args=False)
        self.test_accuracy = self.val_accuracy.clone()

    def setup(self, stage: str) -> None:
        module, sizes = getattr(self.trainer, "datamodule", None), self.mlp.sizes
        if isinstance(module, MNISTDataModule) and (sizes[0], sizes[-1]) != module.ends:
            raise ConfigError(f"sizes is {list(sizes)}, expected the data's {module.ends} at its ends")

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        hp = self.hparams
        optimizer = sgd(self, hp["lr"], hp["momentum"], hp["weight_decay"])
        steps = self.trainer.estimated_stepping_batches  # infinite in a run without end, whose rate stays
        rate = scheduler(optimizer, hp["schedule"], steps)  # type: ignore[arg-type]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, labels, global_size = batch
        total = self._loss_sum(self(x), labels)
        self.train_loss.update(total.detach(), len(labels))
        # DistributedDataParallel averages over the ranks, whose shares may differ in size.
        return total * (self.trainer.world_size / global_size)

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
        """The class of each sample."""
        return self(batch.x).argmax(1)  # type: ignore[no-any-return]

    def _evaluate(self, batch: Batch, loss: SampleMean, accuracy: Metric) -> None:
        outputs = self(batch.x)
        loss.update(self._loss_sum(outputs.double(), batch.labels), len(batch.labels))
        accuracy.update(outputs, batch.labels)

    def _loss_sum(self, outputs: Tensor, labels: Tensor) -> Tensor:
        # Outside of autocast, under which binary_cross_entropy refuses to run.
        with torch.autocast(outputs.device.type, enabled=False):
            dtype = torch.promote_types(outputs.dtype, torch.float32)
            return loss_sum(self.loss, outputs.to(dtype), labels)


@dataclass(eq=False)
class TrainBatches:
    """The training batches from the trainer's epoch and batch on: where a checkpoint resumes, this does."""

    samples: Samples
    batch_size: int
    seed: int
    world: World
    trainer: Trainer

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # Runs when the first batch is asked for: the trainer has its place by then, an iterator before.
        trainer = self.trainer
        overfit = getattr(trainer, "overfit_batches", 0)  # the first batches of one epoch, again and again
        epoch = 1 if overfit else trainer.current_epoch + 1
        start = trainer.fit_loop.batch_idx + 1
        if start < len(self):
            yield from batches(
                self.samples, self.batch_size, seed=self.seed, epoch=epoch, world=self.world, start=start
            )

    # With these two, Lightning takes it for a loader that can go on within an epoch.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class EvaluationBatches:
    """Samples in order, each on one rank, in as many batches on every rank; some may be empty."""

    def __init__(self, samples: Samples, world: World):
        self.samples = samples
        self.world = world
        self.batch_size = EVALUATION_BATCH * world.world_size

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for chunk in torch.arange(len(self.samples), device=self.world.device).split(self.batch_size):
            mine = self.world.share(len(chunk)).narrow(chunk, 0)
            yield Batch(self.samples.inputs(mine), self.samples.labels[mine], len(chunk))


class MNISTDataModule(LightningDataModule):
    """MNIST and its relatives, on the device, in the batches of `torchpar.training.fit`.

    The archives are checked and extracted by the first rank of each machine. A run that is resumed from
    a checkpoint, within an epoch or at its end, on as many ranks or others, goes on with the batches that
    it would have had.

    Args:
        root: folder of the data sets, as torchvision's.
        dataset: what to learn.
        batch_size: samples per step, over all ranks.
        seed: of the samples' order.
        validation: how many training samples, the last ones, to keep for validation; "test" validates
            on the test set, which shows a run's course and must decide nothing in it, such as when to
            stop; 0 does not validate.

    Raises:
        ConfigError: from `setup`, files that are missing or damaged, a batch smaller than the number of
            ranks, no sample left to train on; from `load_state_dict`, a run with other batches.
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
        self.world = World(
            trainer.global_rank, trainer.local_rank, trainer.world_size, trainer.strategy.root_device
        )
        self.world.check_alike("the ranks' data", self.state_dict())
        if self.batch_size < self.world.world_size:
            raise ConfigError(
                f"batch_size is {self.batch_size}, expected at least the number of ranks that share it, "
                f"{self.world.world_size}; it counts the samples of all ranks together"
            )
        train, self.test = load(self.dataset, self.root, self.world)
        kept = 0 if self.validation == "test" else self.validation
        if not 0 <= kept < len(train):
            raise ConfigError(f"validation is {kept}, expected 'test' or 0 to {len(train) - 1} samples")
        split = len(train) - kept
        self.train, self.val = train[:split], self.test if self.validation == "test" else train[split:]

    @property
    def ends(self) -> tuple[int, int]:
        """How many numbers a sample has, and how many classes there are."""
        return self.test.images[0].numel(), len(self.test.classes)

    def train_dataloader(self) -> TrainBatches:
        return TrainBatches(self.train, self.batch_size, self.seed, self.world, self._trainer)

    def val_dataloader(self) -> EvaluationBatches | list[Any]:
        return EvaluationBatches(self.val, self.world) if len(self.val) else []

    def test_dataloader(self) -> EvaluationBatches:
        return EvaluationBatches(self.test, self.world)

    def predict_dataloader(self) -> EvaluationBatches:
        """The test set."""
        return self.test_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """What sets the training batches."""
        return {name: getattr(self, name) for name in ("dataset", "batch_size", "seed", "validation")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        now = self.state_dict()
        differing = [name for name in now if now[name] != state[name]]
        if differing and self._trainer.state.fn == TrainerFn.FITTING:
            was, have = (", ".join(f"{name} {of[name]}" for name in differing) for of in (state, now))
            raise ConfigError(f"the checkpoint's run has {was}, this one has {have}; go on with the same")

    def __str__(self) -> str:  # Lightning's takes loaders for DataLoaders
        return f"MNISTDataModule({str(self.root)!r}, {self.state_dict()})"

    @property
    def _trainer(self) -> Trainer:
        if self.trainer is None:
            raise ConfigError("the data module has no trainer; give it to Trainer.fit or Trainer.test")
        return self.trainer
