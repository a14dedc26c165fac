# SPDX-License-Identifier: MIT
"""Command line of the Lightning lesson: LightningCLI with the other lessons' last line and errors."""

import gc
import logging
import math
import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import distributed as dist

from support import console
from torchpar.errors import ConfigError, TorchparError

try:
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.callbacks import Timer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities import rank_zero_only
except ImportError as error:
    sys.exit(f"this example needs Lightning ({error}); pip install 'torchpar[lightning,examples]'")


class CLI(LightningCLI):
    """``fit`` and ``test``; both end with the last line of the other lessons."""

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        return super().init_parser(exit_on_error=False, **options)  # errors in a line, without the usage

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"data.root": Path(__file__).parent.parent / "data"})
        # One seed for the weights and for the order of the samples.
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as e:  # a model's or a data module's arguments
            raise ConfigError(str(e)) from e

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
            print(console.last_line(accuracy, loss, seconds, trainer.world_size, device))

    def _seconds(self, stage: str) -> float:
        timer: Timer = self.trainer_defaults["callbacks"]
        return timer.time_elapsed(stage)


def main(model: type[LightningModule], data_module: type[LightningDataModule]) -> None:
    """Run LightningCLI; an error is one line from rank 0 and ends every rank with status 2."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # they list the hardware that is absent
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
            model,
            data_module,
            seed_everything_default=0,
            trainer_defaults=trainer,
            save_config_callback=None,  # the logger keeps the hyperparameters
        )
    except (TorchparError, MisconfigurationException, ArgumentError, OSError, UnpicklingError) as e:
        if getattr(rank_zero_only, "rank", 0) == 0:  # every rank meets it
            print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    # Lightning leaves the group of ranks to the interpreter's end, where its threads can abort the process.
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
