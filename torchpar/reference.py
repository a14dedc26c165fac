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
    """``x @ x.mT`` for ``x (n, k)``, in tiles of ``block`` rows. The fast version is
    `torchpar.matmul_t`.

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

    The fast version is `torchpar.exact_matmul`, with the same bits. `torchpar.ops.exact_digits` has
    the formula.
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

    x ``(*, in_features)``, the same on every rank → y_r ``(*, out_r)``, this rank's part of the
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
        if x.requires_grad:  # each rank uses x for other outputs
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
    """The sum of the ranks' x forward; its gradient, the same on every rank, backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
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


class P2PCommunicator:
    """Messages between neighbouring stages of a pipeline; the ranks of ``group`` are the stages, in
    order.

    A stage sends its activations y to the next stage. It sends the gradient of x, the activations
    that it received, to the previous stage. A gradient has the shape of the activations. The first
    stage has no previous one, and the last stage no next one: there nothing is sent, and None is
    received.

    ``send_*`` only queues a message. The next ``recv_*`` sends it, or `flush`. Both return when all
    messages have been sent and received. After the last ``send_*`` call `flush`. Both directions
    start together: neighbours that send to each other, and receive only then, would wait for each
    other.

    Args:
        group: with NCCL, a group that has run a collective, as
            `torch.distributed.batch_isend_irecv` asks.
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
        self._messages: list[dist.P2POp] = []

    def recv_forward(self, shape: Shape) -> Tensor | None:
        x = self._receive(self.stage - 1, shape)
        return None if x is None else x.requires_grad_()

    def send_forward(self, y: Tensor) -> None:
        self._send(self.stage + 1, y)

    def recv_backward(self, y: Tensor) -> Tensor | None:
        return self._receive(self.stage + 1, y.shape)

    def send_backward(self, x: Tensor | None) -> None:
        self._send(self.stage - 1, None if x is None else x.grad)

    def flush(self) -> None:
        messages, self._messages = self._messages, []
        for work in dist.batch_isend_irecv(messages) if messages else ():
            work.wait()

    def _send(self, stage: int, t: Tensor | None) -> None:
        if t is not None and stage < self.stages:
            sent = t.detach().to(dtype=self.dtype).contiguous()  # autocast has another dtype
            self._messages.append(dist.P2POp(dist.isend, sent, group=self.group, group_peer=stage))

    def _receive(self, stage: int, shape: Shape) -> Tensor | None:
        received = None
        if 0 <= stage < self.stages:
            received = torch.empty(shape, dtype=self.dtype, device=self.device)
            self._messages.append(
                dist.P2POp(dist.irecv, received, group=self.group, group_peer=stage)
            )
        self.flush()
        return received


def gpipe(
    forward: Forward, backward: Backward, shapes: Sequence[Shape], p2p: P2PCommunicator
) -> None:
    """Run the forward passes of all micro-batches, then their backward passes.

        p2p = P2PCommunicator()
        parts, targets = x.tensor_split(m), labels.tensor_split(m)

        def forward(i, activations):
            y = stage(parts[i] if activations is None else activations)
            return loss_sum(y, targets[i]) / len(x) if p2p.is_last else y

        gpipe(forward, torch.Tensor.backward, [(len(part), in_features) for part in parts], p2p)

    With p stages of equal work and m micro-batches, a stage is idle for ``(p − 1) / (m + p − 1)``
    of a step. It keeps the activations of m micro-batches. The gradients of the parameters are
    added up in the order of the micro-batches. `torchpar.parallel.Pipeline` runs these schedules.

    Args:
        forward: the number of a micro-batch, and the activations from the previous stage, None on
            the first → the activations for the next stage; on the last one the micro-batch's part
            of the loss.
        backward: what ``forward`` returned, and its gradient, None on the last stage.
        shapes: of the activations that this stage receives for each micro-batch. On the first stage
            only their number counts.

    Source: Huang et al., GPipe, 2019, https://arxiv.org/abs/1811.06965.
    """
    _run_passes(forward, backward, shapes, p2p, ahead=len(shapes))


def one_forward_one_backward(
    forward: Forward, backward: Backward, shapes: Sequence[Shape], p2p: P2PCommunicator
) -> None:
    """Run the backward pass of each micro-batch as early as possible (1F1B).

    Stage s of p runs p − 1 − s forward passes, so that the later stages have work. Then it runs a
    forward and a backward pass in turn, and at the end the backward passes that are left. It keeps
    the activations of at most p − s micro-batches. All else is as in `gpipe`.

    Source: Narayanan et al., PipeDream, 2019, https://doi.org/10.1145/3341301.3359646.
    """
    _run_passes(forward, backward, shapes, p2p, ahead=p2p.stages - 1 - p2p.stage)


def _run_passes(
    forward: Forward, backward: Backward, shapes: Sequence[Shape], p2p: P2PCommunicator, ahead: int
) -> None:
    """Run the passes, each backward pass ``ahead`` micro-batches after its forward pass."""
    kept: deque[tuple[Tensor | None, Tensor]] = deque()
    for i in range(len(shapes) + ahead):
        if i < len(shapes):
            x = p2p.recv_forward(shapes[i])
            y = forward(i, x)
            p2p.send_forward(y)
            kept.append((x, y))
        if i >= ahead:
            x, y = kept.popleft()
            gradient = p2p.recv_backward(y)
            if y.requires_grad:  # a first stage may be frozen
                backward(y, gradient)
            p2p.send_backward(x)
    p2p.flush()


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
