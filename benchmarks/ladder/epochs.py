# SPDX-License-Identifier: MIT
"""An epoch of training on each rung. A run trains some batches and returns the mean loss of each."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.baselines import numba_njit, numpy_mlp, pure_python
from benchmarks.baselines.bridge import copy_weights
from benchmarks.baselines.numpy_mlp import MLP, Array
from benchmarks.ladder.inputs import RATE, Problem
from benchmarks.ladder.measure import CPU, Sample
from benchmarks.timing import Rejected


class Run(ABC):
    """A network on its way through an epoch."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.restart()

    @abstractmethod
    def restart(self) -> None:
        """Take the first weights again."""

    @abstractmethod
    def train(self, first: int, last: int) -> Array:
        """Train on batches ``first`` to ``last`` − 1; their mean losses."""

    def timed(self, first: int, last: int) -> tuple[float, Array]:
        start = time.perf_counter()
        losses = self.train(first, last)
        return time.perf_counter() - start, losses


class Chunks:
    """Takes a run through the epoch up to batch ``end``, so many batches in a sample."""

    def __init__(self, run: Run, batches: int, end: int):
        self.run = run
        self.problem = run.problem
        self.batches = batches
        self.end = end
        self.done = 0

    def warm(self) -> None:
        """Train on a batch of each size, and start again."""
        last = len(self.problem.order)
        self.run.train(0, 1)
        self.run.train(last - 1, last)
        self.run.restart()

    def sample(self) -> Sample | None:
        first, total = self.done, len(self.problem.x)
        self.done = last = min(first + self.batches, self.end)
        if first == last:
            return None
        seconds, losses = self.run.timed(first, last)
        if len(losses) != last - first:
            raise Rejected(f"{len(losses)} losses of {last - first} batches")
        self.problem.check(losses, first)
        part = sum(map(len, self.problem.order[first:last])) / total
        return Sample(seconds, part, sum(map(len, self.problem.order[:last])) / total)


class PurePython(Run):
    """The batches as lists; only the first ``batches`` exist."""

    def __init__(self, problem: Problem, batches: int):
        chosen = problem.order[:batches]
        self.lists = [(problem.x[i].tolist(), problem.labels[i].tolist()) for i in chosen]
        super().__init__(problem)

    def restart(self) -> None:
        start = self.problem.start
        self.weights = [weight.tolist() for weight in start.weights]
        self.biases = [bias.tolist() for bias in start.biases]

    def train(self, first: int, last: int) -> Array:
        losses = []
        for x, labels in self.lists[first:last]:
            loss, d_weights, d_biases = pure_python.gradients(self.weights, self.biases, x, labels)
            pure_python.descend(self.weights, self.biases, d_weights, d_biases, RATE / len(x))
            losses.append(loss / len(x))
        return np.array(losses)


class NumPy(Run):
    def restart(self) -> None:
        self.model = MLP(self.problem.training.sizes)
        self.model.parameters[:] = self.problem.start.parameters
        self.optimizer = numpy_mlp.SGD(self.model, RATE)

    def gradients(self, x: Array, labels: Array) -> tuple[float, Array]:
        """As `MLP.gradients`."""
        return self.model.gradients(x, labels)

    def train(self, first: int, last: int) -> Array:
        losses = []
        for indices in self.problem.order[first:last]:
            loss, gradient = self.gradients(self.problem.x[indices], self.problem.labels[indices])
            self.optimizer.step(gradient / len(indices))
            losses.append(loss / len(indices))
        return np.array(losses)


class Njit(NumPy):
    """The NumPy network, its gradients by compiled loops."""

    def __init__(self, problem: Problem, threads: int | None):
        self.threads = threads
        super().__init__(problem)

    def gradients(self, x: Array, labels: Array) -> tuple[float, Array]:
        loops = numba_njit.PARALLEL if self.threads else numba_njit.SERIAL
        weights, biases = self.model.weights, self.model.biases
        loss, d_weights, d_biases = numba_njit.gradients(loops, weights, biases, x, labels)
        layers = zip(d_weights, d_biases, strict=True)
        return loss, np.concatenate([t.ravel() for layer in layers for t in layer])

    def train(self, first: int, last: int) -> Array:
        with numba_njit.threads(self.threads or 1):
            return super().train(first, last)


class Torch(Run):
    """A PyTorch network of linear layers and sigmoids between them.

    Args:
        model: its parameters are weight and bias of each layer in turn.
        forward: what calls it; the model itself by default.
    """

    def __init__(
        self,
        problem: Problem,
        model: torch.nn.Module,
        device: torch.device = CPU,
        forward: Callable[[Tensor], Tensor] | None = None,
    ):
        self.model = model.to(device)
        self.forward = forward or self.model
        self.x = torch.from_numpy(problem.x).to(device)
        self.labels = torch.from_numpy(problem.labels).to(device)
        self.order = [torch.from_numpy(indices).to(device) for indices in problem.order]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        super().__init__(problem)

    def restart(self) -> None:
        copy_weights(self.problem.start, self.model)

    def train(self, first: int, last: int) -> Array:
        losses = []
        for indices in self.order[first:last]:
            loss = cross_entropy(self.forward(self.x[indices]), self.labels[indices])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return np.array(torch.stack(losses).tolist())


def native(sizes: tuple[int, ...]) -> torch.nn.Module:
    """The network of PyTorch's own layers."""
    layers: list[torch.nn.Module] = []
    for m, n in pairwise(sizes):
        layers += [torch.nn.Linear(m, n), torch.nn.Sigmoid()]
    return torch.nn.Sequential(*layers[:-1])
