# SPDX-License-Identifier: MIT
"""The inputs of the rungs, and the checks of their results."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.compare import Work
from benchmarks.timing import Rejected
from torchpar import data
from torchpar.baselines import numpy_mlp
from torchpar.baselines.numpy_mlp import MLP, SGD, Array

LR = 0.1
DATA = Path(__file__).parents[2] / "examples" / "data"
# The error that is allowed, of the mean loss of any batch. Rounding moves it by less than 1e-5 within an
# epoch; a learning rate that is 1% off, or another order of the samples, moves that of some batch by 1e-2.
LOSS_ERROR = 1e-3


@dataclass(frozen=True)
class Operands:
    """The arguments of an operator, and its result in float64 (or whole numbers).

    Attributes:
        bound: how far off each number of the result may be.
        cold: whether calls find the arguments in memory, or in a cache as a training step does.
    """

    name: str
    label: str
    arguments: tuple[Array, ...]
    expected: Array
    bound: Array
    work: Work
    cold: bool = True

    def check(self, result: Array, rows: slice = slice(None)) -> None:
        """Raise if ``result`` is not that of these rows."""
        expected = self.expected[rows]
        if result.shape != expected.shape:
            raise Rejected(f"the result has shape {result.shape}, expected {expected.shape}")
        wrong = ~(np.abs(result - expected) <= self.bound[rows])
        if wrong.any():
            raise Rejected(f"{wrong.sum()} numbers are off by more than rounding")


def operands(name: str, shape: Sequence[int]) -> Operands:
    """The operands of "maximum" or "matmul_t" ``(n, n)``, or of "linear_sigmoid" ``(m, in, out)``.

    A sum of k products in float32, in whatever order, is off by at most γ(k)·Σ|a·b| with γ(k) = ku/(1 − ku)
    and u = 2⁻²⁴ (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). The sigmoid's
    slope is at most 1/4; 8u allow for its own few roundings.
    """
    random = np.random.default_rng(0)
    if name == "maximum":
        a, b = random.integers(0, 256, (2, *shape), dtype=np.int32)
        label = f"maximum of {shape[0]}×{shape[1]} int32"
        expected = np.where(a > b, a, b)
        return Operands(name, label, (a, b), expected, 0 * expected, Work(3 * a.nbytes, a.size))
    if name == "matmul_t":
        n, k = shape
        x = random.standard_normal((n, k), dtype=np.float32)
        exact = x.astype(np.float64)
        work = Work(4 * (n * k + n * n), n * (n + 1) * k)
        bound = gamma(k) * np.abs(exact) @ np.abs(exact).T
        return Operands(name, f"X·Xᵀ of {n}×{k} float32", (x,), exact @ exact.T, bound, work)
    m, k, n = shape
    x = random.random((m, k), dtype=np.float32)
    weight = random.standard_normal((n, k), dtype=np.float32) / np.float32(np.sqrt(k))
    bias = random.standard_normal(n, dtype=np.float32)
    exact, weight64, bias64 = (t.astype(np.float64) for t in (x, weight, bias))
    z = exact @ weight64.T + bias64
    bound = gamma(k + 1) * (np.abs(exact) @ np.abs(weight64).T + np.abs(bias64)) / 4 + 8 * 2.0**-24
    label = f"linear+sigmoid of {m}×{k}→{n} float32"
    work = Work(4 * (m * k + n * k + n + m * n), 2 * m * n * k)
    return Operands(name, label, (x, weight, bias), numpy_mlp.sigmoid(z), bound, work, cold=False)


def gamma(k: int) -> float:
    """The largest relative error of k roundings in float32."""
    u = 2.0**-24
    return k * u / (1 - k * u)


class Training(NamedTuple):
    """An epoch of a network with a batch size, on the first samples of MNIST; 0 means all."""

    sizes: tuple[int, ...]
    batch_size: int
    samples: int = 0


class TrainingInputs:
    """An epoch of SGD at rate `LR`, as every rung runs it: the same samples, batches and first weights.

    Attributes:
        train, test: MNIST.
        x: ``(n, 784)`` float32 in [0, 1].
        labels: ``(n)`` int64.
        order: the indices of each batch.
        start: a network with the first weights.
    """

    def __init__(self, training: Training):
        train, self.test = data.load("mnist", DATA)
        self.train = train[: training.samples or None]
        self.training = training
        self.x: Array = self.train.inputs(slice(None)).numpy()
        self.labels: Array = self.train.labels.numpy()
        random = np.random.default_rng(0)
        self.order = list(numpy_mlp.batches(len(self.train), training.batch_size, random))
        self.start = MLP(training.sizes, seed=0)

    @property
    def label(self) -> str:
        sizes, batch_size, _ = self.training
        return f"an epoch of {len(self.x):,} MNIST digits, {'-'.join(map(str, sizes))}, batch {batch_size}"

    @property
    def work(self) -> Work:
        """Three products per layer, forward, and backward for weight and input; the first has no gradient
        of its input to compute. Bytes: the samples once, weights and gradients once a step."""
        products = [m * n for m, n in pairwise(self.training.sizes)]
        flops = len(self.x) * (6 * sum(products) - 2 * products[0])
        return Work(self.x.nbytes + 3 * self.start.parameters.nbytes * len(self.order), flops)

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
        if not off <= LOSS_ERROR:
            raise Rejected(f"a loss is off by {off:.0e} of their mean, {LOSS_ERROR:.0e} are allowed")
