# SPDX-License-Identifier: MIT
"""The rungs of an epoch of training.

A rung is a function that prepares, yields None, and then trains on batches and yields the mean loss of each.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.ladder import programs
from benchmarks.ladder.inputs import LR, Training, TrainingInputs
from benchmarks.ladder.rungs import ROUNDS, Rung, Workload, plural
from benchmarks.timing import CPU, Turn, time_calls
from torchpar.baselines import numba_njit, numpy_mlp, pure_python
from torchpar.baselines.bridge import copy_weights
from torchpar.baselines.numpy_mlp import Array
from torchpar.nn import MLP
from torchpar.parallel.launch.local import Ranks

Order = Sequence[Array]  # the indices of each batch
Train = Callable[[TrainingInputs, Order], Iterator[Any]]
Advance = Callable[[int], tuple[float, Array]]  # train on so many batches: the seconds, and their losses

SECONDS = 6.0  # of a rung's turns
PURE_PYTHON = 200  # digits


def workload(training: Training, ranks: Ranks, threads: Sequence[int], compiled: bool = True) -> Workload:
    """All rungs of an epoch; without ``compiled`` less torch.compile."""
    inputs = TrainingInputs(training)
    rungs = list(_rungs(inputs, ranks, threads, compiled))
    return Workload(inputs.label, inputs.work, "GFLOP/s", rungs, SECONDS)


def _rungs(inputs: TrainingInputs, ranks: Ranks, threads: Sequence[int], compiled: bool) -> Iterator[Rung]:
    sizes, batch_size, _ = inputs.training

    def rung(name: str, train: Train, note: str = "", **options: Any) -> Rung:
        return Rung(name, epoch_turn(inputs, local(inputs, train)), note, turns=turns, **options)

    turns = -(-len(inputs.order) // -(-len(inputs.order) // ROUNDS))  # of an epoch
    batches = min(-(-PURE_PYTHON // batch_size), len(inputs.order))
    digits = sum(map(len, inputs.order[:batches]))
    note = f"from {digits} of {len(inputs.x):,} digits"
    slow = epoch_turn(inputs, local(inputs, pure_python_epoch), 1, batches)
    yield Rung("pure Python", slow, note, digits / len(inputs.x))
    yield rung("njit", partial(njit_epoch, threads=None), compiles=True)
    for count in threads:
        epoch = partial(njit_epoch, threads=count)
        yield rung("njit, parallel", epoch, plural(count, "thread"), compiles=count == 1)
    yield rung("NumPy", numpy_epoch)
    if not programs.missing("MPI"):
        yield programs.mpi(inputs)
    yield rung("torch eager", torch_epoch(native(sizes)))
    if compiled:
        fast = native(sizes)
        fast.compile()
        yield rung("torch.compile", torch_epoch(fast), compiles=True)
    yield rung("torchpar CPU", torch_epoch(MLP(sizes)))
    yield programs.run(inputs)
    if not programs.missing(programs.LIGHTNING):
        yield programs.lightning(inputs)
    if torch.cuda.is_available():
        cuda = torch.device("cuda")
        yield rung("torch eager GPU", torch_epoch(native(sizes), cuda), device=cuda)
        yield rung("torchpar GPU", torch_epoch(MLP(sizes), cuda), device=cuda)
    ddp = epoch_turn(inputs, partial(on_ranks, ranks, inputs.training))
    yield Rung("2 ranks", ddp, "DDP over gloo", turns=turns)


def epoch_turn(
    inputs: TrainingInputs, begin: Callable[[Order], Advance], chunk: int = 0, end: int = 0
) -> Turn:
    """The turns that make up an epoch: ``chunk`` batches each, up to batch ``end``; each loss is checked.

    The warm-up trains on a batch of either size, and begins anew.
    """
    chunk, end = chunk or -(-len(inputs.order) // ROUNDS), end or len(inputs.order)
    done = 0
    advance: Advance

    def turn(index: int) -> list[float] | None:
        nonlocal done, advance
        if index == 0:
            begin([inputs.order[0], inputs.order[-1]])(2)
            advance = begin(inputs.order[:end])
            return []
        first, done = done, min(done + chunk, end)
        if first == done:
            return None
        seconds, losses = advance(done - first)
        inputs.check(losses, first, done)
        return [seconds * len(inputs.x) / sum(map(len, inputs.order[first:done]))]

    return turn


def local(inputs: TrainingInputs, train: Train) -> Callable[[Order], Advance]:
    return lambda order: advance_by(train(inputs, order))


def advance_by(losses: Iterator[Any]) -> Advance:
    """Train by taking losses from ``losses``, after its preparation."""
    next(losses)

    def take(batches: int) -> Array:
        taken = list(islice(losses, batches))
        if taken and isinstance(taken[0], Tensor):
            return np.array(torch.stack(taken).tolist())
        return np.array(taken)

    def advance(batches: int) -> tuple[float, Array]:
        timed = time_calls(partial(take, batches))
        return timed.seconds(), timed.result

    return advance


def on_ranks(ranks: Ranks, training: Training, order: Order) -> Advance:
    """Train by data parallelism; the ranks' parts of the losses add up."""
    from benchmarks.ladder import on_ranks as rank

    ranks.run(rank.begin, training, list(order))

    def advance(batches: int) -> tuple[float, Array]:
        seconds, losses = zip(*ranks.run(rank.advance, batches), strict=True)
        return max(seconds), sum(losses)

    return advance


