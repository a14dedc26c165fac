# SPDX-License-Identifier: MIT
"""Loops of `torchpar.baselines.pure_python` on arrays, compiled by Numba.

Products have faster forms, too: blocked, in registers, and triangular. Each function is compiled
twice. `SERIAL` runs in one thread. In `PARALLEL` the iterations of each ``prange`` are divided over
several threads. The option ``fastmath`` allows sums to be reordered, as in every BLAS. Without
``fastmath`` the processor adds one number at a time.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

try:
    from numba import njit, prange
except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
        f"these loops need Numba ({e}); pip install numba", name="numba"
    ) from e

from torchpar.baselines.numpy_mlp import Array

FASTMATH = {"reassoc", "contract"}
TILE = 4  # rows and columns of a tile; its 16 sums stay in registers
BLOCK = 64  # rows that stay in the second-level cache, 256 KB at k = 1000, while other rows pass


def maximum(a: Array, b: Array) -> Array:
    """Return the elementwise maximum of two matrices of one shape, without NaN."""
    result = np.empty_like(a)
    for i in prange(a.shape[0]):
        for j in range(a.shape[1]):
            result[i, j] = a[i, j] if a[i, j] > b[i, j] else b[i, j]
    return result


def matmul(a: Array, b: Array) -> Array:
    """Return ``a·bᵀ``, ``a (m, k)``, ``b (n, k)`` → ``(m, n)``, by three loops.

    Each multiply-add loads two numbers.
    """
    result = np.empty((len(a), len(b)), a.dtype)
    for i in prange(len(a)):
        for j in range(len(b)):
            total = a.dtype.type(0)
            for p in range(a.shape[1]):
                total += a[i, p] * b[j, p]
            result[i, j] = total
    return result


def matmul_blocked(a: Array, b: Array) -> Array:
    """Return ``a·bᵀ`` as `matmul`, ``BLOCK`` rows of ``b`` at a time.

    These rows stay in the second-level cache while all rows of ``a`` pass by. Each multiply-add
    still loads two numbers, but from a nearer cache.
    """
    m, n = len(a), len(b)
    result = np.empty((m, n), a.dtype)
    for block in prange((n + BLOCK - 1) // BLOCK):
        for i in range(m):
            for j in range(block * BLOCK, min(n, (block + 1) * BLOCK)):
                total = a.dtype.type(0)
                for p in range(a.shape[1]):
                    total += a[i, p] * b[j, p]
                result[i, j] = total
    return result


def matmul_in_registers(a: Array, b: Array) -> Array:
    """Return ``a·bᵀ`` as `matmul_blocked`, in tiles whose ``TILE`` × ``TILE`` sums are registers.

    In a tile of t × t sums, 2t loads serve t² multiply-adds.
    """
    m, n = len(a), len(b)
    result = np.empty((m, n), a.dtype)
    for block in prange((n + BLOCK - 1) // BLOCK):
        for i in range(0, m, TILE):
            for j in range(block * BLOCK, min(n, (block + 1) * BLOCK), TILE):
                fill_tile(a, b, i, j, result)
    return result


def matmul_t(x: Array) -> Array:
    """Return ``x·xᵀ``, ``(n, k) → (n, n)``, by three loops, as `matmul`."""
    result = np.empty((len(x), len(x)), x.dtype)
    for i in prange(len(x)):
        for j in range(len(x)):
            total = x.dtype.type(0)
            for p in range(x.shape[1]):
                total += x[i, p] * x[j, p]
            result[i, j] = total
    return result


def matmul_t_triangular(x: Array) -> Array:
    """Return ``x·xᵀ``, ``(n, k) → (n, n)``: tiles on and below the diagonal, and mirror images."""
    n = len(x)
    result = np.empty((n, n), x.dtype)
    for block in prange((n + BLOCK - 1) // BLOCK):
        for i in range(block * BLOCK, n, TILE):
            for j in range(block * BLOCK, min(i + 1, (block + 1) * BLOCK), TILE):
                fill_tile(x, x, i, j, result)
                for p in range(i, min(n, i + TILE)):
                    for q in range(j, min(n, j + TILE)):
                        result[q, p] = result[p, q]
    return result


@njit(fastmath=FASTMATH)
def fill_tile(a: Array, b: Array, i: int, j: int, result: Array) -> None:
    """Compute ``a·bᵀ`` in ``result[i : i + TILE, j : j + TILE]``."""
    m, n, k = len(a), len(b), a.shape[1]
    zero = a.dtype.type(0)
    if m - i < TILE or n - j < TILE:  # a smaller tile at an edge
        for r in range(i, min(m, i + TILE)):
            for c in range(j, min(n, j + TILE)):
                total = zero
                for p in range(k):
                    total += a[r, p] * b[c, p]
                result[r, c] = total
        return
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = zero
    s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = zero
    for p in range(k):
        a0, a1, a2, a3 = a[i, p], a[i + 1, p], a[i + 2, p], a[i + 3, p]
        b0, b1, b2, b3 = b[j, p], b[j + 1, p], b[j + 2, p], b[j + 3, p]
        s00, s01, s02, s03 = s00 + a0 * b0, s01 + a0 * b1, s02 + a0 * b2, s03 + a0 * b3
        s10, s11, s12, s13 = s10 + a1 * b0, s11 + a1 * b1, s12 + a1 * b2, s13 + a1 * b3
        s20, s21, s22, s23 = s20 + a2 * b0, s21 + a2 * b1, s22 + a2 * b2, s23 + a2 * b3
        s30, s31, s32, s33 = s30 + a3 * b0, s31 + a3 * b1, s32 + a3 * b2, s33 + a3 * b3
    result[i, j], result[i, j + 1], result[i, j + 2], result[i, j + 3] = s00, s01, s02, s03
    result[i + 1, j], result[i + 1, j + 1], result[i + 1, j + 2], result[i + 1, j + 3] = (
        s10,
        s11,
        s12,
        s13,
    )
    result[i + 2, j], result[i + 2, j + 1], result[i + 2, j + 2], result[i + 2, j + 3] = (
        s20,
        s21,
        s22,
        s23,
    )
    result[i + 3, j], result[i + 3, j + 1], result[i + 3, j + 2], result[i + 3, j + 3] = (
        s30,
        s31,
        s32,
        s33,
    )


def linear_sigmoid(x: Array, weight: Array, bias: Array) -> Array:
    """Return ``sigmoid(x·weightᵀ + bias)``.

    ``x (m, in)``, ``weight (out, in)``, ``bias (out)`` → ``(m, out)``.
    """
    result = np.empty((len(x), len(weight)), x.dtype)
    for i in prange(len(x)):
        for j in range(len(weight)):
            z = bias[j]
            for m in range(x.shape[1]):
                z += x[i, m] * weight[j, m]
            result[i, j] = sigmoid(z)
    return result


@njit
def sigmoid(z: float) -> float:
    """Return ``1/(1 + e⁻ᶻ)``. An infinite power gives 0; compiled code raises no error for it."""
    result: float = 1 / (1 + np.exp(-z))
    return result


# Layers of a network, for a batch: x (b, in), weight (in, out), bias (out).


def layer(x: Array, weight: Array, bias: Array, hidden: bool) -> Array:
    """Return ``x·weight + bias``, or if the layer is hidden, the sigmoid of this sum."""
    result = np.empty((len(x), len(bias)), x.dtype)
    for s in prange(len(x)):
        for j in range(len(bias)):  # an assignment of arrays takes Numba seconds to compile
            result[s, j] = bias[j]
        for i in range(len(weight)):
            for j in range(len(bias)):
                result[s, j] += x[s, i] * weight[i, j]
        if hidden:
            for j in range(len(bias)):
                result[s, j] = sigmoid(result[s, j])
    return result


@njit(fastmath=FASTMATH)
def cross_entropy(z: Array, labels: Array) -> float:
    """Return the loss summed over samples, and replace ``z (b, classes)`` by the gradient.

    The gradient is the softmax of ``z`` minus the one-hot label.
    """
    loss = 0.0
    for s in range(len(z)):
        largest = z[s, 0]
        for j in range(1, z.shape[1]):
            largest = max(largest, z[s, j])
        loss += largest - z[s, labels[s]]
        total = z.dtype.type(0)
        for j in range(z.shape[1]):
            z[s, j] = np.exp(z[s, j] - largest)
            total += z[s, j]
        loss += np.log(total)
        for j in range(z.shape[1]):
            z[s, j] /= total
        z[s, labels[s]] -= 1
    return loss


def parameter_gradients(x: Array, delta: Array) -> tuple[Array, Array]:
    """Return ``xᵀ·delta`` and the sum of ``delta (b, out)`` over samples."""
    d_weight = np.zeros((x.shape[1], delta.shape[1]), x.dtype)
    for i in prange(len(d_weight)):
        for s in range(len(x)):
            for j in range(delta.shape[1]):
                d_weight[i, j] += x[s, i] * delta[s, j]
    d_bias = np.zeros(delta.shape[1], x.dtype)
    for s in range(len(delta)):
        for j in range(len(d_bias)):
            d_bias[j] += delta[s, j]
    return d_weight, d_bias


def sigmoid_input_gradient(delta: Array, weight: Array, y: Array) -> Array:
    """Return ``delta·weightᵀ ⊙ y ⊙ (1 − y)`` for a layer whose input ``y (b, in)`` is a sigmoid."""
    result = np.empty_like(y)
    for s in prange(len(y)):
        for i in range(y.shape[1]):
            total = y.dtype.type(0)
            for j in range(delta.shape[1]):
                total += weight[i, j] * delta[s, j]
            result[s, i] = total * y[s, i] * (1 - y[s, i])
    return result


LOOPS = (
    *(
        maximum,
        matmul,
        matmul_blocked,
        matmul_in_registers,
        matmul_t,
        matmul_t_triangular,
        linear_sigmoid,
    ),
    *(layer, parameter_gradients, sigmoid_input_gradient),
)


def _compiled(parallel: bool) -> SimpleNamespace:
    """Return all loops; each is compiled when it is first called."""
    # Only prange runs in threads. NumPy's calls here are on few numbers, too few for threads.
    implicit = (
        "comprehension",
        "reduction",
        "inplace_binop",
        "setitem",
        "numpy",
        "stencil",
        "fusion",
    )
    options: Any = {"prange": True, **dict.fromkeys(implicit, False)} if parallel else False
    compiler = njit(fastmath=FASTMATH, parallel=options)
    return SimpleNamespace(**{loop.__name__: compiler(loop) for loop in LOOPS})


SERIAL, PARALLEL = _compiled(parallel=False), _compiled(parallel=True)


def gradients(
    loops: SimpleNamespace,
    weights: Sequence[Array],
    biases: Sequence[Array],
    x: Array,
    labels: Array,
) -> tuple[float, list[Array], list[Array]]:
    """Compute `torchpar.baselines.pure_python.gradients` by layers instead of by samples.

    Args:
        loops: `SERIAL` or `PARALLEL`.
    """
    inputs = [x]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        inputs.append(loops.layer(inputs[-1], weight, bias, True))
    delta = loops.layer(inputs[-1], weights[-1], biases[-1], False)
    loss = cross_entropy(delta, labels)
    layer_gradients = []
    for i in reversed(range(len(weights))):
        layer_gradients.append(loops.parameter_gradients(inputs[i], delta))
        if i > 0:
            delta = loops.sigmoid_input_gradient(delta, weights[i], inputs[i])
    d_weights, d_biases = zip(*reversed(layer_gradients), strict=True)
    return loss, list(d_weights), list(d_biases)
