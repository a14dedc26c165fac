# SPDX-License-Identifier: MIT
"""Functions of Triton that are not inlined: they return numbers and tensors, and call others."""

import pytest
import torch
import triton
import triton.language as tl

from nogpu import emulate

pytestmark = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8),
    reason="Triton 3.6 returns no tensors from functions",
)


@triton.jit(noinline=True)
def twice(p, N: tl.constexpr):
    return 2 * tl.load(p + tl.arange(0, N))


@triton.jit(noinline=True)
def several(p, N: tl.constexpr):
    x = tl.load(p + tl.arange(0, N))
    return x, twice(p, N) + tl.sum(x.to(tl.float32)), 3


@triton.jit(noinline=True)
def scaled(p, factor, N: tl.constexpr):
    return tl.load(p + tl.arange(0, N)) * factor


@triton.jit
def calls(x, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b, c = several(x, N)
    for factor in range(n):  # the same function at two places, one of them in a loop
        a += scaled(x, factor, N)
    tl.store(out + i, a + b * c)
    tl.store(out + N + i, scaled(x, n, N), mask=i < n)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    "size, warps, dtype",
    [(128, 1, torch.float32), (128, 4, torch.float32), (64, 1, torch.float16), (32, 1, torch.half)],
)
def test_what_a_function_returns_has_its_values(arch, size, warps, dtype):
    x, out = torch.randint(-4, 5, (size,)).to(dtype), torch.zeros(2 * size)
    with emulate(arch) as gpu:
        calls[(1,)](x, out, 3, size, num_warps=warps)
    x = x.float()
    assert torch.equal(out[:size], x + (0 + 1 + 2) * x + 3 * (2 * x + x.sum()))
    assert torch.equal(out[size:], torch.where(torch.arange(size) < 3, 3 * x, 0))
    assert gpu.faults == []


@triton.jit(noinline=True)
def one_too_many(p, N: tl.constexpr):
    return tl.load(p + 1 + tl.arange(0, N))


@triton.jit
def wrong(x, out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), one_too_many(x, N))


def test_a_fault_within_a_function_is_named():
    with emulate() as gpu:
        wrong[(1,)](torch.ones(128), torch.empty(128), 128, num_warps=1)
    (fault,) = gpu.faults
    assert fault.name == "out of bounds"
    assert "element 128" in fault.message
