# SPDX-License-Identifier: MIT
"""Exact arithmetic: the same bits on any processor, number of threads, batch and mesh of ranks."""

from torchpar.exact.mode import coverage, mode

__all__ = ["coverage", "mode"]
