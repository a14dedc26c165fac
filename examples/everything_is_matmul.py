# SPDX-License-Identifier: MIT
"""Everything is matmul: regression, convolution and attention as matrix products, and what each costs.

Regression: a = x·w, C = mean (a − y)² over n samples. Each adds its ∂C/∂a = 2(a − y)/n times its x, and the
sum is a product: ∂C/∂w = xᵀ·2(a − y)/n. A bias is the weight of an input that is always 1: ∂C/∂b =
Σ 2(a − y)/n. A mean does not shrink with n: small batches make more steps, not smaller ones.

Convolution: an output is the dot product of a kernel and a window. With the windows written out as rows the
layer is a linear one. The price: an element is written once for every window that holds it.

Attention, softmax(q·kᵀ/√d)·v, with the same x for queries, keys and values: x·xᵀ says how alike rows are.
It is symmetric, so that half of it needs computing; each row becomes a mean of the rows like it.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Conv2d, Module
from torch.nn import functional as F

from torchpar import cli, linear_sigmoid, matmul_t, report, training
from torchpar.data import Dataset, load
from torchpar.errors import ConfigError
from torchpar.nn import Linear
from torchpar.parallel.world import join_world


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Regression, convolution and attention by matrix products."""

    data: Path = Path(__file__).parent / "data"  # Folder of the data sets, as torchvision's root.
    dataset: Dataset = "mnist"  # What the convolutional network learns.
    samples: int | None = None  # Train it on so many samples only.
    epochs: int = 5  # Passes over the training samples.
    batch_size: int = 64  # Samples per step.
    lr: float = 0.3  # Learning rate at the start; it falls to 0 linearly.


def mse_gradient(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """∂C/∂w ``(d)`` for x ``(n, d)``, y ``(n)`` and w ``(d)``."""
    return x.T @ (2 * (x @ w - y) / len(y))


def descend(x: Tensor, y: Tensor, batch_size: int, lr: float) -> list[float]:
    """The loss over all samples after each step of one pass from w = 0."""
    w, losses = x.new_zeros(x.shape[1]), []
    for batch in zip(x.split(batch_size), y.split(batch_size), strict=True):
        w -= lr * mse_gradient(*batch, w)
        losses.append(F.mse_loss(x @ w, y).item())
    return losses


class ConvSigmoid(Conv2d):
    """σ(conv2d(x)) by one product, x ``(b, in, h, w)`` → ``(b, out, h', w')``; without padding."""

    def forward(self, x: Tensor) -> Tensor:
        (height, width), (down, right) = self.kernel_size, self.stride
        windows = x.unfold(2, height, down).unfold(3, width, right)
        columns = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)  # a copy, (b, h', w', in·k²)
        return linear_sigmoid(columns, self.weight.flatten(1), self.bias).movedim(-1, 1)


class ConvNet(Module):
    """28×28 → 16 × 12×12 → 32 × 4×4 → 10; what goes into a layer is centred, or it hardly learns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvSigmoid(1, 16, 5, stride=2), ConvSigmoid(16, 32, 5, stride=2)
        self.last = Linear(32 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first((x.unflatten(1, (1, 28, 28)) - 0.13) / 0.31)  # MNIST's mean and deviation
        return self.last((self.second(y - 0.5) - 0.5).flatten(1))  # type: ignore[no-any-return]


def attention_weights(x: Tensor) -> Tensor:
    """How much each row of x ``(*, n, d)`` attends to each: softmax(x·xᵀ/√d) ``(*, n, n)``."""
    return (matmul_t(x) / x.shape[-1] ** 0.5).softmax(-1)  # type: ignore[no-any-return]


def check(part: str, ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    """Assert that a result and its gradients are PyTorch's, in float64 but for rounding."""
    results = [(y, *torch.autograd.grad(y.cos().sum(), leaves)) for y in (ours, theirs)]
    torch.testing.assert_close(*results)
    difference = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
    print(f"{part}: result and gradients are PyTorch's, within {difference:.0e}")


def save_picture(folder: Path, curves: dict[str, list[float]], kernels: Tensor, weights: Tensor) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, losses in curves.items():
        left.loglog(range(1, len(losses) + 1), losses, marker=".", label=name)
    left.legend()
    left.set(xlabel="step", ylabel="mean squared error", title="Regression: one pass over 1024 samples")
    middle.imshow(F.pad(kernels.view(4, 4, 5, 5), (0, 1, 0, 1)).permute(0, 2, 1, 3).reshape(24, 24).numpy())
    middle.set(xlabel="pixel", ylabel="pixel", title="The first layer's 16 kernels")
    right.imshow(weights.sqrt().numpy())
    right.set(xlabel="digit attended to", ylabel="digit", title="Attention to other digits, square root")
    figure.savefig(folder / "everything_is_matmul.png", dpi=120)


def main(flags: Flags) -> None:
    with join_world(flags.device) as world:
        if world.world_size > 1:
            raise ConfigError(f"{world.world_size} ranks were started, expected one; run it without torchrun")
        train_set, test_set = load(flags.dataset, flags.data, world)
        train_set = train_set[: flags.samples]
        report.prepare_outputs(world, folders=[flags.plots], files=[flags.metrics])
        torch.manual_seed(flags.seed)

        x = F.pad(torch.randn(1024, 7), (0, 1), value=1.0).double()
        w = torch.randn(8).double().requires_grad_()
        y = x @ torch.arange(8.0).double() + 0.1 * torch.randn(1024)
        (derivative,) = torch.autograd.grad(F.mse_loss(x @ w, y), w, create_graph=True)
        check("regression", mse_gradient(x, y, w), derivative, w)
        curves = {f"batch {n}, rate {lr}": descend(x, y, n, lr) for n in (1024, 64, 4) for lr in (0.01, 0.1)}
        for name, losses in curves.items():
            print(f"  {name}: loss {losses[-1]:.4f} at step {len(losses)}")
        conv = ConvSigmoid(16, 32, 5, stride=2).double()
        x = torch.rand(8, 16, 12, 12).double().requires_grad_()
        check("convolution", conv(x), Conv2d.forward(conv, x).sigmoid(), x, *conv.parameters())
        copies = conv(x)[:, 0].numel() * conv.weight[0].numel() / x.numel()
        print(f"  its rows take {copies:.1f} times the {x.nbytes:,} bytes of its input")
        digits = torch.cat([(test_set.labels == label).nonzero()[:10, 0] for label in range(10)])
        x = (test_set.inputs(digits).double() - 0.13).div(0.31).requires_grad_()
        weights = attention_weights(x)
        check("attention", weights @ x, F.scaled_dot_product_attention(x, x, x), x)
        others = F.normalize(weights.detach().fill_diagonal_(0), p=1)
        alike = test_set.labels[digits] == test_set.labels[digits, None]
        print(f"  {others[alike].sum() / len(digits):.0%} of what a digit gives to others goes to its class")

        model = ConvNet().to(world.device)
        optimizer = training.sgd(model, flags.lr, momentum=0.9, weight_decay=3e-5)
        fit = partial(training.fit, model, optimizer, train_set, test_set, world, batch_size=flags.batch_size)
        with report.reporting(world, flags.epochs, len(train_set), flags.metrics) as shown:
            results = fit(epochs=flags.epochs, seed=flags.seed, on_step=shown.step, on_epoch=shown.epoch)
        if flags.plots:
            save_picture(flags.plots, curves, model.first.weight.detach().cpu(), others.cpu())
        print(report.summary(results))


if __name__ == "__main__":
    cli.main(main, Flags)
