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
from torch.utils.data import DataLoader, Dataset

from benchmarks.ladder.rungs import Rung, plural
from benchmarks.timing import CPU, Turn, time_calls
from benchmarks.train import programs
from benchmarks.train.inputs import LR, TrainingInputs
from torchpar.baselines import numba_njit, numpy_mlp, pure_python
from torchpar.baselines.bridge import copy_weights
from torchpar.baselines.numpy_mlp import Array
from torchpar.nn import MLP
from torchpar.parallel.launch.local import Ranks
from torchpar.parallel.launch.world import World
from torchpar.training import Run, sgd
from torchpar.training.fused import FusedGradients
from torchpar.training.graph import GraphedStep

Order = Sequence[Array]  # the indices of each batch
Train = Callable[[TrainingInputs, Order], Iterator[Any]]
Advance = Callable[[int], tuple[float, Array]]  # train on so many batches: the seconds, and their losses

ROUNDS = 10  # turns of an epoch
PLAIN, FUSED = "plain eager", "torchpar"
SLOW = {"pure Python": 200, "customary script": 2000}  # digits, of which an epoch is extrapolated


def rungs(inputs: TrainingInputs, world: World, ranks: Ranks, compiled: bool = True) -> Iterator[Rung]:
    """All ways to train; without ``compiled`` less torch.compile."""
    sizes, batch_size = inputs.training[:2]

    def rung(name: str, train: Train, note: str = "", **options: Any) -> Rung:
        digits = SLOW.get(name, len(inputs.x))
        end = min(-(-digits // batch_size), len(inputs.order))
        part = end < len(inputs.order)
        note = f"from {end * batch_size:,} of {len(inputs.x):,} digits" if part else note
        turn = epoch_turn(inputs, local(inputs, train), 1 if part else 0, end)
        return Rung(name, turn, note, **options)

    yield from gpu_rungs(inputs, world, compiled)
    if inputs.training.dtype != torch.float32:
        return  # an epoch takes minutes on a CPU
    if len(sizes) == 3:  # a step of the others takes a minute
        yield rung("pure Python", pure_python_epoch)
    yield rung("customary script", customary_epoch, "DataLoader, transforms")
    yield rung("njit", partial(njit_epoch, threads=None), compiles=True)
    if torch.get_num_threads() > 1:
        threads = torch.get_num_threads()
        yield rung("njit, parallel", partial(njit_epoch, threads=threads), plural(threads, "thread"))
    yield rung("NumPy", numpy_epoch)
    if not programs.missing("MPI"):
        yield programs.mpi(inputs)
    if not programs.missing(programs.LIGHTNING):
        yield programs.lightning(inputs)
    yield rung(PLAIN, torch_epoch(native(sizes)), "nn.Sequential, SGD")
    if compiled:
        fast = native(sizes)
        fast.compile()
        yield rung("torch.compile", torch_epoch(fast), compiles=True)
    yield rung("torchpar, autograd", run_epoch(world, fused=False))
    yield rung(FUSED, run_epoch(world, fused=True), "gradients by formulas")
    ways = {"DDP": "DistributedDataParallel", "shared": "DistributedDataParallel, shared memory"}
    for way, note in {**ways, "fused": "gradients by formulas"}.items():
        turn = epoch_turn(inputs, partial(on_ranks, ranks, inputs, way))
        yield Rung(f"{FUSED}, 2 ranks", turn, note)


def gpu_rungs(inputs: TrainingInputs, world: World, compiled: bool) -> Iterator[Rung]:
    """The rungs of `benchmarks.train.gpu`, if there is a GPU."""
    if torch.cuda.is_available():
        from benchmarks.train import gpu

        for name, note, train, compiles in gpu.rungs(inputs, world, compiled):
            turn = epoch_turn(inputs, local(inputs, train))
            figures = partial(gpu.figures, inputs, train)
            yield Rung(name, turn, note, 1.0, compiles, torch.device("cuda"), figures=figures)


def epoch_turn(
    inputs: TrainingInputs, begin: Callable[[Order], Advance], chunk: int = 0, end: int = 0
) -> Turn:
    """The turns that make up an epoch: ``chunk`` batches each, up to batch ``end``; each loss is checked.

    The seconds are those of a step of a whole batch. The warm-up trains on a batch of either size, and
    begins anew.
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
        return [seconds * inputs.training.batch_size / sum(map(len, inputs.order[first:done]))]

    return turn


def local(inputs: TrainingInputs, train: Train) -> Callable[[Order], Advance]:
    threads = torch.get_num_threads()

    def begin(order: Order) -> Advance:
        advance = advance_by(train(inputs, order))

        def with_threads(batches: int) -> tuple[float, Array]:
            torch.set_num_threads(threads)  # Numba and Lightning set those of OpenMP
            return advance(batches)

        return with_threads

    return begin


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


def on_ranks(ranks: Ranks, inputs: TrainingInputs, way: str, order: Order) -> Advance:
    """Train by data parallelism, in the order of `torchpar.training.Run`; the ranks' losses add up."""
    from benchmarks.train import on_ranks as rank

    ranks.run(rank.begin, inputs.training, way)

    def advance(batches: int) -> tuple[float, Array]:
        seconds, losses = zip(*ranks.run(rank.advance, way, batches), strict=True)
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
        x = torch.from_numpy(inputs.x).to(device, next(model.parameters()).dtype)
        labels = torch.from_numpy(inputs.labels).to(device)
        batches = [torch.from_numpy(indices).to(device) for indices in order]
        yield None
        for indices in batches:
            loss = cross_entropy(model(x[indices]), labels[indices])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach()

    return train


class Digits(Dataset[tuple[Tensor, int]]):
    """Each digit as `torchvision.datasets.MNIST` returns it, through an image and ``ToTensor``."""

    def __init__(self, inputs: TrainingInputs):
        from torchvision.transforms import ToTensor

        self.transform = ToTensor()
        self.images, self.labels = inputs.train.features, inputs.train.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index].numpy())), int(self.labels[index])


