# SPDX-License-Identifier: MIT
"""Self-attention as matrix products, by a symmetric product of which half is computed.

    python examples/matmul_attention.py --plots pictures

Attention is softmax(q·kᵀ/√d)·v. Here queries, keys and values are the same ``x (n, d)``. The entries of x·xᵀ
say how similar the rows are. Softmax turns each row of it into weights, and each output is a mean of the rows
of x by these weights: similar rows count most.

x·xᵀ is symmetric, and `torchpar.matmul_t` computes half of it. The samples are 100 digits, sorted by class.
Nothing is trained, and yet most of the weight that a digit gives to other digits goes to its own class.
"""

from dataclasses import dataclass

from support import cli, console, plots
from torch import Tensor
from torch.nn.functional import layer_norm, normalize, scaled_dot_product_attention

from torchpar import matmul_t
from torchpar.data import load
from torchpar.parallel.launch.world import join_world


@dataclass(kw_only=True)
class Flags(cli.DataFlags):
    """Compute the attention of images to each other."""

    samples: int = 100  # Number of test images, the first ones.


def attention_weights(x: Tensor) -> Tensor:
    """Return softmax(x·xᵀ/√d) ``(*, n, n)`` for x ``(*, n, d)``: the weight of each row for each row."""
    return (matmul_t(x) / x.shape[-1] ** 0.5).softmax(-1)  # type: ignore[no-any-return]


def attention(x: Tensor) -> Tensor:
    """Return softmax(x·xᵀ/√d)·x ``(*, n, d)``."""
    return attention_weights(x) @ x


def main(flags: Flags) -> None:
    with join_world(flags.device, alone=True) as world:
        _, test = load(flags.dataset, flags.data, world.device)
        order = test.labels[: flags.samples].argsort()
        labels = test.labels[order]
        x = layer_norm(test.inputs(order), (784,))
        row = console.compare(
            "attention", attention(x), lambda x: scaled_dot_product_attention(x, x, x), x, terms=x.shape[1]
        )
        to_others = normalize(attention_weights(x).fill_diagonal_(0), p=1)
        to_class = to_others[labels == labels[:, None]].sum().item() / len(labels)
    print(f"{to_class:.0%} of the weight that an image gives to others goes to its class")
    console.write_metrics(flags.metrics, [row | {"to_own_class": to_class}])
    if flags.plots:
        title = "Weights of images, sorted by class, for each other"
        plots.save_matrices(flags.plots / "attention.png", to_others[None].sqrt(), title)


if __name__ == "__main__":
    cli.main(main, Flags)
