# SPDX-License-Identifier: MIT
"""An MLP trained by Lightning: the model and its step are ours, the loop is the Trainer's.

    python examples/train_lightning.py fit
    python examples/train_lightning.py fit --trainer.accelerator cpu --trainer.devices 2
    python examples/train_lightning.py fit --config examples/lightning.yaml
    python examples/train_lightning.py fit --config examples/lightning.yaml --ckpt_path PATH
    python examples/train_lightning.py test --ckpt_path runs/lightning_logs/…/last.ckpt

The other lessons write the loop out. The weights are the same, to the bit; the Trainer's hooks cost
some tenths of a millisecond per step. LightningCLI makes a flag of each argument. ``fit`` ends with
a test, of the best weights where checkpoints are kept: lightning.yaml turns on a logger,
checkpoints and early stopping. ``fit --report DIR`` writes a page of the run, DIR/run.html.
"""

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path

if missing := [
    name for name in ("lightning", "jsonargparse", "rich", "tyro") if find_spec(name) is None
]:
    sys.exit(
        f"train_lightning.py needs {', '.join(missing)}; pip install 'torchpar[examples,lightning]'"
    )

from support import console, ending, report
from support.cli import Needs, Output
from support.learning_rate import LRSchedule, lr_scheduler

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import cross_entropy

from torchpar.console import SILENCE
from torchpar.data import Batch, Samples, batches, load
from torchpar.data.files import Dataset
from torchpar.errors import ConfigError, check_finite
from torchpar.nn import MLP
from torchpar.training import sgd
from torchpar.training.profile.record import RankRecord
from torchpar.training.profile.recorder import Recorder


class LitMLP(LightningModule):
    """`torchpar.nn.MLP` with its step and its optimizer.

    Args:
        sizes: of the layers, input first.
        lr: learning rate at the start.
        weight_decay: L2 penalty λ of the weights: λ/2·‖W‖² in the loss.
        schedule: course of the learning rate over the run, in steps; linear and cosine end at 0.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (784, 128, 64, 10),
        lr: float = 0.5,
        weight_decay: float = 3e-5,
        schedule: LRSchedule = "linear",
    ):
        super().__init__()
        self.save_hyperparameters()  # as self.hparams, which a checkpoint holds
        self.mlp = MLP(sizes)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._loss(batch, "train")  # the Trainer calls backward() and optimizer.step()

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._loss(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._loss(batch, "test")

    def _loss(self, batch: Batch, stage: str) -> Tensor:
        """Return the mean loss of the global batch; log it and the accuracy."""
        outputs = self.mlp(batch.x)
        # Lightning averages gradients and figures over ranks, whose shares of the batch may differ
        # in size.
        scale = self.trainer.world_size / batch.global_size
        loss = cross_entropy(outputs, batch.labels, reduction="sum") * scale
        accuracy = (outputs.argmax(1) == batch.labels).sum() * scale
        figures, weight = {f"{stage}_loss": loss, f"{stage}_accuracy": accuracy}, batch.global_size
        self.log_dict(
            figures, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight
        )
        return loss

    def on_train_epoch_end(self) -> None:
        """Stop before callbacks save weights that have diverged."""
        figures = self.trainer.callback_metrics
        losses = [figures[name].item() for name in ("train_loss", "val_loss") if name in figures]
        check_finite(f"a loss of epoch {self.current_epoch + 1}", *losses)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        hp = self.hparams
        optimizer = sgd(self, hp["lr"], momentum=0.9, weight_decay=hp["weight_decay"])
        scheduler = lr_scheduler(
            optimizer, hp["schedule"], int(self.trainer.estimated_stepping_batches)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Recording(Callback):
    """Records of a training's steps, and its figures after each epoch, for the page of a run.

    Attributes:
        figures: what the model has logged, by name, of each epoch.
        records: of all ranks, after the training.
    """

    def __init__(self) -> None:
        self.figures: list[dict[str, float]] = []
        self.records: list[RankRecord] = []
        self._recorder: Recorder | None = None
        self._active = ExitStack()

    def steps(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the training batches, and record the steps that take them."""
        return self._recorder.steps(batches) if self._recorder else iter(batches)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recorder = Recorder(pl_module, trainer.optimizers[0])
        self._active.enter_context(self._recorder)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.figures.append({"epoch": trainer.current_epoch + 1, **logged})

    def on_train_end(self, *_: object) -> None:
        self._active.close()
        assert self._recorder is not None
        self.records = self._recorder.gather()

    def on_exception(self, *_: object) -> None:
        self._active.close()


