# SPDX-License-Identifier: MIT
"""Self-attention as matrix products, by a symmetric product of which half is computed.

    python examples/matmul_attention.py --plots pictures

Attention is softmax(q·kᵀ/√d)·v: each output is a mean of the rows of v, and its weights say how
well the output's query fits the rows' keys.

In a transformer queries, keys and values are three products of x and matrices that are learned, and
a causal mask hides from each row those after it: their scores become −∞, and their weights 0. Here
the sequence is the 28 rows of an image, and the three matrices are random.

Sparse attention hides more: a window shows to each row its neighbours, and blocks show to each row
those of its own block. A mask saves no work, since all n² scores are computed before it. Blocks are
products of their own: n/b products of b × b scores are n·b scores in all.

If queries, keys and values are the same ``x (n, d)``, the entries of x·xᵀ say how similar the rows
are, and similar rows count most. x·xᵀ is symmetric, and `torchpar.matmul_t` computes half of it.
The samples are 100 digits, sorted by class. Nothing is trained, and yet most of the weight that a
digit gives to other digits goes to its own class.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from support import checks, cli, console, plots

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, normalize, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from torchpar import matmul_t
from torchpar.console import breaking_silence
from torchpar.data import load
from torchpar.errors import ConfigError
from torchpar.parallel.launch.world import join_world

ROWS = 28  # of an image, and pixels of a row


@dataclass(kw_only=True)
class Flags(cli.DataFlags):
    """Compute the attention of images to each other."""

    samples: cli.Count = 100  # Number of test images, the first ones.
    # Rows on each side that a row sees in sparse attention.
    window: Annotated[int, cli.Bounds(0, ROWS)] = 2
    # Rows of a block in sparse attention, a divisor of 28.
    block: Annotated[int, cli.Bounds(1, ROWS + 1)] = 7
    plots: cli.Plots = None  # Folder for pictures.

    def check(self) -> None:
        super().check()
        if ROWS % self.block:
            raise ConfigError(f"--block is {self.block}, expected a divisor of {ROWS}")


def attention_weights(x: Tensor) -> Tensor:
    """Return softmax(x·xᵀ/√d) ``(*, n, n)`` for x ``(*, n, d)``: the weight of each row for each
    row."""
    return (matmul_t(x) / x.shape[-1] ** 0.5).softmax(-1)  # type: ignore[no-any-return]


def attention(x: Tensor) -> Tensor:
    """Return softmax(x·xᵀ/√d)·x ``(*, n, d)``."""
    return attention_weights(x) @ x


def masked_weights(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """Return softmax(q·kᵀ/√d) ``(*, n, n)`` for q and k ``(*, n, d)``, with 0 where ``hidden (n,
    n)`` is true."""
    scores: Tensor = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def causal_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return the weights with 0 for the rows after each row."""
    n = q.shape[-2]
    return masked_weights(q, k, torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1))


def outside_window(n: int, window: int) -> Tensor:
    """Return the mask ``(n, n)`` that hides from row i each row j with |i − j| > window."""
    i = torch.arange(n)
    return (i[:, None] - i).abs() > window


def outside_block(n: int, block: int) -> Tensor:
    """Return the mask ``(n, n)`` that hides from a row those of other blocks."""
    i = torch.arange(n) // block
    return i[:, None] != i


def block_attention(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """Return the attention ``(*, n, d)`` under the mask of `outside_block`, of which only the
    scores within blocks are computed."""
    q, k, v = (t.unflatten(-2, (-1, block)) for t in (q, k, v))  # (*, n / block, block, d)
    weights: Tensor = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).flatten(-3, -2)


