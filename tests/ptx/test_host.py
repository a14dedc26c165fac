# SPDX-License-Identifier: MIT
"""Programs around kernels: unwritten memory, threads, and descriptors of the host."""

import threading
from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ptx.test_core import in_python
from torchpar.ptx import emulate


@triton.jit
def copy_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n), i < n)


@pytest.mark.parametrize(
    "write, missing",
    [
        (lambda x: x[:3].fill_(1), 3),
        (lambda x: x[::2].copy_(torch.ones(50)), 1),
        (lambda x: x.view(10, 10)[:, 0].zero_(), 1),
        (lambda x: x.split(50)[1].fill_(1), 0),
        (lambda x: x.numpy().fill(-1), None),
        (lambda x: x.fill_(-1), None),
    ],
)
def test_a_part_that_nobody_has_written_is_found(write, missing):
    """And no content is taken for unwritten memory."""
    for dtype in (torch.int32, torch.float16, torch.int8):
        with emulate() as gpu:
            x = torch.empty(100, dtype=dtype)
            write(x)
            copy_kernel[(1,)](x, torch.empty(100, dtype=dtype), 100, BLOCK=128)
        if missing is None:
            assert gpu.faults == []
        else:
            (fault,) = gpu.faults
            assert (fault.name, f"x[{missing}] was not written" in fault.message) == (
                "uninitialised memory",
                True,
            )


def test_threads_may_launch_at_the_same_time():
    wrong = []

    def launch(number: int) -> None:
        for _ in range(3):
            x, out = torch.randn(5000), torch.zeros(5000)
            copy_kernel[(20,)](x, out, 5000, BLOCK=256)
            if not torch.equal(x, out):
                wrong.append(number)

    with emulate("sm_90", schedules="all") as gpu:
        threads = [threading.Thread(target=launch, args=(n,)) for n in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert wrong == []
    assert gpu.faults == []
    assert len(gpu.launches) == 12


@triton.jit
def copy_box_kernel(x, out):
    out.store([0, 0], x.load([0, 0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int16])
@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_100", marks=pytest.mark.slow)])
def test_descriptors_of_the_host_have_each_type(arch, dtype):
    x = torch.randn(32, 32).mul(100).to(dtype)
    out = torch.zeros_like(x)
    with emulate(arch) as gpu:
        one, other = (TensorDescriptor.from_tensor(t, [32, 16]) for t in (x, out))
        copy_box_kernel[(1,)](one, other)
    assert gpu.faults == []
    assert torch.equal(out[:, :16], x[:, :16])


@triton.jit
def matmul_of_constants_kernel(
    a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK):
        left = tl.load(a + m[:, None] * K + start + k[None, :])
        right = tl.load(b + (start + k)[:, None] * N + n[None, :])
        sums = tl.dot(left, right, sums)
    tl.store(out + m[:, None] * N + n[None, :], sums)


@pytest.mark.parametrize("m, n, k", [(128, 32, 64), (64, 32, 64), (128, 16, 64)])
def test_sums_that_are_copied_behind_the_fence_are_right(m, n, k):
    """LLVM moves zeros into the registers of the sums between wgmma.fence and wgmma."""
    a, b = (torch.randn(shape).half() for shape in ((m, k), (k, n)))
    for is_slow in (False, True):
        out = torch.empty(m, n)
        with emulate("sm_90") as gpu, in_python() if is_slow else nullcontext():
            matmul_of_constants_kernel[(1,)](a, b, out, m, n, k, 32, num_warps=8)
        assert gpu.faults == []
        assert (out - a.float() @ b.float()).abs().max() < 1e-3


def test_a_zero_without_memory_is_no_tensor_that_is_written():
    with emulate():
        held = torch.empty(3)
        assert torch.equal(torch._efficientzerotensor((3,)) * 2, torch.zeros(3))
        assert held.shape == (3,)
