# SPDX-License-Identifier: MIT
"""Operators and backpropagation as loops over lists.

Nothing is vectorized, and every number is an object. A matrix is a list of rows. Integers stay
integers, so their results are exact.
"""

import math
from collections.abc import Sequence
from typing import Any

Vector = list[float]
Matrix = list[Vector]


def maximum(a: Matrix, b: Matrix) -> Matrix:
    """Return the elementwise maximum of two matrices of one shape, without NaN."""
    return [
        [x if x > y else y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)
    ]


def matmul(a: Matrix, b: Matrix, rows: int | None = None) -> Matrix:
    """Return ``a·bᵀ``, ``a (m, k)``, ``b (n, k)`` → ``(m, n)``, by three loops.

    Args:
        rows: number of rows of the result to compute; all by default.
    """
    result = []
    for left in a[:rows]:
        row = []
        for right in b:
            total: float = 0
            for p, q in zip(left, right, strict=True):
                total += p * q
            row.append(total)
        result.append(row)
    return result


def matmul_t(x: Matrix, rows: int | None = None) -> Matrix:
    """Return ``x·xᵀ``, ``(n, k) → (n, n)``; ``rows`` as for `matmul`."""
    return matmul(x, x, rows)


def linear_sigmoid(x: Matrix, weight: Matrix, bias: Vector) -> Matrix:
    """Return ``sigmoid(x·weightᵀ + bias)``.

    ``x (m, in)``, ``weight (out, in)``, ``bias (out)`` → ``(m, out)``.
    """
    result = []
    for sample in x:
        row = []
        for weights, z in zip(weight, bias, strict=True):
            for a, w in zip(sample, weights, strict=True):
                z += a * w
            row.append(sigmoid(z))
        result.append(row)
    return result


def sigmoid(z: float) -> float:
    """Return ``1/(1 + e⁻ᶻ)``, computed so that no power overflows."""
    if z >= 0:
        return 1 / (1 + math.exp(-z))
    power = math.exp(z)
    return power / (1 + power)


def sigmoid_prime(a: float) -> float:
    """Return the sigmoid's derivative ``σ'(z) = a·(1 − a)``, from ``a = σ(z)``."""
    return a * (1 - a)


def add_elementwise(a: list[Any], b: list[Any]) -> list[Any]:
    """Return the sums of the elements of two lists, of numbers or NumPy arrays."""
    return [x + y for x, y in zip(a, b, strict=True)]


def gradients(  # noqa: C901  # the loops are the subject
    weights: list[Matrix], biases: list[Vector], x: Matrix, labels: Sequence[int]
) -> tuple[float, list[Matrix], list[Vector]]:
    """Return the cross-entropy of an MLP with sigmoid layers, and gradients, summed over a batch.

    `torchpar.baselines.numpy_mlp` derives the formulas. Here they are applied sample by sample.

    Args:
        weights: for layer i, ``(size_i, size_i+1)``.
        biases: for layer i, ``(size_i+1)``.
        x: ``(b, size_0)``.
        labels: ``(b)``.
    """
    loss = 0.0
    d_weights = [[[0.0] * len(row) for row in weight] for weight in weights]
    d_biases = [[0.0] * len(bias) for bias in biases]
    for sample, label in zip(x, labels, strict=True):
        activations = [sample]
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True), 1):
            z = list(bias)
            for a, row in zip(activations[-1], weight, strict=True):
                for j, w in enumerate(row):
                    z[j] += a * w
            activations.append(z if layer == len(weights) else [sigmoid(t) for t in z])

        logits = activations.pop()
        largest = max(logits)
        powers = [math.exp(t - largest) for t in logits]
        total = sum(powers)
        loss += math.log(total) + largest - logits[label]
        delta = [power / total for power in powers]
        delta[label] -= 1

        for layer in reversed(range(len(weights))):
            d_biases[layer] = add_elementwise(d_biases[layer], delta)
            for a, d_row in zip(activations[layer], d_weights[layer], strict=True):
                for j, d in enumerate(delta):
                    d_row[j] += a * d
            if layer > 0:
                back = []
                for a, row in zip(activations[layer], weights[layer], strict=True):
                    total = 0.0
                    for w, d in zip(row, delta, strict=True):
                        total += w * d
                    back.append(total * sigmoid_prime(a))
                delta = back
    return loss, d_weights, d_biases
