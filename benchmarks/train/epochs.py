# SPDX-License-Identifier: MIT
"""Ways to train: each prepares, yields None, then trains on batches and yields the mean loss of each."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.digits import Digits
from benchmarks.timing import CPU
from benchmarks.train.inputs import LR, TrainingInputs
from torchpar.baselines import numba_njit, numpy_mlp, pure_python
from torchpar.baselines.bridge import copy_weights
from torchpar.baselines.numpy_mlp import Array
from torchpar.nn import MLP
from torchpar.parallel.launch.world import World
from torchpar.training import Run, sgd
from torchpar.training.fused import FusedGradients
from torchpar.training.graph import GraphedStep

Order = Sequence[Array]  # the indices of each batch
Train = Callable[[TrainingInputs, Order], Iterator[Any]]


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

    def train(inputs: TrainingInputs, order: Order) -> Iterator[Tensor | None]:
        step = torch_step(inputs, model.to(device))
        batches = [torch.from_numpy(indices).to(device) for indices in order]
        yield None
        yield from map(step, batches)

    return train


def torch_step(inputs: TrainingInputs, model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """A step of ``model`` from the first weights on, on the digits at given indices; returns the loss."""
    copy_weights(inputs.start, model)
    optimizer, parameter = torch.optim.SGD(model.parameters(), lr=LR), next(model.parameters())
    x = torch.from_numpy(inputs.x).to(parameter.device, parameter.dtype)
    labels = torch.from_numpy(inputs.labels).to(parameter.device)

    def step(indices: Tensor) -> Tensor:
        loss = cross_entropy(model(x[indices]), labels[indices])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def customary_epoch(inputs: TrainingInputs, order: Order) -> Iterator[Tensor | None]:
    model = native(inputs.training.sizes)
    copy_weights(inputs.start, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loader = DataLoader(Digits(inputs.train), batch_sampler=[indices.tolist() for indices in order])
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
