# SPDX-License-Identifier: MIT
"""Everything is matmul: regression, convolution and attention as matrix products, and what each costs.

    python examples/everything_is_matmul.py --plots pictures

Regression: a = x·w, C = mean (a − y)² over n samples. ∂C/∂w = xᵀ·2(a − y)/n, and ∂C/∂b = Σ 2(a − y)/n, as a
bias is the weight of an input 1. A mean does not shrink with n: small batches make more steps, not smaller.

Convolution: an output is the dot product of a kernel and a window. With the windows written out as rows the
layer is a linear one. The price: an element is written once for every window that holds it.

Attention, softmax(q·kᵀ/√d)·v, with the same x for queries, keys and values: x·xᵀ says how alike rows are.
It is symmetric, so that half of it needs computing; each row becomes a mean of the rows like it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchpar import cli, matmul_t, report, training
from torchpar.data import Dataset, Samples, load
from torchpar.errors import ConfigError
from torchpar.nn import Linear, LinearSigmoid
from torchpar.parallel.world import World, alone


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Regression, convolution and attention by matrix products."""

    data: Path = Path(__file__).parent / "data"  # Folder of the data sets, as torchvision's root.
    dataset: Dataset = "mnist"  # What the convolutional network learns.
    samples: int | None = None  # Train it on so many samples only.
    epochs: int = 5  # Passes over the training samples.
    batch_size: int = 64  # Samples per step.
    lr: float = 0.3  # Learning rate at the start; it falls to 0 linearly.


def check(part: str, ours: Tensor, theirs: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Any]:
    """Refuse a float32 result twice as far from float64's as PyTorch's own, and a rounding."""
    exact = theirs(*(t.double() for t in inputs))
    error, native = ((result - exact).abs().max().item() for result in (ours, theirs(*inputs)))
    most = 2 * native + torch.finfo(ours.dtype).eps * exact.abs().max().item()
    print(f"{part}: errs by {error:.1e}, PyTorch by {native:.1e}")
    if not error <= most:
        raise ConfigError(f"{part} errs by {error:.1e}, expected {most:.1e} at most; mend its formula")
    return {"part": part, "error": error, "pytorch_error": native}


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


def regression(device: torch.device) -> dict[str, Any]:
    x, w = F.pad(torch.randn(1024, 7), (0, 1), value=1.0).to(device), torch.randn(8).to(device)
    y = x @ torch.arange(8.0).to(x) + 0.1 * torch.randn(1024).to(x)
    theirs = torch.func.grad(lambda x, y, w: F.mse_loss(x @ w, y), argnums=2)
    part = check("regression", mse_gradient(x, y, w), theirs, x, y, w)
    curves = {f"batch {n}, rate {lr}": descend(x, y, n, lr) for n in (1024, 64, 4) for lr in (0.01, 0.1)}
    print(*(f"  {name}: loss {c[-1]:.4f} at step {len(c)}" for name, c in curves.items()), sep="\n")
    return part | {"losses": curves}


def windows(x: Tensor, size: int, stride: int) -> Tensor:
    """Each window of x ``(b, h, w, in)`` as a row: a copy, ``(b, h', w', in·size²)``."""
    return x.unfold(1, size, stride).unfold(2, size, stride).flatten(3)


def convolution(device: torch.device) -> dict[str, Any]:
    x, layer = torch.rand(8, 16, 12, 12).to(device), LinearSigmoid(16 * 5**2, 32).to(device)
    rows = windows(x.movedim(1, 3), size=5, stride=2)
    y, kernels = layer(rows).movedim(3, 1), layer.weight.detach().unflatten(1, (16, 5, 5))
    part = check("convolution", y, lambda x: F.conv2d(x, kernels.to(x), stride=2).sigmoid(), x)
    print(f"  its rows take {rows.nbytes / x.nbytes:.1f} times the {x.nbytes:,} bytes of its input")
    return part | {"duplication": rows.nbytes / x.nbytes}


def attention_weights(x: Tensor) -> Tensor:
    """How much each row of x ``(*, n, d)`` attends to each: softmax(x·xᵀ/√d) ``(*, n, n)``."""
    return (matmul_t(x) / x.shape[-1] ** 0.5).softmax(-1)  # type: ignore[no-any-return]


def attention(samples: Samples) -> tuple[dict[str, Any], Tensor]:
    order = samples.labels[:100].argsort()
    x, labels = F.layer_norm(samples.inputs(order), (784,)), samples.labels[order]
    part = check("attention", attention_weights(x) @ x, lambda x: F.scaled_dot_product_attention(x, x, x), x)
    to_others = F.normalize(attention_weights(x).fill_diagonal_(0), p=1)
    to_class = to_others[labels == labels[:, None]].sum().item() / len(labels)
    print(f"  {to_class:.0%} of what a digit gives to others goes to its class")
    return part | {"to_own_class": to_class}, to_others


class ConvNet(torch.nn.Module):
    """28×28 → 12×12×16 → 4×4×32 → 10; what goes into a layer is centred, or it hardly learns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = LinearSigmoid(25, 16), LinearSigmoid(400, 32), Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(windows(F.layer_norm(x, (784,)).unflatten(1, (28, 28, 1)), size=5, stride=2))
        y = self.second(windows(y - 0.5, size=5, stride=2))
        return self.last((y - 0.5).flatten(1))  # type: ignore[no-any-return]


def train(flags: Flags, train_set: Samples, test_set: Samples, world: World) -> tuple[Tensor, list[Any]]:
    model = ConvNet().to(world.device)
    optimizer = training.sgd(model, flags.lr, momentum=0.9, weight_decay=3e-5)
    fit = partial(training.fit, model, optimizer, train_set, test_set, world, batch_size=flags.batch_size)
    with report.reporting(world, flags.epochs, len(train_set), metrics=None) as shown:
        results = fit(epochs=flags.epochs, seed=flags.seed, on_step=shown.step, on_epoch=shown.epoch)
    print(report.summary(results))
    return model.first.weight.unflatten(1, (5, 5)), [asdict(result) for result in results]


def main(flags: Flags) -> None:
    with alone(flags.device) as world:
        report.prepare_outputs(world, folders=[flags.plots], files=[flags.metrics])
        train_set, test_set = load(flags.dataset, flags.data, world)
        torch.manual_seed(flags.seed)
        parts = [regression(world.device), convolution(world.device)]
        attended, weights = attention(test_set)
        kernels, epochs = train(flags, train_set[: flags.samples], test_set, world)
    if flags.plots:
        from torchpar import plots

        plots.save_matrices(flags.plots / "kernels.png", kernels, "the first layer's kernels")
        plots.save_matrices(flags.plots / "attention.png", weights[None].sqrt(), "attention, by class (√)")
    if flags.metrics:
        report.write_metrics(flags.metrics, [*parts, attended, *epochs])


if __name__ == "__main__":
    cli.main(main, Flags)
