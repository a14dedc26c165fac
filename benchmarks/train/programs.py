# SPDX-License-Identifier: MIT
"""The rungs that are whole programs, which train for an epoch in loops of their own."""

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.digits import DATA
from benchmarks.ladder.rungs import Rung
from benchmarks.timing import Rejected
from benchmarks.train.inputs import LR, TrainingInputs
from torchpar.baselines import numpy_mlp
from torchpar.baselines.bridge import copy_weights
from torchpar.baselines.numpy_mlp import Array
from torchpar.data import Batch
from torchpar.nn import MLP

LIGHTNING = "Lightning"
EPOCHS = 2  # samples of a program
# The error that is allowed, of the mean loss of an epoch. Rounding moves it by less than 1e-7; a learning
# rate that is 1% off by 7e-4 and more, another order of the samples by 6e-5 and more.
MEAN_LOSS_ERROR = 1e-5
TIMEOUT = 120  # seconds of an epoch by MPI


def program_rung(
    name: str,
    inputs: TrainingInputs,
    order: Sequence[Array],
    epoch: Callable[[], tuple[float, float]],
    note: str = "",
) -> Rung:
    """A rung of `EPOCHS` epochs by ``epoch``, which returns the seconds and the mean loss.

    Args:
        order: of the batches of ``epoch``, on which the mean loss depends.
    """

    @cache
    def expected() -> float:
        return float(np.average(inputs.losses_of(order), weights=[len(indices) for indices in order]))

    def turn(index: int) -> list[float] | None:
        if index == 0:
            return []
        if index > EPOCHS:
            return None
        seconds, loss = epoch()
        steps = len(inputs.x) / inputs.training.batch_size
        if not abs(loss - expected()) <= MEAN_LOSS_ERROR * expected():
            raise Rejected(f"the mean loss is {loss:.5f}, expected {expected():.5f}")
        return [seconds / steps]

    return Rung(name, turn, note)


def lightning(inputs: TrainingInputs) -> Rung:
    """Lightning's Trainer, the same network and the same batches."""
    return program_rung(LIGHTNING, inputs, inputs.order, partial(lightning_epoch, inputs))


def lightning_epoch(inputs: TrainingInputs) -> tuple[float, float]:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Timer

    from torchpar.lightning import LitClassifier, MNISTDataModule

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # what hardware it has not found

    class Digits(MNISTDataModule):
        """The first digits alone, where the inputs are fewer."""

        def setup(self, stage: str) -> None:
            super().setup(stage)
            self.train = inputs.train

    class Network(LitClassifier):
        """The network of the other rungs."""

        def __init__(self) -> None:
            super().__init__(sizes[0], sizes[-1])
            self.mlp = MLP(sizes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x)  # type: ignore[no-any-return]

        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            loss = self.loss_sum(self(batch.x), batch.labels)
            self.train_loss.update(loss.detach(), len(batch.labels))
            return loss / batch.global_size

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR)

    sizes, batch_size = inputs.training[:2]
    extras = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet: dict[str, Any] = dict.fromkeys(extras, False)
    model = Network()
    copy_weights(inputs.start, model.mlp)
    timer = Timer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of workers and loggers that are not wanted here
        trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[timer], **quiet)
        trainer.fit(model, Digits(DATA, batch_size=batch_size))
    return timer.time_elapsed("train"), trainer.callback_metrics["train_loss"].item()


def mpi(inputs: TrainingInputs) -> Rung:
    """`benchmarks.train.mpi_epoch` on two processes."""
    order = list(numpy_mlp.batches(len(inputs.x), inputs.training.batch_size, np.random.default_rng(0)))
    return program_rung("NumPy, 2 processes", inputs, order, partial(mpi_epoch, inputs), "by MPI")


def mpi_epoch(inputs: TrainingInputs) -> tuple[float, float]:
    sizes, batch_size = inputs.training[:2]
    program = [sys.executable, "-m", "benchmarks.train.mpi_epoch"]
    command = [str(mpirun()), "-n", "2", *program, json.dumps([sizes, batch_size, len(inputs.x)])]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, cwd=Path(__file__).parents[2]
    )
    if done.returncode:
        raise Rejected(f"mpirun ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    # Give torch's threads work for a second: after they slept while other processes had the cores, the next
    # rung's steps took ten times as long.
    x, start = torch.ones(300, 300), time.perf_counter()
    while time.perf_counter() - start < 1:
        torch.mm(x, x)
    found = json.loads(done.stdout)
    return found["seconds"], found["loss"]


def mpirun() -> str | None:
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def missing(what: str) -> list[str]:
    """The needs of "MPI" or `LIGHTNING` that are not installed."""
    if what == LIGHTNING:
        return [] if importlib.util.find_spec("lightning") else ["lightning"]
    found = {"mpirun": mpirun(), "mpi4py": importlib.util.find_spec("mpi4py")}
    return [name for name, at in found.items() if at is None]
