# SPDX-License-Identifier: MIT
"""Plain versions of the algorithms: read them first, the fast versions are tested against them."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

Shape = Sequence[int]
Forward = Callable[[int, Tensor | None], Tensor]
Backward = Callable[[Tensor, Tensor | None], None]


def matmul_t(x: Tensor, block: int = 64) -> Tensor:
    """``x @ x.mT`` for ``x (n, k)``, in tiles of ``block`` rows. The fast version is `torchpar.matmul_t`.

    Only tiles on and below the diagonal are computed; each one above is the transpose of one below.
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
    """``a @ b.T`` for float32 ``a (m, k)`` and ``b (n, k)``, finite, by sums of Python's integers.

    The fast version is `torchpar.exact_matmul`, with the same bits. `torchpar.ops.exact_digits` has the
    formula.
    """

    def cut(row: list[float]) -> tuple[int, list[list[int]]]:
        """The exponent of a row, and four digits of each number."""
        largest, exponent = math.frexp(max(map(abs, row), default=0.0))
        exponent += largest >= 1 - 2**-7
        digits = []
        for x in row:
            rest = round(math.ldexp(x, 31 - exponent))
            own: list[int] = []
            for _ in range(3):
                own.insert(0, (rest + 128) % 256 - 128)
                rest = (rest - own[0]) // 256
            digits.append([rest, *own])
        return exponent, digits

    c = torch.empty(len(a), len(b), dtype=torch.float64)
    columns = [cut(row) for row in b.tolist()]
    for i, (e, row) in enumerate(map(cut, a.tolist())):
        for j, (f, column) in enumerate(columns):
            total = sum(
                x[p] * y[q] * 256 ** (3 - p - q)
                for x, y in zip(row, column, strict=True)
                for p in range(4)
                for q in range(4 - p)
            )
            c[i, j] = math.ldexp(total, e + f - 38)
    return c.to(a)


class ColumnParallelLinear(torch.nn.Module):
    """The rows of a layer's weight, split over the ranks: ``y_r = x @ weight_r.T + bias_r``.

    x ``(*, in_features)``, the same on every rank → y_r ``(*, out_r)``, this rank's part of the outputs.
    `torchpar.parallel.ColumnParallelLinear` sums the input's gradient while it computes the weight's.
    """

    def __init__(self, whole: torch.nn.Linear, group: dist.ProcessGroup | None = None):
        super().__init__()
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.group = group
        self.weight = torch.nn.Parameter(whole.weight.detach().tensor_split(ranks, 0)[rank].clone())
        self.bias = torch.nn.Parameter(whole.bias.detach().tensor_split(ranks, 0)[rank].clone())

    def forward(self, x: Tensor) -> Tensor:
        return linear(_SumGradient.apply(x, self.group), self.weight, self.bias)


class RowParallelLinear(torch.nn.Module):
    """The columns of a layer's weight, split over the ranks: ``y = Σ_r x_r @ weight_r.T + bias``.

    x_r ``(*, in_r)``, as `ColumnParallelLinear` gives it → y ``(*, out_features)``, the same on every rank.
    `torchpar.parallel.RowParallelLinear` is the library's.
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


class _SumGradient(torch.autograd.Function):
    """x forward; the sum of the ranks' gradients backward, since each rank used x for other outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        g = g.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(g, group=ctx.group)
        return g, None


