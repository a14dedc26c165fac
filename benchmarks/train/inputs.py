# SPDX-License-Identifier: MIT
"""The inputs of an epoch of training, and the check of its losses."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.digits import DATA
from benchmarks.timing import Rejected
from torchpar import data
from torchpar.baselines.numpy_mlp import MLP, SGD, Array

LR = 0.1
# The error that is allowed, of the mean loss of any batch. Rounding moves it by less than 1e-5 within an
# epoch; a learning rate that is 1% off, or another order of the samples, moves that of some batch by 1e-2.
# bfloat16, whose epochs here have eight steps, is off by 2e-3 on a CPU.
LOSS_ERROR = {torch.float32: 1e-3, torch.bfloat16: 1e-2}


class Training(NamedTuple):
    """An epoch of a network with a batch size, on the first samples of MNIST; 0 means all."""

    sizes: tuple[int, ...]
    batch_size: int
    samples: int = 0
    dtype: torch.dtype = torch.float32


class TrainingInputs:
    """An epoch of SGD at rate `LR`, as every rung runs it: the same samples, batches and first weights.

    Attributes:
        train, test: MNIST.
        x: ``(n, 784)`` float32 in [0, 1].
        labels: ``(n)`` int64.
        order: the indices of each batch, those of `torchpar.training.Run`.
        start: a network with the first weights.
    """

    def __init__(self, training: Training):
        train, self.test = data.load("mnist", DATA)
        self.train = train[: training.samples or None]
        self.training = training
        self.x: Array = self.train.inputs(slice(None)).numpy()
        self.labels: Array = self.train.labels.numpy()
        numbered = data.Samples(self.train.features, torch.arange(len(self.train)), self.train.classes)
        batches = data.batches(numbered, training.batch_size, seed=0, epoch=1)
        self.order = [batch.labels.numpy() for batch in batches]
        self.start = MLP(training.sizes, seed=0)

    @property
    def name(self) -> str:
        return "-".join(map(str, self.training.sizes))

    @cached_property
    def losses(self) -> Array:
        """The mean loss of each batch of ``order``, in float64."""
        return self.losses_of(self.order)

    def losses_of(self, order: Sequence[Array]) -> Array:
        """The mean loss of each batch of ``order``, trained in this order in float64."""
        model = MLP(self.training.sizes, dtype=np.float64)
        model.parameters[:] = self.start.parameters
        optimizer, losses = SGD(model, LR), []
        for indices in order:
            loss, gradient = model.gradients(self.x[indices].astype(np.float64), self.labels[indices])
            optimizer.step(gradient / len(indices))
            losses.append(loss / len(indices))
        return np.array(losses)

    def check(self, losses: Array, first: int, last: int) -> None:
        """Raise if these are not the mean losses of the batches from ``first`` to ``last`` − 1."""
        expected = self.losses[first:last]
        if len(losses) != last - first:
            raise Rejected(f"{len(losses)} losses of {last - first} batches")
        off = np.abs(losses - expected).max() / expected.mean()
        allowed = LOSS_ERROR[self.training.dtype]
        if not off <= allowed:
            raise Rejected(f"a loss is off by {off:.0e} of their mean, {allowed:.0e} are allowed")
