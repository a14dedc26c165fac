# SPDX-License-Identifier: MIT
"""Programs around kernels: unwritten memory, threads, and descriptors of the host."""

import threading
from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from faults import scratch_memory
from test_core import in_python
from triton.tools.tensor_descriptor import TensorDescriptor

from nogpu import emulate


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
        # Compiled before: Python 3.11 may fail where threads parse at the same time, see
        # https://github.com/python/cpython/issues/106905.
        launch(-1)
        threads = [threading.Thread(target=launch, args=(n,)) for n in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert wrong == []
    assert gpu.faults == []
    assert len(gpu.launches) == 15


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
def load_box_kernel(x, out, row, BM: tl.constexpr, BN: tl.constexpr):
    tl.store(out + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN), x.load([row, 0]))


@triton.jit
def load_own_box_kernel(x, out, rows, stride, BM: tl.constexpr, BN: tl.constexpr):
    box = tl.make_tensor_descriptor(x, [rows, BN], [stride, 1], [BM, BN], "nan")
    tl.store(out + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN), box.load([0, 0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_boxes_of_descriptors_may_have_nan_outside_of_the_tensor(dtype):
    x = torch.randn(24, 16).to(dtype)
    by_host, by_device = torch.empty(2, 16, 16, dtype=dtype)
    triton.set_allocator(scratch_memory)
    with emulate() as gpu:
        box = TensorDescriptor.from_tensor(x, [16, 16], padding="nan")
        load_box_kernel[(1,)](box, by_host, 16, 16, 16)
        load_own_box_kernel[(1,)](x, by_device, 8, 16, 16, 16)
    assert gpu.faults == []
    assert torch.equal(by_host[:8], x[16:])
    assert torch.equal(by_device[:8], x[:8])
    assert by_host[8:].isnan().all()
    assert by_device[8:].isnan().all()


@pytest.mark.skipif(
    "round_f32_to_tf32" not in TensorDescriptor.__annotations__, reason="Triton rounds no boxes"
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_boxes_of_descriptors_are_rounded_to_tf32(arch):
    """To 10 bits of the mantissa; a number in the middle becomes the even one."""
    x = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, -1 - 3 * 2**-12, torch.inf]).repeat(16, 4)
    out = torch.empty_like(x)
    with emulate(arch) as gpu:
        box = TensorDescriptor.from_tensor(x, [16, 16], round_f32_to_tf32=True)
        load_box_kernel[(1,)](box, out, 0, 16, 16)
    assert gpu.faults == []
    assert out[0, :4].tolist() == [1, 1 + 2**-9, -1 - 2**-10, torch.inf]
    assert torch.equal(out, out[:1, :4].repeat(16, 4))


@pytest.mark.parametrize(
    "shape, strides, reason",
    [
        ([16, 16], [-16, 1], r"x has strides \[-16, 1\], expected from 0 to 274,877,906,940"),
        ([16, 16], [2**66, 1], "x has strides"),
        ([2**32, 16], [16, 1], r"x has shape \[4294967296, 16\], expected sizes from 1 to"),
    ],
)
def test_a_descriptor_that_no_tensormap_holds_is_refused(shape, strides, reason):
    box = TensorDescriptor(torch.zeros(16, 16), shape, strides, [16, 16])
    with emulate(), pytest.raises(ValueError, match=reason):
        load_box_kernel[(1,)](box, torch.zeros(16, 16), 0, 16, 16)


def test_a_box_that_tma_cannot_copy_is_a_fault():
    x, out = torch.zeros(16, 16), torch.zeros(16, 16)
    with emulate() as gpu:
        load_own_box_kernel[(1,)](x, out, 16, -16, 16, 16)
        load_box_kernel[(1,)](TensorDescriptor.from_tensor(x, [16, 2]), out, 0, 16, 2)
    negative, narrow = gpu.faults
    assert "the descriptor of x (float32 [16, 16]), made at test_host.py:" in negative.message
    assert negative.message.endswith("has a stride of -64 bytes, expected 0 to 2⁴⁰ - 16")
    assert narrow.message == "a row of the box has 8 bytes, expected a multiple of 16"


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
