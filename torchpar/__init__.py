# SPDX-License-Identifier: MIT
"""Triton operators that are full citizens of PyTorch, and parallel training on them.

Importing this package registers ``torch.ops.torchpar.*``. Triton is imported on the first call that
needs a kernel, so ``import torchpar`` is cheap and works where Triton is not installed.
"""

from torchpar import nn
from torchpar.ops import linear_sigmoid, matmul_t, maximum, symmetric_matmul

__version__ = "0.1.0"
__all__ = ["linear_sigmoid", "matmul_t", "maximum", "nn", "symmetric_matmul"]
