# SPDX-License-Identifier: MIT
"""Exact arithmetic: the same bits on any processor, number of threads, batch and mesh of ranks."""

from torchpar.exact.data_parallel import DataParallel
from torchpar.exact.mode import Coverage, coverage, mode

__all__ = ["Coverage", "DataParallel", "coverage", "mode"]
