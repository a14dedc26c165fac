# SPDX-License-Identifier: MIT
"""Data sets as tensors: MNIST and its relatives, and the batches of each rank and epoch.

`torchpar.data.files` reads the files into NumPy arrays, also where PyTorch is not installed.
"""

from importlib.util import find_spec

from torchpar.optional import needs_torch

if find_spec("torch"):
    from torchpar.data.samples import Batch, Samples, batches, load

__all__ = ["Batch", "Samples", "batches", "load"]

if not find_spec("torch"):
    __getattr__ = needs_torch(__name__, __all__)
