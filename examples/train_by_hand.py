# SPDX-License-Identifier: MIT
"""Layers by hand: each layer has a forward and a backward pass, and autograd has no part in it.

    python examples/train_by_hand.py                      learn the quadrants of the plane
    python examples/train_by_hand.py --dataset mnist      learn digits

A forward pass keeps what the backward pass needs. A backward pass takes G = ∂L/∂Y, the gradient of
the loss L with respect to the layer's output Y, and returns ∂L/∂X, which is the G of the layer
before.

    layer           forward                   backward
    Linear          Y = X·Wᵀ + b              ∂L/∂X = G·W,  ∂L/∂W = Gᵀ·X,  ∂L/∂b = Σ G over rows
    ReLU            Y = max(X, 0)             ∂L/∂X = G where Y > 0, else 0
    Sigmoid         Y = σ(X) = 1/(1 + e⁻ˣ)    ∂L/∂X = G ⊙ Y ⊙ (1 − Y)
    Tanh            Y = tanh(X)               ∂L/∂X = G ⊙ (1 − Y ⊙ Y)
    LinearSigmoid   Y = σ(X·Wᵀ + b)           that of Sigmoid, then that of Linear

A loss ends the network. It is a mean over n samples with targets t:

    BinaryCrossEntropy   L = −1/n · Σ (t·ln p + (1 − t)·ln(1 − p))   ∂L/∂p = (p − t)/(p·(1 − p))/n
    SoftmaxCrossEntropy  L = −1/n · Σ t·ln softmax(z)                ∂L/∂z = (softmax(z) − t)/n

Before it trains, the script compares each layer's gradients with (L(x + h) − L(x − h)) / 2h, in
float64. So it checks a formula that you have changed, and a layer that you have added to
`ACTIVATIONS`.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Literal

from support import checks, cli, console, report

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import torchpar
from torchpar.console import breaking_silence
from torchpar.data import Samples, batches, load
from torchpar.data.files import Dataset
from torchpar.errors import ConfigError, check_finite
from torchpar.parallel.launch.world import join_world
from torchpar.testing.operators.compare import farthest
from torchpar.training import EpochResult, Evaluation
from torchpar.training.profile.phases import Phases, phase

# The best h in float64: its error h² and its roundoff eps/h are alike, some 1e-11
# (docs/numerics.md).
H = torch.finfo(torch.float64).eps ** (1 / 3)
# Of a gradient, relative to its largest element; a wrong factor gives 0.1 or more.
LARGEST_ERROR = 1e-7
MARGIN = 0.02  # between points and the axes, of a square of side 2


class Error(float):
    """The error of a gradient, relative to its largest element.

    Attributes:
        where: the element, what it is, and what was expected.
    """

    where = ""


Errors = dict[str, Error]  # by the name of a tensor: "input", "weight", "bias"


class Layer(ABC):
    """A differentiable function of one tensor."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return Y, and keep what `backward` needs."""

    @abstractmethod
    def backward(self, g: Tensor) -> Tensor:
        """Return ∂L/∂X for g = ∂L/∂Y, and keep the gradients of the parameters."""

    def parameters(self) -> dict[str, Tensor]:
        """Return the tensors that are trained, by name."""
        return {}

    def gradients(self) -> dict[str, Tensor]:
        """Return ∂L/∂p for each parameter p, by its name, after a backward pass."""
        return {}


