# SPDX-License-Identifier: MIT
"""The cross-entropy of logits in exact arithmetic, summed over samples."""

from typing import Any

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.exact.ieee import check_dtype, exp, log

# The units of the integers that are added: of a softmax's terms, and of a sample's loss, up to LARGEST_LOSS.
TERM, LOSS, LARGEST_LOSS = 2.0**-32, 2.0**-24, 2.0**38


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        largest = logits.amax(1, keepdim=True)
        shifted = logits - largest
        p = exp(shifted)
        terms = (p.double() * (1 / TERM)).round().long().sum(1, keepdim=True)
        # A NaN or +inf among the logits, or nothing but −inf, leaves integers that mean nothing.
        total = torch.where(largest.abs() < torch.inf, terms.double() * TERM, torch.nan)
        losses = (log(total) - shifted.gather(1, labels[:, None])).squeeze(1)
        one_hot = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)
        ctx.save_for_backward(p.div_(total.float()).sub_(one_hot.float()))
        return _sum(losses)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        # `once_differentiable` would allow create_graph where g needs no gradient, as if this were constant.
        if torch.is_grad_enabled():
            raise ConfigError(
                "cross_entropy_sum has no second derivative, which create_graph=True asks for; leave it out"
            )
        (gradient,) = ctx.saved_tensors
        return gradient * g.float(), None


def _sum(losses: Tensor) -> Tensor:
    """The sum of ``losses (b)`` float64 ≥ 0 in units of `LOSS`: in two halves, whose sums cannot overflow."""
    units = (torch.where(losses <= LARGEST_LOSS, losses, 0.0) * (1 / LOSS)).round().long()
    total = (units >> 32).sum().double() * (2**32 * LOSS) + (units & (2**32 - 1)).sum().double() * LOSS
    total = torch.where((losses > LARGEST_LOSS).any(), torch.inf, total)
    return torch.where(losses.isnan().any(), torch.nan, total)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return −log softmax(logits)[label] summed over samples, as a float64 scalar.

    With m the largest logit of a sample, p = exp(z − m), and s the sum of p over classes,

        loss = log s − (z_label − m)        ∂loss/∂z = p / s − onehot(label)

    s is a sum of integers that count p in units of 2⁻³², and the result is one of losses in units of 2⁻²⁴. So
    the bits depend neither on the order of the samples nor on that of the classes. Results of less than 2²⁹
    in all add up exactly to the loss of all their samples.

    Args:
        logits: ``(b, classes)`` float32; b may be 0. Its gradient is float32, and the only derivative.
        labels: ``(b)`` int64, from 0 to classes − 1.

    Returns:
        A float64 scalar. It is NaN if a loss is: a sample's logits include NaN or +inf, or all are −inf. It
        is infinite if a loss is more than 2³⁸.

    Raises:
        ConfigError: other dtypes or shapes; in the backward pass, ``create_graph=True``.
    """
    check_dtype("the logits' dtype", logits, torch.float32)
    check_dtype("the labels' dtype", labels, torch.int64)
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        shapes = f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
        raise ConfigError(f"{shapes} differ in samples, expected (b, classes) and (b); reshape them")
    return _CrossEntropySum.apply(logits, labels)  # type: ignore[no-any-return]