class _Sum(torch.autograd.Function):
    """The sum of the ranks' x forward; its gradient, the same on every rank, backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def average_gradients(model: torch.nn.Module) -> None:
    """Average every gradient over the ranks, in place, after the backward pass.

    `torch.nn.parallel.DistributedDataParallel` does the same in buckets, during the backward pass.
    """
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


class P2PCommunicator:
    """Messages between neighbouring stages of a pipeline; the ranks of ``group`` are the stages, in order.

    A stage sends its activations y to the next stage. It sends the gradient of x, the activations that it
    received, to the previous stage. A gradient has the shape of the activations. The first stage has no
    previous one, and the last stage no next one: there nothing is sent, and None is received.

    A method returns when its messages have been sent and received. One that sends and receives starts both
    and then waits: neighbours that send to each other, and receive only then, would wait for each other.

    Args:
        group: with NCCL, a group that has run a collective, as `torch.distributed.batch_isend_irecv` asks.
        device, dtype: of the activations.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.group, self.device, self.dtype = group, device, dtype
        self.stage, self.stages = dist.get_rank(group), dist.get_world_size(group)
        self.is_last = self.stage == self.stages - 1

    def recv_forward(self, shape: Shape) -> Tensor | None:
        return self.send_backward_recv_forward(None, shape)

    def send_forward(self, y: Tensor) -> None:
        self._exchange(self.stage + 1, y, None)

    def recv_backward(self, y: Tensor) -> Tensor | None:
        return self._exchange(self.stage + 1, None, y.shape)

    def send_backward(self, x: Tensor | None) -> None:
        self.send_backward_recv_forward(x, None)

    def send_forward_recv_backward(self, y: Tensor, earlier: Tensor) -> Tensor | None:
        """Send ``y``, and receive the gradient of the activations that were sent ``earlier``."""
        return self._exchange(self.stage + 1, y, earlier.shape)

    def send_backward_recv_forward(self, x: Tensor | None, shape: Shape | None) -> Tensor | None:
        """Send the gradient of ``x``, and receive the activations of the next micro-batch."""
        received = self._exchange(self.stage - 1, None if x is None else x.grad, shape)
        return None if received is None else received.requires_grad_()

    def _exchange(self, stage: int, sent: Tensor | None, shape: Shape | None) -> Tensor | None:
        if not 0 <= stage < self.stages:
            return None
        received, messages = None, []
        if sent is not None:
            sent = sent.detach().contiguous()
            messages.append(dist.P2POp(dist.isend, sent, group=self.group, group_peer=stage))
        if shape is not None:
            received = torch.empty(shape, dtype=self.dtype, device=self.device)
            messages.append(dist.P2POp(dist.irecv, received, group=self.group, group_peer=stage))
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        return received


def gpipe(forward: Forward, backward: Backward, shapes: Sequence[Shape], p2p: P2PCommunicator) -> None:
    """Run the forward passes of all micro-batches, then their backward passes.

        p2p = P2PCommunicator()
        parts, targets = x.tensor_split(m), labels.tensor_split(m)

        def forward(i, activations):
            y = stage(parts[i] if activations is None else activations)
            return loss_sum(y, targets[i]) / len(x) if p2p.is_last else y

        gpipe(forward, torch.Tensor.backward, [(len(part), in_features) for part in parts], p2p)

    With p stages of equal work and m micro-batches, a stage is idle for ``(p − 1) / (m + p − 1)`` of a step.
    It keeps the activations of m micro-batches. The gradients of the parameters are added up in the order of
    the micro-batches. `torchpar.parallel.Pipeline` runs these schedules.

    Args:
        forward: the number of a micro-batch, and the activations from the previous stage, None on the first
            → the activations for the next stage; on the last one the micro-batch's part of the loss.
        backward: what ``forward`` returned, and its gradient, None on the last stage.
        shapes: of the activations that this stage receives for each micro-batch. On the first stage only
            their number counts.

    Source: Huang et al., GPipe, 2019, https://arxiv.org/abs/1811.06965.
    """
    kept: deque[tuple[Tensor | None, Tensor]] = deque()
    for i, shape in enumerate(shapes):
        x = p2p.recv_forward(shape)
        y = forward(i, x)
        p2p.send_forward(y)
        kept.append((x, y))
    while kept:
        x, y = kept.popleft()
        backward(y, p2p.recv_backward(y))
        p2p.send_backward(x)


def one_forward_one_backward(
    forward: Forward, backward: Backward, shapes: Sequence[Shape], p2p: P2PCommunicator
) -> None:
    """Run the backward pass of each micro-batch as early as possible (1F1B).

    Stage s of p runs p − 1 − s forward passes, so that the later stages have work. Then it runs a forward
    and a backward pass in turn, and at the end the backward passes that are left. It keeps the activations of
    at most p − s micro-batches. All else is as in `gpipe`.

    Source: Narayanan et al., PipeDream, 2019, https://doi.org/10.1145/3341301.3359646.
    """
    kept: deque[tuple[Tensor | None, Tensor]] = deque()
    m = len(shapes)
    ahead = min(p2p.stages - 1 - p2p.stage, m)
    for i in range(ahead):
        x = p2p.recv_forward(shapes[i])
        y = forward(i, x)
        p2p.send_forward(y)
        kept.append((x, y))
    received = p2p.recv_forward(shapes[ahead]) if ahead < m else None
    for i in range(ahead, m):
        y = forward(i, received)
        kept.append((received, y))
        x, earlier = kept.popleft()
        backward(earlier, p2p.send_forward_recv_backward(y, earlier))
        received = p2p.send_backward_recv_forward(x, shapes[i + 1] if i + 1 < m else None)
    while kept:
        x, y = kept.popleft()
        backward(y, p2p.recv_backward(y))
        p2p.send_backward(x)


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
