# SPDX-License-Identifier: MIT
"""Outcome of training: an evaluation, the figures of an epoch, or the end by a signal."""

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Evaluation(NamedTuple):
    """How good a model is, on every rank the same.

    Attributes:
        loss: mean over all test samples.
        accuracy: in [0, 1]; None where the task has none.
        outputs: of all test samples, where the task keeps them.
    """

    loss: float
    accuracy: float | None = None
    outputs: "Tensor | None" = None


@dataclass(frozen=True)
class EpochResult:
    """Figures of one epoch.

    Attributes:
        epoch: from 1.
        train_loss: mean over the epoch's training samples, each at the step that trained on it.
        test_loss: mean over all test samples, after the epoch.
        test_accuracy: in [0, 1]; None where the task has none.
        samples_per_s: training samples per second over all ranks, without evaluation. In a resumed
            epoch, those since it was resumed.
        seconds: of training and evaluation. In a resumed epoch, those since it was resumed.
        ranks: number of processes.
        device: "cpu" or "cuda".
    """

    epoch: int
    train_loss: float
    test_loss: float
    test_accuracy: float | None
    samples_per_s: float
    seconds: float
    ranks: int
    device: str


class Stopped(Exception):
    """A rank received a signal, such as SIGTERM. All ranks have saved the same step.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number
