# SPDX-License-Identifier: MIT
"""The operations that benchmarks compare: inputs, PyTorch's formula, ours, and the work that they need.

The work is what the operator needs, whoever computes it: a symmetric product is n(n + 1)k operations, so
that a contestant which computes all of it reaches half the roofline at most.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

import torchpar
from benchmarks.compare import Case, Contestant, Mode, Work

MODES: tuple[Mode, ...] = ("forward", "backward", "full")
ALPHA, BETA = 0.5, 2.0  # of symmetric_matmul


def matmul_t(x: Tensor) -> Tensor:
    return x @ x.mT


def symmetric_matmul(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return ALPHA * (a @ b.mT) + BETA * c


def linear_sigmoid(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(x, weight, bias).sigmoid()


def linear_sigmoid_backward(g: Tensor, y: Tensor) -> Tensor:
    """dL/dZ; dL/db, its sum over rows, is computed and dropped."""
    dz: Tensor = torch.ops.aten.sigmoid_backward(g, y)
    dz.sum(0)
    return dz


NATIVE: dict[str, Contestant] = {
    "maximum": torch.maximum,
    "matmul_t": matmul_t,
    "symmetric_matmul": symmetric_matmul,
    "linear_sigmoid": linear_sigmoid,
    "exact_matmul": lambda a, b: a @ b.mT,
    "exact_matmul_t": matmul_t,
}
OURS: dict[str, Contestant] = {
    "maximum": torchpar.maximum,
    "matmul_t": torchpar.matmul_t,
    "symmetric_matmul": lambda a, b, c: torchpar.symmetric_matmul(a, b, c, alpha=ALPHA, beta=BETA),
    "linear_sigmoid": torchpar.linear_sigmoid,
    "exact_matmul": torchpar.exact_matmul,
    "exact_matmul_t": torchpar.exact_matmul_t,
}
# PyTorch's and ours, of what only a backward calls.
BACKWARDS: dict[str, tuple[Contestant, Contestant]] = {
    "linear_sigmoid_backward": (
        linear_sigmoid_backward,
        lambda g, y: torch.ops.torchpar.linear_sigmoid_backward(g, y)[0],
    )
}

OPERATORS = [*NATIVE, *BACKWARDS]


def numpy_matmul_t(x: Tensor) -> Tensor:
    array = x.detach().numpy()
    return torch.from_numpy(np.dot(array, array.T))


def njit_maximum(a: Tensor, b: Tensor) -> Tensor:
    from torchpar.baselines import numba_njit

    return torch.from_numpy(numba_njit.SERIAL.maximum(a.numpy(), b.numpy()))


def normal(seed: int, dtype: torch.dtype, device: torch.device, *shapes: Sequence[int]) -> list[Tensor]:
    """Normally distributed; integers are uniform in [0, 255], or in int8 in [0, 126]."""
    generator = torch.Generator(device).manual_seed(seed)
    if dtype.is_floating_point:
        return [torch.randn(shape, dtype=dtype, device=device, generator=generator) for shape in shapes]
    end = min(256, torch.iinfo(dtype).max)  # the largest is poison
    return [torch.randint(end, shape, dtype=dtype, device=device, generator=generator) for shape in shapes]


def maximum_case(
    dtype: torch.dtype, device: torch.device, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> Case:
    a, b = math.prod(a_shape), math.prod(b_shape)
    return Case(
        "maximum",
        " ".join("x".join(map(str, shape)) for shape in (a_shape, b_shape)),
        dtype,
        device,
        lambda seed: normal(seed, dtype, device, a_shape, b_shape, a_shape),
        NATIVE["maximum"],
        forward=Work((2 * a + b) * dtype.itemsize, a),
        backward=Work((3 * a + 2 * b) * dtype.itemsize, a),
        modes=MODES if dtype.is_floating_point else MODES[:1],
    )


def exact_matmul_case(device: torch.device, m: int, k: int, n: int) -> Case:
    return Case(
        "exact_matmul",
        f"{m}x{k}->{n}",
        torch.float32,
        device,
        lambda seed: normal(seed, torch.float32, device, (m, k), (n, k), (m, n)),
        NATIVE["exact_matmul"],
        forward=Work(4 * (m * k + n * k + m * n), 2 * m * n * k),
        backward=Work(4 * (m * n + 2 * m * k + 2 * n * k), 4 * m * n * k),
    )


def matmul_t_case(dtype: torch.dtype, device: torch.device, *shape: int, operator: str = "matmul_t") -> Case:
    *batch, n, k = shape
    b = math.prod(batch)
    return Case(
        operator,
        "x".join(map(str, shape)),
        dtype,
        device,
        lambda seed: normal(seed, dtype, device, shape, (*batch, n, n)),
        NATIVE[operator],
        forward=Work(b * (n * k + n * n) * dtype.itemsize, b * n * (n + 1) * k),
        backward=Work(b * (n * n + 2 * n * k) * dtype.itemsize, b * 2 * n * n * k),
    )


def symmetric_matmul_case(dtype: torch.dtype, device: torch.device, n: int, k: int) -> Case:
    """α·A·Bᵀ + β·C with B equal to A, which the operator is not told, and a symmetric C."""

    def inputs(seed: int) -> list[Tensor]:
        a, c, gradient = normal(seed, dtype, device, (n, k), (n, n), (n, n))
        return [a, a.clone(), (c + c.mT) / 2, gradient]

    return Case(
        "symmetric_matmul",
        f"{n}x{k}",
        dtype,
        device,
        inputs,
        NATIVE["symmetric_matmul"],
        forward=Work((2 * n * k + 2 * n * n) * dtype.itemsize, n * (n + 1) * k),
        backward=Work((2 * n * n + 4 * n * k) * dtype.itemsize, 4 * n * n * k),
    )


def linear_sigmoid_case(dtype: torch.dtype, device: torch.device, m: int, k: int, n: int) -> Case:
    def inputs(seed: int) -> list[Tensor]:
        x, weight, bias, gradient = normal(seed, dtype, device, (m, k), (n, k), (n,), (m, n))
        return [x, weight / math.sqrt(k), bias, gradient]  # so scaled, the sigmoid does not saturate

    return Case(
        "linear_sigmoid",
        f"{m}x{k}->{n}",
        dtype,
        device,
        inputs,
        NATIVE["linear_sigmoid"],
        forward=Work((m * k + n * k + n + m * n) * dtype.itemsize, 2 * m * n * k),
        backward=Work((2 * m * n + 2 * m * k + 2 * n * k + n) * dtype.itemsize, 4 * m * n * k),
    )


def linear_sigmoid_backward_case(dtype: torch.dtype, device: torch.device, m: int, n: int) -> Case:
    """The first pass of the backward. Its own derivatives are not timed."""

    def inputs(seed: int) -> list[Tensor]:
        g, z, gradient = normal(seed, dtype, device, (m, n), (m, n), (m, n))
        return [g, z.sigmoid(), gradient]

    return Case(
        "linear_sigmoid_backward",
        f"{m}x{n}",
        dtype,
        device,
        inputs,
        linear_sigmoid_backward,
        forward=Work((3 * m * n + n) * dtype.itemsize, 5 * m * n),
        backward=Work(0, 0),
        modes=MODES[:1],
    )