def customary_epoch(inputs: TrainingInputs, order: Order) -> Iterator[Tensor | None]:
    model = native(inputs.training.sizes)
    copy_weights(inputs.start, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loader = DataLoader(Digits(inputs), batch_sampler=[indices.tolist() for indices in order])
    yield None
    for images, labels in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(images.flatten(1)), labels)
        loss.backward()
        optimizer.step()
        yield loss.detach()


def run_epoch(world: World, fused: bool, graph: bool = False) -> Train:
    """The loop of the lessons. It has an order of its own, that of `TrainingInputs.order`."""

    def train(inputs: TrainingInputs, order: Order) -> Iterator[Any]:
        sizes, batch_size = inputs.training[:2]
        model = MLP(sizes).to(world.device, inputs.training.dtype)
        copy_weights(inputs.start, model)
        optimizer = sgd(model, LR, momentum=0, weight_decay=0)
        gradients = FusedGradients(model)

        def step(x: Tensor, labels: Tensor, size: int) -> Tensor:
            if fused:
                loss = gradients(x, labels, size)
            else:
                loss = cross_entropy(model(x), labels, reduction="sum")
                (loss / size).backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        samples, test = inputs.train.to(world.device), inputs.test[:10].to(world.device)
        graphed = GraphedStep(step, samples, optimizer) if graph else None
        yield None
        parts = (model, optimizer, None, world, samples, test)
        predict = partial(evaluated, model, inputs.training.dtype)
        with Run(*parts, epochs=1, batch_size=batch_size, predict=predict) as run:
            for epoch in run.epochs():
                for batch in run.indices(epoch) if graphed else run.batches(epoch):
                    loss = graphed(*batch) if graphed else step(*batch)
                    run.log(loss)
                    yield (loss.item() if loss.is_cpu else loss) / batch[-1]

    return train


def evaluated(model: torch.nn.Module, dtype: torch.dtype, x: Tensor) -> Tensor:
    return model(x.to(dtype))  # type: ignore[no-any-return]


def native(sizes: tuple[int, ...]) -> torch.nn.Module:
    """The network of PyTorch's own layers."""
    layers: list[torch.nn.Module] = []
    for m, n in pairwise(sizes):
        layers += [torch.nn.Linear(m, n), torch.nn.Sigmoid()]
    return torch.nn.Sequential(*layers[:-1])
