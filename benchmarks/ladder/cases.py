# SPDX-License-Identifier: MIT
"""The cases of the ladder: operators, their arguments, and the check of their results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from torchpar.baselines.grader import Wrong, compare
from torchpar.baselines.numpy_mlp import Array

from ..compare import Work
from ..operators import make_case as make_operator_case
from ..records import workloads
from ..records.record import Workload
from ..timing import CPU, Rejected

WARM_SECONDS = 5e-3  # of a turn whose arguments stay in the caches
TILE = 4  # as in `numba_njit`, which can be imported only where Numba is


class Ladder(NamedTuple):
    """One operator of the ladder, and the ways to compute it that are its own.

    Attributes:
        label: of a case, for a shape.
        workload: the name in `benchmarks.records`.
        shape: of maximum rows and columns; of X·Xᵀ n and k; of A·Bᵀ m, k and n; of linear+sigmoid
            rows, in_features and out_features.
        loops: Numba's: their function, and needed operations for each byte that they load into
            registers. A multiply-add is two operations and loads two numbers of 4 bytes; a tile of
            t × t sums loads 2t numbers for t² multiply-adds. Of a multiply-add of X·Xᵀ, one
            operation is needed: the result is symmetric.
        best: the loop that several threads compute beside the plain one.
        taught: the first kernels of a course, in `torchpar.baselines.triton_kernels`.
        interpreted: a shape for them in Triton's interpreter.
        ours: whether torchpar's operator is in the ladder.
        cold: whether calls find the arguments in memory, or in a cache as a training step does.
    """

    label: str
    workload: str
    shape: tuple[int, ...]
    quick: tuple[int, ...]
    loops: Mapping[str, tuple[str, float | None]]
    best: str = "njit"
    taught: Mapping[str, str] = MappingProxyType({})
    interpreted: tuple[int, ...] = ()
    ours: bool = True
    cold: bool = True

    @property
    def functions(self) -> Workload:
        return workloads()[self.workload]


LADDERS = {
    "maximum": Ladder(
        label="maximum of {}×{} int32",
        workload="maximum",
        shape=(1000, 1000),
        quick=(20, 30),
        loops={"njit": ("maximum", None)},
        taught={"Triton, a program for each row": "maximum_by_rows"},
        interpreted=(20, 30),
    ),
    "matmul_t": Ladder(
        label="X·Xᵀ of {}×{} float32",
        workload="matmul_t",
        shape=(1000, 1000),
        quick=(33, 17),
        loops={
            "njit": ("matmul_t", 1 / 8),
            "njit, blocked": ("matmul_blocked", 1 / 8),
            "njit, in registers": ("matmul_in_registers", TILE / 8),
            "njit, triangular": ("matmul_t_triangular", TILE / 4),
        },
        best="njit, triangular",
        taught={"Triton, one program in all": "matmul_t_by_one_program"},
        interpreted=(33, 17),
    ),
    "matmul": Ladder(
        label="A·Bᵀ of {}×{}×{} float32",
        workload="exact_matmul",  # whose native function is the general product
        shape=(1000, 1000, 1000),
        quick=(33, 17, 41),
        loops={
            "njit": ("matmul", 1 / 4),
            "njit, blocked": ("matmul_blocked", 1 / 4),
            "njit, in registers": ("matmul_in_registers", TILE / 4),
        },
        best="njit, in registers",
        taught={"Triton, naive": "matmul_naive", "Triton, tiled": "matmul_tiled"},
        interpreted=(70, 75, 41),
        ours=False,
    ),
    "linear_sigmoid": Ladder(
        label="linear+sigmoid of {}×{}→{} float32",
        workload="linear_sigmoid",
        shape=(64, 784, 128),
        quick=(7, 33, 5),
        loops={"njit": ("linear_sigmoid", None)},
        cold=False,
    ),
}


@dataclass(frozen=True)
class LadderCase:
    """An operator, its arguments, and its result in float64 (or whole numbers).

    Attributes:
        shape: as in `Ladder`.
        bound: how far off each number of the result may be.
        work: the least that it takes.
        cold: as in `Ladder`.
        variant: as of `make_case`.
    """

    operator: str
    shape: tuple[int, ...]
    label: str
    arguments: tuple[Array, ...]
    expected: Array
    bound: Array
    work: Work
    cold: bool
    variant: str = ""

    @property
    def size(self) -> str:
        return "×".join(map(str, self.shape))

    def check(self, result: Array, rows: slice = slice(None)) -> None:
        """Raise if ``result`` is not that of these rows, and name its first wrong number."""
        try:
            compare(result, self.expected[rows], self.bound[rows])
        except Wrong as e:
            raise Rejected(str(e)) from None


A_B = "A·B"
WIDER = {"int32": "int64", "float32": "float64"}


def make_case(operator: str, shape: Sequence[int], variant: str = "") -> LadderCase:
    """The case of an operator of `LADDERS`. Of maximum the numbers are integers from 0 to 255.

    A sum of k products in float32, in whatever order, is off by at most γ(k)·Σ|a·b| with γ(k) =
    ku/(1 − ku) and u = 2⁻²⁴ (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section
    3.1). The sigmoid's slope is at most 1/4; 8u allow for its own few roundings.

    Args:
        variant: what a student's function may take in place of the arguments: the same numbers in
            a type of `WIDER`, or `A_B`: of the product the transpose of B, so that A·B of its
            arguments is the result.
    """
    ladder, integers = LADDERS[operator], operator == "maximum"
    shapes = (shape, shape) if integers else tuple(shape)
    dtype = torch.int32 if integers else torch.float32
    case = make_operator_case(ladder.functions, shapes, dtype, CPU)
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
    label, work = ladder.label.format(*shape), case.forward
    if variant == A_B:
        arguments = arguments[0], np.ascontiguousarray(arguments[1].T)
    elif variant:
        arguments = tuple(t.astype(variant) for t in arguments)
    return LadderCase(
        operator, tuple(shape), label, arguments, expected, bound, work, ladder.cold, variant
    )
