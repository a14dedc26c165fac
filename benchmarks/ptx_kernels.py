# SPDX-License-Identifier: MIT
"""Triton kernels of the benchmark `ptx`, and a process that runs them in one of three ways.

    python -m benchmarks.ptx_kernels core | python | interpreter

It reads names of cases, runs each one once, checks the result, and writes the seconds.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WAYS = ("core", "python", "interpreter")


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < n) + tl.load(y + at, at < n), at < n)


@triton.jit
def softmax_kernel(x, out, n, BLOCK: tl.constexpr):
    row, column = tl.program_id(0) * n, tl.arange(0, BLOCK)
    values = tl.load(x + row + column, column < n, other=-float("inf"))
    powers = tl.exp(values - tl.max(values, 0))
    tl.store(out + row + column, powers / tl.sum(powers, 0), column < n)


@triton.jit
def dropout_kernel(x, out, n, p, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, at < n, other=0.0)
    tl.store(out + at, tl.where(tl.rand(seed, at) > p, values / (1 - p), 0.0), at < n)


@triton.jit
def layer_norm_kernel(x, weight, bias, out, n, eps, BLOCK: tl.constexpr):
    row, column = tl.program_id(0) * n, tl.arange(0, BLOCK)
    inside = column < n
    values = tl.load(x + row + column, inside, other=0.0)
    mean = tl.sum(values, 0) / n
    centred = tl.where(inside, values - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / n + eps)
    result = centred * scale * tl.load(weight + column, inside) + tl.load(bias + column, inside)
    tl.store(out + row + column, result, inside)


@triton.jit
def matmul_kernel(a, b, c, n, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Square matrices of n rows, a multiple of each block."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    column, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, n, BK):
        left = tl.load(a + m[:, None] * n + start + k[None, :])
        right = tl.load(b + (start + k)[:, None] * n + column[None, :])
        sums = tl.dot(left, right, sums)
    tl.store(c + m[:, None] * n + column[None, :], sums.to(tl.float16))


@triton.jit
def attention_kernel(
    q, k, v, out, scale, LENGTH, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    head, d = tl.program_id(1) * LENGTH * D, tl.arange(0, D)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    queries = tl.load(q + head + m[:, None] * D + d[None, :])
    largest = tl.full((BM,), -float("inf"), tl.float32)
    total, sums = tl.zeros((BM,), tl.float32), tl.zeros((BM, D), tl.float32)
    for start in range(0, LENGTH, BN):
        n = start + tl.arange(0, BN)
        keys = tl.load(k + head + n[None, :] * D + d[:, None])
        scores = tl.dot(queries, keys) * (scale * 1.4426950408889634)
        new = tl.maximum(largest, tl.max(scores, 1))
        powers, kept = tl.exp2(scores - new[:, None]), tl.exp2(largest - new)
        total, sums = total * kept + tl.sum(powers, 1), sums * kept[:, None]
        values = tl.load(v + head + n[:, None] * D + d[None, :])
        sums, largest = tl.dot(powers.to(tl.float16), values, sums), new
    tl.store(out + head + m[:, None] * D + d[None, :], (sums / total[:, None]).to(tl.float16))


class Case(NamedTuple):
    """A launch, and how far its result may be from ``expected``."""

    launch: Callable[[Tensor], Any]
    expected: Tensor
    error: float


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cases() -> dict[str, Case]:
    x, y = normal(2**17), normal(2**17, seed=1)
    rows, weight, bias = normal(64, 1000), normal(1000, seed=2), normal(1000, seed=3)
    a, b = (normal(256, 256, dtype=torch.float16, seed=seed) for seed in (4, 5))
    q, k, v = (normal(2, 128, 64, dtype=torch.float16, seed=seed) for seed in (6, 7, 8))
    grid, scale = (2**17 // 1024,), 1 / math.sqrt(64)
    scores = (q.double() @ k.double().mT * scale).softmax(-1)
    normed = torch.nn.functional.layer_norm(rows, (1000,), weight, bias, 1e-5)
    return {
        "vector add": Case(
            lambda out: add_kernel[grid](x, y, out, len(x), BLOCK=1024), (x + y).double(), 1e-6
        ),
        "softmax": Case(
            lambda out: softmax_kernel[(64,)](rows, out, 1000, BLOCK=1024),
            rows.double().softmax(1),
            1e-6,
        ),
        # Half of the elements are kept; which ones the generator says.
        "dropout": Case(
            lambda out: dropout_kernel[grid](x, out, len(x), 0.5, 7, BLOCK=1024), x.double(), 8.0
        ),
        "layer norm": Case(
            lambda out: layer_norm_kernel[(64,)](rows, weight, bias, out, 1000, 1e-5, BLOCK=1024),
            normed.double(),
            1e-4,
        ),
        "matmul": Case(
            lambda out: matmul_kernel[(4, 4)](a, b, out, 256, BM=64, BN=64, BK=64),
            a.double() @ b.double(),
            0.1,
        ),
        "attention": Case(
            lambda out: attention_kernel[(2, 2)](q, k, v, out, scale, 128, D=64, BM=64, BN=32),
            scores @ v.double(),
            1e-2,
        ),
    }


NAMES = ("vector add", "softmax", "dropout", "layer norm", "matmul", "attention")


def seconds(case: Case, way: str) -> float:
    """Launch once, and return the seconds it took.

    Raises:
        ValueError: the result is wrong, or the emulator has found an error.
    """
    halves = case.error >= 1e-2 and case.error < 1
    out = torch.zeros(case.expected.shape, dtype=torch.float16 if halves else torch.float32)
    context: AbstractContextManager[Any] = nullcontext()
    if way != "interpreter":
        from torchpar.ptx import emulate

        context = emulate("sm_90")
    with context as gpu:
        start = time.perf_counter()
        case.launch(out)
        taken = time.perf_counter() - start
    error = float((out.double() - case.expected).abs().max())
    if not error <= case.error:
        raise ValueError(f"the greatest error is {error:.2g}, expected at most {case.error:.2g}")
    if gpu is not None and gpu.report().errors:
        raise ValueError(str(gpu.report().errors[0]))
    return taken


def main(way: str) -> None:
    if way == "python":
        os.environ["TORCHPAR_PTX"] = "python"
    known = cases()
    for line in sys.stdin:
        try:
            print(seconds(known[line.strip()], way), flush=True)
        except ValueError as e:
            print(f"wrong: {e}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
