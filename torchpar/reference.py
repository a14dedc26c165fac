# SPDX-License-Identifier: MIT
"""Plain versions of the algorithms: read them first, the fast versions are tested against them."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

Forward = Callable[[int, Tensor | None], Tensor]
Backward = Callable[[Tensor, Tensor | None], None]


def matmul_t(x: Tensor, block: int = 64) -> Tensor:
    """``x @ x.mT`` for ``x (n, k)``, in tiles of ``block`` rows. The fast version is
    `torchpar.matmul_t`.

    Only tiles on and below the diagonal are computed; a tile above is the transpose of a tile
    below.
    """
    c = x.new_empty(len(x), len(x))
    for i in range(0, len(x), block):
        for j in range(0, i + 1, block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            tile = x[rows] @ x[columns].T
            if i == j:
                tile = tile.tril() + tile.tril(-1).T
            c[rows, columns] = tile
            c[columns, rows] = tile.T
    return c


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` for finite ``a (m, k)`` and ``b (n, k)``, by sums of Python's integers.

    The fast version is `torchpar.exact_matmul`, with the same bits. `torchpar.ops.exact_digits` has
    the formula.
    """
    n = 4 if a.dtype == torch.float32 else 3  # digits
    least = {torch.float32: 149, torch.bfloat16: 133, torch.float16: 24}[a.dtype]
    significant = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[a.dtype]

    def cut(row: list[float]) -> tuple[int, list[list[int]]]:
        """The exponent of a row, and the digits of each number."""
        largest, exponent = math.frexp(max(map(abs, row), default=0.0))
        exponent += largest >= 1 - 2**-7
        digits = []
        for x in row:
            rest = round(math.ldexp(x, 8 * n - 1 - exponent))
            lower: list[int] = []
            for _ in range(n - 1):
                lower.insert(0, (rest + 128) % 256 - 128)
                rest = (rest - lower[0]) // 256
            digits.append([rest, *lower])
        return exponent, digits

    c = torch.empty(len(a), len(b), dtype=torch.float64, device=a.device)
    columns = [cut(row) for row in b.tolist()]
    for i, (e, row) in enumerate(map(cut, a.tolist())):
        for j, (f, column) in enumerate(columns):
            total = sum(
                x[p] * y[q] * 256 ** (n - 1 - p - q)
                for x, y in zip(row, column, strict=True)
                for p in range(n)
                for q in range(n - p)
            )
            value = math.ldexp(total, e + f - 8 * n - 6)
            # A multiple of the last place, so that rounding to the dtype changes nothing.
            place = max(math.frexp(value)[1] - significant, -least)
            nearest = math.ldexp(round(math.ldexp(value, -place)), place)
            c[i, j] = math.copysign(nearest, value)
    return c.to(a)


class ColumnParallelLinear(torch.nn.Module):
    """The rows of a layer's weight, split over the ranks: ``y_r = x @ weight_r.T + bias_r``.

    x ``(*, in_features)``, the same on every rank → y_r ``(*, out_r)``, this rank's shard of the
    outputs. `torchpar.parallel.ColumnParallelLinear` sums the input's gradient while it computes
    the weight's.
    """

    def __init__(self, whole: torch.nn.Linear, group: dist.ProcessGroup | None = None):
        super().__init__()
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.group = group
        self.weight = torch.nn.Parameter(whole.weight.detach().tensor_split(ranks, 0)[rank].clone())
        self.bias = torch.nn.Parameter(whole.bias.detach().tensor_split(ranks, 0)[rank].clone())

    def forward(self, x: Tensor) -> Tensor:
        x = x.view_as(x)
        if x.requires_grad:  # each rank computes other outputs from x
            x.register_hook(lambda g: _summed(g, self.group))
        return linear(x, self.weight, self.bias)


class RowParallelLinear(torch.nn.Module):
    """The columns of a layer's weight, split over the ranks: ``y = Σ_r x_r @ weight_r.T + bias``.

    x_r ``(*, in_r)``, as `ColumnParallelLinear` gives it → y ``(*, out_features)``, the same on
    every rank. `torchpar.parallel.RowParallelLinear` is the library's.
    """

    def __init__(self, whole: torch.nn.Linear, group: dist.ProcessGroup | None = None):
        super().__init__()
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.group = group
        self.weight = torch.nn.Parameter(whole.weight.detach().tensor_split(ranks, 1)[rank].clone())
        self.bias = torch.nn.Parameter(whole.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        # Each rank would add the bias before the sum, p times in all.
        return _Sum.apply(linear(x, self.weight), self.group) + self.bias  # type: ignore[no-any-return]


class _Sum(torch.autograd.Function):
    """Forward, the sum of all ranks' x; backward, its gradient, which is the same on every rank."""

    @staticmethod
    def forward(ctx: object, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: object, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def _summed(t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    t = t.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(t, group=group)
    return t


def average_gradients(model: torch.nn.Module) -> None:
    """Average every gradient over the ranks, in place, after the backward pass.

    `torch.nn.parallel.DistributedDataParallel` does the same in buckets, during the backward pass.
    """
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def gpipe(
    forward: Forward,
    backward: Backward,
    shapes: Sequence[Sequence[int]],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Run the forward passes of all micro-batches through the stages, then their backward passes.

    The ranks of ``group`` are the stages, in order. Each message blocks until it has been received.
    `torchpar.parallel.split.schedules` has two schedules, whose messages do not block.

    Args:
        forward: the number of a micro-batch, and the activations from the previous stage, None on
            the first → the activations for the next stage; on the last one the micro-batch's part
            of the loss.
        backward: the result of ``forward``, and its gradient, None on the last stage → None.
        shapes: of the float32 activations that this stage receives for each micro-batch. On the
            first stage only their number counts.

    Source: Huang et al., GPipe, 2019, https://arxiv.org/abs/1811.06965.
    """
    stage, last = dist.get_rank(group), dist.get_world_size(group) - 1
    kept: list[tuple[Tensor | None, Tensor]] = []
    for i, shape in enumerate(shapes):
        x = None
        if stage > 0:
            x = torch.empty(shape, device=torch.get_default_device())
            dist.recv(x, group=group, group_src=stage - 1)
            x.requires_grad_()
        y = forward(i, x)
        if stage < last:
            dist.send(y.detach(), group=group, group_dst=stage + 1)
        kept.append((x, y))
    for x, y in kept:
        gradient = None
        if stage < last:
            gradient = torch.empty_like(y)
            dist.recv(gradient, group=group, group_src=stage + 1)
        backward(y, gradient)
        if x is not None:
            assert x.grad is not None
            dist.send(x.grad, group=group, group_dst=stage - 1)


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """A matrix near U·Vᵀ for ``x = U·Σ·Vᵀ``, by Newton–Schulz iterations in the dtype of ``x``.

    Each iteration maps every singular value σ to ``a·σ + b·σ³ + c·σ⁵``, which moves it towards 1.
    ``x (*, n, m)`` → ``(*, n, m)``. The fast version is `torchpar.optim.newton_schulz`.

    Source: Jordan, Muon, 2024, https://kellerjordan.github.io/posts/muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
