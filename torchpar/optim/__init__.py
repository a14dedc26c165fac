# SPDX-License-Identifier: MIT
"""Optimizers: Muon and its orthogonalization, and a chain of optimizers.

`muon` is the optimizer, and `newton_schulz` its iteration, by the products of `buffered_products`
or `exact_products`, and the kernels of `elementwise`. `assign` chooses an optimizer for each
parameter of a model, of which `heads` finds the output heads, and `chained` steps several as one.
`matrices` sees parameters as batches of matrices, and `exchange` sends shards between ranks.
"""

from torchpar.optim.chained import ChainedOptimizer
from torchpar.optim.muon import Muon
from torchpar.optim.newton_schulz import orthogonalize

__all__ = ["ChainedOptimizer", "Muon", "orthogonalize"]