class Linear(Layer):
    """``x (n, in_features)`` → ``(n, out_features)``, with Xavier's uniform weights."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        bound = (6 / (in_features + out_features)) ** 0.5
        # Drawn on the CPU always.
        weight = torch.empty(out_features, in_features).uniform_(-bound, bound)
        self.weight = weight.to(device, dtype)
        self.bias = self.weight.new_zeros(out_features)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return torch.addmm(self.bias, x, self.weight.T)

    def backward(self, g: Tensor) -> Tensor:
        self.weight_gradient = g.T @ self.x
        self.bias_gradient = g.sum(0)
        return g @ self.weight

    def parameters(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias}

    def gradients(self) -> dict[str, Tensor]:
        return {"weight": self.weight_gradient, "bias": self.bias_gradient}


class ReLU(Layer):
    """The larger one of x and 0, by `torchpar.maximum`."""

    def forward(self, x: Tensor) -> Tensor:
        self.y = torchpar.maximum(x, x.new_zeros(()))
        return self.y

    def backward(self, g: Tensor) -> Tensor:
        return g * (self.y > 0)


class Sigmoid(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.y = x.sigmoid()
        return self.y

    def backward(self, g: Tensor) -> Tensor:
        return g * self.y * (1 - self.y)


class Tanh(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.y = x.tanh()
        return self.y

    def backward(self, g: Tensor) -> Tensor:
        return g * (1 - self.y * self.y)


class LinearSigmoid(Linear):
    """`Linear` and `Sigmoid` in one: `torchpar.linear_sigmoid` stores no Z on a GPU, only Y =
    σ(Z)."""

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        self.y = torchpar.linear_sigmoid(x, self.weight, self.bias)
        return self.y

    def backward(self, g: Tensor) -> Tensor:
        return super().backward(g * self.y * (1 - self.y))


class BinaryCrossEntropy:
    """The loss of probabilities ``p (n, 1)`` and labels 0 and 1, ``(n)``."""

    def forward(self, p: Tensor, labels: Tensor) -> Tensor:
        self.p, self.t = p, labels[:, None].to(p)
        # ln 0 is −∞. As in PyTorch, a logarithm is at least −100.
        log_p, log_q = p.log().clamp(min=-100), (1 - p).log().clamp(min=-100)
        return -(self.t * log_p + (1 - self.t) * log_q).sum() / len(p)

    def backward(self) -> Tensor:
        # In float32 p can be 0 or 1. Divide by no less than PyTorch does.
        return (self.p - self.t) / (self.p * (1 - self.p)).clamp(min=1e-12) / len(self.p)


class SoftmaxCrossEntropy:
    """The loss of logits ``z (n, classes)`` and labels ``(n)``."""

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        self.t = one_hot(labels, z.shape[1]).to(z)
        log_p = z.log_softmax(1)
        self.p = log_p.exp()
        return -(self.t * log_p).sum() / len(z)

    def backward(self) -> Tensor:
        return (self.p - self.t) / len(self.t)


Loss = BinaryCrossEntropy | SoftmaxCrossEntropy


class Network(Layer):
    """Layers, one after the other."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def add(self, layer: Layer) -> None:
        self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, g: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            g = layer.backward(g)
        return g

    def parameters(self) -> dict[str, Tensor]:
        return {
            f"{i}.{name}": p
            for i, layer in enumerate(self.layers)
            for name, p in layer.parameters().items()
        }

    def gradients(self) -> dict[str, Tensor]:
        return {
            f"{i}.{name}": g
            for i, layer in enumerate(self.layers)
            for name, g in layer.gradients().items()
        }

    def step(self, lr: float) -> None:
        """Make a step of gradient descent: p ← p − lr·∂L/∂p."""
        for p, g in zip(self.parameters().values(), self.gradients().values(), strict=True):
            p.sub_(g, alpha=lr)


