# SPDX-License-Identifier: MIT
"""Exact arithmetic: the same bits on any processor, number of threads, batch and mesh of ranks."""

from torchpar.exact.clip import clip_grad_norm_
from torchpar.exact.data_parallel import DataParallel
from torchpar.exact.gradients import ExactGradients
from torchpar.exact.layers import parallel_mlp
from torchpar.exact.loss import cross_entropy_sum
from torchpar.exact.mode import Coverage, coverage, mode
from torchpar.exact.sgd import ExactSGD

__all__ = [
    "Coverage",
    "DataParallel",
    "ExactGradients",
    "ExactSGD",
    "clip_grad_norm_",
    "coverage",
    "cross_entropy_sum",
    "mode",
    "parallel_mlp",
]
