# SPDX-License-Identifier: MIT
"""Linear regression as matrix products, and the effect of learning rate and batch size.

    python examples/matmul_regression.py --plots pictures

The model of one sample is a = w·x + b, its cost against the target y is C = (a − y)², and

    ∂C/∂w = 2x·(a − y)        ∂C/∂b = 2(a − y)

A bias is the weight of an input that is always 1. So n samples are a matrix ``x (n, d)`` whose last
column is 1, with weights ``w (d)`` and targets ``y (n)``. The cost is the mean over the samples:

    a = x·w        C = 1/n · Σ (a − y)²        ∂C/∂a = 2(a − y)/n        ∂C/∂w = xᵀ·∂C/∂a

Both the forward and the backward pass are matrix products. A batch is one product, which gives what
the products of the single samples give, in less time.

The gradient of a small batch is a mean as well: it is noisier than that of all samples, but not
smaller. So in one pass over the samples small batches make more steps, and the cost falls further.
The pictures show the cost by step, and the path of (w, b) for a line y = w·x + b.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from support import checks, cli, console, measure, plots

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, pad

from torchpar.errors import check_finite
from torchpar.parallel.launch.world import join_world

SAMPLES = 1024
LINE = (1.5, -1.0)  # w and b of the picture


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Fit a linear model by gradient descent."""

    lr: cli.Numbers = (0.01, 0.1)  # Learning rates to compare.
    batch_size: cli.Counts = (1024, 64, 4)  # Batch sizes to compare, of 1024 samples.
    plots: cli.Plots = None  # Folder for pictures.


def predict(x: Tensor, w: Tensor) -> Tensor:
    """Return a ``(n)`` for a batch x ``(n, d)``, or the number a for one sample x ``(d)``."""
    return x @ w


def mse_gradient(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Return ∂C/∂w ``(d)`` for x ``(n, d)``, y ``(n)`` and w ``(d)``."""
    a = predict(x, w)
    return x.T @ (2 * (a - y) / len(y))


def descend(x: Tensor, y: Tensor, batch_size: int, lr: float) -> tuple[list[float], Tensor]:
    """Make one pass over the samples from w = 0.

    Returns:
        The cost over all samples before each step and at the end, and the weights at these times.
    """
    w = x.new_zeros(x.shape[1])
    path = [w.clone()]
    for x_batch, y_batch in zip(x.split(batch_size), y.split(batch_size), strict=True):
        w -= lr * mse_gradient(x_batch, y_batch, w)
        path.append(w.clone())
    costs = [mse_loss(predict(x, w), y).item() for w in path]
    check_finite(f"the cost at the learning rate {lr:g}", *costs)
    return costs, torch.stack(path)


def make_samples(weights: Tensor, n: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """Return x ``(n, d)``, whose last column is 1, and noisy targets of the ``weights (d)``."""
    x = pad(torch.randn(n, len(weights) - 1), (0, 1), value=1.0).to(weights)
    y = x @ weights + 0.1 * torch.randn(n).to(x)
    return x, y


def compare_formulas(x: Tensor, y: Tensor) -> list[dict[str, str | float]]:
    """Compare the formulas with PyTorch's, for some of the samples: another number than the batches
    have."""
    x, y, w = x[:999], y[:999], torch.randn(x.shape[1]).to(x)
    d = len(w)
    single = torch.stack([checks.result_of(predict, sample, w, shape=()) for sample in x])
    batch = checks.result_of(predict, x, w, shape=(len(x),))
    gradient = checks.result_of(mse_gradient, x, y, w, shape=(d,))
    autograd = torch.func.grad(lambda x, y, w: mse_loss(x @ w, y), argnums=2)
    return [
        checks.compare("forward of a batch", batch, torch.mv, x, w, terms=d),
        checks.compare("forward of each sample", single, torch.mv, x, w, terms=d),
        checks.compare("gradient", gradient, autograd, x, y, w, terms=999),
    ]


def compare_times(x: Tensor) -> dict[str, float]:
    """Print the milliseconds of one product for all samples, and of a product for each of them."""
    w = x.new_zeros(x.shape[1])
    ways = {"batch": lambda: predict(x, w), "each": lambda: [predict(one, w) for one in x]}
    ms = measure.interleaved_ms(ways, x.device)
    batch, each = f"{ms['batch']:.3g} ms by one product", f"{ms['each']:.3g} ms by one for each"
    print(f"forward of {len(x)} samples: {batch}, {each}")
    return {f"ms_{way}": value for way, value in ms.items()}


def compare_norms(x: Tensor, y: Tensor, batch_sizes: tuple[int, ...]) -> list[dict[str, float]]:
    """Print the norms of the batches' gradients at w = 0: their mean, and their standard
    deviation."""
    rows = []
    for batch_size in batch_sizes:
        parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
        norms = torch.stack([mse_gradient(*part, x.new_zeros(x.shape[1])).norm() for part in parts])
        row = {"batch_size": batch_size, "steps_of_a_pass": len(norms)}
        rows.append(
            row | {"mean_norm": norms.mean().item(), "spread": norms.std(correction=0).item()}
        )
    console.print_rows(rows, "norm of the gradient at the start")
    return rows


def save_paths(file: Path, batch_sizes: tuple[int, ...], lr: float, device: torch.device) -> None:
    """Draw how each batch size moves (w, b) in one pass over the samples of a line."""
    x, y = make_samples(torch.tensor(LINE, device=device))
    paths = {f"batches of {n}": descend(x, y, n, lr)[1] for n in batch_sizes}
    points = torch.cat(list(paths.values()))
    low, high = points.amin(0), points.amax(0)
    margin = 0.3 * (high - low).max()
    ranges = zip((low - margin).tolist(), (high + margin).tolist(), strict=True)
    plane = plots.on_grid(
        lambda w: (w.to(x) @ x.T - y).square().mean(1).sqrt(),
        *(torch.linspace(*ends, 101) for ends in ranges),
    )
    with plots.picture(file, (4.3, 4.3)) as (axes,):
        axes.contour(*plane, levels=8, colors="0.8")
        for name, path in paths.items():
            line = plots.as_array(path.T)
            axes.plot(*line, ".-", markersize=4, label=name, zorder=-len(path))
        title = f"one pass, learning rate {lr:g}\n(gray: lines of equal cost)"
        axes.set(xlabel="w", ylabel="b", title=title)
        axes.legend()


def main(flags: Flags) -> None:
    with join_world(flags.device, alone=True) as world:
        torch.manual_seed(flags.seed)
        x, y = make_samples(torch.arange(8.0, device=world.device))
        cli.take_threads(world.device.type, x.numel())
        errors = compare_formulas(x, y)
        times = compare_times(x)
        norms = compare_norms(x, y, flags.batch_size)
        choices = product(flags.batch_size, flags.lr)
        curves = {f"batch {n}, learning rate {lr:g}": descend(x, y, n, lr)[0] for n, lr in choices}
        if flags.plots:
            save_paths(
                flags.plots / "regression-path.png", flags.batch_size, flags.lr[0], world.device
            )
    console.write_metrics(flags.metrics, [*errors, *norms, {"costs": curves, **times}])
    if flags.plots:
        label = "cost before the step\n(the last point: at the end)"
        plots.save_curves(flags.plots / "regression.png", curves, "step", label)
    for name, costs in curves.items():
        steps = len(costs) - 1
        print(f"{name}: cost {costs[-1]:.4f} after {steps} step{'s' * (steps > 1)}")


if __name__ == "__main__":
    cli.main(main, Flags)