# A layer of your own that you add here is checked, and can be chosen by --activation.
ACTIVATIONS: dict[str, type[Layer]] = {"relu": ReLU, "sigmoid": Sigmoid, "tanh": Tanh}


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Train a network whose gradients are computed by its layers, without autograd."""

    dataset: Dataset | Literal["quadrants"] = "quadrants"  # Points of the plane, or images.
    data: cli.DataFolder = cli.DATA  # Folder of the data sets, as torchvision's root.
    # Number of training samples; by default 4000 points, or all images.
    samples: cli.Count | None = None
    # Widths of the hidden layers; by default 30, for images 128.
    hidden: tuple[cli.Size, ...] | None = None
    # Function between the layers: relu, sigmoid, tanh, or one of your own.
    activation: str = "relu"
    fused: bool = False  # Compute a linear layer and its sigmoid by torchpar.linear_sigmoid.
    # Passes over the training samples; by default 60 over points, 5 over images.
    epochs: cli.Count | None = None
    batch_size: cli.Count = 64  # Samples per step.
    # Learning rate at the start; it falls linearly. By default 1, for images 0.4.
    lr: cli.Number | None = None
    report: cli.Report = None  # Folder for a page of the run, run.html.

    def check(self) -> None:
        super().check()
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            found = f"--activation is {self.activation!r}, expected one of {known}"
            raise ConfigError(f"{found}; take one, or add yours to ACTIVATIONS")
        if self.fused and self.activation != "sigmoid" and self.dataset != "quadrants":
            raise ConfigError(
                "--fused has no sigmoid to fuse, expected --activation sigmoid; add it"
            )


def build_network(
    sizes: Sequence[int],
    activation: str = "relu",
    output: str = "",
    fused: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """Return linear layers of these ``sizes``, with an activation after each.

    Args:
        activation: after each layer but the last, a key of `ACTIVATIONS`.
        output: after the last layer; "" for none.
        fused: make one `LinearSigmoid` of a linear layer and the sigmoid after it.
        device, dtype: of the weights.
    """
    network = Network()
    functions = [activation] * (len(sizes) - 2) + [output]
    for function, pair in zip(functions, pairwise(sizes), strict=True):
        if fused and function == "sigmoid":
            network.add(LinearSigmoid(*pair, device, dtype))
            continue
        network.add(Linear(*pair, device, dtype))
        if function:
            network.add(ACTIVATIONS[function]())
    return network


def difference_quotient(loss: Callable[[], Tensor], t: Tensor) -> Tensor:
    """Return (L(t + h) − L(t − h)) / 2h for each element of ``t``, which ``loss`` reads."""
    quotients = torch.empty_like(t)
    elements, results = t.view(-1), quotients.view(-1)
    for i in range(len(elements)):
        value = elements[i].clone()
        elements[i] = value + H
        above = loss()
        elements[i] = value - H
        results[i] = (above - loss()) / (2 * H)
        elements[i] = value
    return quotients


def compare_gradients(
    loss: Callable[[], Tensor], gradients: Sequence[tuple[str, Tensor, Tensor]], size: float = 0.0
) -> Errors:
    """Return the error of each gradient, relative to its largest element, by name.

    Args:
        gradients: of each tensor t that ``loss`` reads: its name, t, and ∂L/∂t by a formula.
        size: the sum of the magnitudes of the loss's terms. A gradient is 0 if it and its quotient
            are at most the roundoff eps/h of such a sum.
    """
    errors: Errors = {}
    roundoff = H**2 * size  # eps/h is H²
    for name, t, gradient in gradients:
        expected = difference_quotient(loss, t)
        if gradient.shape == expected.shape:
            relative = (gradient - expected).abs().max() / expected.abs().max()
            if max(gradient.abs().max(), expected.abs().max()) <= roundoff:
                relative = torch.zeros(())  # both are 0, to which no error is relative
            error = Error(relative.nan_to_num(torch.inf, torch.inf))  # NaN is in no order
            error.where = farthest(gradient, expected)
        else:
            error = Error(torch.inf)
            error.where = f"its shape is {tuple(gradient.shape)}, expected {tuple(expected.shape)}"
        errors[name] = max(error, errors.get(name, Error()))
    return errors


def gradients_of(layer: Layer) -> dict[str, Tensor]:
    """Return the gradients of a layer's parameters after a backward pass, by name.

    Raises:
        ConfigError: a reader's layer has another number of them, or one that is no tensor.
    """
    place = checks.place_of(layer.gradients)
    parameters: object = layer.parameters()
    gradients: object = layer.gradients()
    if not isinstance(parameters, Mapping):
        raise ConfigError(
            f"{checks.place_of(layer.parameters)} returns {checks.describe(parameters)}, expected "
            "a dictionary; return the parameters by name"
        )
    if not isinstance(gradients, Mapping) or [*gradients] != [*parameters]:
        by_name = isinstance(gradients, Mapping)
        found = f"those of {[*gradients]}" if by_name else checks.describe(gradients)  # type: ignore[misc]
        raise ConfigError(
            f"{place} returns {found}, expected those of the parameters {[*parameters]}; return "
            "the gradient of each by its name"
        )
    for name, gradient in gradients.items():
        if not isinstance(gradient, Tensor):
            shape = tuple(parameters[name].shape)
            raise ConfigError(
                f"{place} returns {checks.describe(gradient)} for {name!r}, expected a tensor of "
                f"shape {shape}; mend what backward keeps"
            )
    return dict(gradients)


def check_layer(layer: Layer, x: Tensor, *outputs: int) -> Errors:
    """Compare a layer's gradients, for the loss Σ G ⊙ Y with a random G.

    Args:
        outputs: the shape of Y.
    """
    y = checks.result_of(layer.forward, x, shape=outputs, dtype=x.dtype)
    g = torch.randn_like(y)
    size = (g * y).abs().sum().item()
    place = checks.place_of(layer.backward)
    with checks.unchanged(place, x, what="the input of its forward pass"):
        gradient = checks.result_of(layer.backward, g, shape=x.shape, dtype=x.dtype)
    found = gradients_of(layer)
    gradients = [
        ("input", x, gradient),
        *((name.rpartition(".")[2], p, found[name]) for name, p in layer.parameters().items()),
    ]
    return compare_gradients(lambda: (g * layer.forward(x)).sum(), gradients, size)


def check_loss(loss: Loss, x: Tensor, labels: Tensor) -> Errors:
    """Compare a loss's gradient with respect to the network's output ``x``."""
    checks.result_of(loss.forward, x, labels, shape=(), dtype=x.dtype)
    place = checks.place_of(loss.backward)
    with checks.unchanged(place, x, what="the input of its forward pass"):
        gradient = checks.result_of(loss.backward, shape=x.shape, dtype=x.dtype)
    return compare_gradients(lambda: loss.forward(x, labels), [("input", x, gradient)])


def make_activations() -> list[Layer]:
    """Return a layer of each kind in `ACTIVATIONS`.

    Raises:
        ConfigError: a reader's is no `Layer`, or lacks a pass.
    """
    for name, kind in ACTIVATIONS.items():
        if not (isinstance(kind, type) and issubclass(kind, Layer)):
            raise ConfigError(
                f"ACTIVATIONS[{name!r}] is {kind}, expected a class; derive one from Layer"
            )
        if missing := " and no ".join(sorted(kind.__abstractmethods__)):
            place = checks.place_of(kind)
            raise ConfigError(f"{place} has no {missing}, expected both passes; write it")
    return [kind() for kind in ACTIVATIONS.values()]


def check_gradients(device: torch.device) -> dict[str, Errors]:
    """Print the errors of all layers' gradients in float64, and return them.

    Raises:
        ConfigError: an error above `LARGEST_ERROR`.
    """
    dtype = torch.float64
    x, labels = torch.randn(6, 5).to(device, dtype), torch.tensor([0, 1, 1, 0, 1, 0], device=device)
    x += 0.1 * x.sign()  # ReLU has a kink at 0
    activations = make_activations()
    layers = [Linear(5, 4, device, dtype), *activations, LinearSigmoid(5, 4, device, dtype)]
    losses = (BinaryCrossEntropy(), x[:, :1].sigmoid()), (SoftmaxCrossEntropy(), x)
    network = build_network([5, 4, 3, 1], "tanh", "sigmoid", device=device, dtype=dtype)
    errors: dict[str, Errors] = {}
    count = len(layers) + len(losses)
    with breaking_silence(lambda: f"{len(errors)} of {count} layers and losses checked"):
        for layer in layers:
            columns = 4 if isinstance(layer, Linear) else 5
            errors[type(layer).__name__] = check_layer(layer, x, len(x), columns)
        for loss, outputs in losses:
            errors[type(loss).__name__] = check_loss(loss, outputs, labels)
        errors["a network of three layers"] = check_layer(network, x, len(x), 1)
    parts = ("input", "weight", "bias")
    rows = [
        {"layer": name} | {part: f"{found[part]:.1e}" if part in found else "" for part in parts}
        for name, found in errors.items()
    ]
    console.print_rows(rows, "relative errors of gradients, in float64")
    for name, found in errors.items():
        for part, error in found.items():
            if not error <= LARGEST_ERROR:
                raise ConfigError(
                    f"{name}: the gradient of its {part} is off by {error:.1e}, expected "
                    f"{LARGEST_ERROR:.0e} at most: {error.where}; mend its forward or its backward "
                    "pass"
                )
    return errors


def draw(n: int, seed: int, wrong: float = 0.0, device: torch.device | str = "cpu") -> Samples:
    """Return points of [−1, 1]² with the label x·y < 0, which is inverted for a share ``wrong`` of
    them.

    All points keep the distance `MARGIN` from the axes: labels of nearer points cannot be learned
    from a finite set.
    """
    generator = torch.Generator().manual_seed(seed % 2**64)
    signs = torch.randint(0, 2, (n, 2), generator=generator) * 2 - 1
    points = signs * (MARGIN + (1 - MARGIN) * torch.rand(n, 2, generator=generator))
    labels = (points.prod(1) < 0) ^ (torch.rand(n, generator=generator) < wrong)
    return Samples(points.to(device), labels.long().to(device), ("I, III", "II, IV"))


def load_samples(flags: Flags, device: torch.device) -> tuple[Samples, Samples]:
    """Return the training and test samples."""
    if flags.dataset == "quadrants":
        count = flags.samples or 4000
        train, test = (
            draw(n, 2 * flags.seed + i, device=device) for i, n in enumerate((count, 2500))
        )
    else:
        train, test = load(flags.dataset, flags.data, device)
        cli.check_samples(flags.samples, len(train))
    return train[: flags.samples], test


def evaluate(network: Network, loss: Loss, test: Samples) -> Evaluation:
    outputs = network.forward(test.inputs(slice(None)))
    predicted = outputs.argmax(1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0.5).long()
    accuracy = (predicted == test.labels).double().mean().item()
    return Evaluation(loss.forward(outputs, test.labels).item(), accuracy, outputs)


def train(
    network: Network,
    loss: Loss,
    flags: Flags,
    samples: Samples,
    test: Samples,
    phases: Phases,
) -> list[EpochResult]:
    """Train by gradient descent, and return the figures of each epoch.

    Args:
        phases: measures the steps.

    Raises:
        DivergedError: a training or a test loss that is not finite.
    """
    of_points = flags.dataset == "quadrants"
    epochs = flags.epochs or (60 if of_points else 5)
    first_lr = (1.0 if of_points else 0.4) if flags.lr is None else flags.lr
    results: list[EpochResult] = []
    with breaking_silence(lambda: f"{len(results)} of {epochs} epochs"):
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            lr = first_lr * (1 - (epoch - 1) / epochs)
            total = torch.zeros((), dtype=torch.float64, device=samples.labels.device)
            drawn = batches(samples, flags.batch_size, seed=flags.seed, epoch=epoch)
            for x, labels, n in phases.steps(drawn):
                total += n * loss.forward(network.forward(x), labels)
                with phase("backward"):
                    network.backward(loss.backward())
                network.step(lr)
            train_loss = total.item() / len(samples)
            check_finite(f"the training loss of epoch {epoch}", train_loss)
            speed = len(samples) / (time.perf_counter() - start)
            test_loss, accuracy, _ = evaluate(network, loss, test)
            check_finite(f"the test loss after epoch {epoch}", test_loss)
            seconds = time.perf_counter() - start
            figures = (epoch, train_loss, test_loss, accuracy, speed, seconds)
            results.append(EpochResult(*figures, ranks=1, device=total.device.type))
            if epoch % -(-epochs // 10) == 0:
                print(console.epoch_line(results[-1], epochs))
    return results


def main(flags: Flags) -> None:
    with join_world(flags.device, alone=True) as world:
        torch.manual_seed(flags.seed)
        errors = check_gradients(world.device)
        samples, test = load_samples(flags, world.device)
        of_points = flags.dataset == "quadrants"
        hidden = ((30,) if of_points else (128,)) if flags.hidden is None else flags.hidden
        sizes = [
            samples.inputs(slice(0, 1)).shape[1],
            *hidden,
            1 if of_points else len(test.classes),
        ]
        cli.check_memory(sizes)
        cli.take_threads(world.device.type, cli.largest_product(sizes, flags.batch_size))
        output = "sigmoid" if of_points else ""
        network = build_network(sizes, flags.activation, output, flags.fused, device=world.device)
        loss = BinaryCrossEntropy() if of_points else SoftmaxCrossEntropy()
        print(" → ".join(type(layer).__name__ for layer in (*network.layers, loss)))
        with Phases(world.device) as phases:
            results = train(network, loss, flags, samples, test, phases)
        if flags.report:
            weights = sum(p.nbytes for p in network.parameters().values())
            memory = {"weights": weights, "gradients": weights}
            outputs = network.forward(test.inputs(slice(None)))
            if of_points:  # one output, the probability of label 1
                outputs = torch.hstack([1 - outputs, outputs])
            page = {"": report.as_run(results, [phases.record(0, memory)])}
            report.write(flags.report, page, outputs, test)
    console.write_metrics(flags.metrics, [errors, *map(asdict, results)])
    print(console.summary(results))


if __name__ == "__main__":
    cli.main(main, Flags)
