# SPDX-License-Identifier: MIT
"""Optimizers: Muon and its orthogonalisation, SGD, and a chain of optimizers."""

from torchpar.optim.chained import ChainedOptimizer
from torchpar.optim.muon import Muon
from torchpar.optim.newton_schulz import orthogonalize
from torchpar.optim.sgd import SGD

__all__ = ["SGD", "ChainedOptimizer", "Muon", "orthogonalize"]
