# SPDX-License-Identifier: MIT
"""A conformance kit for optimizers: many situations, each compared with whole matrices on one process.

The public names load their modules, which import much of PyTorch, on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchpar.testing.optimizers import Conformance, Row, check_optimizer
    from torchpar.testing.situations import SITUATIONS

__all__ = ["SITUATIONS", "Conformance", "Row", "check_optimizer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'torchpar.testing' has no attribute {name!r}")
    module = "situations" if name == "SITUATIONS" else "optimizers"
    return getattr(importlib.import_module(f"torchpar.testing.{module}"), name)
