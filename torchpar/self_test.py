# SPDX-License-Identifier: MIT
"""One call of each operator beside float64, for the doctor."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import torchpar
from torchpar.ops.matrix import fp32_precision

A, B, WEIGHT = (400, 80), (400, 80), (72, 80)  # several blocks on a CPU


class SelfTest(NamedTuple):
    """An operator's call, its formula, and the shapes of the operands."""

    operator: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    shapes: tuple[tuple[int, int], ...]


# A lambda looks its operator up when it is called, so that a test can put a wrong one in its place.
TESTS = {
    "maximum": SelfTest(lambda a, b: torchpar.maximum(a, b), torch.maximum, (A, B)),
    "matmul_t": SelfTest(lambda x: torchpar.matmul_t(x), lambda x: x @ x.T, (A,)),
    "symmetric_matmul": SelfTest(lambda x: torchpar.symmetric_matmul(x, x), lambda x: x @ x.T, (A,)),
    "linear_sigmoid": SelfTest(
        lambda x, w: torchpar.linear_sigmoid(x, w), lambda x, w: torch.sigmoid(x @ w.T), (A, WEIGHT)
    ),
    "exact_matmul": SelfTest(lambda a, b: torchpar.exact_matmul(a, b), lambda a, b: a @ b.T, (A, B)),
}


def run(test: SelfTest, device: str) -> tuple[Tensor, Tensor]:
    """Return the error of each number of the result, measured with float64, and its bound."""
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(shape, generator=generator) for shape in test.shapes]
    actual = test.operator(*(t.to(device) for t in operands)).cpu().double()
    expected = test.formula(*(t.double() for t in operands))
    bound = torch.zeros_like(expected)
    if test.formula is not torch.maximum:
        # |x̂·ŷ − x·y| ≤ (k + 2)·u·|x|·|y| (Higham, "Accuracy and Stability", 3.1), where |σ'| ≤ 1/4.
        magnitudes = operands[0].abs().double() @ operands[-1].abs().double().T
        bound = (A[1] + 2) * _rounding(device) * magnitudes + 2.0**-22
    return (actual - expected).abs(), bound


def _rounding(device: str) -> float:
    """The unit roundoff u of the factors of a product."""
    return 2.0**-24 if device == "cpu" or fp32_precision() == "ieee" else 2.0**-11
