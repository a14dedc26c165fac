# SPDX-License-Identifier: MIT
"""Triton operators that work with all of PyTorch, and parallel training on them.

Importing this package registers ``torch.ops.torchpar.*``. Triton is imported on the first call that
needs a kernel, and `torchpar.optim`, `torchpar.parallel` and others on first use: so
``import torchpar`` is cheap, and works where Triton is not installed. Where PyTorch is not
installed, `torchpar.baselines` and `torchpar.data.files` still work.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torchpar.optional import needs_torch

if find_spec("torch"):
    from torchpar import library, nn
    from torchpar.library import player
    from torchpar.ops import (
        exact_matmul,
        exact_matmul_t,
        fp32_products,
        linear_sigmoid,
        matmul_t,
        maximum,
        symmetric_matmul,
    )

    player.start()

if TYPE_CHECKING:
    from torchpar import exact, optim, parallel, testing

__version__ = "0.6.0"
# nogpu names the lines that call torchpar, and this Muon where a CUDA graph cannot capture
# PyTorch's.
__nogpu__ = {"optimizers": {"torch.optim.Muon": "torchpar.optim.Muon"}}
__all__ = ["exact_matmul", "exact_matmul_t", "linear_sigmoid", "matmul_t", "maximum"]
__all__ += ["fp32_products"]
__all__ += ["exact", "library", "nn", "optim", "parallel", "symmetric_matmul", "testing"]


def __getattr__(name: str) -> Any:
    if name not in ("exact", "optim", "parallel", "testing") or not find_spec("torch"):
        needs_torch(__name__, __all__)(name)
    return importlib.import_module(f"torchpar.{name}")
