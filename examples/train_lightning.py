# SPDX-License-Identifier: MIT
"""The same training in Lightning: the model and the data are ours, the loop is its Trainer's.

    python examples/train_lightning.py fit
    python examples/train_lightning.py fit --trainer.accelerator cpu --trainer.devices 2
    python examples/train_lightning.py fit --config examples/lightning.yaml
    python examples/train_lightning.py test --ckpt_path lightning_logs/tensorboard/…/last.ckpt

The other examples call `torchpar.training.fit`, a loop of some forty lines that can be read. Here a
LightningModule says what a step computes and a LightningDataModule which batches there are; when and where
they run, in which precision, on how many processes, what is logged and saved, and when to stop, are
arguments of the Trainer. LightningCLI makes flags of all of them, and reads them from a YAML file; try
``fit --help`` and ``fit --print_config``.

What a framework must not change is the result. Each epoch's order is a function of the seed and the epoch,
ranks share each batch as DistributedDataParallel needs it, and evaluation counts every sample once: so the
weights are those of train_ddp.py, to the bit. What it costs is some tenths of a millisecond per step, for the
hooks around it: much for a model of this size, nothing for a large one.

``fit`` ends with a test, of the best weights where checkpoints are kept. By default nothing is written;
lightning.yaml turns on loggers, checkpoints and early stopping.
"""

import gc
import logging
import math
import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

try:
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import Timer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities import rank_zero_only

    from torchpar.lightning import LitMLP, MNISTDataModule
except ImportError as error:
    sys.exit(f"this example needs Lightning ({error}); pip install 'torchpar[lightning,examples]'")
from torch import distributed as dist

from torchpar import report
from torchpar.errors import ConfigError


class CLI(LightningCLI):
    """``fit`` and ``test`` whose last line is that of the other examples."""

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        return super().init_parser(exit_on_error=False, **options)  # errors in a line, without the usage

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"data.root": Path(__file__).parent / "data"})
        # One seed for the weights and for the order of the samples.
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def after_fit(self) -> None:
        trained = self._seconds("train")
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", None)
        self.trainer.test(self.model, self.datamodule, ckpt_path=best or None, verbose=False)
        self.after_test(trained)

    def after_test(self, trained: float = 0.0) -> None:
        trainer, metrics = self.trainer, self.trainer.callback_metrics
        if trainer.is_global_zero:
            accuracy, loss = (float(metrics.get(name, math.nan)) for name in ("test_accuracy", "test_loss"))
            seconds, device = trained + self._seconds("test"), trainer.strategy.root_device.type
            print(report.last_line(accuracy, loss, seconds, trainer.world_size, device))

    def _seconds(self, stage: str) -> float:
        timer: Timer = self.trainer_defaults["callbacks"]
        return timer.time_elapsed(stage)


def main() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):  # which say what hardware they have not found
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # no validation
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")  # torch's, of Lightning
    trainer = {
        "max_epochs": 10,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": sys.stdout.isatty(),
        "callbacks": Timer(),
    }
    try:
        CLI(
            LitMLP,
            MNISTDataModule,
            seed_everything_default=0,
            trainer_defaults=trainer,
            save_config_callback=None,  # the loggers keep the hyperparameters
        )
    except (ConfigError, MisconfigurationException, ArgumentError, OSError, UnpicklingError) as e:
        if getattr(rank_zero_only, "rank", 0) == 0:  # every rank meets it
            print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    # Lightning would leave the group of ranks to the interpreter's end, where its threads can abort it.
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