def causal_attention(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """Return the attention ``(*, n, d)`` of x ``(*, n, features)``, for three matrices
    ``(d, features)``."""
    q, k, v = (x @ w.mT for w in (wq, wk, wv))
    return causal_weights(q, k) @ v


def compare_causal(images: Tensor) -> tuple[list[dict[str, str | float]], list[Tensor]]:
    """Compare causal attention and its gradients with PyTorch's, and return the errors, and the
    queries, keys and values."""
    x = layer_norm(images, (ROWS,))
    projections = {name: torch.randn(16, ROWS).to(x) / ROWS**0.5 for name in ("wq", "wk", "wv")}

    def reference(x: Tensor, *projections: Tensor) -> Tensor:
        q, k, v = (linear(x, w) for w in projections)
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = {"x": x} | projections
    q, k, v = qkv = [x @ w.mT for w in projections.values()]
    checks.result_of(causal_weights, q, k, shape=(len(x), ROWS, ROWS))
    y = checks.result_of(causal_attention, *inputs.values(), shape=v.shape)
    row = checks.compare("causal attention", y, reference, *inputs.values(), terms=28)
    rows = checks.compare_gradients(
        "causal attention", causal_attention, reference, inputs, terms=len(x) * 28
    )
    return [row, *rows], qkv


def checked_masks(window: int, block: int) -> list[Tensor]:
    """Return the masks of `outside_window` and `outside_block` for the rows of an image.

    PyTorch's attention takes the same masks, so it cannot find a wrong one. They are compared with
    the rows that a row sees: a stretch around it, and the stretch of its block.

    Raises:
        ConfigError: a mask hides another row, or shows one.
    """
    near = [range(i - window, i + window + 1) for i in range(ROWS)]
    same = [range(i - i % block, i - i % block + block) for i in range(ROWS)]
    return [
        checks.exactly(
            function,
            ROWS,
            size,
            expected=torch.tensor([[j not in rows for j in range(ROWS)] for rows in seen]),
        )
        for function, size, seen in ((outside_window, window, near), (outside_block, block, same))
    ]


def compare_sparse(qkv: list[Tensor], window: int, block: int) -> list[dict[str, str | float]]:
    """Compare attention in a window and in blocks with PyTorch's under the same masks, and return
    the errors and the numbers of scores."""
    q, k, v = qkv
    near, same = (m.to(q.device) for m in checked_masks(window, block))

    def masked(hidden: Tensor) -> Tensor:
        shape = (len(q), ROWS, ROWS)
        return checks.result_of(masked_weights, q, k, hidden, shape=shape) @ v

    def of_blocks() -> Tensor:
        return checks.result_of(block_attention, q, k, v, block, shape=v.shape)

    rows = []
    for part, hidden, function in (
        ("window attention", near, partial(masked, near)),
        ("block attention", same, partial(masked, same)),
        ("products of blocks", same, of_blocks),
    ):
        with FlopCounterMode(display=False) as counter:
            y = function()
        # Each score is a product of d numbers, and its weight multiplies d numbers of v.
        scores = round(counter.get_total_flops() / (4 * q.shape[-1] * len(q)))

        def reference(q: Tensor, k: Tensor, v: Tensor, shown: Tensor = ~hidden) -> Tensor:
            return scaled_dot_product_attention(q, k, v, attn_mask=shown)

        row = checks.compare(part, y, reference, q, k, v, terms=ROWS)
        shown = int((~hidden).sum())
        computed = (
            f"{scores} scores of an image are computed" if scores else "no product is counted"
        )
        print(f"{part}: {computed}, {shown} are shown")
        rows.append(row | {"scores": scores, "shown": shown})
    return rows


def main(flags: Flags) -> None:
    with join_world(flags.device, alone=True) as world:
        _, test = load(flags.dataset, flags.data, world.device)
        cli.check_samples(flags.samples, len(test), "test")
        order = test.labels[: flags.samples].argsort()
        labels = test.labels[order]
        cli.take_threads(world.device.type, len(order) ** 2 * 784)
        torch.manual_seed(flags.seed)
        with breaking_silence(lambda: "still computing attention"):
            causal, qkv = compare_causal(test.inputs(order).unflatten(1, (ROWS, ROWS)))
            sparse = compare_sparse(qkv, flags.window, flags.block)
            x = layer_norm(test.inputs(order), (784,))
            weights = checks.result_of(attention_weights, x, shape=(len(x), len(x)))
            row = checks.compare(
                "attention",
                checks.result_of(attention, x, shape=x.shape),
                lambda x: scaled_dot_product_attention(x, x, x),
                x,
                terms=x.shape[1],
            )
            to_others = normalize(weights.fill_diagonal_(0), p=1)
            to_class = to_others[labels == labels[:, None]].sum().item() / len(labels)
    console.write_metrics(flags.metrics, [*causal, *sparse, row | {"to_own_class": to_class}])
    if flags.plots:
        title = "Weights of images, sorted by class, for each other"
        plots.save_matrices(flags.plots / "attention.png", to_others[None].sqrt(), title)
        q, k, _ = qkv
        weights = causal_weights(q, k)
        title = "Causal weights of the rows of four images"
        plots.save_matrices(
            flags.plots / "causal.png", weights[:: max(len(weights) // 4, 1)][:4], title
        )
        masks = outside_window(ROWS, flags.window), outside_block(ROWS, flags.block)
        weights = torch.stack([masked_weights(q[0], k[0], mask.to(q.device)) for mask in masks])
        title = "Weights in a window and in blocks"
        plots.save_matrices(flags.plots / "sparse.png", weights, title)
    print(f"{to_class:.0%} of the weight that an image gives to others goes to its class")


if __name__ == "__main__":
    cli.main(main, Flags)
