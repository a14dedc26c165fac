# SPDX-License-Identifier: MIT
"""Record of each operator: its contract, read by the tests, and what the benchmarks time of it."""

import torch

from .exact_matmul import EXACT_MATMUL
from .linear_sigmoid import LINEAR_SIGMOID
from .matmul_t import MATMUL_T
from .maximum import MAXIMUM
from .record import Operator, Shapes, Workload
from .symmetric_matmul import SYMMETRIC_MATMUL

OPERATORS: dict[str, Operator] = {
    op.name: op for op in (MAXIMUM, MATMUL_T, SYMMETRIC_MATMUL, LINEAR_SIGMOID, EXACT_MATMUL)
}


def workloads() -> dict[str, Workload]:
    """All workloads by name."""
    return {one.name: one for op in OPERATORS.values() for one in op.workloads}


def kernel_names() -> dict[str, set[str]]:
    """The Triton kernels of all operators, by name; some are of a backward pass."""
    own = {name: op.kernels for name, op in OPERATORS.items()}
    for op in OPERATORS.values():
        own |= op.other_kernels
    return own


def by_dtype() -> list[tuple[str, torch.dtype]]:
    return [(name, dtype) for name, op in OPERATORS.items() for dtype in op.dtypes]


def by_case() -> list[tuple[str, Shapes]]:
    return [(name, shapes) for name, op in OPERATORS.items() for shapes in op.cases]
