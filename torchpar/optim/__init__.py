# SPDX-License-Identifier: MIT
"""Optimizers: Muon and its orthogonalization, and a chain of optimizers."""

from torchpar.optim.chained import ChainedOptimizer
from torchpar.optim.muon import Muon
from torchpar.optim.newton_schulz import orthogonalize

__all__ = ["ChainedOptimizer", "Muon", "orthogonalize"]
