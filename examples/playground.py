# SPDX-License-Identifier: MIT
"""Four sets of points and seven features of TensorFlow's playground, with noise and a penalty λ.

    python examples/playground.py
    python examples/playground.py --points spiral --hidden 32 32 --epochs 300 --plots pictures
    python examples/playground.py --points circle --features x1^2 x2^2 --noise 0.3 --penalty 0.003
    python examples/playground.py --points circle --activation tanh --hidden 4 2 --lr 0.03 \
        --epochs 300 --plots pictures

A network without a hidden layer draws a line through its features. It learns circles by the squares
of the coordinates, and quadrants by their product. A network with hidden layers finds features by
itself from the coordinates alone. The spiral needs both, or wider layers and more epochs.

The losses are binary cross-entropies. The playground's own is ½·(o − t)² of an output o in [−1, 1]
and a label t of ±1. With the probability p of label 1, o is 2p − 1; the column "test squared" has
that. --plots also draws what each neuron computes over the plane, of the networks with hidden
layers.

The playground's plane is [−6, 6]², here [−1, 1]², so that its sin(x) is sin(6·x). Its noise is a
share of 0 to 0.5. Gaussians become wider by it, points of a spiral are moved, and those of circles
and quadrants get the label of a point near them. Test points have the same noise.
(D. Smilkov and others, "Direct-manipulation visualization of deep networks", 2017.)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import pi
from typing import TYPE_CHECKING, Annotated, Literal

from support import cli, console, plots

import torch
from quadrants import evaluate, train
from torch import Tensor

from torchpar.data import Samples
from torchpar.errors import check_finite
from torchpar.nn import MLP
from torchpar.parallel.launch.world import join_world
from torchpar.training import sgd

BATCH_SIZE = 10
SIDE = 6.0  # of the playground's plane, from its middle
RADIUS = 5.0
Points = Literal["quadrants", "circle", "gauss", "spiral"]  # a set that you add to `draw`, too

FEATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x1": lambda x1, x2: x1,
    "x2": lambda x1, x2: x2,
    "x1^2": lambda x1, x2: x1 * x1,
    "x2^2": lambda x1, x2: x2 * x2,
    "x1x2": lambda x1, x2: x1 * x2,
    "sin1": lambda x1, x2: (SIDE * x1).sin(),
    "sin2": lambda x1, x2: (SIDE * x2).sin(),
}
if TYPE_CHECKING:
    Feature = str
else:
    Feature = Literal[tuple(FEATURES)]  # what --features takes, with those that you add
COORDINATES: tuple[Feature, ...] = ("x1", "x2")
Neurons = dict[str, Callable[[Tensor], Tensor]]  # as `plots.save_neurons` has it
Panels = dict[str, tuple[Samples, Callable[[Tensor], Tensor]]]  # as `plots.save_boundaries` has it


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Learn points of the plane by features and by hidden layers."""

    points: Annotated[tuple[Points, ...], cli.Filled()] = (
        "quadrants",
        "circle",
        "gauss",
        "spiral",
    )  # Sets of points.
    # Features that the coordinates are compared with.
    features: Annotated[tuple[Feature, ...], cli.Filled()] = tuple(FEATURES)
    hidden: cli.Sizes = (8, 8)  # Widths of the hidden layers.
    activation: Literal["relu", "tanh"] = "relu"  # Activation of the hidden layers.
    noise: Annotated[float, cli.Bounds(0, 0.5000001)] = 0.0  # Noise of the points, 0 to 0.5.
    penalty: cli.Number = 0.0  # λ of the weights.
    samples: Annotated[int, cli.Bounds(2, 2**31)] = 250  # Points to learn, and as many for tests.
    epochs: cli.Count = 60  # Passes over the points.
    lr: cli.Number = 0.05  # Learning rate at the start; it falls linearly.
    plots: cli.Plots = None  # Folder for pictures.


def draw(
    kind: Points, n: int, seed: int, noise: float = 0.0, device: torch.device | str = "cpu"
) -> Samples:
    """Return points of the plane, and labels 0 and 1."""
    generator = torch.Generator().manual_seed(seed % 2**64)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    labels = torch.arange(n) % 2
    if kind == "quadrants":
        x = uniform(-5, 5, n, 2)
        x += 0.3 * x.sign()  # a gap beside the axes
        labels = ((x + noise * uniform(-5, 5, n, 2)).prod(1) < 0).long()
    elif kind == "circle":
        near, far = uniform(0, 0.5 * RADIUS, n), uniform(0.7 * RADIUS, RADIUS, n)
        x = torch.where(labels == 1, near, far)[:, None] * on_circle(uniform(0, 2 * pi, n))
        moved = x + noise * uniform(-RADIUS, RADIUS, n, 2)
        labels = (moved.norm(dim=1) < 0.5 * RADIUS).long()
    elif kind == "gauss":
        variance = 0.5 + 7 * noise  # 0.5 to 4
        middle = 2.0 * (2 * labels - 1)[:, None]
        x = middle + variance**0.5 * torch.randn(n, 2, generator=generator)
    else:
        along = torch.arange(n) // 2 / (n / 2)  # of each arm, 0 to 1
        angle = 1.75 * 2 * pi * along + pi * labels
        x = RADIUS * along[:, None] * on_circle(angle) + noise * uniform(-1, 1, n, 2)
    return Samples((x / SIDE).to(device), labels.to(device), ("0", "1"))