class Lines(Callback):
    """A line at the start and after each epoch, above the progress bar if there is one.

    Without a bar a long epoch says now and then how far it is.
    """

    def on_train_start(self, trainer: Trainer, *_: object) -> None:
        steps = f"{trainer.num_training_batches} steps"
        self._print(trainer, f"epoch {trainer.current_epoch + 1} begins: {steps}")

    def on_train_epoch_start(self, *_: object) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        silent = time.perf_counter() - self._printed
        if silent >= SILENCE and not trainer.progress_bar_callback:
            seconds = f"{time.perf_counter() - self._start:.0f} s"
            steps = f"{batch_idx + 1} of {trainer.num_training_batches} steps"
            self._print(trainer, f"epoch {trainer.current_epoch + 1}: {steps} after {seconds}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        figures = trainer.callback_metrics
        logged = [
            f"{name.replace('_', ' ')} {figures[name].item():.4f}"
            for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
            if name in figures
        ]
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        line = " | ".join([epoch, *logged, f"{time.perf_counter() - self._start:.1f} s"])
        self._print(trainer, line)

    def _print(self, trainer: Trainer, line: str) -> None:
        self._printed = time.perf_counter()
        if bar := trainer.progress_bar_callback:
            bar.print(line)
        elif trainer.is_global_zero:
            print(line, flush=True)


class Epochs:
    """The batches of each epoch on this rank, as `torchpar.training.Run` takes them.

    A DataLoader with Lightning's sampler would pad the ranks' shares to one size.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        seed: int,
        trainer: Trainer,
        steps: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
    ):
        self.samples, self.batch_size, self.seed, self.trainer = samples, batch_size, seed, trainer
        self.steps = steps  # yields the batches, and may record what is done with them

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def share(self, indices: Tensor) -> Tensor:
        return indices.tensor_split(self.trainer.world_size)[self.trainer.global_rank]

    def __iter__(self) -> Iterator[Batch]:
        # A generator, which reads the epoch at the first batch: a resumed trainer has restored it
        # by then.
        epoch = self.trainer.current_epoch + 1
        drawn = batches(
            self.samples, self.batch_size, seed=self.seed, epoch=epoch, share=self.share
        )
        yield from self.steps(drawn)


class MNIST(LightningDataModule):
    """MNIST and its relatives, on the device.

    Args:
        root: folder of the data sets, as torchvision's.
        dataset: see `torchpar.data.load`.
        batch_size: samples per step, over all ranks.
        seed: of the samples' order.
        validation: number of training samples, the last ones, to keep for validation; 0 does not
            validate.
    """

    def __init__(
        self,
        root: Path = Path(__file__).parent / "data",
        dataset: Dataset = "mnist",
        batch_size: int = 128,
        seed: int = 0,
        validation: int = 0,
    ):
        super().__init__()
        self.root, self.dataset, self.validation = root, dataset, validation
        self.batch_size, self.seed = batch_size, seed

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        train, self.test = load(self.dataset, self.root, self.trainer.strategy.root_device)
        if not 0 <= self.validation < len(train):
            raise ConfigError(
                f"validation is {self.validation}, expected 0 to {len(train) - 1} samples"
            )
        split = len(train) - self.validation
        self.train, self.val = train[:split], train[split:]
        self.epochs = partial(Epochs, seed=self.seed, trainer=self.trainer)

    def train_dataloader(self) -> Epochs:
        assert self.trainer is not None
        recordings = [c for c in self.trainer.callbacks if isinstance(c, Recording)]  # type: ignore[attr-defined]
        return self.epochs(
            self.train, self.batch_size, steps=recordings[0].steps if recordings else iter
        )

    def val_dataloader(self) -> Epochs | list[Epochs]:
        return self.epochs(self.val, len(self.val)) if len(self.val) else []

    def test_dataloader(self) -> Epochs:
        return self.epochs(self.test, len(self.test))


class CLI(LightningCLI):
    """LightningCLI with ``--report``."""

    recording: Recording | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--report", type=Path | None, help="folder for a page of the run")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        with ending.parsing():
            super().parse_arguments(parser, args)

    def before_fit(self) -> None:
        if folder := self.config.fit.report:
            for mark in (Needs("matplotlib"), Needs("jinja2"), Output(is_folder=True)):
                mark.check("--report", folder)
            self.recording = Recording()
            self.trainer.callbacks.append(self.recording)  # type: ignore[attr-defined]


def main() -> None:
    """Run ``fit`` or ``test``; both end with the last line of the other lessons."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # they list the hardware that is absent
        logging.getLogger(name).setLevel(logging.WARNING)
    # Without validation there are no samples.
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
    # PyTorch warns of Lightning's calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    timer = Timer()
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    shown = {
        "max_epochs": 10,
        "enable_progress_bar": sys.stdout.isatty(),
        "callbacks": [timer, Lines()],
    }
    options = {"seed_everything_default": 0, "trainer_defaults": silent | shown}
    with ending.ending():
        # The logger keeps the hyperparameters.
        cli = CLI(LitMLP, MNIST, save_config_callback=None, **options)  # type: ignore[arg-type]
        trainer = cli.trainer
        # Of all epochs, also those before a checkpoint from which the run was resumed. It is read
        # here, because a test of the best weights loads the timer from their checkpoint.
        trained = timer.time_elapsed("train") if cli.subcommand == "fit" else 0.0
        if cli.subcommand == "fit":
            best = getattr(trainer.checkpoint_callback, "best_model_path", None)
            trainer.test(cli.model, cli.datamodule, ckpt_path=best or None, verbose=False)
        check_finite("the test loss", trainer.callback_metrics["test_loss"].item())
        if trainer.is_global_zero:
            accuracy, loss = (
                trainer.callback_metrics[f"test_{name}"].item() for name in ("accuracy", "loss")
            )
            seconds = trained + timer.time_elapsed("test")
            device = trainer.strategy.root_device.type
            last_line = console.last_line(accuracy, loss, seconds, trainer.world_size, device)
            if cli.recording is not None:
                page = {"": report.Run(cli.recording.figures, last_line, cli.recording.records)}
                test = cli.datamodule.test
                outputs = cli.model.mlp(test.inputs(slice(None)))
                report.write(cli.config.fit.report, page, outputs, test)
            print(last_line)
    # Until the interpreter's end the group's threads could abort the process.
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
