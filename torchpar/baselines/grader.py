# SPDX-License-Identifier: MIT
"""A student's own file: which functions each command takes from it."""

from collections.abc import Iterable
from types import ModuleType

# The functions that the ladder takes: the operator of each, and the row that it is compared with.
OPERATORS = {
    "max_cpu": ("maximum", "pure Python"),
    "max_numba": ("maximum", "njit"),
    "max_gpu": ("maximum", "torchpar GPU, with copies"),
    "matmul_transpose_trivial": ("matmul_t", "pure Python"),
    "matmul_transpose_numba": ("matmul_t", "njit"),
    "matmul_transpose_gpu": ("matmul_t", "torchpar GPU, with copies"),
    "maximum": ("maximum", "torchpar CPU"),
    "matmul_t": ("matmul_t", "torchpar CPU"),
    "matmul": ("matmul", "torch eager"),
    "linear_sigmoid": ("linear_sigmoid", "torchpar CPU"),
}


def own_of(module: ModuleType, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that a module has as functions of its own."""
    functions = ((name, getattr(module, name, None)) for name in names)
    own = module.__name__
    return [name for name, one in functions if getattr(one, "__module__", None) == own]
