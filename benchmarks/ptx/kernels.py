# SPDX-License-Identifier: MIT
"""Triton kernels of the benchmark `ptx`, and the launch of each, whose result is checked."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.knobs import runtime

from ..timing import Rejected

NAMES = ("vector add", "softmax", "dropout", "layer norm", "matmul", "attention")


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
    """A launch, the tensor that it fills, and what is wrong with its content ("" if nothing)."""

    launch: Callable[[Tensor], Any]
    shape: tuple[int, ...]
    fault: Callable[[Tensor], str]
    dtype: torch.dtype = torch.float32


def near(expected: Tensor, error: float) -> Callable[[Tensor], str]:
    """Return a function that says how far a result is from ``expected``, if by more than that."""

    def fault(found: Tensor) -> str:
        most = float((found.double() - expected.double()).abs().max())
        return "" if most <= error else f"the greatest error is {most:.2g}, expected {error:.2g}"

    return fault


def halved(x: Tensor) -> Callable[[Tensor], str]:
    """Return a function that says whether a result is a dropout of ``x`` by one half."""

    def fault(found: Tensor) -> str:
        kept = found != 0
        share = float(kept.double().mean())
        doubled = 2 * x[kept]
        # A division on a GPU may be off by two units in the last place.
        if ((found[kept] - doubled).abs() > 2**-22 * doubled.abs()).any():
            return "an element is neither 0 nor twice the operand's"
        return "" if 0.49 < share < 0.51 else f"a share of {share:.3f} is kept, expected 0.5"

    return fault


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@cache
def cases() -> dict[str, Case]:
    x, y = normal(2**17), normal(2**17, seed=1)
    rows, weight, bias = normal(64, 1000), normal(1000, seed=2), normal(1000, seed=3)
    a, b = (normal(256, 256, dtype=torch.float16, seed=seed) for seed in (4, 5))
    q, k, v = (normal(2, 128, 64, dtype=torch.float16, seed=seed) for seed in (6, 7, 8))
    grid, scale = (2**17 // 1024,), 1 / math.sqrt(64)
    scores = (q.double() @ k.double().mT * scale).softmax(-1)
    normed = torch.nn.functional.layer_norm(rows.double(), (1000,), weight.double(), bias.double())
    half = torch.float16
    return {
        "vector add": Case(
            lambda out: add_kernel[grid](x, y, out, len(x), BLOCK=1024), x.shape, near(x + y, 0)
        ),
        "softmax": Case(
            lambda out: softmax_kernel[(64,)](rows, out, 1000, BLOCK=1024),
            rows.shape,
            near(rows.double().softmax(1), 1e-6),
        ),
        "dropout": Case(
            lambda out: dropout_kernel[grid](x, out, len(x), 0.5, 7, BLOCK=1024), x.shape, halved(x)
        ),
        "layer norm": Case(
            lambda out: layer_norm_kernel[(64,)](rows, weight, bias, out, 1000, 1e-5, BLOCK=1024),
            rows.shape,
            near(normed, 1e-5),
        ),
        "matmul": Case(
            lambda out: matmul_kernel[(4, 4)](a, b, out, 256, BM=64, BN=64, BK=64),
            (256, 256),
            near(a.double() @ b.double(), 2**-5),  # half a unit of float16 from 32 on is 2⁻⁶
            half,
        ),
        "attention": Case(
            lambda out: attention_kernel[(2, 2)](q, k, v, out, scale, 128, D=64, BM=64, BN=32),
            q.shape,
            near(scores @ v.double(), 2e-3),
            half,
        ),
    }


def seconds(name: str) -> float:
    """Launch a case once, and return the seconds it took.

    Raises:
        Rejected: the result is wrong, or the emulator has found an error.
    """
    from nogpu import emulate

    case = cases()[name]
    out = torch.zeros(case.shape, dtype=case.dtype)
    with nullcontext() if runtime.interpret else emulate("sm_90") as gpu:
        start = time.perf_counter()
        case.launch(out)
        taken = time.perf_counter() - start
    if fault := case.fault(out):
        raise Rejected(fault)
    if gpu is not None and gpu.report().errors:
        raise Rejected(str(gpu.report().errors[0]))
    return taken
