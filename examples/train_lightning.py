# SPDX-License-Identifier: MIT
"""An MLP trained by Lightning: the model and its step are ours, the loop is the Trainer's.

    python examples/train_lightning.py fit
    python examples/train_lightning.py fit --trainer.accelerator cpu --trainer.devices 2
    python examples/train_lightning.py fit --config examples/lightning.yaml
    python examples/train_lightning.py test --ckpt_path /tmp/torchpar/lightning_logs/…/last.ckpt

The other lessons write the loop out. Here a LightningModule holds the model, the step and the optimizer, and
a LightningDataModule the batches. The Trainer calls them: on one process or several, in a precision, with
loggers, checkpoints and early stopping. LightningCLI makes a flag of each argument, and reads them from a
YAML file; see ``fit --help`` and ``fit --print_config``.

A framework must not change the result: the weights are those of a plain loop, to the bit. Its hooks cost some
tenths of a millisecond per step, which is much for a model of this size and nothing for a large one.

``fit`` ends with a test, of the best weights where checkpoints are kept. By default nothing is written;
lightning.yaml turns on a logger, checkpoints and early stopping.
"""

import gc
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

from support import console
from torch import Tensor
from torch import distributed as dist

from torchpar.data import Batch
from torchpar.errors import TorchparError
from torchpar.nn import MLP
from torchpar.training import LRSchedule, lr_scheduler, sgd
from torchpar.training.losses import Loss

try:
    from jsonargparse import ArgumentError
    from jsonargparse.typing import NonNegativeFloat
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import Timer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities import rank_zero_only
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

    from torchpar.lightning import LitClassifier, MNISTDataModule
except ImportError as error:
    sys.exit(f"this example needs Lightning ({error}); pip install 'torchpar[lightning,examples]'")


class LitMLP(LitClassifier):
    """`torchpar.nn.MLP` with its step and its optimizer; `LitClassifier` evaluates and logs.

    Args:
        sizes: of the layers, input first.
        hidden: activation between layers.
        loss: "cross-entropy" on logits; "bce" or "mse" on sigmoid outputs.
        lr: learning rate at the start.
        momentum: Nesterov momentum.
        weight_decay: L2 penalty λ of the weights: λ/2·‖W‖² in the loss.
        schedule: course of the learning rate over the run, in steps; linear and cosine end at 0.
        compile: compile the MLP by torch.compile.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (784, 128, 64, 10),
        hidden: Literal["sigmoid", "relu"] = "sigmoid",
        loss: Loss = "cross-entropy",
        lr: NonNegativeFloat = 0.5,
        momentum: NonNegativeFloat = 0.9,
        weight_decay: NonNegativeFloat = 3e-5,
        schedule: LRSchedule = "linear",
        compile: bool = False,
    ):
        super().__init__(sizes[-1], loss)
        self.save_hyperparameters()  # as self.hparams, which a checkpoint holds
        self.mlp = MLP(sizes, hidden, "logits" if loss == "cross-entropy" else "sigmoid")
        if compile:
            self.mlp.compile()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, labels, global_size = batch
        loss = self.loss_sum(self(x), labels)
        self.train_loss.update(loss.detach(), len(labels))
        # The loss is the mean over the global batch. DistributedDataParallel averages over the ranks, whose
        # shares of the batch may differ in size. The Trainer calls backward() and optimizer.step().
        return loss * (self.trainer.world_size / global_size)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        hp = self.hparams
        optimizer = sgd(self, hp["lr"], hp["momentum"], hp["weight_decay"])
        steps = self.trainer.estimated_stepping_batches  # infinite in a run without end, whose rate stays
        scheduler = lr_scheduler(optimizer, hp["schedule"], steps)  # type: ignore[arg-type]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class CLI(LightningCLI):
    """Samples of this repository, and one seed for the weights and for the order of the samples."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"data.root": Path(__file__).parent / "data"})
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)


def run() -> None:
    """Run ``fit`` or ``test``; both end with the last line of the other lessons."""
    timer = Timer()
    extras = ("logger", "enable_checkpointing", "enable_model_summary")
    defaults = {"max_epochs": 10, "enable_progress_bar": sys.stdout.isatty(), "callbacks": timer}
    cli = CLI(
        LitMLP,
        MNISTDataModule,
        seed_everything_default=0,
        trainer_defaults=dict.fromkeys(extras, False) | defaults,
        parser_kwargs={"exit_on_error": False},  # errors in a line, without the usage
        save_config_callback=None,  # the logger keeps the hyperparameters
    )
    trainer = cli.trainer
    if cli.subcommand == "fit":
        best = getattr(trainer.checkpoint_callback, "best_model_path", None)
        trainer.test(cli.model, cli.datamodule, ckpt_path=best or None, verbose=False)
    if trainer.is_global_zero:
        metrics, seconds = trainer.callback_metrics, timer.time_elapsed("train") + timer.time_elapsed("test")
        accuracy, loss = (float(metrics.get(name, math.nan)) for name in ("test_accuracy", "test_loss"))
        device = trainer.strategy.root_device.type
        print(console.last_line(accuracy, loss, seconds, trainer.world_size, device))


def main() -> None:
    """Call `run`; an error is one line from rank 0 and ends every rank with status 2."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # they list the hardware that is absent
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # no validation
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")  # torch's, of Lightning
    try:
        run()
    except (
        TorchparError,
        ValueError,
        MisconfigurationException,
        ArgumentError,
        OSError,
        UnpicklingError,
    ) as e:
        if getattr(rank_zero_only, "rank", 0) == 0:  # every rank meets it
            print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    # Lightning leaves the group of ranks to the interpreter's end, where its threads can abort the process.
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
