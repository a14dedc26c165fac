# SPDX-License-Identifier: MIT
"""Schedules of a pipeline: the order of its passes, and the messages between its stages."""

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Shape = Sequence[int]
Forward = Callable[[int, Tensor | None], Tensor]
Backward = Callable[[Tensor, Tensor | None], None]


class P2PCommunicator:
    """Messages between neighboring stages of a pipeline: the ranks of ``group``, in order.

    A stage sends its activations y to the next stage. It sends the gradient of x, the activations
    that it received, to the previous stage. A gradient has the shape of the activations. The first
    stage has no previous stage, and the last stage has no next stage: there nothing is sent, and
    None is received.

    ``send_*`` only queues a message. The next ``recv_*`` or `flush` sends it, and returns when all
    messages have been sent and received. After the last ``send_*`` call `flush`. Both directions
    start together: neighbors that send to each other, and receive only then, would wait for each
    other.

    Args:
        group: with NCCL, a group that has run a collective, as
            `torch.distributed.batch_isend_irecv` requires.
        device, dtype: device and dtype of the activations.
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
    added up in the order of the micro-batches. `torchpar.reference.gpipe` is a plain version.

    Args:
        forward: the number of a micro-batch, and the activations from the previous stage, None on
            the first stage → the activations for the next stage; on the last stage, the
            micro-batch's term of the loss.
        backward: takes the result of ``forward``, and its gradient, None on the last stage.
        shapes: for each micro-batch, the shape of the activations that this stage receives. On the
            first stage only the number of shapes counts.

    Source: Huang et al., GPipe, 2019, https://arxiv.org/abs/1811.06965.
    """
    _run_passes(forward, backward, shapes, p2p, ahead=len(shapes))


def one_forward_one_backward(
    forward: Forward, backward: Backward, shapes: Sequence[Shape], p2p: P2PCommunicator
) -> None:
    """Run the backward pass of each micro-batch as early as possible (1F1B).

    Stage s of p runs p − 1 − s forward passes, so that the later stages have work. Then it runs a
    forward and a backward pass in turn, and at the end the backward passes that are left. It keeps
    the activations of at most p − s micro-batches. Arguments and results are as in `gpipe`.

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
