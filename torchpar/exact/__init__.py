# SPDX-License-Identifier: MIT
"""Exact arithmetic: the same bits on any processor, number of threads, batch and mesh of ranks."""

from torchpar.exact.data_parallel import DataParallel
from torchpar.exact.dispatch import Coverage, coverage, mode
from torchpar.exact.tensor_parallel import linear

__all__ = ["Coverage", "DataParallel", "coverage", "linear", "mode"]
