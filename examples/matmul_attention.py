# SPDX-License-Identifier: MIT
"""Self-attention as matrix products, by a symmetric product of which half is computed.

    python examples/matmul_attention.py --plots pictures

Attention is softmax(q·kᵀ/√d)·v: each output is a mean of the rows of v, and its weights say how
well the output's query fits the rows' keys.

In a transformer queries, keys and values are three products of x and matrices that are learned, and
a causal mask hides from each row those after it: their scores become −∞, and their weights 0. Here
the sequence is the 28 rows of an image, and the three matrices are random.

If queries, keys and values are the same ``x (n, d)``, the entries of x·xᵀ say how similar the rows
are, and similar rows count most. x·xᵀ is symmetric, and `torchpar.matmul_t` computes half of it.
The samples are 100 digits, sorted by class. Nothing is trained, and yet most of the weight that a
digit gives to other digits goes to its own class.
"""

from dataclasses import dataclass

import torch
from support import checks, cli, console, plots
from torch import Tensor
from torch.nn.functional import layer_norm, linear, normalize, scaled_dot_product_attention

from torchpar import matmul_t
from torchpar.data import load
from torchpar.parallel.launch.world import join_world


@dataclass(kw_only=True)
class Flags(cli.DataFlags):
    """Compute the attention of images to each other."""

    samples: cli.Count = 100  # Number of test images, the first ones.
    plots: cli.Plots = None  # Folder for pictures.


def attention_weights(x: Tensor) -> Tensor:
    """Return softmax(x·xᵀ/√d) ``(*, n, n)`` for x ``(*, n, d)``: the weight of each row for each
    row."""
    return (matmul_t(x) / x.shape[-1] ** 0.5).softmax(-1)  # type: ignore[no-any-return]


def attention(x: Tensor) -> Tensor:
    """Return softmax(x·xᵀ/√d)·x ``(*, n, d)``."""
    return attention_weights(x) @ x


def causal_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return softmax(q·kᵀ/√d) ``(*, n, n)`` for q and k ``(*, n, d)``, with 0 for the rows after
    each row."""
    n, d = q.shape[-2:]
    later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    scores: Tensor = q @ k.mT / d**0.5
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def causal_attention(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """Return the attention ``(*, n, d)`` of x ``(*, n, features)``, for three matrices
    ``(d, features)``."""
    q, k, v = (x @ w.mT for w in (wq, wk, wv))
    return causal_weights(q, k) @ v


def compare_causal(images: Tensor) -> tuple[list[dict[str, str | float]], Tensor]:
    """Compare causal attention and its gradients with PyTorch's, and return the errors and the
    weights."""
    x = layer_norm(images, (28,))
    projections = {name: torch.randn(16, 28).to(x) / 28**0.5 for name in ("wq", "wk", "wv")}

    def reference(x: Tensor, *projections: Tensor) -> Tensor:
        q, k, v = (linear(x, w) for w in projections)
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = {"x": x} | projections
    y = causal_attention(*inputs.values())
    row = checks.compare("causal attention", y, reference, *inputs.values(), terms=28)
    rows = checks.compare_gradients(
        "causal attention", causal_attention, reference, inputs, terms=len(x) * 28
    )
    return [row, *rows], causal_weights(x @ projections["wq"].mT, x @ projections["wk"].mT)


def main(flags: Flags) -> None:
    with join_world(flags.device, alone=True) as world:
        _, test = load(flags.dataset, flags.data, world.device)
        order = test.labels[: flags.samples].argsort()
        labels = test.labels[order]
        torch.manual_seed(flags.seed)
        causal, weights = compare_causal(test.inputs(order).unflatten(1, (28, 28)))
        x = layer_norm(test.inputs(order), (784,))
        row = checks.compare(
            "attention",
            attention(x),
            lambda x: scaled_dot_product_attention(x, x, x),
            x,
            terms=x.shape[1],
        )
        to_others = normalize(attention_weights(x).fill_diagonal_(0), p=1)
        to_class = to_others[labels == labels[:, None]].sum().item() / len(labels)
    print(f"{to_class:.0%} of the weight that an image gives to others goes to its class")
    console.write_metrics(flags.metrics, [*causal, row | {"to_own_class": to_class}])
    if flags.plots:
        title = "Weights of images, sorted by class, for each other"
        plots.save_matrices(flags.plots / "attention.png", to_others[None].sqrt(), title)
        title = "Causal weights of the rows of four images"
        plots.save_matrices(
            flags.plots / "causal.png", weights[:: max(len(weights) // 4, 1)][:4], title
        )


if __name__ == "__main__":
    cli.main(main, Flags)
