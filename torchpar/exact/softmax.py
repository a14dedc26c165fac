# SPDX-License-Identifier: MIT
"""Softmax and its logarithm in exact arithmetic.

    m = max x        p = e^(x − m)        softmax = p / Σp        log softmax = (x − m) − ln Σp

Σp is a sum of integers in units of 2⁻³², the same with and without terms that are 0.
"""

import math

import torch
from torch import Tensor

from torchpar.exact import ieee
from torchpar.exact.functions import log64

_TERM = 2.0**-32


def _parts(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x − m and p, float32, and Σp, float64; where all are −∞."""
    largest = x.amax(dim, keepdim=True) if x.shape[dim] else x.sum(dim, keepdim=True)
    empty = largest == -math.inf
    shifted = x - torch.where(empty, 0.0, largest)
    p = ieee.exp(shifted)
    total = (p.double() * (1 / _TERM)).round().nan_to_num_(0, 0, 0).long().sum(
        dim, keepdim=True
    ).double() * _TERM
    return shifted, p, torch.where(largest < math.inf, total, math.nan), empty


def softmax(x: Tensor, dim: int, zero_if_masked: bool = False) -> Tensor:
    """e^x / Σ e^x over ``dim`` of float32 ``x``; where all are −∞ NaN, or 0 with ``zero_if_masked``."""
    _, p, total, empty = _parts(x, dim)
    result = p / total.float()
    return torch.where(empty, 0.0 if zero_if_masked else math.nan, result)


def log_softmax(x: Tensor, dim: int) -> Tensor:
    """ln(e^x / Σ e^x) over ``dim`` of float32 ``x``."""
    shifted, _, total, _ = _parts(x, dim)
    return (shifted.double() - log64(total)).float()
