# SPDX-License-Identifier: MIT
"""Linear regression as matrix products, and the effect of learning rate and batch size.

    python examples/matmul_regression.py --plots pictures

The model is a = x·w for n samples ``x (n, d)`` and weights ``w (d)``. A bias is the weight of an input that
is always 1. The cost is the mean squared error against the targets ``y (n)``:

    C = 1/n · Σ (a − y)²        ∂C/∂a = 2(a − y)/n        ∂C/∂w = xᵀ·∂C/∂a

Both the forward and the backward pass are matrix products. The gradient of a small batch is a mean as well:
it is noisier than that of all samples, but not smaller. So in one pass over the samples small batches make
more steps, and the cost falls further.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from support import cli, console, plots
from torch import Tensor
from torch.nn.functional import mse_loss, pad

from torchpar.errors import ConfigError
from torchpar.parallel.launch.world import join_world


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Fit a linear model by gradient descent."""

    lr: tuple[float, ...] = (0.01, 0.1)  # Learning rates to compare.
    batch_size: tuple[int, ...] = (1024, 64, 4)  # Batch sizes to compare, of 1024 samples.
    plots: Path | None = None  # Folder for pictures.

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.lr and self.batch_size):
            raise ConfigError("--lr and --batch-size take one value or more each")


def mse_gradient(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Return ∂C/∂w ``(d)`` for x ``(n, d)``, y ``(n)`` and w ``(d)``."""
    a = x @ w
    return x.T @ (2 * (a - y) / len(y))


def descend(x: Tensor, y: Tensor, batch_size: int, lr: float) -> list[float]:
    """Return the cost over all samples before each step of one pass from w = 0, and at the end."""
    w = x.new_zeros(x.shape[1])
    costs = [mse_loss(x @ w, y).item()]
    for x_batch, y_batch in zip(x.split(batch_size), y.split(batch_size), strict=True):
        w -= lr * mse_gradient(x_batch, y_batch, w)
        costs.append(mse_loss(x @ w, y).item())
    return costs


def make_samples(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return x ``(n, 8)``, whose last column is 1, and noisy targets of the weights 0, 1, …, 7."""
    x = pad(torch.randn(n, 7), (0, 1), value=1.0).to(device)
    y = x @ torch.arange(8.0).to(x) + 0.1 * torch.randn(n).to(x)
    return x, y


def main(flags: Flags) -> None:
    with join_world(flags.device, alone=True) as world:
        torch.manual_seed(flags.seed)
        x, y = make_samples(1024, world.device)
        w = torch.randn(8).to(world.device)
        autograd = torch.func.grad(lambda x, y, w: mse_loss(x @ w, y), argnums=2)
        part = x[:999], y[:999], w  # of another size than the data and the batches
        row = console.compare("gradient", mse_gradient(*part), autograd, *part, terms=999)
        choices = product(flags.batch_size, flags.lr)
        curves = {f"batch {n}, learning rate {lr:g}": descend(x, y, n, lr) for n, lr in choices}
    for name, costs in curves.items():
        print(f"{name}: cost {costs[-1]:.4f} after {len(costs) - 1} steps")
    console.write_metrics(flags.metrics, [row | {"costs": curves}])
    if flags.plots:
        plots.save_curves(flags.plots / "regression.png", curves, "step", "cost before the step")


if __name__ == "__main__":
    cli.main(main, Flags)
