# SPDX-License-Identifier: MIT
"""Convolution as a matrix product, and a convolutional network built of linear layers.

    python examples/matmul_convolution.py --plots pictures

An output of a convolution is the dot product of a kernel and a window of the input. Write each
window as a row: then the convolution is the product of the rows and the kernels, a linear layer.
The price is memory. An element of the input is written once for every window that contains it. A
table shows what that costs beside `torch.nn.functional.conv2d`: the median time of calls in turn,
and the most bytes that a call allocates.
"""

from dataclasses import asdict, dataclass
from functools import partial

from support import checks, cli, console, measure, plots

import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, layer_norm, linear
from torch.optim.lr_scheduler import LambdaLR

from torchpar.console import breaking_silence
from torchpar.data import load
from torchpar.nn import Linear, LinearSigmoid
from torchpar.parallel.launch.world import join_world
from torchpar.training import Classification, Run, sgd


@dataclass(kw_only=True)
class Flags(cli.DataFlags):
    """Train a convolutional network that consists of linear layers."""

    samples: cli.Count | None = None  # Number of training samples, the first ones; by default all.
    plots: cli.Plots = None  # Folder for pictures.
    epochs: cli.Count = 5  # Passes over the training samples.
    batch_size: cli.Count = 64  # Samples per step.
    lr: cli.Number = 0.3  # Learning rate at the start; it falls to 0 linearly.


def windows(x: Tensor, size: int, stride: int) -> Tensor:
    """Return each window of x ``(b, h, w, in)`` as a row: a copy, ``(b, h', w', in·size²)``."""
    return x.unfold(1, size, stride).unfold(2, size, stride).flatten(3)


def convolution(x: Tensor, kernels: Tensor) -> Tensor:
    """Return the convolution of x ``(b, in, h, w)`` and ``kernels (out, in, 5, 5)``,
    ``(b, out, h', w')``."""
    rows = windows(x.movedim(1, 3), size=5, stride=2)
    return linear(rows, kernels.flatten(1)).movedim(3, 1)


def compare_with_conv2d(device: torch.device) -> list[console.Row]:
    """Compare `convolution`, its gradients, and a linear layer of windows with PyTorch's
    convolution; return the errors."""
    x = torch.rand(8, 16, 12, 12).to(device)
    layer = LinearSigmoid(16 * 5**2, 32).to(device)
    rows = checks.result_of(windows, x.movedim(1, 3), size=5, stride=2, shape=(8, 4, 4, 16 * 5**2))
    y = layer(rows).movedim(3, 1)
    kernels = layer.weight.detach().unflatten(1, (16, 5, 5))
    reference = partial(conv2d, stride=2)
    inputs = {"x": x, "kernels": kernels}
    terms = rows.shape[-1]
    mine = checks.result_of(convolution, x, kernels, shape=y.shape)
    row = checks.compare("convolution", mine, reference, *inputs.values(), terms=terms)
    layer_row = checks.compare(
        "linear layer of windows",
        y,
        lambda x: reference(x, kernels.to(x)).sigmoid(),
        x,
        terms=terms,
    )
    gradients = checks.compare_gradients(
        "convolution", convolution, reference, inputs, terms=len(rows) * 32
    )
    print(f"the rows take {rows.nbytes / x.nbytes:.1f} times the {x.nbytes:,} bytes of the input")
    return [row | {"duplication": rows.nbytes / x.nbytes}, layer_row, *gradients]


def compare_costs(device: torch.device, batch_size: int = 64) -> list[console.Row]:
    """Print the time and the memory of each layer of `ConvNet` by windows and by conv2d, without
    gradient."""
    rows: list[console.Row] = []
    for layer, channels, side, out in (("first", 1, 28, 16), ("second", 16, 12, 32)):
        x = torch.ones(batch_size, channels, side, side, device=device)
        kernels = torch.ones(out, channels, 5, 5, device=device)
        ways = {
            "windows": partial(convolution, x, kernels),
            "conv2d": partial(conv2d, x, kernels, stride=2),
        }
        ms = measure.interleaved_ms(ways, device)
        for way, function in ways.items():
            row = {"layer": layer, "way": way, "ms": ms[way], "input_bytes": x.nbytes}
            rows.append(row | {"allocated_bytes": measure.peak_bytes(function, device)})
    shown = [{key: f"{v:,}" if "bytes" in key else v for key, v in row.items()} for row in rows]
    console.print_rows(shown, f"a convolution of {batch_size} inputs")
    return rows


class ConvNet(torch.nn.Module):
    """A network of two convolutions and a linear layer: 28×28 → 12×12×16 → 4×4×32 → 10.

    The input of each layer is centered: with sigmoids that are all positive it learns slowly.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = LinearSigmoid(5 * 5, 16)
        self.second = LinearSigmoid(5 * 5 * 16, 32)
        self.last = Linear(4 * 4 * 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = layer_norm(x, (784,)).unflatten(1, (28, 28, 1))
        y = self.first(windows(y, size=5, stride=2)) - 0.5
        y = self.second(windows(y, size=5, stride=2)) - 0.5
        return self.last(y.flatten(1))  # type: ignore[no-any-return]


def main(flags: Flags) -> None:
    with join_world(flags.device, alone=True) as world:
        train, test = load(flags.dataset, flags.data, world.device)
        cli.check_samples(flags.samples, len(train))
        train = train[: flags.samples]
        # In a step the second layer has the larger product.
        cli.take_threads(world.device.type, flags.batch_size * 4 * 4 * 5 * 5 * 16 * 32)
        torch.manual_seed(flags.seed)
        errors = compare_with_conv2d(world.device)
        with breaking_silence(lambda: "still timing windows and conv2d"):
            costs = compare_costs(world.device)

        model = ConvNet().to(world.device)
        optimizer = sgd(model, flags.lr, momentum=0.9, weight_decay=3e-5)
        steps = -(-len(train) // flags.batch_size)
        scheduler = LambdaLR(optimizer, lambda step: 1 - step / (flags.epochs * steps))
        task = Classification(train, test, flags.batch_size, seed=flags.seed)
        with Run(model, optimizer, scheduler, world, task, epochs=flags.epochs) as run:
            for epoch in run.epochs():
                what = f"steps of epoch {epoch}"
                for x, labels, batch_size in console.progress(
                    run.batches(epoch), what, total=steps
                ):
                    loss = cross_entropy(model(x), labels, reduction="sum")
                    (loss / batch_size).backward()
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                    run.end_step(loss_sum=loss)
                run.end_epoch()
    epochs = [asdict(result) for result in run.results]
    console.print_rows(
        epochs, columns=("epoch", "train_loss", "test_loss", "test_accuracy", "seconds")
    )
    if flags.plots:
        kernels = model.first.weight.unflatten(1, (5, 5))
        plots.save_matrices(flags.plots / "kernels.png", kernels, "Kernels of the first layer")
    console.write_metrics(flags.metrics, [*errors, *costs, *epochs])
    print(console.summary(run.results))


if __name__ == "__main__":
    cli.main(main, Flags)
