# SPDX-License-Identifier: MIT
"""The operands of the rungs, and the checks of their results."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.compare import Work
from benchmarks.timing import Rejected
from torchpar.baselines import numpy_mlp
from torchpar.baselines.numpy_mlp import Array


@dataclass(frozen=True)
class Operands:
    """The arguments of an operator, and its result in float64 (or whole numbers).

    Attributes:
        bound: how far off each number of the result may be.
        cold: whether calls find the arguments in memory, or in a cache as a training step does.
    """

    name: str
    label: str
    arguments: tuple[Array, ...]
    expected: Array
    bound: Array
    work: Work
    cold: bool = True

    def check(self, result: Array, rows: slice = slice(None)) -> None:
        """Raise if ``result`` is not that of these rows."""
        expected = self.expected[rows]
        if result.shape != expected.shape:
            raise Rejected(f"the result has shape {result.shape}, expected {expected.shape}")
        wrong = ~(np.abs(result - expected) <= self.bound[rows])
        if wrong.any():
            raise Rejected(f"{wrong.sum()} numbers are off by more than rounding")


def operands(name: str, shape: Sequence[int]) -> Operands:
    """The operands of "maximum" or "matmul_t" ``(n, n)``, or of "linear_sigmoid" ``(m, in, out)``.

    A sum of k products in float32, in whatever order, is off by at most γ(k)·Σ|a·b| with γ(k) = ku/(1 − ku)
    and u = 2⁻²⁴ (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). The sigmoid's
    slope is at most 1/4; 8u allow for its own few roundings.
    """
    random = np.random.default_rng(0)
    if name == "maximum":
        a, b = random.integers(0, 256, (2, *shape), dtype=np.int32)
        label = f"maximum of {shape[0]}×{shape[1]} int32"
        expected = np.where(a > b, a, b)
        return Operands(name, label, (a, b), expected, 0 * expected, Work(3 * a.nbytes, a.size))
    if name == "matmul_t":
        n, k = shape
        x = random.standard_normal((n, k), dtype=np.float32)
        exact = x.astype(np.float64)
        work = Work(4 * (n * k + n * n), n * (n + 1) * k)
        bound = gamma(k) * np.abs(exact) @ np.abs(exact).T
        return Operands(name, f"X·Xᵀ of {n}×{k} float32", (x,), exact @ exact.T, bound, work)
    m, k, n = shape
    x = random.random((m, k), dtype=np.float32)
    weight = random.standard_normal((n, k), dtype=np.float32) / np.float32(np.sqrt(k))
    bias = random.standard_normal(n, dtype=np.float32)
    exact, weight64, bias64 = (t.astype(np.float64) for t in (x, weight, bias))
    z = exact @ weight64.T + bias64
    bound = gamma(k + 1) * (np.abs(exact) @ np.abs(weight64).T + np.abs(bias64)) / 4 + 8 * 2.0**-24
    label = f"linear+sigmoid of {m}×{k}→{n} float32"
    work = Work(4 * (m * k + n * k + n + m * n), 2 * m * n * k)
    return Operands(name, label, (x, weight, bias), numpy_mlp.sigmoid(z), bound, work, cold=False)


def gamma(k: int) -> float:
    """The largest relative error of k roundings in float32."""
    u = 2.0**-24
    return k * u / (1 - k * u)
