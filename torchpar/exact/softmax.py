# SPDX-License-Identifier: MIT
"""Rules for softmax, its logarithm, and logarithms of sums of exponentials.

    m = max x        p = e^(x − m)        softmax = p / Σp        log softmax = (x − m) − ln Σp

The largest p is 1, so that the unit of `exact_sum` is the same with and without terms that are 0.
"""

import math
from typing import Any

import torch
from torch import Tensor

from torchpar.exact.functions import exp64, in_pieces, log64
from torchpar.exact.registry import rule
from torchpar.exact.sums import exact_sum


def _parts(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m, x − m and p, float32, and Σp, float64. Where m is −∞, x is in the place of x − m."""
    empty = any(x.shape[dim] == 0 for dim in dims)
    largest = x.sum(dims, True) if empty else x.amax(dims, True)
    shifted = x - torch.where(largest == -math.inf, 0.0, largest)
    p = in_pieces(exp64, shifted)
    return largest, shifted, p, exact_sum(p, dims, True)


@rule("_softmax")
def softmax(x: Tensor, dim: int, _: Any = None) -> Tensor:
    """e^x / Σ e^x over ``dim`` of float32 ``x``; NaN where all are −∞."""
    _, _, p, total = _parts(x, [dim])
    return p / total.float()


@rule("_safe_softmax")
def safe_softmax(x: Tensor, dim: int, _: Any = None) -> Tensor:
    """`softmax`, but 0 where all are −∞."""
    largest, _, p, total = _parts(x, [dim])
    return torch.where(largest == -math.inf, 0.0, p / total.float())


@rule("_softmax_backward_data")
def _softmax_backward(g: Tensor, y: Tensor, dim: int, _: Any) -> Tensor:
    total = exact_sum(g.double() * y.double(), [dim], True)
    return ((g.double() - total) * y.double()).float()


@rule("_log_softmax")
def _log_softmax(x: Tensor, dim: int, half: bool) -> Tensor:
    _, shifted, _, total = _parts(x, [dim])
    return (shifted.double() - log64(total)).float()


@rule("_log_softmax_backward_data")
def _log_softmax_backward(g: Tensor, y: Tensor, dim: int, _: Any) -> Tensor:
    return (g.double() - exp64(y.double()) * exact_sum(g, [dim], True)).float()


@rule("logsumexp")
def _logsumexp(x: Tensor, dims: list[int], keepdim: bool = False) -> Tensor:
    largest, _, _, total = _parts(x, dims)
    result = torch.where(largest.isinf(), largest.double(), log64(total) + largest.double()).float()
    return result if keepdim else result.squeeze(tuple(dims))