# Rungs that yield the losses of batches


def pure_python_epoch(inputs: TrainingInputs, order: Order) -> Iterator[float | None]:
    weights = [weight.tolist() for weight in inputs.start.weights]
    biases = [bias.tolist() for bias in inputs.start.biases]
    batches = [(inputs.x[indices].tolist(), inputs.labels[indices].tolist()) for indices in order]
    yield None
    for x, labels in batches:
        loss, d_weights, d_biases = pure_python.gradients(weights, biases, x, labels)
        pure_python.descend(weights, biases, d_weights, d_biases, LR / len(x))
        yield loss / len(x)


def numpy_epoch(
    inputs: TrainingInputs,
    order: Order,
    gradients: Callable[[numpy_mlp.MLP, Array, Array], tuple[float, Array]] = numpy_mlp.MLP.gradients,
) -> Iterator[float | None]:
    model = numpy_mlp.MLP(inputs.training.sizes)
    model.parameters[:] = inputs.start.parameters
    optimizer = numpy_mlp.SGD(model, LR)
    yield None
    for indices in order:
        loss, gradient = gradients(model, inputs.x[indices], inputs.labels[indices])
        optimizer.step(gradient / len(indices))
        yield loss / len(indices)


def njit_epoch(inputs: TrainingInputs, order: Order, threads: int | None) -> Iterator[float | None]:
    """The NumPy network, its gradients by compiled loops."""

    def gradients(model: numpy_mlp.MLP, x: Array, labels: Array) -> tuple[float, Array]:
        loops = numba_njit.PARALLEL if threads else numba_njit.SERIAL
        with numba_njit.threads(threads or 1):
            loss, *layers = numba_njit.gradients(loops, model.weights, model.biases, x, labels)
        return loss, np.concatenate([t.ravel() for layer in zip(*layers, strict=True) for t in layer])

    return numpy_epoch(inputs, order, gradients)


def torch_epoch(model: torch.nn.Module, device: torch.device = CPU) -> Train:
    """A PyTorch network, whose parameters are weight and bias of each layer in turn."""
    model.to(device)

    def train(inputs: TrainingInputs, order: Order) -> Iterator[Tensor | None]:
        copy_weights(inputs.start, model)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        x, labels = torch.from_numpy(inputs.x).to(device), torch.from_numpy(inputs.labels).to(device)
        batches = [torch.from_numpy(indices).to(device) for indices in order]
        yield None
        for indices in batches:
            loss = cross_entropy(model(x[indices]), labels[indices])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach()

    return train


def native(sizes: tuple[int, ...]) -> torch.nn.Module:
    """The network of PyTorch's own layers."""
    layers: list[torch.nn.Module] = []
    for m, n in pairwise(sizes):
        layers += [torch.nn.Linear(m, n), torch.nn.Sigmoid()]
    return torch.nn.Sequential(*layers[:-1])