def on_circle(angle: Tensor) -> Tensor:
    return torch.stack([angle.sin(), angle.cos()], 1)


def with_features(x: Tensor, features: tuple[Feature, ...]) -> Tensor:
    """Return the features ``(n, features)`` of points ``x (n, 2)``."""
    return torch.stack([FEATURES[name](*x.T) for name in features], 1)


def named(features: tuple[Feature, ...]) -> str:
    """Return the names of up to three features, or how many there are."""
    return " ".join(features) if len(features) <= 3 else str(len(features))


def learn(
    kind: Points,
    features: tuple[Feature, ...],
    hidden: tuple[int, ...],
    flags: Flags,
    device: torch.device,
) -> tuple[console.Row, Samples, Callable[[Tensor], Tensor], Neurons]:
    """Train a network, and return its figures, its points, its probability of label 1, and what
    the neurons of each layer compute."""
    both = draw(kind, 2 * flags.samples, flags.seed, flags.noise, device)
    # As in the playground, any half of the points is for tests: without noise a spiral is always
    # the same.
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(flags.seed % 2**64))
    points, test = (
        Samples(both.features[half], both.labels[half], both.classes)
        for half in order.to(device).chunk(2)
    )
    inputs, of_test = (
        Samples(with_features(one.features, features), one.labels, one.classes)
        for one in (points, test)
    )
    torch.manual_seed(flags.seed)
    model = MLP([len(features), *hidden, 1], hidden=flags.activation, output="sigmoid").to(device)
    optimizer = sgd(model, lr=flags.lr, momentum=0.9, weight_decay=flags.penalty)
    train(model, optimizer, inputs, flags.epochs, batch_size=BATCH_SIZE, seed=flags.seed)
    (train_loss, _), (test_loss, accuracy) = evaluate(model, inputs), evaluate(model, of_test)
    check_finite("a loss", train_loss, test_loss)

    @torch.no_grad()
    def probability(x: Tensor) -> Tensor:
        return model(with_features(x.to(device), features)).squeeze(1).cpu()  # type: ignore[no-any-return]

    def neurons_of(depth: int) -> Callable[[Tensor], Tensor]:
        @torch.no_grad()
        def values(x: Tensor) -> Tensor:
            z: Tensor = model.layers[:depth](with_features(x.to(device), features))
            return (2 * z - 1 if depth > len(hidden) else z).cpu()

        return values

    layers = [f"hidden layer {i}" for i in range(1, len(hidden) + 1)]
    names = ["features", *layers, "output, 2p − 1"]
    squared = 2 * (probability(test.features) - test.labels.cpu()) ** 2
    row = {"points": kind, "features": named(features), "hidden": " ".join(map(str, hidden)) or "-"}
    figures = {"train_loss": train_loss, "test_loss": test_loss}
    figures |= {"test_squared": squared.mean().item(), "test_accuracy": accuracy}
    return row | figures, points, probability, {n: neurons_of(i) for i, n in enumerate(names)}


def main(flags: Flags) -> None:
    start = time.perf_counter()
    rows: list[console.Row] = []
    pictures: dict[Points, Panels] = {kind: {} for kind in flags.points}
    ways = [*product(flags.points, ((), flags.hidden), (COORDINATES, flags.features))]
    with join_world(flags.device, alone=True) as world:
        sizes = [len(flags.features), *flags.hidden, 1]
        cli.take_threads(world.device.type, cli.largest_product(sizes, BATCH_SIZE))
        for kind, hidden, features in console.progress(ways, "networks"):
            row, points, probability, neurons = learn(kind, features, hidden, flags, world.device)
            rows.append(row)
            layers = " ".join(map(str, hidden)) or "none"
            title = f"features: {named(features)}\nhidden: {layers}"
            pictures[kind][title] = points, probability
            if flags.plots and hidden:
                by = "coordinates" if features == COORDINATES else "features"
                plots.save_neurons(flags.plots / f"playground-{kind}-neurons-{by}.png", neurons)
    if flags.plots:
        for kind, panels in pictures.items():
            plots.save_boundaries(flags.plots / f"playground-{kind}.png", panels)
    console.print_rows(rows, f"noise {flags.noise:g}, λ {flags.penalty:g}")
    console.write_metrics(flags.metrics, rows)
    last, seconds = rows[-1], time.perf_counter() - start
    accuracy, loss = float(str(last["test_accuracy"])), float(str(last["test_loss"]))
    print(console.last_line(accuracy, loss, seconds, ranks=1, device=world.device.type))


if __name__ == "__main__":
    cli.main(main, Flags)
