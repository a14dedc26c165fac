# SPDX-License-Identifier: MIT
"""Exact arithmetic: the same bits on any processor, number of threads, batch and mesh of ranks.

`dispatch` is the mode. `registry` says which ATen operators have the same bits everywhere, and
holds the rules of others: `products`, `reductions` (sums, softmax, losses, indexing, sort),
`functions` of elements, `attention` and `random`. `sums` adds exactly, and `native` checks operands
as ATen does. `within` and `loader_workers` carry the mode into PyTorch's functions and workers;
`watch` warns of arithmetic outside of it. `data_parallel` and `tensor_parallel` add over ranks, and
`verify` trains. `divergence` names the first tensor in which two trainings, exact or not, differ.
"""

from torchpar.exact.data_parallel import DataParallel
from torchpar.exact.dispatch import Coverage, coverage, mode
from torchpar.exact.divergence.recording import record
from torchpar.exact.tensor_parallel import linear

__all__ = ["Coverage", "DataParallel", "coverage", "linear", "mode", "record"]
