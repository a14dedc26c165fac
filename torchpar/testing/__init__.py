# SPDX-License-Identifier: MIT
"""Checks for optimizers and operators: many situations, each compared with what is right.

`operators` tries an operator and `optimizers` an optimizer; `rows` holds the rows of both.
`doctor` examines this machine, `explain` says who computes a product on a GPU, and `estimate` how
long a kernel takes there. The public names load their modules, which import much of PyTorch, on
first use.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchpar.testing.operators.case import Sample
    from torchpar.testing.operators.check_operator import check_operator
    from torchpar.testing.operators.table import OperatorTable
    from torchpar.testing.optimizers.check_optimizer import check_optimizer
    from torchpar.testing.optimizers.conformance import Conformance
    from torchpar.testing.optimizers.formulas import Formula
    from torchpar.testing.optimizers.situations import SITUATIONS
    from torchpar.testing.rows import Row

_MODULES = {
    "SITUATIONS": "optimizers.situations",
    "Conformance": "optimizers.conformance",
    "Formula": "optimizers.formulas",
    "OperatorTable": "operators.table",
    "Row": "rows",
    "Sample": "operators.case",
    "check_operator": "operators.check_operator",
    "check_optimizer": "optimizers.check_optimizer",
}
__all__ = [
    "SITUATIONS",
    "Conformance",
    "Formula",
    "OperatorTable",
    "Row",
    "Sample",
    "check_operator",
    "check_optimizer",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'torchpar.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"torchpar.testing.{_MODULES[name]}"), name)
