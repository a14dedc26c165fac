# SPDX-License-Identifier: MIT
"""The cases of the ladder: operators, their arguments, and the check of their results."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.compare import Work
from benchmarks.operators import make_case as make_operator_case
from benchmarks.records import workloads
from benchmarks.records.record import Workload
from benchmarks.timing import CPU, Rejected
from torchpar.baselines.numpy_mlp import Array

SHAPES: dict[str, tuple[int, ...]] = {
    "maximum": (1000, 1000),
    "matmul_t": (1000, 1000),  # n, k
    "matmul": (1000, 1000, 1000),  # m, k, n
    "linear_sigmoid": (64, 784, 128),  # rows, in_features, out_features
}
QUICK_SHAPES = {
    "maximum": (20, 30),
    "matmul_t": (33, 17),
    "matmul": (33, 17, 41),
    "linear_sigmoid": (7, 33, 5),
}
WARM_SECONDS = 5e-3  # of a turn whose arguments stay in the caches
LABELS = {
    "maximum": "maximum of {}×{} int32",
    "matmul_t": "X·Xᵀ of {}×{} float32",
    "matmul": "A·Bᵀ of {}×{}×{} float32",
    "linear_sigmoid": "linear+sigmoid of {}×{}→{} float32",
}


@dataclass(frozen=True)
class LadderCase:
    """An operator, its arguments, and its result in float64 (or whole numbers).

    Attributes:
        shape: as in `SHAPES`.
        bound: how far off each number of the result may be.
        work: the least that it takes.
        cold: whether calls find the arguments in memory, or in a cache as a training step does.
    """

    operator: str
    shape: tuple[int, ...]
    label: str
    arguments: tuple[Array, ...]
    expected: Array
    bound: Array
    work: Work
    cold: bool

    def check(self, result: Array, rows: slice = slice(None)) -> None:
        """Raise if ``result`` is not that of these rows, and name its first wrong number."""
        expected = self.expected[rows]
        if result.shape != expected.shape:
            raise Rejected(f"the result has shape {result.shape}, expected {expected.shape}")
        wrong = ~(np.abs(result - expected) <= self.bound[rows])
        if wrong.any():
            at = tuple(map(int, np.argwhere(wrong)[0]))
            place = ", ".join(map(str, at))
            first = f"result[{place}] is {result[at]:.7g}, expected {expected[at]:.7g}"
            raise Rejected(f"{first}; {wrong.sum():,} of {wrong.size:,} numbers are wrong")


def workload_of(operator: str) -> Workload:
    """The workload of an operator of the ladder. The general product is `exact_matmul`'s, whose
    ``ours`` is not in the ladder."""
    return workloads()["exact_matmul" if operator == "matmul" else operator]


def make_case(operator: str, shape: Sequence[int]) -> LadderCase:
    """The case of an operator of `SHAPES`. Of maximum the numbers are integers from 0 to 255.

    A sum of k products in float32, in whatever order, is off by at most γ(k)·Σ|a·b| with γ(k) =
    ku/(1 − ku) and u = 2⁻²⁴ (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section
    3.1). The sigmoid's slope is at most 1/4; 8u allow for its own few roundings.
    """
    integers = operator == "maximum"
    shapes = (shape, shape) if integers else tuple(shape)
    dtype = torch.int32 if integers else torch.float32
    case = make_operator_case(workload_of(operator), shapes, dtype, CPU)
    arguments = tuple(t.numpy() for t in case.inputs(0)[:-1])
    expected = case.oracle(*(torch.from_numpy(t.astype(np.float64)) for t in arguments)).numpy()
    sizes = [np.abs(t.astype(np.float64)) for t in arguments]
    bound, u = 0 * expected, 2.0**-24
    if operator == "linear_sigmoid":
        ku = (shape[1] + 1) * u  # the bias is one more term
        bound = ku / (1 - ku) * (sizes[0] @ sizes[1].T + sizes[2]) / 4 + 8 * u
    elif not integers:
        ku = shape[1] * u
        bound = ku / (1 - ku) * sizes[0] @ sizes[-1].T
    label, cold = LABELS[operator].format(*shape), operator != "linear_sigmoid"
    return LadderCase(operator, tuple(shape), label, arguments, expected, bound, case.forward, cold)
