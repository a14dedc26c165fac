# SPDX-License-Identifier: MIT
"""Programs that train for an epoch in loops of their own, and are timed as they are."""

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.baselines.bridge import copy_weights
from benchmarks.baselines.numpy_mlp import Array
from benchmarks.ladder import split
from benchmarks.ladder.inputs import DATA, RATE, Problem
from benchmarks.ladder.measure import Rung, Sample
from benchmarks.timing import Rejected
from torchpar import data, training
from torchpar.nn import MLP
from torchpar.parallel.world import World

PLAIN, LIGHTNING = "torchpar.training.fit", "Lightning"
EPOCHS = 2  # samples of each
# Of the mean loss of an epoch. Rounding moves it by less than 1e-7; a learning rate that is 1% off by 7e-4
# and more, another order of the samples by 6e-5 and more.
MEAN_ALIKE = 1e-5
TIMEOUT = 120  # seconds of an epoch
EXAMPLES = Path(__file__).parents[2] / "examples"


NEEDS = {"MPI": ("mpirun", "mpi4py", "tyro"), LIGHTNING: ("lightning",)}


def found(name: str) -> bool:
    """Whether the program or the package is installed."""
    return _mpirun() is not None if name == "mpirun" else importlib.util.find_spec(name) is not None


def _mpirun() -> str | None:
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def mpi(problem: Problem) -> Rung | None:
    """examples/train_mpi.py on two processes; None without an mpirun, or what the script needs."""
    if not all(map(found, NEEDS["MPI"])):
        return None
    mpirun = _mpirun()
    sizes, batch_size, _ = problem.training
    flags = f"--epochs 1 --lr {RATE} --momentum 0 --weight-decay 0 --batch-size {batch_size}".split()
    flags += ["--samples", str(len(problem.x)), "--hidden", *map(str, sizes[1:-1])]

    def epoch() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            metrics = Path(folder) / "metrics.jsonl"
            script = [sys.executable, str(EXAMPLES / "train_mpi.py"), *flags, "--metrics", str(metrics)]
            done = subprocess.run(
                [str(mpirun), "-n", "2", *script], capture_output=True, text=True, timeout=TIMEOUT
            )
            if done.returncode:
                raise Rejected(f"mpirun ended with {done.returncode}: {done.stderr.strip()[-200:]}")
            row = json.loads(metrics.read_text().splitlines()[-1])
            _wake()
        return len(problem.x) / row["samples_per_s"], row["train_loss"]

    return _rung("NumPy, 2 processes", split.noted("by MPI"), problem, problem.order, epoch)


class Loops:
    """The same epoch by `torchpar.training.fit` and by Lightning's Trainer: one network, two loops."""

    def __init__(self, problem: Problem, world: World):
        self.problem = problem
        self.world = world
        train, test = data.load("mnist", DATA, world)
        self.train, self.test = train[: len(problem.x)], test[:10]

    @cached_property
    def order(self) -> list[Array]:
        """The indices of each batch of torchpar's own order."""
        indices = torch.arange(len(self.train))
        numbered = data.Samples(self.train.images, indices, self.train.classes)
        batch_size = self.problem.training.batch_size
        epoch = data.batches(numbered, batch_size, seed=0, epoch=1, world=self.world)
        return [batch.labels.numpy() for batch in epoch]

    def plain(self) -> Rung:
        def epoch() -> tuple[float, float]:
            model = MLP(self.problem.training.sizes)
            copy_weights(self.problem.start, model)
            (result,) = training.fit(
                model,
                training.sgd(model, RATE, momentum=0, weight_decay=0),
                self.train,
                self.test,
                self.world,
                epochs=1,
                batch_size=self.problem.training.batch_size,
                schedule="constant",
            )
            return len(self.train) / result.samples_per_s, result.train_loss

        return _rung(PLAIN, "", self.problem, self.order, epoch)

    def lightning(self) -> Rung | None:
        """None where Lightning is not installed."""
        try:
            from lightning.pytorch import Trainer
            from lightning.pytorch.callbacks import Timer

            from torchpar.lightning import LitMLP, MNISTDataModule
        except ImportError:
            return None
        # It says what hardware it has not found, in each epoch.
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        samples = self.train

        class Digits(MNISTDataModule):
            """The first ones alone, where the problem says so."""

            def setup(self, stage: str) -> None:
                super().setup(stage)
                self.train = samples

        sizes, batch_size, _ = self.problem.training
        quiet: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )

        def epoch() -> tuple[float, float]:
            model = LitMLP(sizes, lr=RATE, momentum=0, weight_decay=0, schedule="constant")
            copy_weights(self.problem.start, model.mlp)
            timer = Timer()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of workers and loggers that are not wanted here
                trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[timer], **quiet)
                trainer.fit(model, Digits(DATA, batch_size=batch_size))
            return timer.time_elapsed("train"), trainer.callback_metrics["train_loss"].item()

        return _rung(LIGHTNING, "", self.problem, self.order, epoch)


def _wake() -> None:
    """Give torch's threads work for a second: after they slept while other processes had the cores, the next
    rung's steps took ten times as long."""
    x, start = torch.ones(300, 300), time.perf_counter()
    while time.perf_counter() - start < 1:
        torch.mm(x, x)


def _rung(
    name: str, note: str, problem: Problem, order: list[Array], epoch: Callable[[], tuple[float, float]]
) -> Rung:
    """Two epochs; of each the seconds and the mean loss, which float64's decides about."""
    left = EPOCHS

    @cache
    def expected() -> float:
        return float(np.average(problem.losses_of(order), weights=[len(indices) for indices in order]))

    def sample() -> Sample | None:
        nonlocal left
        if left == 0:
            return None
        left -= 1
        seconds, loss = epoch()
        if not abs(loss - expected()) <= MEAN_ALIKE * expected():
            raise Rejected(f"the mean loss is {loss:.5f}, expected {expected():.5f}")
        return Sample(seconds)

    return Rung(name, sample, warm=lambda: None, note=note)
